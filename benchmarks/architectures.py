"""Every architecture of transformers that builds small: merged by us, compared with PEFT.

    python -m benchmarks.architectures [--table FILE] [--record FILE] [TYPE ...]

For each model type and each of its auto classes: a tiny model with random weights is saved, PEFT
puts an adapter with random factors on all of its linear layers and saves it, the command line
merges, and plain transformers loads the result. Every weight is compared with base + PEFT's delta
weight, and the outputs with those of PEFT's unmerged model where the model takes one of a few
common inputs. A task with a head of its own starts from a base without it, as in practice.

With `--lora` the adapter is converted to a LoRA instead, which PEFT loads on the base and merges.

Prints a line per case and writes a table: right, refused (with the code), not run (no small model
builds, or PEFT refuses) and WRONG. Cases run in processes of their own, so that one that crashes or
hangs costs itself only.
"""

import argparse
import contextlib
import io
import json
import platform
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.adapting import TASKS, Case, adapt, base_auto, cases, float32
from benchmarks.workers import Worker, WorkerDiedError, ask_all, recorded, serve

INTRODUCTION = """\
Tiny models of transformers with random weights, one per model type and auto class, adapted by PEFT
on all linear layers with random factors, merged by the command line, loaded by plain transformers.
*right*: every weight equals base + PEFT's delta weight, and the outputs are those of PEFT's
unmerged model ("weights and outputs"), or the model took none of the inputs that were tried
("weights"). "all that PEFT can adapt" leaves out layers that PEFT refuses (sizes that k does not
divide) or ignores (`out_proj` of nn.MultiheadAttention, which is refused), and layers without
outputs. *not run*: no small model could be built, or PEFT does not adapt it."""
REMARKS = """\
The refusals are what they should be. `forward-ignores-adapter`: PEFT's own merge differs from its
unmerged model there, because the model reads the weight past the adapter or calls the layer out of
a plain list. shieldgemma2: plain transformers does not find its own save of this class again (all
weights missing); the class that it is published as is right. big_bird (QuestionAnswering): PEFT
saves one `modules_to_save` within another under names that it does not load itself."""
CLOSE = 1e-5  # of weights, relative to the largest
CLOSE_OUTPUTS = 2e-3  # of outputs: random weights amplify the last bits


@dataclass(frozen=True)
class Verdict:
    """`kind` is right, refused, not run or WRONG; `reason` says how it was found, or why not."""

    kind: str
    reason: str


# one case --------------------------------------------------------------------------------------


def judge(case: Case, folder: Path, *, lora: bool = False) -> Verdict:
    """Merges, or converts, one case in `folder` and compares."""
    try:
        adapted, targets = _prepare(case, folder)
    except Exception as error:  # a model that does not build, or PEFT does not adapt: no finding
        reason = (str(error).splitlines() or [""])[0][:100]
        return Verdict("not run", f"{type(error).__name__}: {reason}")
    adapter, base, out = folder / "adapter", folder / "base", folder / "out"
    as_lora = "convert", adapter, "--to", "lora", "--for", "peft", "--base", base, "-o", out
    status, text = command(*as_lora) if lora else merge(adapter, base, out)
    if status == 2:
        return Verdict("refused", (text.splitlines() or [""])[0][:300])
    if status:
        return Verdict("WRONG", f"exit {status}: {text[-300:]}")
    return _compare(adapted, _loaded(case, folder), targets)


def _prepare(case: Case, folder: Path) -> tuple[Any, str]:
    """The unmerged model, after its base and its adapter were saved; what was adapted."""
    from benchmarks import tiny

    tiny.build(base_auto(case), case.model_type).save_pretrained(folder / "base")
    return adapt(case, folder / "base", folder / "adapter")


def merge(adapter: Path, base: Path, out: Path) -> tuple[int, str]:
    return command("merge", adapter, "--base", base, "-o", out)


def command(*arguments: str | Path) -> tuple[int, str]:
    """The exit status of the command line, and what it said."""
    from gralora_convert.cli.entry import main

    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            main(list(map(str, arguments)))
        except SystemExit as exit_:
            return int(exit_.code or 0), err.getvalue()
    return 0, err.getvalue()


def _loaded(case: Case, folder: Path) -> Any:
    """The reloaded merge, or what PEFT makes of the reloaded LoRA."""
    import transformers
    from peft import PeftModel

    load = getattr(transformers, case.auto).from_pretrained
    if not (folder / "out" / "adapter_config.json").exists():
        return load(folder / "out", dtype=float32())
    options = {"num_labels": 4} if TASKS[case.auto] in ("SEQ_CLS", "TOKEN_CLS") else {}
    model = load(folder / "base", dtype=float32(), **options)
    return PeftModel.from_pretrained(model, folder / "out").merge_and_unload()


def _compare(adapted: Any, merged: Any, targets: str) -> Verdict:
    """Every parameter of the reloaded merge against base + PEFT's delta weight, then outputs."""
    from benchmarks import tiny

    inner = adapted.base_model.model
    if type(merged) is not type(inner):
        return Verdict("WRONG", f"loads as {type(merged).__name__}, not {type(inner).__name__}")
    problem = _weights_differ(inner, merged)
    if problem:
        return Verdict("WRONG", problem)
    for given in tiny.inputs(inner):
        expected = tiny.forward(inner, given)
        if expected is None:
            continue
        found = tiny.forward(merged, given)
        if found is None or found.shape != expected.shape:
            return Verdict("WRONG", "outputs have another shape")
        gap = difference(found, expected)
        if not gap <= CLOSE_OUTPUTS:
            return Verdict("WRONG", f"outputs differ by {gap:.3g}")
        return Verdict("right", f"weights and outputs, {targets}")
    return Verdict("right", f"weights, {targets}")


def difference(found: Any, expected: Any) -> float:
    import torch

    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    if not finite.any():
        return 0.0
    gap = (found - expected)[finite].abs().max()
    return float(gap / expected[finite].abs().max().clamp_min(1e-12))


def _weights_differ(inner: Any, merged: Any) -> str:
    """What differs; '' when nothing does."""
    found = {
        **dict(merged.named_buffers()),
        **dict(merged.named_parameters(remove_duplicate=False)),
    }
    for name, module in inner.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        wanted = (module.base_layer.weight + module.get_delta_weight("default")).detach()
        other = found.get(f"{name}.weight")
        if other is None or other.shape != wanted.shape:
            return f"{name}.weight is not in the reloaded model"
        gap = difference(other.detach(), wanted)
        if gap > CLOSE:
            return f"{name} differs by {gap:.3g}"
    for name, parameter in inner.named_parameters():
        if "gralora_" in name or name.endswith(".base_layer.weight") or "original_module" in name:
            continue
        plain = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if plain not in found:
            return f"{plain} is not in the reloaded model"
        if difference(found[plain].detach(), parameter.detach()) > CLOSE:
            return f"{plain} was changed"
    return ""


# all cases -------------------------------------------------------------------------------------


def work(question: dict[str, str], *, lora: bool) -> dict[str, str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return asdict(judge(Case(**question), Path(folder), lora=lora))
        except Exception as error:  # the comparison itself broke: as bad as a difference
            return asdict(Verdict("WRONG", f"{type(error).__name__}: {str(error)[:300]}"))


class Judging(Worker):
    def ask(self, question: Any) -> dict[str, str]:
        try:
            verdict: dict[str, str] = super().ask(question)
        except WorkerDiedError as reason:
            verdict = asdict(Verdict("not run", str(reason)))
        print(f"{question['model_type']:30} {question['auto']:36} "
              f"{verdict['kind']}: {verdict['reason']}", flush=True)  # fmt: skip
        return verdict


def judge_all(
    every: Sequence[Case], limit: float, jobs: int, record: Path | None, *, lora: bool
) -> dict[Case, Verdict]:
    worker = [sys.executable, "-m", "benchmarks.architectures", "--worker"]
    worker += ["--lora"] if lora else []
    questions = [asdict(case) for case in every]
    answers = ask_all(questions, lambda: Judging(worker, limit), jobs, record)
    return {case: Verdict(**answer) for case, answer in zip(every, answers, strict=True)}


# the table -------------------------------------------------------------------------------------


def why(verdict: Verdict) -> str:
    """A reason without what is particular to one case."""
    if verdict.kind == "refused":
        code = re.search(r"\[([\w-]+)\]", verdict.reason)
        return code[1] if code else re.sub(r"^error: \S+: ", "", verdict.reason)
    if verdict.kind == "not run":
        return re.sub(r"(/\S+|\d+|'[^']*'|`[^`]*`|\S*\.\S+)", "…", verdict.reason)[:90]
    return verdict.reason


def table(found: dict[Case, Verdict], command: str, total_cases: int) -> str:
    """The results as Markdown; `total_cases` is the number of all, run or not."""
    import peft
    import torch
    import transformers

    def versions() -> str:
        return (f"transformers {transformers.__version__}, PEFT {peft.__version__}, "
                f"torch {torch.__version__}, Python {platform.python_version()}")  # fmt: skip

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case, verdict in found.items():
        counts[case.auto][verdict.kind] += 1
        short = case.auto.removeprefix("AutoModelFor")
        reasons[verdict.kind, why(verdict)].append(f"{case.model_type} ({short})")
    kinds = ("right", "refused", "not run", "WRONG")
    lines = ["# Architectures", "", *INTRODUCTION.splitlines(), "",
             f"Measured with {versions()}, {len(found)} of {total_cases} cases:", "",
             f"    {command}", "",
             "| auto class | " + " | ".join(kinds) + " |",
             "|---|" + "---:|" * len(kinds)]  # fmt: skip
    for auto, held in counts.items():
        lines.append(f"| {auto} | " + " | ".join(str(held[kind]) for kind in kinds) + " |")
    total: Counter[str] = sum(counts.values(), Counter())
    lines.append("| **all** | " + " | ".join(f"**{total[kind]}**" for kind in kinds) + " |")
    types = {case.model_type for case, verdict in found.items() if verdict.kind == "right"}
    every = {case.model_type for case in found}
    lines += ["", f"{len(types)} of {len(every)} model types are right in one class or more."]
    lines += ["", REMARKS]
    for kind in kinds:
        lines += ["", f"## {kind.capitalize() if kind != 'WRONG' else 'Wrong'}", ""]
        by_reason = sorted((len(v), why_, v) for (k, why_), v in reasons.items() if k == kind)
        if not by_reason:
            lines.append("None.")
        for number, reason, names in reversed(by_reason):
            listed = "" if kind == "right" else ": " + ", ".join(sorted(names))
            lines.append(f"* {number} x {reason}{listed}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--auto", action="append", choices=TASKS, help="these classes only")
    parser.add_argument("--lora", action="store_true", help="convert to LoRA instead of merging")
    parser.add_argument("--table", type=Path, help="write the results there")
    parser.add_argument("--record", type=Path, help="resume: verdicts are kept there")
    parser.add_argument("--recorded", action="store_true", help="the cases in --record only")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one case")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        return serve(partial(work, lora=chosen.lora))
    every = [case for case in cases(chosen.types) if case.auto in (chosen.auto or TASKS)]
    if chosen.recorded:
        known = recorded(chosen.record)
        every = [case for case in every if json.dumps(asdict(case)) in known]
    found = judge_all(every, chosen.limit, chosen.jobs, chosen.record, lora=chosen.lora)
    text = table(found, "python -m benchmarks.architectures", len(cases([])))
    if chosen.table is not None:
        chosen.table.write_text(text)
    print(json.dumps(Counter(verdict.kind for verdict in found.values())))


if __name__ == "__main__":
    main()
