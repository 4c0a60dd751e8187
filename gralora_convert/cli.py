"""The command line: parse, call one verb, print what it returns.

stdout is the result, stderr is progress and notes. Exit status: 0 done / yes, 1 the answer is no,
2 refused or misused, 70 a bug, 130 interrupted.
"""

import functools
import itertools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from gralora_convert.errors import ConvertError, InvalidAdapterError, MisuseError
from gralora_convert.version import __version__

if TYPE_CHECKING:
    from gralora_convert.assembly import Kind
    from gralora_convert.blocks import Method
    from gralora_convert.plan import Plan
    from gralora_convert.report import Finding

P = ParamSpec("P")
T = TypeVar("T")

EXIT_NO, EXIT_REFUSED, EXIT_BUG, EXIT_INTERRUPTED = 1, 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs one command and exits with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = commands.main(args=given, prog_name="gralora-convert", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: the output is what it was before", err=True)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        status = EXIT_REFUSED
    except (ConvertError, click.ClickException, OSError) as error:
        _refuse(error, as_json=_wants_json(given))
        status = EXIT_REFUSED
    except Exception:
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
        kind, where, message, hint = "usage", "", error.format_message(), ""
        line = message
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"Try '{error.ctx.command_path} --help'."
            line = f"{message} {hint}"
    else:
        kind, where, hint = "system", str(getattr(error, "filename", "") or ""), ""
        message = str(getattr(error, "strerror", "") or error)
        line = f"{where}: {message}" if where else message
    if as_json:
        fields = {"kind": kind, "message": message, "where": where, "hint": hint}
        click.echo(json.dumps({"error": fields}, indent=2))
    else:
        click.echo(f"error: {line}", err=True)
        for finding in error.findings if isinstance(error, InvalidAdapterError) else ():
            if finding.severity == "error":
                click.echo(f"  {finding}", err=True)


def _echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2))


def _options(
    *options: Callable[[Callable[P, T]], Callable[P, T]],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Several options as one decorator, in the order in which the help shows them."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


DTYPES = ("keep", "float32", "bfloat16", "float16")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
base_option = click.option(
    "--base", metavar="MODEL",
    help="Base model: folder, file or Hub id.  [default: the adapter's base_model_name_or_path]",
)  # fmt: skip
device_option = click.option("--device", default="cpu", show_default=True, help="Where to compute.")
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Let transformers run code of the model's folder."
)
key_map_option = click.option(
    "--key-map", multiple=True, metavar="FROM=TO",
    help="Module FROM of the adapter is TO in the base (a whole name or a leading part).",
)  # fmt: skip
progress_option = click.option(
    "--progress/--no-progress", default=None, help="A bar on stderr.  [default: on a terminal]"
)
writing_options = _options(
    click.option("-o", "--output", required=True, metavar="DIR",
                 help="New folder; must not exist, or be empty, unless --overwrite."),
    click.option("--dtype", type=click.Choice(DTYPES), default="keep", show_default=True,
                 help="dtype of the tensors written; keep = each tensor's own."),
    click.option("--jobs", type=click.IntRange(min=1), help="Worker threads.  [default: the CPUs]"),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace DIR, atomically."),
    click.option("--verify/--no-verify", default=True, show_default=True,
                 help="Check what was written before publishing it."),
    device_option, progress_option, json_option,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gralora-convert")
def commands() -> None:
    """Model surgery on GraLoRA adapters: inspect, validate, merge, convert, extract, verify."""


@commands.command()
@click.argument("path")
@json_option
def inspect(path: str, as_json: bool) -> int:
    """What is PATH? An adapter or a checkpoint; reads headers only.

    \b
    Example:
      gralora-convert inspect ./adapter
    """
    from gralora_convert.inspection import inspect

    found = inspect(path)
    if as_json:
        _echo_json(found.document)
    else:
        click.echo(found.text)
    return 0


@commands.command()
@click.argument("adapter")
@base_option
@click.option("--format", "style", type=click.Choice(["text", "json", "github"]), default="text",
              show_default=True, help="github prints workflow annotations.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@key_map_option
@trust_option
def validate(
    adapter: str,
    base: str | None,
    style: str,
    as_json: bool,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Is ADAPTER intact, does it fit the base? One finding per line.

    Exits 0 when it is valid, 1 when it has errors, 2 when there is nothing to read.

    \b
    Example:
      gralora-convert validate ./adapter --base ./model --format github
    """
    from gralora_convert.checks import validate

    report = validate(adapter, base, key_map=_key_map(key_map), trust_remote_code=trust_remote_code)
    nothing = [f for f in report.errors if f.code in ("config-missing", "weights-missing")]
    match "json" if as_json else style:
        case "json":
            _echo_json(report.as_json() | ({"error": _nothing_read(nothing[0])} if nothing else {}))
        case "github":
            if report.findings:
                click.echo(report.as_annotations())
        case _:
            if report.findings:
                click.echo(report.as_text())
            errors = len(report.errors)
            click.echo(f"{adapter}: " + (f"{errors} error(s)" if errors else "valid"))
    return EXIT_REFUSED if nothing else 0 if report.ok else EXIT_NO


def _nothing_read(finding: "Finding") -> dict[str, str]:
    """The refusal that goes with a folder in which there is no adapter to read."""
    fields = {"message": finding.message, "where": finding.where, "hint": finding.hint}
    return {"kind": "unreadable", **fields}


@commands.command()
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
@base_option
@click.option("--weight", "weights", type=float, multiple=True, metavar="FLOAT",
              help="One per ADAPTER, in order.  [default: 1.0]")  # fmt: skip
@click.option("--shard-size", default="keep", show_default=True, metavar="keep|SIZE",
              help="keep = the base's own files; else a size such as 5GB.")  # fmt: skip
@writing_options
@key_map_option
@trust_option
def merge(
    adapters: Sequence[str],
    base: str | None,
    weights: Sequence[float],
    shard_size: str,
    output: str,
    dtype: str,
    jobs: int | None,
    dry_run: bool,
    overwrite: bool,
    verify: bool,
    device: str,
    progress: bool | None,
    as_json: bool,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Add ADAPTER's update to the base: a dense checkpoint that every server loads.

    Several adapters are summed in float32 and rounded once.

    \b
    Example:
      gralora-convert merge ./adapter --base ./model -o ./merged
    """
    from gralora_convert.merging import merge, summary

    plan = merge(
        *adapters,
        base=base,
        weights=weights or None,
        dtype=dtype,
        shard_size=shard_size,
        device=device,
        verify=verify,
        key_map=_key_map(key_map),
        trust_remote_code=trust_remote_code,
    )
    run = _Run(output, jobs, dry_run, overwrite, verify, progress, as_json)
    return run.carry_out(plan, summary)


shape_options = _options(
    click.option("--to", type=click.Choice(["gralora", "hybrid", "lora"]), required=True,
                 help="Kind of the result."),
    click.option("--k", type=click.IntRange(min=1),
                 help="Blocks per side.  [default: the source's, or 2]"),
    click.option("--r", type=click.IntRange(min=1), help="Rank.  [default: the smallest exact]"),
    click.option("--hybrid-r", type=click.IntRange(min=0), help="Rank of the general part."),
    click.option("--alpha", type=float,
                 help="Numerator of the scaling.  [default: keep the scaling]"),
    click.option("--max-error", type=float,
                 help="Smallest rank with this relative Frobenius error; excludes --r."),
)  # fmt: skip


@commands.command()
@click.argument("adapter")
@shape_options
@click.option("--allow-inexact", is_flag=True, help="Approximate optimally, print the error.")
@click.option(
    "--base",
    metavar="MODEL",
    help="The original model: for LoRAs with DoRA, PiSSA, OLoRA or lora_bias.",
)
@writing_options
@key_map_option
@trust_option
def convert(
    adapter: str,
    to: "Kind",
    k: int | None,
    r: int | None,
    hybrid_r: int | None,
    alpha: float | None,
    max_error: float | None,
    allow_inexact: bool,
    base: str | None,
    output: str,
    dtype: str,
    jobs: int | None,
    dry_run: bool,
    overwrite: bool,
    verify: bool,
    device: str,
    progress: bool | None,
    as_json: bool,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Write ADAPTER as GraLoRA, Hybrid GraLoRA or LoRA, exactly unless told otherwise.

    \b
    Examples:
      gralora-convert convert ./lora --to gralora --k 2 -o ./gralora
      gralora-convert convert ./gralora --to lora -o ./servable
    """
    from gralora_convert.assembly import summary
    from gralora_convert.conversion import convert

    plan = convert(
        adapter,
        to=to,
        base=base,
        k=k,
        r=r,
        hybrid_r=hybrid_r,
        alpha=alpha,
        max_error=max_error,
        allow_inexact=allow_inexact,
        dtype=dtype,
        device=device,
        verify=verify,
        key_map=_key_map(key_map),
        trust_remote_code=trust_remote_code,
    )
    run = _Run(output, jobs, dry_run, overwrite, verify, progress, as_json)
    return run.carry_out(plan, summary)


@commands.command()
@click.option("--base", required=True, metavar="MODEL", help="Folder, file or Hub id.")
@click.option("--tuned", required=True, metavar="MODEL", help="The fine-tuned model.")
@shape_options
@click.option("--include", multiple=True, metavar="PATTERN", help="Only modules like this.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No modules like this.")
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact", "randomised"]),
    default="auto",
    show_default=True,
    help="auto = randomised where a block's side is above 512.",
)
@writing_options
@trust_option
def extract(
    base: str,
    tuned: str,
    to: "Kind",
    k: int | None,
    r: int | None,
    hybrid_r: int | None,
    alpha: float | None,
    max_error: float | None,
    include: Sequence[str],
    exclude: Sequence[str],
    svd: "Method",
    output: str,
    dtype: str,
    jobs: int | None,
    dry_run: bool,
    overwrite: bool,
    verify: bool,
    device: str,
    progress: bool | None,
    as_json: bool,
    trust_remote_code: bool,
) -> int:
    """Find the adapter that takes the base to a fine-tuned model, optimally for its rank.

    \b
    Example:
      gralora-convert extract --base ./model --tuned ./tuned --to gralora --k 2 --r 32 -o ./adapter
    """
    from gralora_convert.assembly import summary
    from gralora_convert.extraction import extract

    plan = extract(
        base=base,
        tuned=tuned,
        to=to,
        k=k,
        r=r,
        hybrid_r=hybrid_r,
        alpha=alpha,
        max_error=max_error,
        include=include,
        exclude=exclude,
        svd=svd,
        dtype=dtype,
        device=device,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    run = _Run(output, jobs, dry_run, overwrite, verify, progress, as_json)
    return run.carry_out(plan, summary)


class _Run:
    """What the three writing commands do alike: dry run, progress, the closing lines."""

    def __init__(
        self,
        output: str,
        jobs: int | None,
        dry_run: bool,
        overwrite: bool,
        verify: bool,
        progress: bool | None,
        as_json: bool,
    ) -> None:
        self.output, self.jobs, self.dry_run, self.overwrite = output, jobs, dry_run, overwrite
        self.verify, self.as_json = verify, as_json
        self.progress = sys.stderr.isatty() if progress is None else progress

    def carry_out(self, plan: "Plan", summary: Callable[[Mapping[str, object], str], str]) -> int:
        if self.dry_run:
            self._print_plan(plan)
            return 0
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
        with _bar(plan.nbytes, self.progress) as advance:
            receipt = plan.write(
                self.output,
                overwrite=self.overwrite,
                jobs=self.jobs,
                verify=self.verify,
                progress=advance,
            )
        if self.as_json:
            _echo_json(receipt)
        else:
            click.echo(summary(receipt, self.output))
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
            f"total {plan.nbytes:,} bytes, {document['computed']} of {document['tensors']} tensors "
            f"computed; peak memory about {plan.peak_memory(self.jobs) / 1e6:,.0f} MB; "
            f"{document['free_disk']:,} bytes free on the disk. Nothing was written."
        )
        for note in plan.notes:
            click.echo(f"note: {note}")


def _key_map(entries: Sequence[str]) -> dict[str, str]:
    """`FROM=TO` options as a mapping."""
    mapping = {}
    for entry in entries:
        name, equals, to = entry.partition("=")
        if not equals or not name or not to:
            raise MisuseError(f"--key-map {entry!r} is not FROM=TO")
        mapping[name] = to
    return mapping


@commands.command()
@click.argument("adapter")
@base_option
@click.option("--merged", required=True, metavar="MODEL", help="The checkpoint to audit.")
@click.option("--level", type=click.Choice(["weights", "modules", "model"]), default="model",
              show_default=True, help="How deep; each includes those before it.")  # fmt: skip
@click.option("--slack", type=float, default=1.0, show_default=True,
              help="Widen every bound by this factor.")  # fmt: skip
@click.option("--text", help="Run the model on this text, through its own tokenizer.")
@device_option
@progress_option
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
    device: str,
    progress: bool | None,
    as_json: bool,
    key_map: Sequence[str],
    trust_remote_code: bool,
) -> int:
    """Do base + ADAPTER and a merged checkpoint compute the same? Whoever made the merge.

    Exits 0 when they do, 1 when they do not; then it says what happened.

    \b
    Example:
      gralora-convert verify ./adapter --base ./model --merged ./merged
    """
    from gralora_convert.checkpoint import Checkpoint
    from gralora_convert.equivalence import verify

    opened = Checkpoint.open(merged)
    show = sys.stderr.isatty() if progress is None else progress
    with _bar(opened.nbytes, show) as advance:
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
    for line in found.notes:
        click.echo(f"note: {line}", err=True)
    if as_json:
        _echo_json(found.as_json())
    else:
        click.echo(found.as_text())
    return 0 if found.ok else EXIT_NO


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, advanced by a number of bytes."""
    if not show:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield lambda count: bar.update(count) and None
