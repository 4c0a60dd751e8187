"""One pass over a merged checkpoint: every tensor against what base and adapter say it must be."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gralora_convert.adapters import Adapter
from gralora_convert.base import Kept, Merged, Patched, Recipe, Replaced, misread
from gralora_convert.disk import FLOATING, Checkpoint, TensorSpec, read_torch
from gralora_convert.output import Ranks
from gralora_convert.system import usable_cpus
from gralora_convert.verbs.verification.comparison import Comparison, Others, Row, difference
from gralora_convert.verbs.verification.expected import Expected
from gralora_convert.verbs.verification.factored import WRONG, Factored
from gralora_convert.verbs.verification.pairs import Pairs

WHOLE = 1 << 16  # elements: a matrix up to here is measured whole, of a larger one a sample
NEIGHBOURS = 64  # modules of the same shape that a wrong one is compared with
SUM_ELEMENTS = 1 << 22  # of a replaced tensor: enough to see that a value was added
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "position_ids")
_TIED = ("lm_head.weight", "embed_tokens.weight", "decoder.weight", "decoder.bias")


@dataclass(frozen=True)
class _Audit:
    """A recipe beside what was merged, and how to look."""

    recipe: Recipe
    merged: Checkpoint
    pairs: Pairs
    probe: bool
    device: str
    progress: Callable[[int], None]
    each: Callable[..., Iterator[Any]]  # map, by several workers

    def find(self, name: str) -> TensorSpec | None:
        return self.pairs.found.get(name)


def audited(
    recipe: Recipe,
    merged: Checkpoint,
    *,
    probe: bool,
    device: str,
    progress: Callable[[int], None],
    ranks: Ranks,
) -> Iterator[Row]:
    """A row for every tensor of the recipe, and for each one that is in `merged` besides: those
    that this rank looks at."""
    one_thread = partial(torch.set_num_threads, 1)  # of arithmetic: the workers are many enough
    with ThreadPoolExecutor(usable_cpus(), initializer=one_thread) as workers:
        pairs = Pairs.of(recipe, merged)
        yield from _rows(_Audit(recipe, merged, pairs, probe, device, progress, workers.map), ranks)


def _rows(audit: _Audit, ranks: Ranks) -> Iterator[Row]:
    old_head = _old_head(audit.recipe)
    for name, entry in ranks.share(audit.pairs.expected.items, _cost):
        match entry:
            case Merged():
                yield from _merged(audit, name, entry)
            case Replaced():
                yield _replaced(audit, name, entry.spec)
            case Patched():
                yield _patched(audit, name, entry)
            case Kept():
                yield from _kept(audit, name, entry.spec, name in old_head)
    if ranks.rank < ranks.size - 1:
        return
    linear = audit.recipe.architectures[0].linear_weights
    for name, why in misread(audit.recipe.scales, audit.merged, linear):
        yield Row(name, _module_of(name), WRONG, why)
    for name in audit.pairs.others:
        yield _extra(audit, name)


def _cost(tensor: tuple[str, Kept | Merged | Patched | Replaced]) -> int:
    """What looking at a tensor takes, in bytes compared."""
    _, entry = tensor
    return 1 + entry.spec.nbytes * (4 if isinstance(entry, Merged) else 1)


# Adapted tensors ----------------------------------------------------------------------------------


def _merged(audit: _Audit, output: str, entry: Merged) -> Iterator[Row]:
    before, after = entry.spec, audit.find(output)
    module = entry.updates[0].module
    if after is None:
        why = "is missing; the tied base weight is used instead" if entry.untied else "is missing"
        yield Row(output, module, WRONG, why)
        return
    if after.shape != before.shape or after.dtype not in FLOATING:
        what = f"is {after.dtype} {after.shape}, {entry.dtype} {before.shape} was needed"
        yield Row(output, module, WRONG, what)
        return
    is_large = before.numel > WHOLE
    comparison = Comparison(
        before, after, [Factored.of(update, audit.device) for update in entry.updates],
        Expected(before, after, entry.updates, audit.device) if is_large else None,
        probe=audit.probe, device=audit.device, progress=audit.progress, each=audit.each,
    )  # fmt: skip
    adapters = {update.module: update.adapter for update in entry.updates}
    for found in comparison.found(lambda module: _others(adapters[module], module)):
        held = found.module or _module_of(output)
        yield replace(found, tensor=output, module=held, dtype=after.dtype)


def _others(adapter: Adapter, module: str) -> Others:
    """The modules of the same shape, the nearest in the file first."""
    names = adapter.modules
    own, shape = names.index(module), adapter.shape(module)
    same = [name for name in names if name != module and adapter.shape(name) == shape]
    same.sort(key=lambda name: abs(names.index(name) - own))
    return [(name, partial(adapter.delta, name)) for name in same[:NEIGHBOURS]]


# Replaced tensors ---------------------------------------------------------------------------------


def _replaced(audit: _Audit, output: str, source: TensorSpec) -> Row:
    after, module = audit.find(output), _module_of(output)
    if after is None:
        return Row(output, module, WRONG, "is missing; the adapter brings it")
    ratio = difference(source, after, audit.progress)
    before = audit.recipe.base.tensors.get(output)
    what = _why_not_replaced(before, source, after) if ratio else ""
    return Row(output, module, ratio, what)


def _why_not_replaced(before: TensorSpec | None, source: TensorSpec, after: TensorSpec) -> str:
    what = "is not the value that the adapter brings"
    if before is None or before.shape != after.shape:
        return what
    if difference(before, after) == 0:
        return f"{what}: it was not replaced, the base's value is still there"
    if after.numel <= SUM_ELEMENTS and after.dtype in FLOATING and before.dtype in FLOATING:
        total = read_torch(before).double() + read_torch(source).double()
        found = read_torch(after)
        if torch.allclose(found.double(), total, rtol=torch.finfo(found.dtype).eps):
            return f"{what}: it was added to the base's value instead of replacing it"
    return what


def _patched(audit: _Audit, output: str, entry: Patched) -> Row:
    """A tensor of the base of which rows are replaced (a bias that is fused on disk)."""
    after, module = audit.find(output), _module_of(output)
    if after is None or after.shape != entry.spec.shape:
        return Row(output, module, WRONG, "is missing or of another shape")
    wanted = read_torch(entry.spec).clone()
    for rows, source in entry.parts:
        values = read_torch(source)
        chosen = slice(rows.first, rows.first + rows.count)
        picked = values[chosen] if rows.order is None else values[list(rows.order)]
        wanted[rows.start : rows.stop] = picked
    found = read_torch(after)
    if torch.equal(found, wanted.to(found.dtype)):
        return Row(output, module, 0.0)
    if difference(entry.spec, after) == 0:
        return Row(output, module, WRONG, "was not replaced, the base's value is still there")
    return Row(output, module, WRONG, "is not the value that the adapter brings")


# All others ---------------------------------------------------------------------------------------


def _kept(audit: _Audit, name: str, spec: TensorSpec, spare: bool) -> Iterator[Row]:
    after = audit.find(name)
    if after is None:
        if not spare and not _is_droppable(name, spec, audit.recipe.base):
            yield Row(name, _module_of(name), WRONG, "is missing")
        return
    ratio, what = difference(spec, after, audit.progress), ""
    if ratio:
        what = "was changed, but no adapter touches it"
        if after.shape != spec.shape:
            what = f"has shape {after.shape}, {spec.shape} was needed; no adapter touches it"
    yield Row(name, _module_of(name), ratio, what, kept=True)


def _extra(audit: _Audit, name: str) -> Row:
    """A tensor that neither base nor adapter has; the copy of a tied weight is none."""
    spec = audit.merged.tensors[name]
    leaf = name.rpartition(".")[2]
    twins = [
        other
        for other in audit.recipe.base.tensors.values()
        if other.shape == spec.shape and leaf == other.name.rpartition(".")[2]
    ]
    if name.endswith(_TIED) and any(difference(twin, spec) == 0 for twin in twins):
        return Row(name, _module_of(name), 0.0, kept=True)
    what = "is in the merged checkpoint, but neither in base nor adapter"
    if name in audit.recipe.base.tensors:
        what = "was left beside a weight that is plain now"
    return Row(name, _module_of(name), WRONG, what)


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _old_head(recipe: Recipe) -> frozenset[str]:
    """The base's head, outside its bare model, where the trained function does not use it: the
    adapter brings another head, or was trained on the bare model. transformers leaves it out."""
    base = recipe.base.tensors
    for prefix in recipe.prefixes:
        inside = f"{prefix}."
        outside = frozenset(name for name in base if not name.startswith(inside))
        other = any(not n.startswith(inside) and n not in base for n in recipe.replaced)
        bare = any(
            name == f"{inside}{update.module}.weight"
            for name, entry in recipe.merged.items()
            for update in entry.updates
        )
        if len(outside) < len(base) and (other or bare):
            return outside
    return frozenset()


def _is_droppable(name: str, spec: TensorSpec, base: Checkpoint) -> bool:
    """Whether transformers leaves a tensor out when it saves: a second copy of a tied weight, a
    buffer that is computed."""
    if name.endswith(_COMPUTED):
        return True
    return name.endswith(_TIED) and any(
        other.name != name and other.shape == spec.shape and difference(other, spec) == 0
        for other in base.tensors.values()
    )
