"""Which tensor of a merged checkpoint is which of those expected, whatever their names and layout.

Names may have a base-model prefix or lack it. Where more differs, those are one that transformers
loads as one: renamed, or the experts of a layer as a tensor each here and as one stack there.
(Biases of experts it knows in one layout each: conversion_mapping.py of transformers 5.23.0.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gralora_convert.base import Architecture, Kept, Merged, Patched, Recipe, Replaced, spellings
from gralora_convert.disk import DTYPE_BITS, Checkpoint, Rows, TensorSpec

Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Pairs:
    """What is expected, by name; what was found for it; and the names of what nothing expects.

    A stack that is several tensors on the other side is taken as those, under their names.
    """

    expected: Mapping[str, Kept | Merged | Patched | Replaced]
    found: Tensors
    others: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, merged: Checkpoint) -> "Pairs":
        expected, names = dict(recipe.tensors), _names_in(merged, recipe)
        found = {name: merged.tensors[there] for name, there in names.items()}
        known = set(names.values())
        missing, others = expected.keys() - found.keys(), merged.tensors.keys() - known
        for ours, theirs in _moved(recipe, merged) if missing and others else ():
            here, there = ({part.tensor for part in parts} for parts in (ours, theirs))
            if not (here <= missing and there <= others):
                continue
            stored, entry = merged.tensors[theirs[0].tensor], expected[ours[0].tensor]
            if len(ours) == len(theirs) == 1:
                found[ours[0].tensor] = stored
            elif len(theirs) == 1:
                found |= _pieces(stored, ours, recipe.base.tensors)
            elif isinstance(entry, Kept):
                pieces = _pieces(entry.spec, theirs, merged.tensors)
                found |= {name: merged.tensors[name] for name in pieces}
                expected |= {name: replace(entry, spec=spec) for name, spec in pieces.items()}
                if pieces:
                    del expected[ours[0].tensor]
            known |= there
        return cls(expected, found, tuple(name for name in merged.tensors if name not in known))


def _names_in(merged: Checkpoint, recipe: Recipe) -> Mapping[str, str]:
    """Expected name -> name in the merged checkpoint, which may carry the base-model prefix."""
    names = {}
    for name in recipe.tensors:
        candidates = spellings(name, recipe.prefixes)
        found = next((c for c in candidates if c in merged.tensors), None)
        if found is not None:
            names[name] = found
    return names


def _moved(
    recipe: Recipe, merged: Checkpoint
) -> Iterator[tuple[tuple[Rows, ...], tuple[Rows, ...]]]:
    """Where each parameter lies in the base, and where in the merged checkpoint, if all of it is
    one tensor in one of them and whole tensors in the other."""
    reading = recipe.architectures[0].reading
    here, there = (Architecture(held, reading=reading).layout for held in (recipe.base, merged))
    for parameter, ours in here.items():
        theirs = there.get(parameter, ())
        whole = _are_whole(ours, recipe.base.tensors) and _are_whole(theirs, merged.tensors)
        if whole and theirs and 1 in (len(ours), len(theirs)):
            yield ours, theirs


def _are_whole(parts: tuple[Rows, ...], tensors: Tensors) -> bool:
    return all(
        part.order is None and part.start == 0 and tensors[part.tensor].shape[:1] == (part.count,)
        for part in parts
    )


def _pieces(stack: TensorSpec, parts: tuple[Rows, ...], like: Tensors) -> Tensors:
    """What lies in a stack as the tensors `like` that `parts` name, by the rows of its matrices;
    nothing where their sizes do not agree."""
    bits = DTYPE_BITS[stack.dtype]
    width = stack.numel // max(sum(part.count for part in parts), 1)
    sizes = {part.tensor: part.count * width for part in parts}
    is_cut = all(like[name].numel == size for name, size in sizes.items())
    if stack.strides is not None or not is_cut or sum(sizes.values()) != stack.numel or bits % 8:
        return {}
    return {
        part.tensor: replace(
            stack, shape=like[part.tensor].shape, nbytes=sizes[part.tensor] * bits // 8,
            offset=stack.offset + part.first * width * bits // 8,
        )
        for part in parts
    }  # fmt: skip
