"""The options that several commands share, and what those do alike that write."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from gralora_convert.cli.terminal import (
    EXIT_REFUSED,
    Choice,
    Line,
    bar,
    is_quiet,
    quiet_option,
    show,
    show_json,
    show_notes,
)
from gralora_convert.errors import MisuseError, printable

if TYPE_CHECKING:
    from gralora_convert.delta import Kind
    from gralora_convert.output import Plan


def _gathered(
    name: str,
    into: type[object],
    *options: Callable[[Callable[..., int]], Callable[..., int]],
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Several options as one decorator, in the order in which the help shows them; the command
    gets their values as one `into`, the argument `name`. Those that are no field of it stay
    arguments."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def gathering(**given: object) -> int:
            value = into(
                **{field: given.pop(field) for field in into.__annotations__ if field in given}
            )
            return command(**given, **{name: value})

        return functools.reduce(lambda made, option: option(made), reversed(options), gathering)

    return decorate


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n".join(
        ["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {x}" for x in lines)]
    )


SERVERS = ("vllm", "sglang", "llama.cpp", "peft")
DTYPES = ("keep", "float32", "bfloat16", "float16")
PATH = click.Path()  # no check here: it may be a Hub id; a shell completes names of files
# `--base`, which has another default where a base is not always needed
some_base_option = functools.partial(click.option, "--base", type=PATH, metavar="MODEL")
# `--for`, an engine that serves LoRAs
server_option = functools.partial(click.option, "--for", "server", type=Choice(SERVERS))
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on stdout.  [default: off]"
)
base_option = some_base_option(
    help="Base model: folder, file or Hub id.  [default: the adapter's base_model_name_or_path]"
)
weight_option = click.option(
    "--weight", "weights", type=float, multiple=True, metavar="FLOAT",
    help="One per ADAPTER, in order.  [default: 1.0]",
)  # fmt: skip
device_option = click.option("--device", default="cpu", show_default=True, help="Where to compute.")
trust_option = click.option(
    "--trust-remote-code", is_flag=True,
    help="Let transformers run code of the model's folder.  [default: off]",
)  # fmt: skip
key_map_option = click.option(
    "--key-map", multiple=True, metavar="FROM=TO",
    help="Module FROM of the adapter is TO in the base (a whole name or a leading part).  "
    "[default: the same names]",
)  # fmt: skip
_LAYOUT = (
    click.option(
        "--fan-in-fan-out", multiple=True, metavar="PATTERN",
        help="These modules are stored (in, out), as Conv1D; for layers that nothing else tells.  "
        "[default: none]",
    ),
    click.option(
        "--linear", multiple=True, metavar="PATTERN",
        help="These are stored (out, in), as nn.Linear; * is any part of a name.  [default: none]",
    ),
)  # fmt: skip
plot_option = click.option(
    "--plot", type=PATH, metavar="FILE",
    help="Draw it, as PNG, SVG or PDF by the suffix of FILE.  [default: no picture]",
)  # fmt: skip
progress_option = click.option(
    "--progress/--no-progress", default=None, help="A bar on stderr.  [default: on a terminal]"
)


@dataclass(frozen=True, slots=True)
class Run:
    """What the three writing commands do alike: dry run, progress, the closing lines."""

    output: str
    dtype: str
    jobs: int | None
    resume: bool
    dry_run: bool
    overwrite: bool
    verify: bool
    device: str
    progress: bool | None
    as_json: bool

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of a verb."""
        return {"dtype": self.dtype, "device": self.device, "verify": self.verify}

    def carry_out(
        self,
        plan: "Plan",
        summary: Callable[[Mapping[str, object], str], Sequence[str]],
        *,
        digests: bool | None = None,
    ) -> int:
        from gralora_convert.output import Ranks

        ranks = Ranks.from_environment()
        is_speaker = ranks.is_leader
        if self.dry_run:
            plan.require_allowed(self.output, overwrite=self.overwrite)
            if is_speaker:
                self._print_plan(plan)
            return 0
        if is_speaker:
            show_notes(plan.notes)
        if self.resume and is_speaker and (left := plan.resumable_bytes(self.output)):
            show_notes([f"goes on: {left:,} bytes are there already"])
        tensors = sum(file.data_nbytes for file in plan.files)
        shown = self.progress if is_speaker else False
        with _resumable(not self.resume), bar(tensors, shown) as advance:
            receipt = plan.write(
                self.output,
                overwrite=self.overwrite,
                resume=self.resume,
                jobs=self.jobs,
                verify=self.verify,
                digests=digests,
                progress=advance,
                ranks=ranks,
            )
        if not is_speaker:
            return 0
        try:
            if self.as_json:
                show_json(receipt, as_written=True)
            else:
                show(*summary(receipt, printable(self.output)))
        except KeyboardInterrupt:  # nobody may be reading, so nothing more goes there
            place = printable(self.output)
            told = f"{place}: is complete, but telling so was interrupted."
            show(Line(told, severity="error"), err=True)
            return EXIT_REFUSED  # as for an output that cannot be told of for any other reason
        return 0

    def _print_plan(self, plan: "Plan") -> None:
        from gralora_convert.cli.summaries import plan_table

        document = plan.as_json(Path(self.output), self.jobs)
        if self.as_json:
            show_json(document)
            return
        if not is_quiet():
            show(*plan_table(plan))
        show(
            f"total {plan.nbytes:,} bytes, {document['bytes']:,} of them in {len(plan.files)} "
            f"weight file(s), {document['computed']} of {document['tensors']} tensors computed; "
            f"peak memory about {plan.peak_memory(self.jobs) / 1e6:,.0f} MB; "
            f"{document['free_disk']:,} bytes free on the disk. Nothing was written."
        )
        show_notes(plan.notes, err=False)


@contextmanager
def _resumable(is_untold: bool) -> Iterator[None]:
    """Lets an interruption name the option that keeps what is done."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if is_untold and not hasattr(interrupt, "__notes__"):
            interrupt.add_note("With --resume what is done would be kept for the next run.")
        raise


writing_options = _gathered(
    "run", Run,
    click.option("-o", "--output", type=PATH, required=True, metavar="DIR",
                 help="New folder; must not exist, or be empty, unless --overwrite."),
    click.option("--dtype", type=Choice(DTYPES), default="keep", show_default=True,
                 help="dtype of the tensors written; keep = each tensor's own."),
    click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: the CPUs]"),
    click.option("--resume", is_flag=True,
                 help="Go on from what a broken run left, and leave what is done if this one "
                 "breaks.  [default: off]"),
    click.option("--dry-run", is_flag=True,
                 help="Print the plan and write nothing.  [default: off]"),
    click.option("--overwrite", is_flag=True, help="Replace DIR, atomically.  [default: off]"),
    click.option("--verify/--no-verify", default=True, show_default=True,
                 help="Check what was written before publishing it."),
    device_option, progress_option, quiet_option, json_option,
)  # fmt: skip


class Wanted(TypedDict):
    """The shape of the adapter that is asked for."""

    to: "Kind"
    k: int | None
    r: int | None
    hybrid_r: int | None
    alpha: float | None
    max_error: float | None


shape_options = _gathered(
    "wanted", Wanted,
    click.option("--to", type=Choice(["gralora", "hybrid", "lora"]), required=True,
                 help="Kind of the result."),
    click.option("--k", type=click.IntRange(min=1),
                 help="Blocks per side.  [default: the source's, or 2]"),
    click.option("--r", type=click.IntRange(min=1),
                 help="Rank.  [default: the smallest exact; extract: 32]"),
    click.option("--hybrid-r", type=click.IntRange(min=0),
                 help="Rank of the general part.  [default: the source's, or a LoRA's rank; "
                 "extract: r / 2]"),
    click.option("--alpha", type=float,
                 help="Numerator of the scaling.  [default: keep the scaling]"),
    click.option("--max-error", type=float,
                 help="Smallest rank with this relative Frobenius error, with --for vllm, "
                 "llama.cpp or peft of each module; excludes --r.  [default: off]"),
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What is said of a base that it does not tell itself."""

    fan_in_fan_out: Sequence[str]
    linear: Sequence[str]
    trust_remote_code: bool
    key_map: Sequence[str] = ()

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of a verb. Where both layouts are said of a module, (in, out) counts."""
        others = [pattern for pattern in self.linear if pattern not in self.fan_in_fan_out]
        layouts = dict.fromkeys(self.fan_in_fan_out, True) | dict.fromkeys(others, False)
        mapped = {"key_map": _parse_key_map(self.key_map)} if self.key_map else {}
        return {"fan_in_fan_out": layouts, "trust_remote_code": self.trust_remote_code, **mapped}


layout_options = _gathered("said", Said, *_LAYOUT, trust_option)
reading_options = _gathered("said", Said, key_map_option, *_LAYOUT, trust_option)


def _parse_key_map(entries: Sequence[str]) -> dict[str, str]:
    """`FROM=TO` options as a mapping."""
    mapping = {}
    for entry in entries:
        name, equals, to = entry.partition("=")
        if not equals or not name or not to:
            raise MisuseError(
                f"--key-map {entry!r} is not FROM=TO", hint="Give two names of modules."
            )
        mapping[name] = to
    return mapping
