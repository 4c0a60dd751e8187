"""The command line: parse, call one verb, print what it returns.

Options that a command does not look at itself (`asked`) are its verb's arguments, by their names.

stdout is the result, stderr is progress and notes. Exit status: 0 done / yes, 1 the answer is no,
2 refused or misused, 70 a bug, 130 interrupted.
"""

from collections.abc import Sequence
from typing import Any

import click

from gralora_convert.cli.options import (
    PATH,
    Run,
    Said,
    Wanted,
    base_option,
    device_option,
    examples,
    json_option,
    layout_options,
    plot_option,
    progress_option,
    reading_options,
    server_option,
    shape_options,
    some_base_option,
    weight_option,
    writing_options,
)
from gralora_convert.cli.terminal import (
    EXIT_NO,
    EXIT_REFUSED,
    Choice,
    bar,
    quiet_option,
    show,
    show_json,
    show_notes,
)
from gralora_convert.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gralora-convert")
def commands() -> None:
    """Model surgery on GraLoRA adapters: inspect, validate, merge, convert, extract, verify."""


@commands.command(
    epilog=examples(
        "gralora-convert inspect ./adapter",
        "gralora-convert inspect ./adapter --plot adapter.png",
    )
)
@click.argument("path", type=PATH)
@plot_option
@some_base_option(
    help="For --plot: norms against this model's.  [default: the adapter's, if it is here]"
)
@progress_option
@quiet_option
@json_option
def inspect(
    path: str, plot: str | None, base: str | None, progress: bool | None, as_json: bool
) -> int:
    """What is PATH? An adapter or a checkpoint; reads headers only.

    Exits 0 when it could be told, 1 when it is an adapter with errors, 2 when it is neither.
    """
    from gralora_convert.cli.pages import inspection_page
    from gralora_convert.cli.reports import refusal, status_of
    from gralora_convert.verbs import inspect

    if plot is not None:
        from gralora_convert.cli.plots import require_drawable

        require_drawable(plot)
    found = inspect(path)
    if as_json:
        show_json(found.document | refusal(found.report))
    else:
        show(*inspection_page(found))
    if plot is not None and found.report.ok:
        from gralora_convert.cli.pictures import plot_adapter

        plot_adapter(path, found, plot, base, progress)
    return status_of(found.report)


@commands.command(
    epilog=examples("gralora-convert validate ./adapter --base ./model --format github")
)
@click.argument("adapters", type=PATH, metavar="ADAPTER...", nargs=-1, required=True)
@base_option
@server_option(help="Does this engine serve it as it is?  [default: not asked]")
@click.option("--format", "style", type=Choice(["text", "json", "github"]), default="text",
              show_default=True, help="github prints workflow annotations.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.  [default: off]")
@quiet_option
@reading_options
def validate(
    adapters: Sequence[str],
    base: str | None,
    server: str | None,
    style: str,
    as_json: bool,
    said: Said,
) -> int:
    """Is ADAPTER intact, does it fit the base? One finding per line.

    A merged checkpoint is checked against its receipt: is it still what was written?

    An adapter is named by its folder or by one of its files.

    Exits 0 when it is valid, 1 when it has errors, 2 when there is nothing to read.
    """
    from gralora_convert.cli.reports import folders, show_reports, status_of
    from gralora_convert.verbs import validate

    arguments = said.as_arguments()
    reports = {
        adapter: validate(adapter, base, server=server, **arguments)
        for adapter in folders(adapters)
    }
    show_reports(reports, "json" if as_json else style)
    return max(map(status_of, reports.values()))


@commands.command(
    epilog=examples(
        "gralora-convert merge ./adapter --base ./model -o ./merged",
        "torchrun --nproc-per-node 4 -m -- gralora_convert merge ./adapter --base ./model -o out",
    )
)
@click.argument("adapters", type=PATH, metavar="ADAPTER...", nargs=-1, required=True)
@base_option
@weight_option
@click.option("--shard-size", default="keep", show_default=True, metavar="keep|SIZE",
              help="keep = the base's own files; else a size such as 5GB.")  # fmt: skip
@click.option("--digests/--no-digests", default=None,
              help="State the sha256 of every file in the receipt.  "
              "[default: for outputs up to 256 MiB]")  # fmt: skip
@click.option(
    "--again", is_flag=True, help="Merge even if the base holds ADAPTER already.  [default: off]"
)
@click.option("--labels", metavar="A,B,...",
              help="Names of a trained classifier's labels, in order.  "
              "[default: as the configs name them]")  # fmt: skip
@writing_options
@reading_options
def merge(
    adapters: Sequence[str],
    weights: Sequence[float],
    digests: bool | None,
    labels: str | None,
    run: Run,
    said: Said,
    **asked: Any,
) -> int:
    """Add ADAPTER's update to the base: a dense checkpoint that every server loads.

    Several adapters are summed in float32 and rounded once. Under torchrun, srun or mpirun the
    processes share the work, and the files.
    """
    from gralora_convert.cli.summaries import merge_summary
    from gralora_convert.verbs import merge

    named = None if labels is None else labels.split(",")
    asked |= run.as_arguments() | said.as_arguments()
    plan = merge(*adapters, weights=weights or None, labels=named, **asked)
    return run.carry_out(plan, merge_summary, digests=digests)


@commands.command(
    epilog=examples(
        "gralora-convert convert ./lora --to gralora --k 2 -o ./gralora",
        "gralora-convert convert ./gralora --to lora --for vllm -o ./servable",
    )
)
@click.argument("adapter", type=PATH)
@shape_options
@click.option("--allow-inexact", is_flag=True,
              help="Approximate optimally, print the error.  [default: off]")  # fmt: skip
@server_option(help="Make the LoRA as this engine reads it, or refuse.  [default: as PEFT does]")
@plot_option
@some_base_option(
    help="The original model: for LoRAs with DoRA, PiSSA, OLoRA or lora_bias.  [default: none]"
)
@writing_options
@reading_options
def convert(
    adapter: str, wanted: Wanted, plot: str | None, run: Run, said: Said, **asked: Any
) -> int:
    """Write ADAPTER as GraLoRA, Hybrid GraLoRA or LoRA, exactly unless told otherwise.

    --plot draws the error of a LoRA against its rank, with the largest ranks of servers.
    """
    from gralora_convert.cli.pictures import drawn, plot_trade
    from gralora_convert.cli.summaries import adapter_summary
    from gralora_convert.verbs import convert

    pictured = None if plot is None else drawn(adapter, wanted, plot)
    asked |= run.as_arguments() | said.as_arguments()
    plan = convert(adapter, **wanted, **asked)
    status = run.carry_out(plan, adapter_summary)
    if plot is not None and pictured is not None:
        plot_trade(pictured, plan, plot, run.progress)
    return status


@commands.command(
    epilog=examples("gralora-convert extract --base ./model --tuned ./tuned --to lora -o ./adapter")
)
@click.option("--base", type=PATH, required=True, metavar="MODEL", help="Folder, file or Hub id.")
@click.option("--tuned", type=PATH, required=True, metavar="MODEL", help="The fine-tuned model.")
@shape_options
@click.option("--include", multiple=True, metavar="PATTERN",
              help="Only modules like this, such as '*.q_proj', and nothing else.  "
              "[default: all]")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN",
              help="No modules like this.  [default: none]")  # fmt: skip
@click.option("--linear-only", is_flag=True,
              help="Only linear layers, which servers take: embeddings, output head, norms and "
              "biases stay the base's; a note says how much of the difference that leaves out.  "
              "[default: off]")  # fmt: skip
@click.option("--svd", type=Choice(["auto", "exact", "randomised"]), default="auto",
              show_default=True,
              help="auto = randomised where a block's side is above 512.")  # fmt: skip
@server_option(help="Make the LoRA as this engine reads it, or refuse.  [default: as PEFT does]")
@writing_options
@layout_options
def extract(wanted: Wanted, run: Run, said: Said, **asked: Any) -> int:
    """Find the adapter that takes the base to a fine-tuned model, optimally for its rank.

    What differs and is no linear layer is saved whole, unless left out; notes say what was, and how
    much of the difference that is.
    """
    from gralora_convert.cli.summaries import adapter_summary
    from gralora_convert.verbs import extract

    asked |= run.as_arguments() | said.as_arguments()
    plan = extract(**wanted, **asked)
    return run.carry_out(plan, adapter_summary)


@commands.command(
    epilog=examples("gralora-convert verify ./adapter --base ./model --merged ./merged")
)
@click.argument("adapters", type=PATH, metavar="ADAPTER...", nargs=-1, required=True)
@base_option
@weight_option
@click.option(
    "--merged", type=PATH, required=True, metavar="MODEL", help="The checkpoint to audit."
)
@click.option("--level", type=Choice(["weights", "modules", "model"]),
              help="How deep; each includes those before it.  [default: model, left out with a "
              "note where it does not fit in memory]")  # fmt: skip
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
@reading_options
def verify(
    adapters: Sequence[str],
    weights: Sequence[float],
    merged: str,
    plot: str | None,
    progress: bool | None,
    as_json: bool,
    said: Said,
    **asked: Any,
) -> int:
    """Do base + ADAPTER and a merged checkpoint compute the same? Whoever made the merge.

    Several adapters and weights as in merge; without weights, those of the merge's receipt.

    Exits 0 when they do, 1 when they do not (then it says what happened), 2 when there is no
    answer.
    """
    from gralora_convert.cli.plots import draw_equivalence, require_drawable
    from gralora_convert.disk import Checkpoint
    from gralora_convert.output import Ranks
    from gralora_convert.verbs import verify

    if plot is not None:
        require_drawable(plot)
    opened = Checkpoint.open(merged)
    ranks = Ranks.from_environment()
    with bar(opened.nbytes, progress if ranks.is_leader else False) as advance:
        asked |= said.as_arguments() | {"progress": advance, "ranks": ranks}
        found = verify(*adapters, merged=opened, weights=weights or None, **asked)
    if not ranks.is_leader:
        return 0
    show_notes(found.notes)
    if plot is not None:
        draw_equivalence(found, plot)
        show_notes([f"drawn: {plot}"])
    if as_json:
        show_json(found.as_json())
    else:
        show(*found.as_text().split("\n"))
    return EXIT_REFUSED if found.ok is None else 0 if found.ok else EXIT_NO
