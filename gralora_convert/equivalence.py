"""`verify`: do base + adapter and a merged checkpoint compute the same? Whoever made the merge.

Three depths. Weights: every element of every tensor against base + delta, within a bound that is
derived from the stored dtype. Modules: the full GraLoRA forward path of each module on probe
inputs, in the same pass. Model: the two models' outputs, as transformers loads them.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gralora_convert.adapter import Adapter
from gralora_convert.checkpoint import Checkpoint
from gralora_convert.delta import Delta, Gralora, permute_rows, rows, terms
from gralora_convert.diagnosis import BlockShares, mistakes, verdict
from gralora_convert.errors import MisuseError
from gralora_convert.layer import forward_path
from gralora_convert.outputs import ModelComparison, compare_models
from gralora_convert.pieces import Piece, Placement, Replacement, Target
from gralora_convert.placement import place
from gralora_convert.rounding import Survival, magnitude_rows, survival, tolerance, worst_ratio
from gralora_convert.tensors import FLOATING, TensorSpec, read_bytes, read_torch, torch_dtype

__all__ = ["Equivalence", "Row", "verify"]

TILE_ELEMENTS = 1 << 20  # per tile and float64 array: 8 MiB each
PROBES = 4
WRONG = sys.float_info.max  # the ratio of what is missing or not finite; JSON has no infinity
LEVELS = ("weights", "modules", "model")


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one tensor: `worst` is the largest |difference| / bound (right: at most 1)."""

    tensor: str
    module: str
    worst: float
    what: str = ""
    survival: Survival | None = None
    output_worst: float | None = None

    def as_json(self) -> dict[str, object]:
        row: dict[str, object] = {"tensor": self.tensor, "module": self.module, "worst": self.worst}
        if self.what:
            row["what"] = self.what
        return row | (self.survival.as_json() if self.survival else {})


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What `verify` found; `ok` when every level that was run agrees."""

    rows: tuple[Row, ...]
    untouched: int
    slack: float
    level: str
    model: ModelComparison | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def weights_ok(self) -> bool:
        return all(row.worst <= self.slack for row in self.rows)

    @property
    def modules_ok(self) -> bool:
        return all((row.output_worst or 0.0) <= self.slack for row in self.rows)

    @property
    def ok(self) -> bool:
        """Whether base + adapter and the merged checkpoint are the same function."""
        model = self.model is None or self.model.ok
        return self.weights_ok and model and (self.level == "weights" or self.modules_ok)

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The tensors that are not what they should be, the worst first."""
        wrong = [row for row in self.rows if row.worst > self.slack]
        return tuple(sorted(wrong, key=lambda row: -row.worst))

    @property
    def survival(self) -> Survival:
        """What rounding kept of the whole update."""
        return sum((row.survival for row in self.rows if row.survival), Survival())

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
            "survival": self.survival.as_json(),
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """The verdict, what is wrong, and what rounding kept; a line each."""
        kept = self.survival
        lines = [f"{row.tensor}: {row.what} ({_times(row.worst)})" for row in self.wrong]
        worst = max((row.worst for row in self.rows), default=0.0)
        lines.append(
            f"weights: {'equal' if self.weights_ok else 'NOT equal'} to base + adapter; "
            f"{len(self.rows)} tensors compared element by element, {self.untouched} untouched; "
            f"largest difference {_times(worst)}"
        )
        if self.level != "weights":
            outputs = max((row.output_worst or 0.0 for row in self.rows), default=0.0)
            lines.append(
                f"modules: outputs {'agree' if self.modules_ok else 'do NOT agree'} on {PROBES} "
                f"probe inputs each; largest difference {_times(outputs)}"
            )
        if self.model is not None:
            lines.append(self.model.as_text())
        if kept.elements and self.weights_ok:
            lines.append(
                f"rounding kept {kept.kept:.1%} of the update, noise {kept.noise:.1%} of it, "
                f"{kept.share_changed:.1%} of the weights changed"
            )
            if kept.kept < 0.9 or kept.noise > 0.5:
                lines.append("much of the update is lost to the dtype: merge with --dtype float32")
        lines.append("same function" if self.ok else "NOT the same function")
        return "\n".join(lines)


def _times(ratio: float) -> str:
    return "not comparable" if ratio == WRONG else f"{ratio:.3g} x the rounding bound"


def verify(
    adapter: Adapter | str | Path,
    *,
    merged: Checkpoint | str | Path,
    base: Checkpoint | str | Path | None = None,
    level: str = "model",
    slack: float = 1.0,
    device: str = "cpu",
    text: str | None = None,
    key_map: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Equivalence:
    """Whether `merged` is base + adapter, by any tool that made it.

    Arguments:
        level: `weights`, `modules` (adds outputs per module) or `model` (adds the whole model on
            token ids, or on `text` through its tokenizer; left out with a note where the model
            does not fit in memory).
        slack: widens every bound by this factor; the bounds are derived, 1 is right.

    Raises:
        InvalidAdapterError: the adapter has errors or does not fit the base.
        UnreadableError, UnsupportedError: a checkpoint.

    The bound: half a unit in the last place of the stored dtype, plus the error of float32 sums,
    plus half a unit of the adapter's dtype where that has 16 bits (PEFT rounds the delta to it).
    """
    if level not in LEVELS:
        raise MisuseError(f"level {level!r} is none of {', '.join(LEVELS)}")
    if not slack > 0:
        raise MisuseError(f"slack {slack} is not positive")
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    named = base or opened.base_source
    if named is None:
        raise MisuseError("names no base model", where=opened.path, hint="Give --base.")
    source = named if isinstance(named, Checkpoint) else Checkpoint.open(named)
    result = merged if isinstance(merged, Checkpoint) else Checkpoint.open(merged)
    placement, report = place(opened, source, key_map=key_map, trust_remote_code=trust_remote_code)
    report.require_ok(opened.path)
    assert placement is not None
    audit = _Audit(opened, source, result, placement, level != "weights", device, progress)
    found = tuple(audit.rows())
    notes: tuple[str, ...] = ()
    comparison = None
    if level == "model":
        comparison, notes = compare_models(
            opened, source, result, slack=slack, device=device, text=text,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    found = _with_base_hint(found, audit.differing, slack)
    return Equivalence(found, audit.untouched, slack, level, comparison, notes)


def _with_base_hint(rows: tuple[Row, ...], differing: int, slack: float) -> tuple[Row, ...]:
    """When untouched tensors differ, too, it is another base rather than a wrong merge."""
    if differing < 2 or not any(row.module and row.worst > slack for row in rows):
        return rows
    return tuple(
        Row(r.tensor, r.module, r.worst, f"{r.what}; {differing} untouched tensors differ, too: "
            "merged into another base?", r.survival, r.output_worst)
        if r.worst > slack else r
        for r in rows
    )  # fmt: skip


class _Audit:
    """One pass over a merged checkpoint."""

    def __init__(
        self,
        adapter: Adapter,
        base: Checkpoint,
        merged: Checkpoint,
        placement: Placement,
        probe: bool,
        device: str,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.adapter, self.base, self.merged, self.placement = adapter, base, merged, placement
        self.probe, self.device = probe, torch.device(device)
        self.progress = progress or (lambda count: None)
        self.untouched = self.differing = 0
        self._names = _names_in(merged, placement, base)

    def rows(self) -> Iterator[Row]:
        """A row for each adapted or replaced tensor, and for each other one that is wrong."""
        expected: set[str] = set()
        pieces: dict[str, list[tuple[Target, Piece]]] = {}
        for target in self.placement.targets:
            for piece in target.pieces:
                pieces.setdefault(piece.output, []).append((target, piece))
        for output, held in pieces.items():
            expected.add(output)
            yield self._targeted(output, held)
        patches: dict[str, list[Replacement]] = {}
        for replacement in self.placement.replacements:
            expected.add(replacement.output)
            if replacement.start is None:
                yield self._replaced(replacement.output, replacement.source)
            else:
                patches.setdefault(replacement.output, []).append(replacement)
        for output, parts in patches.items():
            yield self._patched(output, parts)
        for name, spec in self.base.tensors.items():
            if name not in expected:
                yield from self._kept(name, spec)
        known = {self._names.get(name) for name in (*expected, *self.base.tensors)}
        for name in self.merged.tensors:
            if name not in known:
                yield from self._extra(name)

    def _find(self, name: str) -> TensorSpec | None:
        found = self._names.get(name)
        return None if found is None else self.merged.tensors[found]

    def _targeted(self, output: str, held: list[tuple[Target, Piece]]) -> Row:
        module = held[0][0].module
        piece = held[0][1]
        before, after = piece.source or self.base.tensors[piece.tensor], self._find(output)
        if after is None:
            tied = any(target.untied for target, _ in held)
            why = "is missing; the tied base weight is used instead" if tied else "is missing"
            return Row(output, module, WRONG, why)
        if after.shape != before.shape or after.dtype not in FLOATING:
            what = f"is {after.dtype} {after.shape}, {before.shape} was needed"
            return Row(output, module, WRONG, what)
        deltas = [(target, piece, self._delta(target, piece)) for target, piece in held]
        comparison = _Comparison(before, after, deltas, self._factor_dtype(module), self.probe)
        comparison.run(self.progress)
        what = "" if comparison.worst <= 1.0 else comparison.explain()
        return Row(
            output, module, comparison.worst, what, comparison.survival, comparison.output_worst
        )

    def _delta(self, target: Target, piece: Piece) -> Delta:
        delta = self.adapter.delta(target.module)
        return delta if piece.order is None else permute_rows(delta, piece.order)

    def _factor_dtype(self, module: str) -> torch.dtype | None:
        """The adapter's dtype when it has 16 bits: other tools round the delta to it."""
        dtypes = {spec.dtype for spec in self.adapter.roles[module].values()}
        short = dtypes & {"F16", "BF16"}
        return torch_dtype(min(short)) if short else None

    def _replaced(self, output: str, source: TensorSpec) -> Row:
        after = self._find(output)
        if after is None:
            return Row(output, output, WRONG, "is missing; the adapter brings it")
        difference = _difference(source, after, self.progress)
        what = "" if difference == 0 else "is not the value that the adapter brings"
        return Row(output, output, difference, what)

    def _patched(self, output: str, parts: Sequence[Replacement]) -> Row:
        """A tensor of the base of which rows are replaced (a bias that is fused on disk)."""
        after = self._find(output)
        if after is None or after.shape != self.base.tensors[output].shape:
            return Row(output, output, WRONG, "is missing or of another shape")
        wanted = read_torch(self.base.tensors[output]).clone()
        for part in parts:
            rows = read_torch(part.source)
            picked = list(part.order) if part.order is not None else None
            begin = part.source_start
            chosen = rows[begin : begin + part.count] if picked is None else rows[picked]
            assert part.start is not None
            wanted[part.start : part.start + part.count] = chosen
        found = read_torch(after)
        if torch.equal(found, wanted.to(found.dtype)):
            return Row(output, output, 0.0)
        return Row(output, output, WRONG, "is not the value that the adapter brings")

    def _kept(self, name: str, spec: TensorSpec) -> Iterator[Row]:
        after = self._find(name)
        if after is None:
            if not _is_droppable(name, spec, self.base):
                yield Row(name, name, WRONG, "is missing")
            return
        difference = _difference(spec, after, self.progress)
        if difference:
            self.differing += 1
            yield Row(name, name, difference, "was changed, but no adapter touches it")
        else:
            self.untouched += 1

    def _extra(self, name: str) -> Iterator[Row]:
        """A tensor that neither base nor adapter has; the copy of a tied weight is none."""
        spec = self.merged.tensors[name]
        twins = [
            other
            for other in self.base.tensors.values()
            if other.shape == spec.shape
            and name.rpartition(".")[2] == other.name.rpartition(".")[2]
        ]
        if name.endswith(("lm_head.weight", "embed_tokens.weight")) and any(
            _difference(twin, spec, lambda count: None) == 0 for twin in twins
        ):
            self.untouched += 1
            return
        yield Row(name, name, WRONG, "is in the merged checkpoint, but neither in base nor adapter")


def _names_in(merged: Checkpoint, placement: Placement, base: Checkpoint) -> dict[str, str]:
    """Expected name -> name in the merged checkpoint, which may carry the base-model prefix."""
    wanted = [*base.tensors, *(p.output for t in placement.targets for p in t.pieces)]
    wanted += [r.output for r in placement.replacements]
    prefixes = placement.architecture.prefixes
    names = {}
    for name in dict.fromkeys(wanted):
        candidates = [name]
        for prefix in prefixes:
            candidates += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            candidates += [c.removesuffix(old) + new for c in candidates if c.endswith(old)]
        found = next((c for c in candidates if c in merged.tensors), None)
        if found is not None:
            names[name] = found
    return names


def _is_droppable(name: str, spec: TensorSpec, base: Checkpoint) -> bool:
    """Whether transformers leaves a tensor out when it saves: a second copy of a tied weight, a
    buffer that is computed."""
    if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "position_ids")):
        return True
    if not name.endswith(
        ("lm_head.weight", "embed_tokens.weight", "decoder.weight", "decoder.bias")
    ):
        return False
    return any(
        other.name != name and other.shape == spec.shape and _difference(other, spec, _ignore) == 0
        for other in base.tensors.values()
    )


def _ignore(count: int) -> None:
    pass


def _difference(one: TensorSpec, other: TensorSpec, progress: Callable[[int], None]) -> float:
    """0 when `other` is `one` (in its own dtype), else the largest difference in units of half the
    last place of `other`'s dtype; WRONG where that means nothing."""
    if one.shape != other.shape:
        return WRONG
    worst = 0.0
    size = max(1, TILE_ELEMENTS)
    for start in range(0, one.numel, size):
        stop = min(start + size, one.numel)
        progress((stop - start) * other.nbytes // max(other.numel, 1))
        if one.dtype == other.dtype:
            width = one.nbytes // one.numel
            if read_bytes(one, start * width, stop * width) == read_bytes(
                other, start * width, stop * width
            ):
                continue
        if one.dtype not in FLOATING or other.dtype not in FLOATING:
            return WRONG
        dtype = torch_dtype(other.dtype)
        expected = _elements(one, start, stop).to(dtype).double()
        found = _elements(other, start, stop).double()
        bound = tolerance(found, expected, magnitude=torch.zeros(()), terms=0, dtype=dtype)
        if not torch.equal(expected, found):
            worst = max(worst, min(worst_ratio(found, expected, bound), WRONG), 2.0)
    return worst


def _elements(spec: TensorSpec, start: int, stop: int) -> Tensor:
    width = spec.nbytes // spec.numel
    data = read_bytes(spec, start * width, stop * width)
    return torch.frombuffer(data, dtype=torch_dtype(spec.dtype))


class _Comparison:
    """One stored matrix against base + deltas, tile by tile, in float64."""

    def __init__(
        self,
        before: TensorSpec,
        after: TensorSpec,
        deltas: list[tuple[Target, Piece, Delta]],
        factor_dtype: torch.dtype | None,
        probe: bool,
    ) -> None:
        self.before, self.after, self.deltas = before, after, deltas
        self.dtype, self.factor_dtype = torch_dtype(after.dtype), factor_dtype
        self.transposed = deltas[0][0].transposed
        self.worst = 0.0
        self.survival = Survival()
        self.output_worst: float | None = None
        first = deltas[0][2]
        k = first.k if isinstance(first, Gralora) and len(deltas) == 1 else 1
        self.shares = BlockShares.zeros(k)
        self._probe = _Probe(before.shape, deltas, self.transposed) if probe else None

    def tiles(self) -> Iterator[tuple[int, int]]:
        count = max(1, TILE_ELEMENTS // self.before.shape[1])
        for start in range(0, self.before.shape[0], count):
            yield start, min(start + count, self.before.shape[0])

    def run(self, progress: Callable[[int], None]) -> None:
        for start, stop in self.tiles():
            before, after = _rows(self.before, start, stop), _rows(self.after, start, stop)
            delta, magnitude, products = self._expected(start, stop)
            exact = before + delta
            bound = tolerance(
                after, exact, magnitude=before.abs() + magnitude, terms=products, dtype=self.dtype,
                delta=delta, delta_dtype=self.factor_dtype,
            )  # fmt: skip
            ratio = worst_ratio(after, exact, bound)
            if not bool(after.isfinite().all()):
                ratio = WRONG
            self.worst = max(self.worst, min(ratio, WRONG))
            self.survival += survival(before, after, delta)
            rounded = exact.to(self.dtype).double()
            self.shares.add(
                after - before,
                rounded - before,
                delta,
                start,
                self.before.shape[0],
                self.transposed,
            )
            if self._probe is not None:
                self._probe.add(before, after, bound, start, stop)
            progress((stop - start) * self.after.nbytes // self.after.shape[0])
        if self._probe is not None:
            self.output_worst = min(self._probe.worst(), WRONG)

    def _expected(self, start: int, stop: int) -> tuple[Tensor, Tensor, int]:
        """Delta rows, a bound of their sums of absolute products, and products per element."""
        shape = (stop - start, self.before.shape[1])
        delta, magnitude = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        products = 0
        for _, piece, value in self.deltas:
            first, last = max(start, piece.start), min(stop, piece.start + piece.count)
            if first >= last:
                continue
            begin = first - piece.start + (0 if piece.order else piece.delta_start)
            span = (begin, begin + last - first)
            place = slice(first - start, last - start)
            delta[place] += rows(value, *span, transposed=self.transposed)
            magnitude[place] += magnitude_rows(value, *span, transposed=self.transposed)
            products += terms(value)
        return delta, magnitude, products

    def explain(self) -> str:
        """What happened, in a clause; tries the usual mistakes on the stored weights."""
        if self.worst == WRONG:
            return "holds NaN or infinity"
        named = self._mistake() if len(self.deltas) == 1 else None
        return verdict(self.shares, named)

    def _mistake(self) -> str | None:
        """The mistake whose delta leaves by far the smallest residual, if any does."""
        _, piece, delta = self.deltas[0]
        candidates = [("", delta), *mistakes(delta)]
        residuals = [0.0] * len(candidates)
        for start, stop in self.tiles():
            moved = _rows(self.after, start, stop) - _rows(self.before, start, stop)
            begin = start - piece.start + (0 if piece.order else piece.delta_start)
            for i, (_, value) in enumerate(candidates):
                part = rows(value, begin, begin + stop - start, transposed=self.transposed)
                residuals[i] += float((moved - part).square().sum())
        best = min(range(len(candidates)), key=residuals.__getitem__)
        return candidates[best][0] if residuals[best] < 0.5 * residuals[0] else None


def _rows(spec: TensorSpec, start: int, stop: int) -> Tensor:
    width = spec.shape[1]
    return _elements(spec, start * width, stop * width).double().view(stop - start, width)


class _Probe:
    """Probe inputs through a module: base + full adapter path against the merged weight."""

    def __init__(
        self,
        shape: tuple[int, ...],
        deltas: list[tuple[Target, Piece, Delta]],
        transposed: bool,
    ) -> None:
        self.transposed = transposed
        in_features, out_features = shape if transposed else shape[::-1]
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(PROBES, in_features, dtype=torch.float64, generator=generator)
        self.difference = torch.zeros(PROBES, out_features, dtype=torch.float64)
        self.bound = torch.zeros(PROBES, out_features, dtype=torch.float64)
        for _, piece, delta in deltas:
            path = forward_path(delta, self.x)
            if transposed:
                self.difference -= path
            else:
                begin = 0 if piece.order else piece.delta_start
                place = slice(piece.start, piece.start + piece.count)
                self.difference[:, place] -= path[:, begin : begin + piece.count]

    def add(self, before: Tensor, after: Tensor, bound: Tensor, start: int, stop: int) -> None:
        x = self.x[:, start:stop] if self.transposed else self.x
        place = slice(None) if self.transposed else slice(start, stop)
        left, right, widths = (w if self.transposed else w.T for w in (before, after, bound))
        self.difference[:, place] += x @ right - x @ left
        self.bound[:, place] += x.abs() @ widths

    def worst(self) -> float:
        return worst_ratio(self.difference, torch.zeros_like(self.difference), self.bound)
