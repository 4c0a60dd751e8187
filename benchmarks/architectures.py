"""Every architecture of transformers that builds small: merged by us, compared with PEFT.

    python -m benchmarks.architectures [--table FILE] [--record FILE] [TYPE ...]

For each model type and each of its auto classes: a tiny model with random weights is saved, PEFT
puts an adapter with random factors on all of its linear layers and saves it, the command line
merges, and plain transformers loads the result. Every weight is compared with base + PEFT's delta
weight, and the outputs with those of PEFT's unmerged model where the model takes one of a few
common inputs. A task with a head of its own starts from a base without it, as in practice.

Prints a line per case and writes a table: right, refused (with the code), not run (no small model
builds, or PEFT refuses) and WRONG. Cases run in processes of their own, so that one that crashes or
hangs costs itself only.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TASKS: dict[str, str | None] = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": None,
    "AutoModelForImageTextToText": None,
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForMaskedLM": None,
    "AutoModelForImageClassification": None,
    "AutoModelForObjectDetection": None,
    "AutoModelForUniversalSegmentation": None,
    "AutoModelForSemanticSegmentation": None,
    "AutoModelForDepthEstimation": None,
    "AutoModelForZeroShotObjectDetection": None,
    "AutoModelForMaskGeneration": None,
    "AutoModelForSpeechSeq2Seq": None,
    "AutoModelForCTC": None,
    "AutoModelForAudioClassification": None,
    "AutoModelForTextToSpectrogram": None,
    "AutoModelForTextToWaveform": None,
}
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
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
HEADS = ("classifier", "score", "qa_outputs")  # saved whole by PEFT for these tasks
BATCH = 40  # cases of one process
CLOSE = 1e-5  # of weights, relative to the largest
CLOSE_OUTPUTS = 2e-3  # of outputs: random weights amplify the last bits


@dataclass(frozen=True)
class Case:
    model_type: str
    auto: str


@dataclass(frozen=True)
class Verdict:
    """`kind` is right, refused, not run or WRONG; `reason` says how it was found, or why not."""

    kind: str
    reason: str


# one case --------------------------------------------------------------------------------------


def judge(case: Case, folder: Path) -> Verdict:
    """Merges one case in `folder` and compares."""
    try:
        adapted, targets = _prepare(case, folder)
    except Exception as error:  # a model that does not build, or PEFT does not adapt: no finding
        reason = (str(error).splitlines() or [""])[0][:100]
        return Verdict("not run", f"{type(error).__name__}: {reason}")
    status, text = _merge(folder)
    if status == 2:
        return Verdict("refused", (text.splitlines() or [""])[0][:300])
    if status:
        return Verdict("WRONG", f"exit {status}: {text[-300:]}")
    return _compare(adapted, case.auto, folder, targets)


def _prepare(case: Case, folder: Path) -> tuple[Any, str]:
    """The unmerged model, after its base and its adapter were saved; what was adapted."""
    import transformers
    from peft import GraloraConfig, get_peft_model

    from benchmarks import tiny

    task = TASKS[case.auto]
    tiny.build(_base_auto(case), case.model_type).save_pretrained(folder / "base")
    options: dict[str, Any] = {"num_labels": 4} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    options |= {"dtype": _float32(), "output_loading_info": True}
    for explicit in (False, True):
        model, info = getattr(transformers, case.auto).from_pretrained(folder / "base", **options)
        new = _new_modules(model, info["missing_keys"]) if task in HEADED else []
        targets = _adaptable(model, new) if explicit else "all-linear"
        config = GraloraConfig(
            r=4, alpha=8, target_modules=targets, task_type=task, modules_to_save=new or None
        )
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, NotImplementedError, AttributeError, TypeError):
            if explicit:
                raise
            continue
        if not explicit and any("gralora_" in name for name in _ignored(adapted)):
            continue
        _randomise(adapted)
        adapted.save_pretrained(folder / "adapter")
        return adapted, "all that PEFT can adapt" if explicit else "all-linear"
    raise ValueError("PEFT adapts none of its layers")


def _base_auto(case: Case) -> str:
    """The class of the base: a task's head is trained on a model without it."""
    if TASKS[case.auto] not in HEADED:
        return case.auto
    is_encoder = case.model_type in _mapping("AutoModelForMaskedLM")  # bare, with its pooler
    is_bare = is_encoder or TASKS[case.auto] == "QUESTION_ANS"
    autos = ["AutoModelForCausalLM", "AutoModel", case.auto]
    return next(auto for auto in autos[is_bare:] if case.model_type in _mapping(auto))


def _new_modules(model: Any, missing: Sequence[str]) -> list[str]:
    """The modules that hold the parameters which the base lacks: a head, and what leads to it."""
    found = set()
    for name in missing:
        words = name.split(".")
        deep = 2 if words[0] == model.base_model_prefix else 1
        found.add(".".join(words[:deep] if len(words) > deep else words[:-1]))
    return sorted(found)


def _float32() -> Any:
    import torch

    return torch.float32


def _adaptable(model: Any, new: Sequence[str]) -> list[str]:
    """Linear layers of even sizes, outside of new heads, that PEFT's forward does not ignore."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)
    try:
        output = head()
    except (NotImplementedError, AttributeError):
        output = None
    ignored = {id(m.out_proj) for m in model.modules() if hasattr(m, "in_proj_weight")}
    return [
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
        and id(module) not in ignored and all(n % 2 == 0 < n for n in module.weight.shape)
        and name not in HEADS and not any(f"{name}.".startswith(f"{head}.") for head in new)
    ]  # fmt: skip


def _ignored(adapted: Any) -> Iterator[str]:
    """Parameters of layers whose adapter PEFT's forward ignores, or that have no outputs."""
    for name, module in adapted.named_modules():
        if hasattr(module, "gralora_A") and not module.get_base_layer().weight.numel():
            yield f"{name}.gralora_A"
        if hasattr(module, "in_proj_weight"):
            yield from (f"{name}.{inner}" for inner, _ in module.named_parameters())


def _randomise(adapted: Any) -> None:
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "gralora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif parameter.requires_grad:  # a head that is trained whole
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _merge(folder: Path) -> tuple[int, str]:
    from gralora_convert.cli.entry import main as command

    arguments = ["merge", str(folder / "adapter"), "--base", str(folder / "base"),
                 "-o", str(folder / "out")]  # fmt: skip
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            command(arguments)
        except SystemExit as exit_:
            return int(exit_.code or 0), err.getvalue()
    return 0, err.getvalue()


def _compare(adapted: Any, auto: str, folder: Path, targets: str) -> Verdict:
    """Every parameter of the reloaded merge against base + PEFT's delta weight, then outputs."""
    import transformers

    from benchmarks import tiny

    inner = adapted.base_model.model
    merged = getattr(transformers, auto).from_pretrained(folder / "out", dtype=_float32())
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
        difference = _difference(found, expected)
        if not difference <= CLOSE_OUTPUTS:
            return Verdict("WRONG", f"outputs differ by {difference:.3g}")
        return Verdict("right", f"weights and outputs, {targets}")
    return Verdict("right", f"weights, {targets}")


def _difference(found: Any, expected: Any) -> float:
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
        difference = _difference(other.detach(), wanted)
        if difference > CLOSE:
            return f"{name} differs by {difference:.3g}"
    for name, parameter in inner.named_parameters():
        if "gralora_" in name or name.endswith(".base_layer.weight") or "original_module" in name:
            continue
        plain = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if plain not in found:
            return f"{plain} is not in the reloaded model"
        if _difference(found[plain].detach(), parameter.detach()) > CLOSE:
            return f"{plain} was changed"
    return ""


# all cases -------------------------------------------------------------------------------------


def _mapping(auto: str) -> set[str]:
    """The model types that an auto class knows."""
    import transformers

    names: Any = getattr(transformers, auto)._model_mapping._model_mapping
    return set(names)


def cases(chosen: Sequence[str]) -> list[Case]:
    import transformers

    types = sorted(set(chosen) or set(transformers.CONFIG_MAPPING.keys()))
    known = {auto: _mapping(auto) for auto in TASKS}
    return [Case(name, auto) for auto in TASKS for name in types if name in known[auto]]


def work() -> None:
    """A worker: cases from stdin, verdicts to stdout, a JSON line each."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answers, sys.stdout = sys.stdout, io.StringIO()
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                verdict = judge(Case(**json.loads(line)), Path(folder))
            except Exception as error:  # the comparison itself broke: as bad as a difference
                verdict = Verdict("WRONG", f"{type(error).__name__}: {str(error)[:300]}")
        print(json.dumps(asdict(verdict)), file=answers, flush=True)


class Worker:
    """A process that judges cases; replaced after BATCH cases, a crash or a timeout."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None
        self.count = 0

    def judge(self, case: Case) -> Verdict:
        if self.process is None or self.count >= BATCH:
            self._restart()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self.count += 1
        timer = threading.Timer(self.limit, process.kill)
        timer.start()
        began = time.monotonic()
        try:
            process.stdin.write(json.dumps(asdict(case)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return Verdict(**json.loads(line))
        self.stop()
        if time.monotonic() - began >= self.limit:
            return Verdict("not run", f"takes more than {self.limit:.0f} s")
        return Verdict("not run", "its process died")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _restart(self) -> None:
        self.stop()
        self.count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.architectures", "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip


def judge_all(
    every: Sequence[Case], limit: float, jobs: int, record: Path | None
) -> dict[Case, Verdict]:
    """The verdict of each case; those that `record` knows are taken from it, others added."""
    found = _recorded(record)
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in every:
        if case not in found:
            waiting.put(case)

    def run() -> None:
        worker = Worker(limit)
        with contextlib.suppress(queue.Empty):
            while True:
                case = waiting.get_nowait()
                verdict = found[case] = worker.judge(case)
                print(f"{case.model_type:30} {case.auto:36} {verdict.kind}: {verdict.reason}",
                      flush=True)  # fmt: skip
                if record is not None:
                    with record.open("a") as file:
                        file.write(json.dumps([asdict(case), asdict(verdict)]) + "\n")
        worker.stop()

    threads = [threading.Thread(target=run) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {case: found[case] for case in every}


def _recorded(record: Path | None) -> dict[Case, Verdict]:
    if record is None or not record.exists():
        return {}
    pairs = [json.loads(line) for line in record.read_text().splitlines()]
    return {Case(**case): Verdict(**verdict) for case, verdict in pairs}


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
    parser.add_argument("--table", type=Path, help="write the results there")
    parser.add_argument("--record", type=Path, help="resume: verdicts are kept there")
    parser.add_argument("--recorded", action="store_true", help="the cases in --record only")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of one case")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        return work()
    every = [case for case in cases(chosen.types) if case.auto in (chosen.auto or TASKS)]
    if chosen.recorded:
        known = _recorded(chosen.record)
        every = [case for case in every if case in known]
    found = judge_all(every, chosen.limit, chosen.jobs, chosen.record)
    text = table(found, "python -m benchmarks.architectures", len(cases([])))
    if chosen.table is not None:
        chosen.table.write_text(text)
    print(json.dumps(Counter(verdict.kind for verdict in found.values())))


if __name__ == "__main__":
    main()
