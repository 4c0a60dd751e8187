"""`verify`: do base + adapter and a merged checkpoint compute the same? Whoever made the merge.

Three depths. Weights: every element of every tensor against base + delta, within a bound that is
derived from the stored dtype. Modules: the full GraLoRA forward path of each module on probe
inputs, in the same pass. Model: the two models' outputs, as transformers loads them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from gralora_convert.adapters import CONFIG_NAME, Adapter, AdapterLike
from gralora_convert.base import (
    Reading,
    Recipe,
    combine,
    gathered,
    lost_steps,
    place_in,
    scales_of,
)
from gralora_convert.delta import Survival, device_for
from gralora_convert.disk import FLOATING, Checkpoint
from gralora_convert.errors import MisuseError, is_number, printable
from gralora_convert.output import Ranks, meeting, one_arithmetic_thread
from gralora_convert.verbs.verification.agreement import ModelComparison, NotRun
from gralora_convert.verbs.verification.audit import Row, audited
from gralora_convert.verbs.verification.factored import WRONG
from gralora_convert.verbs.verification.outputs import compare_models
from gralora_convert.verbs.verification.probes import PROBES

LEVELS = ("weights", "modules", "model")
SHOWN = 20  # wrong tensors in the text; JSON has all
MUCH_LOST, MUCH_NOISE = 0.9, 0.5  # kept below, or noise above: the dtype is too coarse
LITTLE = 0.01  # fewer of the elements that show an update are little evidence


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What `verify` found. `ok`: True when every level that was asked for agrees, False when one
    does not, None when the weights agree and `unanswered` says why more could not be seen."""

    rows: tuple[Row, ...]
    untouched: int
    slack: float
    level: str
    model: ModelComparison | None = None
    notes: tuple[str, ...] = field(default=())
    unanswered: str = ""
    titles: tuple[str, ...] = ()  # kind, r, k and alpha of each adapter

    @property
    def weights_ok(self) -> bool:
        return all(row.worst <= self.slack for row in self.rows)

    @property
    def modules_ok(self) -> bool:
        return all((row.output_worst or 0.0) <= self.slack for row in self.rows)

    @property
    def ok(self) -> bool | None:
        """Whether base + adapter and the merged checkpoint are the same function."""
        model = self.model is None or self.model.ok
        same = self.weights_ok and model and (self.level == "weights" or self.modules_ok)
        return None if same and self.unanswered else same

    @property
    def verdict(self) -> str:
        """`ok` in words."""
        if self.ok is None:
            return "no answer"
        return "same function" if self.ok else "NOT the same function"

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The tensors that are not what they should be, the worst first."""
        wrong = [row for row in self.rows if row.worst > self.slack]
        return tuple(sorted(wrong, key=lambda row: -row.worst))

    @property
    def survival(self) -> Survival:
        """What rounding kept of the whole update."""
        return sum((row.survival for row in self.rows if row.survival), Survival())

    @property
    def evidence(self) -> dict[str, Survival]:
        """By stored dtype, what its elements show of the updates that are right: where none of
        them changed, a merge without the update would look the same."""
        found: dict[str, Survival] = {}
        for row in self.rows:
            if row.survival and row.survival.energy and row.worst <= self.slack:
                found[row.dtype] = found.get(row.dtype, Survival()) + row.survival
        return found

    @property
    def least_kept(self) -> Row | None:
        """The module of which rounding kept least, the noisiest of equals."""
        held = [(row, row.survival) for row in self.rows if row.survival and row.survival.energy]
        return min(held, key=lambda pair: (pair[1].kept, -pair[1].noise), default=(None, None))[0]

    def as_json(self) -> dict[str, object]:
        worst = max(self.rows, key=lambda row: row.worst, default=None)
        outputs = [row for row in self.rows if row.output_worst is not None]
        farthest = max(outputs, key=lambda row: row.output_worst or 0.0, default=None)
        return {
            "ok": self.ok,
            "weights": {
                "ok": self.weights_ok,
                "worst": worst.worst if worst else 0.0,
                "worst_module": worst.module if worst else "",
                "rows": [row.as_json() for row in self.rows],
                "untouched": self.untouched,
            },
            "modules": None
            if self.level == "weights"
            else {
                "ok": self.modules_ok,
                "worst": farthest.output_worst if farthest else 0.0,
                "worst_module": farthest.module if farthest else "",
                "probes": PROBES,
                "rows": [{"module": r.module, "worst": r.output_worst} for r in outputs],
            },
            "model": self.model.as_json() if self.model else None,
            "survival": self._survival_json(),
            "evidence": {
                dtype: {"strength": _strength(seen), **seen.as_json(), "elements": seen.elements}
                for dtype, seen in self.evidence.items()
            },
            "notes": list(self.notes),
            "unanswered": self.unanswered or None,
        }

    def _survival_json(self) -> dict[str, object]:
        least = self.least_kept
        found: dict[str, object] = dict(self.survival.as_json())
        if least is not None and least.survival is not None:
            found["worst"] = {"module": least.module, **least.survival.as_json()}
        return found

    def as_text(self) -> str:
        """The verdict, what is wrong, and what rounding kept; a line each."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for row in self.wrong[:SHOWN]:
            is_own = f".{row.tensor}".rpartition(".")[0].endswith(f".{row.module}")
            inside = "" if is_own or not row.module else f" ({row.module})"
            yield f"{row.tensor}{inside}: {row.what} ({_times(row.worst)})"
        if len(self.wrong) > SHOWN:
            yield f"... and {len(self.wrong) - SHOWN} more tensors (the JSON lists all)"
        worst = max((row.worst for row in self.rows), default=0.0)
        yield (
            f"weights: {'equal' if self.weights_ok else 'NOT equal'} to base + adapter; "
            f"{len({row.tensor for row in self.rows})} tensors compared element by element, "
            f"{self.untouched} untouched; largest difference {_times(worst)}"
        )
        if self.level != "weights":
            outputs = max((row.output_worst or 0.0 for row in self.rows), default=0.0)
            yield (
                f"modules: outputs {'agree' if self.modules_ok else 'do NOT agree'} on {PROBES} "
                f"probe inputs each; largest difference {_times(outputs)}"
            )
        if self.model is not None:
            yield self.model.as_text()
            yield from self._settings(self.model)
            yield from self._contradiction(self.model)
        if self.weights_ok:
            yield from self._survival_lines()
            for dtype, seen in self.evidence.items():
                yield f"evidence in {dtype}: {_strength(seen)}, {_shown(seen)}"
        yield f"{self.verdict}: {self.unanswered}" if self.ok is None else self.verdict

    def _settings(self, model: ModelComparison) -> Iterator[str]:
        """What config.json says of the merged model alone, where that may be the reason."""
        if model.ok:
            return
        why = "; inputs as short as these need not show it" if model.agrees else ""
        for setting in (model.far if model.agrees else model.settings)[:SHOWN]:
            yield f"{setting}{why}"

    def _contradiction(self, model: ModelComparison) -> Iterator[str]:
        """What it means when weights and model disagree."""
        if self.weights_ok and not model.agrees:
            yield (
                "the weights are right, but transformers does not compute the same with them: look "
                "at what config.json, a tied weight or a renamed tensor makes of the merged folder"
            )
        elif model.agrees and not self.weights_ok:
            yield (
                "the outputs agree within rounding, but the weights decide: what is wrong is too "
                "small, or too far from these inputs, to show in the outputs"
            )

    def _survival_lines(self) -> Iterator[str]:
        whole, least = self.survival, self.least_kept
        if least is None or least.survival is None:
            return
        yield (
            f"rounding kept {whole.kept:.1%} of the update, noise {whole.noise:.1%} of it, "
            f"{whole.share_changed:.1%} of the weights changed"
        )
        part = least.survival
        yield f"least kept: {least.module}, {part.kept:.1%}, noise {part.noise:.1%}"
        if part.kept < MUCH_LOST or part.noise > MUCH_NOISE:
            yield 'much of the update is lost to the dtype: merge with `dtype="float32"`'


def _strength(seen: Survival) -> str:
    if not seen.changed:
        return "none"
    return "weak" if seen.share_changed < LITTLE else "strong"


def _shown(seen: Survival) -> str:
    if not seen.changed:
        return (
            f"no one of {seen.elements:,} measured elements shows the update: a merge without it "
            "is stored the same"
        )
    return f"{seen.changed:,} of {seen.elements:,} measured elements show the update"


def _times(ratio: float) -> str:
    return "not comparable" if ratio == WRONG else f"{ratio:.3g} x the rounding bound"


def verify(
    *adapters: AdapterLike,
    merged: Checkpoint | str | Path,
    base: Checkpoint | str | Path | None = None,
    weights: Sequence[float] | None = None,
    level: str | None = None,
    slack: float = 1.0,
    device: str = "cpu",
    text: str | None = None,
    key_map: Mapping[str, str] | None = None,
    fan_in_fan_out: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> Equivalence:
    """Whether `merged` is base + sum of weight * delta, by any tool that made it.

    Arguments:
        adapters: one or several, as in `merge`.
        weights: one for each adapter; default: those of the receipt beside `merged`, where it
            lists these adapters, else 1.
        level: `weights`, `modules` (adds outputs per module) or `model` (adds the whole model on
            token ids, on `text` through its tokenizer, or on other inputs made from its config).
            Where the model cannot be run, there is no answer (`ok` None). The default is `model`,
            which is left out with a note where it does not fit in memory, or where neither base
            nor merge has a config.json.
        slack: widens every bound by this factor; the bounds are derived, 1 is right.
        key_map, fan_in_fan_out: as in `merge`.

    Raises:
        InvalidAdapterError: the adapter has errors or does not fit the base.
        UnreadableError, UnsupportedError: a checkpoint.
        OutputError: another rank has failed, or is lost.

    The bound: half a unit in the last place of the stored dtype, plus the error of float32 sums,
    plus half a unit of the adapter's dtype where that has 16 bits (PEFT rounds the delta to it).
    """
    asked, level = level, "model" if level is None else level
    if level not in LEVELS:
        raise MisuseError(f"level {level!r} is none of {', '.join(LEVELS)}")
    if not is_number(slack) or slack <= 0:
        raise MisuseError(f"slack {slack!r} is not a positive, finite number")
    near = str(device_for(device, torch.float64))
    weighted, source, said = gathered(adapters, base, weights)
    opened, factors = [adapter for adapter, _ in weighted], [weight for _, weight in weighted]
    result = merged if isinstance(merged, Checkpoint) else Checkpoint.open(merged)
    if weights is None and (listed := _receipt_weights(opened, result)):
        factors = listed
        told = ", ".join(f"{weight:g}" for weight in factors)
        said.append(f"the receipt of the merge gives weight {told}: compared with that")
    reading = Reading.of(key_map, fan_in_fan_out, trust_remote_code)
    placements = [place_in(one, source, reading) for one in opened]
    recipe = combine(placements, factors, plain=_made_plain(source, result))
    ranks = ranks or Ranks()
    entries = [(name, one.spec.dtype, one.spec.shape) for name, one in recipe.tensors.items()]
    plan = repr([level, factors, entries])
    with meeting(ranks, result.path, plan) as others, one_arithmetic_thread():
        mine = audited(
            recipe, result, probe=level != "weights", device=near,
            progress=progress or (lambda count: None), ranks=ranks,
        )  # fmt: skip
        said_by = others.gather([asdict(row) for row in mine])
    found = [Row.of(row) for rows in said_by for row in rows]
    rows = tuple(row for row in found if row.worst or not row.kept)
    untouched = len(found) - len(rows)
    rows = _with_base_hint(rows, slack)
    lost = "of the adapter's pipeline is missing: other steps would run"
    rows += tuple(Row(name, "", WRONG, lost) for one in opened for name in lost_steps(one, result))
    notes = (
        *said,
        *(note for one in opened for note in _base_notes(one, source)),
        *_receipt_notes(recipe, result),
        *_folder_notes(result),
    )
    titles = tuple(one.title for one in opened)
    if level != "model" or not ranks.is_leader:
        return Equivalence(rows, untouched, slack, level, None, notes, titles=titles)
    comparison, remarks = compare_models(
        recipe, result, slack=slack, device=device, text=text,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    notes += remarks
    if isinstance(comparison, NotRun):
        why = f"the model was not run: {comparison.reason}"
        must_answer = comparison.is_blind or asked is not None
        blind = f'{why}. Compare without it: `level="modules"`' if must_answer else ""
        return Equivalence(rows, untouched, slack, level, None, (*notes, why), blind, titles)
    if comparison.ok:
        notes += tuple(f"{setting}; the outputs agree" for setting in comparison.settings)
    return Equivalence(rows, untouched, slack, level, comparison, notes, titles=titles)


def _made_plain(base: Checkpoint, merged: Checkpoint) -> list[str]:
    """The weights that are fp8 codes in the base, and plain numbers in the merged checkpoint: a
    merge may make more of them plain than it must."""
    tensors = merged.tensors
    held = scales_of(base).specs.keys() & tensors.keys()
    return [name for name in held if tensors[name].dtype in FLOATING]


def _with_base_hint(rows: tuple[Row, ...], slack: float) -> tuple[Row, ...]:
    """When untouched tensors differ, too, it is another base rather than a wrong merge."""
    changed = sum(row.kept for row in rows)
    if changed < 2 or not any(row.survival and row.worst > slack for row in rows):
        return rows
    hint = f"; {changed} untouched tensors differ, too: merged into another base?"
    return tuple(replace(row, what=row.what + hint) if row.worst > slack else row for row in rows)


def _base_notes(adapter: Adapter, base: Checkpoint) -> Iterator[str]:
    """What the receipt of the base says, where that is a merged checkpoint itself."""
    held = base.merged_adapters
    if held and adapter.sha256() in held:
        yield (
            f"the base {base.source} holds this adapter already: are `base` and `merged` in each "
            "other's place?"
        )


def _folder_notes(merged: Checkpoint) -> Iterator[str]:
    """What lies in the merged folder that was not compared, and that others may load."""
    if others := merged.other_weights:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield (
            f"{merged.path} holds {printable(others[0])}{more} beside the weights that were "
            "compared; a server may load it instead"
        )
    if merged.path.is_dir() and (merged.path / CONFIG_NAME).exists():
        yield (
            f"{merged.path} holds an {CONFIG_NAME}: where PEFT is installed, transformers puts "
            "that adapter onto the merged weights; move it out of the folder"
        )


def _listed(merged: Checkpoint) -> list[Mapping[str, object]]:
    """The adapters that the receipt of a merge lists."""
    inputs = (merged.receipt or {}).get("inputs")
    listed = inputs.get("adapters") if isinstance(inputs, Mapping) else None
    return [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []


def _receipt_weights(adapters: Sequence[Adapter], merged: Checkpoint) -> list[float] | None:
    """The weights that the receipt gives these adapters; None if it does not, or all are 1."""
    held = {one.get("sha256"): one.get("weight", 1.0) for one in _listed(merged)}
    found = [held.get(adapter.sha256()) for adapter in adapters] if held else []
    weights = [weight for weight in found if isinstance(weight, int | float) and is_number(weight)]
    if len(weights) < len(adapters) or all(weight == 1 for weight in weights):
        return None
    return weights


def _receipt_notes(recipe: Recipe, merged: Checkpoint) -> Iterator[str]:
    """What the receipt of a merge says that the adapters compared here cannot explain."""
    held = _listed(merged)
    if not held:  # an adapter is hashed for a reason only
        return
    named = ", ".join(f"{one.get('path')} (weight {one.get('weight', 1.0)})" for one in held)
    compared = {adapter.sha256(): weight for adapter, weight in recipe.weighted}
    if any(one.get("sha256") not in compared for one in held):
        others = f"{len(held)} adapters" if len(held) > 1 else "another adapter"
        yield f"the receipt of the merge lists {others}: {named}; a difference is expected"
    elif any(compared[str(one.get("sha256"))] != one.get("weight", 1.0) for one in held):
        yield f"the receipt of the merge lists {named}; other weights are compared here"
