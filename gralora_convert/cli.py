"""The command line: parse, call one verb, print what it returns.

stdout is the result, stderr is progress and notes. Exit status: 0 done / yes, 1 the answer is no,
2 refused or misused, 70 a bug, 130 interrupted.
"""

import contextlib
import functools
import gc
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from gralora_convert.errors import (
    ConvertError,
    MisuseError,
    OutOfMemoryError,
    printable,
    sentences,
)
from gralora_convert.files import is_file
from gralora_convert.strictjson import dump_json
from gralora_convert.terminal import Choice, bar, open_streams, quiet_option, show, show_notes
from gralora_convert.version import __version__

if TYPE_CHECKING:
    from gralora_convert.assembly import Kind
    from gralora_convert.blocks import Method
    from gralora_convert.equivalence import Equivalence
    from gralora_convert.plan import Plan
    from gralora_convert.ranks import Ranks
    from gralora_convert.report import Finding, Report

P = ParamSpec("P")
T = TypeVar("T")

EXIT_NO, EXIT_REFUSED, EXIT_BUG, EXIT_INTERRUPTED = 1, 2, 70, 130


def run() -> None:
    """The console script: `main`, without the third of a second in which torch takes itself apart
    when Python ends; everything is written and flushed by then."""
    gc.set_threshold(100_000, 20, 20)  # what is imported stays: looking for cycles finds none
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own, which would only spin
    open_streams()
    try:
        main()
    except SystemExit as exit_:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody listens, or it is closed
                stream.flush()
        os._exit(exit_.code if isinstance(exit_.code, int) else 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = commands.main(args=given, prog_name="gralora-convert", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except (click.Abort, KeyboardInterrupt) as interrupt:
        show("interrupted: the output is what it was before", err=True)
        for note in getattr(interrupt.__cause__ or interrupt, "__notes__", ()):
            show(note, err=True)
        status = EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):  # SystemExit: what click 8 makes of a broken pipe
        status = EXIT_REFUSED
    except (ConvertError, click.ClickException, OSError) as error:
        _refuse(error, as_json=_wants_json(given))
        status = EXIT_REFUSED
    except Exception as error:
        if OutOfMemoryError.is_meant_by(error):
            _refuse(OutOfMemoryError(), as_json=_wants_json(given))
            sys.exit(EXIT_REFUSED)
        traceback.print_exc()
        click.echo(
            f"gralora-convert {__version__}: this is a bug. Please report it with the lines above.",
            err=True,
        )
        status = EXIT_BUG
    sys.exit(status if isinstance(status, int) else 0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wants_json(arguments: Sequence[str]) -> bool:
    return "--json" in arguments or ("--format", "json") in itertools.pairwise(arguments)


def _refuse(error: Exception, *, as_json: bool) -> None:
    if isinstance(error, ConvertError):
        kind, where, message, hint = error.kind, error.where, error.message, error.hint
        line = str(error)
    elif isinstance(error, click.ClickException):
        message = " ".join(error.format_message().split())  # click lists choices on lines
        kind, where, hint = "usage", "", ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"Try '{error.ctx.command_path} --help'."
        line = sentences(message, hint)
    else:
        kind, where, hint = "system", printable(getattr(error, "filename", "") or ""), ""
        message = printable(getattr(error, "strerror", "") or error)
        line = f"{where}: {message}" if where else message
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(message, err=True)
    elif as_json:
        fields = {"kind": kind, "message": message, "where": where, "hint": hint}
        with contextlib.suppress(OSError):  # stdout may be what has failed
            _echo_json({"error": fields})
    else:
        with contextlib.suppress(OSError):
            show(f"error: {line}", err=True)


def _echo_json(value: object) -> None:
    click.echo(dump_json(value))


def _options(
    *options: Callable[[Callable[P, T]], Callable[P, T]],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Several options as one decorator, in the order in which the help shows them."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


def _gathered(
    name: str,
    into: type[object],
    *options: Callable[[Callable[..., int]], Callable[..., int]],
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Several options as one decorator; the command gets their values as one `into`, the argument
    `name`. Those that are no field of it stay arguments."""
    names = [field.name for field in fields(into)]  # type: ignore[arg-type]

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def gathering(**given: object) -> int:
            value = into(**{field: given.pop(field) for field in names})
            return command(**given, **{name: value})

        return _options(*options)(gathering)

    return decorate


def _examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n".join(
        ["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {x}" for x in lines)]
    )


def _base_option(meaning: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """`--base`, which has another default where a base is not always needed."""
    return click.option("--base", type=PATH, metavar="MODEL", help=meaning)


DTYPES = ("keep", "float32", "bfloat16", "float16")
PATH = click.Path()  # no check here: it may be a Hub id; a shell completes names of files
json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on stdout.  [default: off]"
)
base_option = _base_option(
    "Base model: folder, file or Hub id.  [default: the adapter's base_model_name_or_path]"
)
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
plot_option = click.option(
    "--plot", type=PATH, metavar="FILE",
    help="Draw it, as PNG, SVG or PDF by the suffix of FILE.  [default: no picture]",
)  # fmt: skip
progress_option = click.option(
    "--progress/--no-progress", default=None, help="A bar on stderr.  [default: on a terminal]"
)


@dataclass(frozen=True, slots=True)
class _Run:
    """What the three writing commands do alike: dry run, progress, the closing lines."""

    output: str
    dtype: str
    jobs: int | None
    dry_run: bool
    overwrite: bool
    verify: bool
    device: str
    progress: bool | None
    as_json: bool

    def carry_out(
        self,
        plan: "Plan",
        summary: Callable[[Mapping[str, object], str], str],
        *,
        resume: bool = False,
        digests: bool | None = None,
        ranks: "Ranks | None" = None,
    ) -> int:
        is_speaker = ranks is None or ranks.is_leader
        if self.dry_run:
            plan.require_allowed(self.output, overwrite=self.overwrite)
            if is_speaker:
                self._print_plan(plan)
            return 0
        if is_speaker:
            show_notes(plan.notes)
        if resume and is_speaker and (left := plan.resumable_bytes(self.output)):
            show_notes([f"goes on: {left:,} bytes are there already"])
        tensors = sum(file.data_nbytes for file in plan.files)
        with bar(tensors, self.progress if is_speaker else False) as advance:
            receipt = plan.write(
                self.output,
                overwrite=self.overwrite,
                resume=resume,
                jobs=self.jobs,
                verify=self.verify,
                digests=digests,
                progress=advance,
                ranks=ranks,
                note=lambda sentence: show_notes([sentence]),
            )
        if not is_speaker:
            return 0
        if self.as_json:
            _echo_json(receipt)
        else:
            show(summary(receipt, printable(self.output)))
        return 0

    def _print_plan(self, plan: "Plan") -> None:
        document = plan.as_json(Path(self.output), self.jobs)
        if self.as_json:
            _echo_json(document)
            return
        for file in plan.files:
            click.echo(f"{file.name}  {len(file.parts)} tensors, {file.nbytes:,} bytes")
            for part in file.parts:
                how = "copy" if type(part.source).__name__ == "Copied" else "compute"
                click.echo(f"  {how:7}  {part.dtype:5} {list(part.shape)}  {part.name}")
        for name in sorted({*plan.texts, *plan.sidecars}):
            click.echo(f"{name}  {'edited' if name in plan.texts else 'copy'}")
        click.echo(
            f"total {plan.nbytes:,} bytes, {document['bytes']:,} of them in weight files, "
            f"{document['computed']} of {document['tensors']} tensors computed; "
            f"peak memory about {plan.peak_memory(self.jobs) / 1e6:,.0f} MB; "
            f"{document['free_disk']:,} bytes free on the disk. Nothing was written."
        )
        for note in plan.notes:
            show(f"note: {note}")


writing_options = _gathered(
    "run", _Run,
    click.option("-o", "--output", type=PATH, required=True, metavar="DIR",
                 help="New folder; must not exist, or be empty, unless --overwrite."),
    click.option("--dtype", type=Choice(DTYPES), default="keep", show_default=True,
                 help="dtype of the tensors written; keep = each tensor's own."),
    click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: the CPUs]"),
    click.option("--dry-run", is_flag=True,
                 help="Print the plan and write nothing.  [default: off]"),
    click.option("--overwrite", is_flag=True, help="Replace DIR, atomically.  [default: off]"),
    click.option("--verify/--no-verify", default=True, show_default=True,
                 help="Check what was written before publishing it."),
    device_option, progress_option, quiet_option, json_option,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gralora-convert")
def commands() -> None:
    """Model surgery on GraLoRA adapters: inspect, validate, merge, convert, extract, verify."""


@commands.command(
    epilog=_examples(
        "gralora-convert inspect ./adapter",
        "gralora-convert inspect ./adapter --plot adapter.png",
    )
)
@click.argument("path", type=PATH)
@plot_option
@_base_option("For --plot: norms against this model's.  [default: the adapter's, if it is here]")
@progress_option
@quiet_option
@json_option
def inspect(
    path: str, plot: str | None, base: str | None, progress: bool | None, as_json: bool
) -> int:
    """What is PATH? An adapter or a checkpoint; reads headers only.

    Exits 0 when it could be told, 1 when it is an adapter with errors, 2 when it is neither.
    """
    from gralora_convert.inspection import inspect

    if plot is not None:
        from gralora_convert.plots import require_drawable

        require_drawable(plot)
    found = inspect(path)
    nothing = _nothing_to_read(found.report)
    if as_json:
        _echo_json({**found.document, **({"error": _nothing_read(nothing)} if nothing else {})})
    else:
        show(found.text)
    if plot is not None and found.report.ok:
        _plot_adapter(path, found.document, plot, base, progress)
    return EXIT_REFUSED if nothing else 0 if found.report.ok else EXIT_NO


def _plot_adapter(
    path: str,
    document: Mapping[str, object],
    plot: str,
    base: str | None,
    progress: bool | None,
) -> None:
    if document["kind"] not in ("gralora", "hybrid", "lora"):
        raise MisuseError(
            "--plot draws one adapter, which this is not", where=path,
            hint="`verify --plot` draws a merge.",
        )  # fmt: skip
    from gralora_convert.adapter import Adapter
    from gralora_convert.anatomy import dissect
    from gralora_convert.plots import draw_anatomy

    adapter = Adapter.open(path)
    total = sum(adapter.factor_bytes(module) for module in adapter.modules)
    with bar(total, progress) as advance:
        draw_anatomy(dissect(adapter, base, progress=advance), plot)
    show_notes([f"drawn: {plot}"])


@commands.command(
    epilog=_examples("gralora-convert validate ./adapter --base ./model --format github")
)
@click.argument("adapters", type=PATH, metavar="ADAPTER...", nargs=-1, required=True)
@base_option
@click.option("--format", "style", type=Choice(["text", "json", "github"]), default="text",
              show_default=True, help="github prints workflow annotations.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.  [default: off]")
@quiet_option
@key_map_option
@trust_option
def validate(
    adapters: Sequence[str],
    base: str | None,
    style: str,
    as_json: bool,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Is ADAPTER intact, does it fit the base? One finding per line.

    A merged checkpoint is checked against its receipt: is it still what was written?

    An adapter is named by its folder or by one of its files.

    Exits 0 when it is valid, 1 when it has errors, 2 when there is nothing to read.
    """
    from gralora_convert.checks import validate

    mapping = _key_map(key_map)
    reports = {
        adapter: validate(adapter, base, key_map=mapping, trust_remote_code=trust_remote_code)
        for adapter in _folders(adapters)
    }
    _print_reports(reports, "json" if as_json else style)
    return max(
        EXIT_REFUSED if _nothing_to_read(report) else 0 if report.ok else EXIT_NO
        for report in reports.values()
    )


def _print_reports(reports: Mapping[str, "Report"], style: str) -> None:
    match style:
        case "json":
            documents = {adapter: _report_json(report) for adapter, report in reports.items()}
            everything = {"ok": all(r.ok for r in reports.values()), "adapters": documents}
            _echo_json(everything if len(documents) > 1 else next(iter(documents.values())))
        case "github":
            for adapter, report in reports.items():
                if report.findings:
                    titled = len(reports) > 1  # annotations name files within an adapter only
                    lines = [f"::group::{printable(adapter)}"] if titled else []
                    click.echo("\n".join([*lines, report.as_annotations()]))
                    click.echo("::endgroup::\n" if titled else "", nl=False)
        case _:
            for adapter, report in reports.items():
                if report.findings:
                    show(report.as_text())
                errors = len(report.errors)
                verdict = f"{errors} error(s)" if errors else "valid"
                show(f"{printable(adapter)}: {verdict}")


def _folders(names: Sequence[str]) -> list[str]:
    """Each adapter once, where several were given by their files (as pre-commit does)."""
    if len(names) == 1:
        return list(names)
    return list(dict.fromkeys(str(Path(n).parent) if is_file(n) else n for n in names))


def _report_json(report: "Report") -> dict[str, object]:
    nothing = _nothing_to_read(report)
    return report.as_json() | ({"error": _nothing_read(nothing)} if nothing else {})


def _nothing_to_read(report: "Report") -> "Finding | None":
    """The finding that says that a folder holds no adapter."""
    missing = ("config-missing", "weights-missing")
    return next((finding for finding in report.errors if finding.code in missing), None)


def _nothing_read(finding: "Finding") -> dict[str, str]:
    """The refusal that goes with a folder in which there is no adapter to read."""
    fields = {"message": finding.message, "where": finding.where, "hint": finding.hint}
    return {"kind": "unreadable", **fields}


@commands.command(
    epilog=_examples(
        "gralora-convert merge ./adapter --base ./model -o ./merged",
        "torchrun --nproc-per-node 4 -m gralora_convert merge ./adapter --base ./model -o ./merged",
    )
)
@click.argument("adapters", type=PATH, metavar="ADAPTER...", nargs=-1, required=True)
@base_option
@click.option("--weight", "weights", type=float, multiple=True, metavar="FLOAT",
              help="One per ADAPTER, in order.  [default: 1.0]")  # fmt: skip
@click.option("--shard-size", default="keep", show_default=True, metavar="keep|SIZE",
              help="keep = the base's own files; else a size such as 5GB.")  # fmt: skip
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from what a broken run left, and leave what is done if this one breaks.  "
    "[default: off]",
)
@click.option("--digests/--no-digests", default=None,
              help="State the sha256 of every file in the receipt.  "
              "[default: for outputs up to 256 MiB]")  # fmt: skip
@click.option(
    "--again", is_flag=True, help="Merge even if the base holds ADAPTER already.  [default: off]"
)
@writing_options
@key_map_option
@trust_option
def merge(
    adapters: Sequence[str],
    base: str | None,
    weights: Sequence[float],
    shard_size: str,
    resume: bool,
    digests: bool | None,
    again: bool,
    run: _Run,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Add ADAPTER's update to the base: a dense checkpoint that every server loads.

    Several adapters are summed in float32 and rounded once. Under torchrun, srun or mpirun the
    processes share the work, a file at a time.
    """
    from gralora_convert.merging import merge, summary
    from gralora_convert.ranks import Ranks

    plan = merge(
        *adapters,
        base=base,
        weights=weights or None,
        dtype=run.dtype,
        shard_size=shard_size,
        device=run.device,
        verify=run.verify,
        again=again,
        key_map=_key_map(key_map),
        trust_remote_code=trust_remote_code,
    )
    ranks = Ranks.from_environment()
    return run.carry_out(plan, summary, resume=resume, digests=digests, ranks=ranks)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The shape of the adapter that is asked for."""

    to: "Kind"
    k: int | None
    r: int | None
    hybrid_r: int | None
    alpha: float | None
    max_error: float | None


shape_options = _gathered(
    "wanted", _Wanted,
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
                 help="Smallest rank with this relative Frobenius error; excludes --r.  "
                 "[default: off]"),
)  # fmt: skip


@commands.command(
    epilog=_examples(
        "gralora-convert convert ./lora --to gralora --k 2 -o ./gralora",
        "gralora-convert convert ./gralora --to lora -o ./servable",
    )
)
@click.argument("adapter", type=PATH)
@shape_options
@click.option("--allow-inexact", is_flag=True,
              help="Approximate optimally, print the error.  [default: off]")  # fmt: skip
@_base_option(
    "The original model: for LoRAs with DoRA, PiSSA, OLoRA or lora_bias.  [default: none]"
)
@writing_options
@key_map_option
@trust_option
def convert(
    adapter: str,
    wanted: _Wanted,
    allow_inexact: bool,
    base: str | None,
    run: _Run,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Write ADAPTER as GraLoRA, Hybrid GraLoRA or LoRA, exactly unless told otherwise."""
    from gralora_convert.assembly import summary
    from gralora_convert.conversion import convert

    plan = convert(
        adapter,
        to=wanted.to,
        base=base,
        k=wanted.k,
        r=wanted.r,
        hybrid_r=wanted.hybrid_r,
        alpha=wanted.alpha,
        max_error=wanted.max_error,
        allow_inexact=allow_inexact,
        dtype=run.dtype,
        device=run.device,
        verify=run.verify,
        key_map=_key_map(key_map),
        trust_remote_code=trust_remote_code,
    )
    return run.carry_out(plan, summary)


@commands.command(
    epilog=_examples(
        "gralora-convert extract --base ./model --tuned ./tuned --to lora -o ./adapter"
    )
)
@click.option("--base", type=PATH, required=True, metavar="MODEL", help="Folder, file or Hub id.")
@click.option("--tuned", type=PATH, required=True, metavar="MODEL", help="The fine-tuned model.")
@shape_options
@click.option("--include", multiple=True, metavar="PATTERN",
              help="Only modules like this, such as '*.q_proj'.  [default: all]")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN",
              help="No modules like this.  [default: none]")  # fmt: skip
@click.option("--svd", type=Choice(["auto", "exact", "randomised"]), default="auto",
              show_default=True,
              help="auto = randomised where a block's side is above 512.")  # fmt: skip
@writing_options
@trust_option
def extract(
    base: str,
    tuned: str,
    wanted: _Wanted,
    include: Sequence[str],
    exclude: Sequence[str],
    svd: "Method",
    run: _Run,
    trust_remote_code: bool,
) -> int:
    """Find the adapter that takes the base to a fine-tuned model, optimally for its rank."""
    from gralora_convert.assembly import summary
    from gralora_convert.extraction import extract

    plan = extract(
        base=base,
        tuned=tuned,
        to=wanted.to,
        k=wanted.k,
        r=wanted.r,
        hybrid_r=wanted.hybrid_r,
        alpha=wanted.alpha,
        max_error=wanted.max_error,
        include=include,
        exclude=exclude,
        svd=svd,
        dtype=run.dtype,
        device=run.device,
        verify=run.verify,
        trust_remote_code=trust_remote_code,
    )
    return run.carry_out(plan, summary)


def _key_map(entries: Sequence[str]) -> dict[str, str]:
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


@commands.command(
    epilog=_examples("gralora-convert verify ./adapter --base ./model --merged ./merged")
)
@click.argument("adapter", type=PATH)
@base_option
@click.option(
    "--merged", type=PATH, required=True, metavar="MODEL", help="The checkpoint to audit."
)
@click.option("--level", type=Choice(["weights", "modules", "model"]), default="model",
              show_default=True, help="How deep; each includes those before it.")  # fmt: skip
@click.option("--slack", type=float, default=1.0, show_default=True,
              help="Widen every bound by this factor.")  # fmt: skip
@click.option("--text",
              help="Run the model on this text, through its own tokenizer.  "
              "[default: random token ids]")  # fmt: skip
@plot_option
@device_option
@progress_option
@quiet_option
@json_option
@key_map_option
@trust_option
def verify(
    adapter: str,
    base: str | None,
    merged: str,
    level: str,
    slack: float,
    text: str | None,
    plot: str | None,
    device: str,
    progress: bool | None,
    as_json: bool,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Do base + ADAPTER and a merged checkpoint compute the same? Whoever made the merge.

    Exits 0 when they do, 1 when they do not; then it says what happened.
    """
    from gralora_convert.checkpoint import Checkpoint
    from gralora_convert.equivalence import verify
    from gralora_convert.plots import require_drawable

    if plot is not None:
        require_drawable(plot)
    opened = Checkpoint.open(merged)
    with bar(opened.nbytes, progress) as advance:
        found = verify(
            adapter,
            base=base,
            merged=opened,
            level=level,
            slack=slack,
            device=device,
            text=text,
            key_map=_key_map(key_map),
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    _print_equivalence(found, plot, as_json)
    return 0 if found.ok else EXIT_NO


def _print_equivalence(found: "Equivalence", plot: str | None, as_json: bool) -> None:
    from gralora_convert.plots import draw_equivalence

    show_notes(found.notes)
    if plot is not None:
        draw_equivalence(found, plot)
        show_notes([f"drawn: {plot}"])
    if as_json:
        _echo_json(found.as_json())
    else:
        show(found.as_text())
