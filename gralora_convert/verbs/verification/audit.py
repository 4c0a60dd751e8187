"""One pass over a merged checkpoint: every tensor against what base and adapter say it must be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gralora_convert.adapters import Adapter
from gralora_convert.base import Piece, Placement, Replacement, Target, spellings
from gralora_convert.delta import Delta, Survival, permute_rows, to_device
from gralora_convert.disk import FLOATING, Checkpoint, TensorSpec, read_torch, torch_dtype
from gralora_convert.verbs.verification.comparison import (
    WRONG,
    Comparison,
    Others,
    Update,
    difference,
)

__all__ = [
    "Audit",
    "Row",
]


NEIGHBOURS = 64  # modules of the same shape that a wrong one is compared with
SUM_ELEMENTS = 1 << 22  # of a replaced tensor: enough to see that a value was added
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "position_ids")
_TIED = ("lm_head.weight", "embed_tokens.weight", "decoder.weight", "decoder.bias")


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one tensor, or on the part of it that belongs to `module`: `worst` is the
    largest |difference| / bound (right: at most 1)."""

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


class Audit:
    """The rows of one merged checkpoint. After `rows` has ended, `untouched` counts the tensors
    that are the base's, `changed` those that should be and are not."""

    def __init__(
        self,
        adapter: Adapter,
        base: Checkpoint,
        merged: Checkpoint,
        placement: Placement,
        *,
        probe: bool,
        device: str,
        progress: Callable[[int], None],
    ) -> None:
        self.adapter, self.base, self.merged, self.placement = adapter, base, merged, placement
        self.probe, self.device, self.progress = probe, device, progress
        self.untouched = self.changed = 0
        self._names = _names_in(merged, placement, base)
        self._old_head = _old_head(placement, base)

    def rows(self) -> Iterator[Row]:
        """A row for each adapted or replaced tensor, and for each other one that is wrong."""
        expected: set[str] = set()
        pieces: dict[str, list[tuple[Target, Piece]]] = {}
        for target in self.placement.targets:
            for piece in target.pieces:
                pieces.setdefault(piece.output, []).append((target, piece))
        for output, held in pieces.items():
            expected.add(output)
            yield from self._targeted(output, held)
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

    # Adapted tensors -----------------------------------------------------------------------------

    def _targeted(self, output: str, held: list[tuple[Target, Piece]]) -> Iterator[Row]:
        module, piece = held[0][0].module, held[0][1]
        before, after = piece.source or self.base.tensors[piece.tensor], self._find(output)
        if after is None:
            tied = any(target.untied for target, _ in held)
            why = "is missing; the tied base weight is used instead" if tied else "is missing"
            yield Row(output, module, WRONG, why)
            return
        if after.shape != before.shape or after.dtype not in FLOATING:
            what = f"is {after.dtype} {after.shape}, {before.shape} was needed"
            yield Row(output, module, WRONG, what)
            return
        comparison = Comparison(
            before, after, [self._update(target, piece) for target, piece in held],
            probe=self.probe, device=self.device, progress=self.progress,
        )  # fmt: skip
        for found in comparison.found(self._others):
            module = found.module or _module_of(output)
            row = (found.worst, found.what, found.survival, found.output_worst)
            yield Row(output, module, *row)

    def _update(self, target: Target, piece: Piece) -> Update:
        delta: Delta = self.adapter.delta(target.module)
        begin, short = piece.delta_start, self.adapter.short_dtype(target.module)
        if piece.order is not None:
            delta, begin = permute_rows(self.adapter.delta(target.module), piece.order), 0
        return Update(
            target.module, to_device(delta, self.device), piece.start, piece.count, begin,
            target.transposed, None if short is None else torch_dtype(short),
        )  # fmt: skip

    def _others(self, module: str) -> Others:
        """The modules of the same shape, the nearest in the file first."""
        names = self.adapter.modules
        own, shape = names.index(module), self.adapter.shape(module)
        same = [name for name in names if name != module and self.adapter.shape(name) == shape]
        same.sort(key=lambda name: abs(names.index(name) - own))
        return [(name, partial(self.adapter.delta, name)) for name in same[:NEIGHBOURS]]

    # Replaced tensors ----------------------------------------------------------------------------

    def _replaced(self, output: str, source: TensorSpec) -> Row:
        after, module = self._find(output), _module_of(output)
        if after is None:
            return Row(output, module, WRONG, "is missing; the adapter brings it")
        ratio = difference(source, after, self.progress)
        what = (
            ""
            if ratio == 0
            else self._why_not_replaced(self.base.tensors.get(output), source, after)
        )
        return Row(output, module, ratio, what)

    def _why_not_replaced(
        self, before: TensorSpec | None, source: TensorSpec, after: TensorSpec
    ) -> str:
        what = "is not the value that the adapter brings"
        if before is None or before.shape != after.shape:
            return what
        if difference(before, after, _ignore) == 0:
            return f"{what}: it was not replaced, the base's value is still there"
        if after.numel <= SUM_ELEMENTS and after.dtype in FLOATING and before.dtype in FLOATING:
            total = read_torch(before).double() + read_torch(source).double()
            found = read_torch(after)
            if torch.allclose(found.double(), total, rtol=torch.finfo(found.dtype).eps):
                return f"{what}: it was added to the base's value instead of replacing it"
        return what

    def _patched(self, output: str, parts: Sequence[Replacement]) -> Row:
        """A tensor of the base of which rows are replaced (a bias that is fused on disk)."""
        after, module = self._find(output), _module_of(output)
        if after is None or after.shape != self.base.tensors[output].shape:
            return Row(output, module, WRONG, "is missing or of another shape")
        wanted = read_torch(self.base.tensors[output]).clone()
        for part in parts:
            values = read_torch(part.source)
            picked = list(part.order) if part.order is not None else None
            begin = part.source_start
            chosen = values[begin : begin + part.count] if picked is None else values[picked]
            assert part.start is not None
            wanted[part.start : part.start + part.count] = chosen
        found = read_torch(after)
        if torch.equal(found, wanted.to(found.dtype)):
            return Row(output, module, 0.0)
        if difference(self.base.tensors[output], after, _ignore) == 0:
            return Row(output, module, WRONG, "was not replaced, the base's value is still there")
        return Row(output, module, WRONG, "is not the value that the adapter brings")

    # All others ----------------------------------------------------------------------------------

    def _kept(self, name: str, spec: TensorSpec) -> Iterator[Row]:
        after = self._find(name)
        if after is None:
            if name not in self._old_head and not _is_droppable(name, spec, self.base):
                yield Row(name, _module_of(name), WRONG, "is missing")
            return
        ratio = difference(spec, after, self.progress)
        if ratio:
            self.changed += 1
            what = "was changed, but no adapter touches it"
            if after.shape != spec.shape:
                what = f"has shape {after.shape}, {spec.shape} was needed; no adapter touches it"
            yield Row(name, _module_of(name), ratio, what)
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
        if name.endswith(_TIED) and any(difference(twin, spec, _ignore) == 0 for twin in twins):
            self.untouched += 1
            return
        what = "is in the merged checkpoint, but neither in base nor adapter"
        yield Row(name, _module_of(name), WRONG, what)


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _names_in(merged: Checkpoint, placement: Placement, base: Checkpoint) -> Mapping[str, str]:
    """Expected name -> name in the merged checkpoint, which may carry the base-model prefix."""
    wanted = [*base.tensors, *(p.output for t in placement.targets for p in t.pieces)]
    wanted += [r.output for r in placement.replacements]
    names = {}
    for name in dict.fromkeys(wanted):
        candidates = spellings(name, placement.architecture.text.prefixes)
        found = next((c for c in candidates if c in merged.tensors), None)
        if found is not None:
            names[name] = found
    return names


def _old_head(placement: Placement, base: Checkpoint) -> frozenset[str]:
    """The base's head, outside its bare model, where the trained function does not use it: the
    adapter brings another head, or was trained on the bare model. transformers leaves it out."""
    for prefix in placement.architecture.text.prefixes:
        inside = f"{prefix}."
        outside = frozenset(name for name in base.tensors if not name.startswith(inside))
        other = any(
            not replacement.output.startswith(inside) and replacement.output not in base.tensors
            for replacement in placement.replacements
        )
        bare = any(
            piece.tensor == f"{inside}{target.module}.weight"
            for target in placement.targets
            for piece in target.pieces
        )
        if len(outside) < len(base.tensors) and (other or bare):
            return outside
    return frozenset()


def _is_droppable(name: str, spec: TensorSpec, base: Checkpoint) -> bool:
    """Whether transformers leaves a tensor out when it saves: a second copy of a tied weight, a
    buffer that is computed."""
    if name.endswith(_COMPUTED):
        return True
    return name.endswith(_TIED) and any(
        other.name != name and other.shape == spec.shape and difference(other, spec, _ignore) == 0
        for other in base.tensors.values()
    )


def _ignore(count: int) -> None:
    pass
