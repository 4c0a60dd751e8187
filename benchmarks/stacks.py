"""Adapters and bases of two stacks (transformers and PEFT), crossed: merged here, loaded here.

    python -m benchmarks.stacks FOLDER --other PYTHON [--record FILE] [--table FILE] [TYPE ...]

PYTHON is the interpreter of an environment with another transformers and PEFT. Crossed are the
vision language models of `benchmarks.vlms`, each with 21 adapters, and every model type and auto
class that `benchmarks.tiny` builds small in both environments, with one adapter on all that PEFT
can adapt. The other stack makes a base; the stack here loads it and saves it its own way. Each
stack puts PEFT's GraLoRA with random values on its own base, and saves it, the outputs of the
unmerged model, and PEFT's own merge. Then each adapter is merged into the base of either stack by
the command line and loaded by the transformers of this environment. The judges are the outputs of
the unmerged model in the stack that trained it, and every weight of PEFT's merge there. Where the
model takes none of the inputs tried, or the bare model gives other outputs here than there, the
weights alone judge.

Cases run in processes of their own; `--record` keeps their results, and resumes. A case that is
not right stays in FOLDER.
"""

import argparse
import functools
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import tiny, vlms
from benchmarks.adapting import HEADED, TASKS, Case, adapt, base_auto, cases, float32
from benchmarks.architectures import CLOSE, CLOSE_OUTPUTS, Verdict, difference, merge
from benchmarks.architectures import why as short
from benchmarks.workers import Worker, WorkerDiedError, ask_all, recorded, serve

BY_HAND = "by hand"  # in place of an auto class: one of `vlms`
STACKS = ("other", "here")
MERGED = "merged by PEFT"
NO_JUDGE = "no_judge.txt"
Outputs = Mapping[str, torch.Tensor]


# by the stack of one environment ---------------------------------------------------------------


def _class(case: Case, for_base: bool = False) -> Any:
    if case.auto == BY_HAND:
        return type(vlms.FAMILIES[case.model_type]())
    return getattr(transformers, base_auto(case) if for_base else case.auto)


def _load(case: Case, folder: Path, for_base: bool = False) -> tuple[Any, list[str]]:
    """A model, and the parameters of it that the folder lacks."""
    torch.manual_seed(0)
    labels = TASKS.get(case.auto) in ("SEQ_CLS", "TOKEN_CLS") and not for_base
    options: dict[str, Any] = {"num_labels": 4} if labels else {}
    options |= {"dtype": float32(), "output_loading_info": True}
    model, info = _class(case, for_base).from_pretrained(folder, **options)
    return model.eval(), sorted(info["missing_keys"])


def make(case: Case, folder: Path, given: str | None) -> str:
    """A base, its adapters and what they give, into `folder`; '' or why some of it is missing."""
    folder.mkdir(parents=True)
    by_hand = case.auto == BY_HAND
    if given:
        model, missing = _load(case, Path(given), for_base=True)
        if missing:
            return f"does not find {missing[0]} in the other's save"
    elif by_hand:
        model = vlms.build(case.model_type)
    else:
        model = tiny.build(base_auto(case), case.model_type)
    model.save_pretrained(folder / "base")
    bare, missing = _load(case, folder / "base")
    if missing and TASKS.get(case.auto) not in HEADED:
        return f"does not find {missing[0]} in its own save"
    torch.save(_outputs(case, bare, folder.parent / "inputs.pt"), folder / "bare.pt")
    for name, adapted in _adapters(case, folder):
        found = _outputs(case, adapted.base_model.model.eval(), folder.parent / "inputs.pt")
        torch.save(found, folder / f"{name}.pt")
        _save_merged(case, adapted, folder / f"{name}, {MERGED}")
    return ""


def _save_merged(case: Case, adapted: Any, folder: Path) -> None:
    """PEFT's merge; a note that it is no judge where PEFT cannot merge, its own stack does not load
    what was saved, or it merges a head into the embeddings that share its weight."""
    named = list(adapted.named_parameters(remove_duplicate=False))
    layers = {id(p) for name, p in named if name.endswith(".base_layer.weight")}
    shared = [n for n, p in named if id(p) in layers and not n.endswith(".base_layer.weight")]
    try:
        merged = adapted.merge_and_unload()
        merged.save_pretrained(folder)
        lost = _other_weights(_load(case, folder)[0], merged)
        problem = f"it changes {shared[0]}" if shared else lost
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        folder.mkdir(exist_ok=True)
        (folder / NO_JUDGE).write_text(problem)


def _adapters(case: Case, folder: Path) -> Iterator[tuple[str, Any]]:
    if case.auto == BY_HAND:
        yield from vlms.adapters(lambda: _load(case, folder / "base")[0], folder)
    else:
        yield "adapter", adapt(case, folder / "base", folder / "adapter")[0].eval()


def _outputs(case: Case, model: Any, file: Path) -> Outputs:
    """Of the inputs in `file`, or the first that the model takes, which go there."""
    if file.exists():
        return tiny.outputs(model, torch.load(file))
    for given in (vlms if case.auto == BY_HAND else tiny).inputs(model):
        found = tiny.outputs(model, given)
        if found:
            torch.save(given, file)
            return found
    return {}


# by the stack here -----------------------------------------------------------------------------


def judge(case: Case, folder: Path) -> list[list[str]]:
    """Of each merge: the adapter, the stacks of adapter and base, what became of it, and why."""
    rows = []
    for trained in (folder / stack for stack in STACKS):
        for file in sorted(trained.glob("*.pt")):
            if not (trained / f"{file.stem}, {MERGED}").exists():
                continue
            for base in (folder / stack for stack in STACKS):
                if (base / "bare.pt").exists():
                    kind, why = _judge(case, trained, file.stem, base)
                    rows.append([file.stem, trained.name, base.name, kind, why])
    return rows


def _judge(case: Case, trained: Path, name: str, base: Path) -> tuple[str, str]:
    out = trained.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    status, text = merge(trained / name, base / "base", out)
    if status:
        return ("refused" if status == 2 else "WRONG"), text[:3000]
    ours, lacking = _load(case, out)
    if lacking:
        return "WRONG", f"{lacking[0]} is missing"
    right = _comparable(case, trained, torch.load(trained / f"{name}.pt"))
    seen = _gap(right, torch.load(trained / "bare.pt")) > CLOSE_OUTPUTS if right else False
    gap = _gap(_outputs(case, ours, trained.parent / "inputs.pt"), right) if seen else 0.0
    merged = trained / f"{name}, {MERGED}"
    peft, lost = (None, [""]) if (merged / NO_JUDGE).exists() else _load(case, merged)
    other_weights = "" if lost else _other_weights(ours, peft)
    if other_weights or (gap > CLOSE_OUTPUTS and not _is_drawn(case, trained)):
        return "WRONG", f"outputs differ by {gap:.2g}, weights: {other_weights or 'none'}"
    if seen and gap < CLOSE_OUTPUTS:
        return "right", "outputs"
    if lost:
        return "not judged", "no outputs to compare, and PEFT's own merge does not load as it was"
    return "right", f"weights: {'no outputs' if right else 'the forward is another here'}"


def _comparable(case: Case, trained: Path, right: Outputs) -> Outputs:
    """The outputs of a stack that its bare model gives here, too."""
    if trained.name == "here" or _is_drawn(case, trained):
        return right
    bare, here = torch.load(trained / "bare.pt"), torch.load(trained.parent / "here/bare.pt")
    return {
        name: values for name, values in right.items()
        if name in bare and _gap(here, {name: bare[name]}) < CLOSE_OUTPUTS
    }  # fmt: skip


def _is_drawn(case: Case, trained: Path) -> bool:
    """Whether a new head, drawn at random, lets the other stack's bare outputs say nothing."""
    return trained.name == "other" and TASKS.get(case.auto) in HEADED


def _gap(found: Outputs, expected: Outputs) -> float:
    """The largest relative difference of what both name; infinite when that is nothing."""
    both = [name for name in expected if name in found]
    if not both or any(found[name].shape != expected[name].shape for name in both):
        return float("inf")
    return max(difference(found[name], expected[name]) for name in both)


def _other_weights(found: torch.nn.Module, expected: torch.nn.Module) -> str:
    """The first tensor that differs; '' when none does."""
    ours, theirs = found.state_dict(), expected.state_dict()
    if ours.keys() != theirs.keys():
        return f"{sorted(ours.keys() ^ theirs.keys())[0]} is in one only"
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            return f"{name} has another shape"
        if difference(ours[name].float(), tensor.float()) > CLOSE:
            return f"{name} differs by {difference(ours[name].float(), tensor.float()):.2g}"
    return ""


# all cases -------------------------------------------------------------------------------------


def work(question: dict[str, Any]) -> Any:
    """What a process of either environment does."""
    if question["do"] == "stack":
        known = [asdict(case) for case in cases([])]
        return {"name": f"{version('transformers')} + {version('peft')}", "cases": known}
    case, folder = Case(**question["case"]), Path(question["folder"])
    try:
        if question["do"] == "make":
            return make(case, folder, question["given"])
        return judge(case, folder)
    except Exception as error:
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return told if question["do"] == "make" else [["", "", "", "WRONG", told]]


class Crossing:
    """Two processes, one of each environment, and what they say of a case."""

    def __init__(self, other: str, folder: Path, limit: float) -> None:
        pythons = zip(STACKS, (other, sys.executable), strict=True)
        self.folder = folder
        self.workers = {
            stack: Worker([python, "-m", "benchmarks.stacks", str(folder), "--worker"], limit)
            for stack, python in pythons
        }  # fmt: skip

    def ask(self, question: Any) -> Any:
        folder = self.folder / f"{question['auto']} {question['model_type']}"
        shutil.rmtree(folder, ignore_errors=True)
        answer = self._ask(question, folder)
        kinds = Counter(kind for *_, kind, _ in answer["merges"])
        said = [f"{stack}: {why}" for stack, why in answer["not made"].items() if why]
        print(f"{question['model_type']:30} {question['auto']:36} {dict(kinds)} {said}", flush=True)
        if set(kinds) <= {"right"}:
            shutil.rmtree(folder, ignore_errors=True)
        return answer

    def _ask(self, case: Any, folder: Path) -> Any:
        not_made: dict[str, str] = {}
        for stack in STACKS:
            given = None if stack == "other" else str(folder / "other/base")
            question = {"do": "make", "case": case, "folder": str(folder / stack), "given": given}
            try:
                not_made[stack] = self.workers[stack].ask(question)
            except WorkerDiedError as reason:
                not_made[stack] = str(reason)
            if not (folder / stack / "bare.pt").exists():
                return {"not made": not_made, "merges": []}
        try:
            question = {"do": "judge", "case": case, "folder": str(folder)}
            return {"not made": not_made, "merges": self.workers["here"].ask(question)}
        except WorkerDiedError as reason:
            return {"not made": {**not_made, "here": str(reason)}, "merges": []}

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()


def _chosen(types: Sequence[str], known: Mapping[str, Any]) -> list[Any]:
    by_hand = [asdict(Case(family, BY_HAND)) for family in vlms.FAMILIES]
    both = [case for case in known["other"]["cases"] if case in known["here"]["cases"]]
    if not types:
        return by_hand + both
    every = {name: [c for c in by_hand + both if c["model_type"] == name] for name in types}
    return [case for name in types for case in every[name]]


def table(every: Sequence[Any], answers: Sequence[Any], names: Sequence[str]) -> str:
    """The results as Markdown: a row for each kind of family, then what is not right, and why."""
    columns = ("right by outputs", "right by weights", "refused", "not judged", "WRONG")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, set[str]] = defaultdict(set)
    for case, answer in zip(every, answers, strict=True):
        held, name = counts[case["auto"]], f"{case['model_type']} ({case['auto']})"
        held["cases"] += bool(answer["merges"])
        for stack, why in zip(names, answer["not made"].values(), strict=False):
            if why:
                reasons[f"nothing by {stack}: {short(Verdict('not run', why))}"].add(name)
        for *_, kind, why in answer["merges"]:
            told = f"right by {why.partition(':')[0]}" if kind == "right" else kind
            held[told] += 1
            if told not in ("right by outputs", "right by weights"):
                reasons[f"{kind}: {short(Verdict(kind, why))}"].add(name)
    total: Counter[str] = sum(counts.values(), Counter())
    lines = ["| auto class | families | " + " | ".join(columns) + " |",
             "|---|" + "---:|" * (1 + len(columns))]  # fmt: skip
    for auto, held in [*counts.items(), ("all", total)]:
        shown = " | ".join(str(held[column]) for column in ("cases", *columns))
        lines.append(f"| {auto} | {shown} |")
    lines += ["", *(f"* {len(reasons[why])} x {why}: {', '.join(sorted(reasons[why]))}"
                    for why in sorted(reasons))]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--other", help="the interpreter of the other stack")
    parser.add_argument("--table", type=Path, help="write the results there")
    parser.add_argument("--record", type=Path, help="resume: results are kept there")
    parser.add_argument("--recorded", action="store_true", help="what is in --record only")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one step of a case")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_intermixed_args()
    if chosen.worker:
        serve(work)
        return 0
    start: Callable[[], Crossing] = functools.partial(
        Crossing, chosen.other, chosen.folder.absolute(), chosen.limit
    )
    asker = start()
    known = {stack: worker.ask({"do": "stack"}) for stack, worker in asker.workers.items()}
    asker.stop()
    every = _chosen(chosen.types, known)
    if chosen.recorded:
        every = [case for case in every if json.dumps(case) in recorded(chosen.record)]
    answers = ask_all(every, start, chosen.jobs, chosen.record)
    text = table(every, answers, [known[stack]["name"] for stack in STACKS])
    if chosen.table is not None:
        chosen.table.write_text(text)
    return int("WRONG" in {row[3] for answer in answers for row in answer["merges"]})


if __name__ == "__main__":
    sys.exit(main())
