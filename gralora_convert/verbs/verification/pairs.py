"""Which tensor of a merged checkpoint is which of those expected, whatever their names and layout.

Names may have a base-model prefix or lack it. Where more differs, those are one that transformers
loads as one: renamed, or the experts of a layer as a tensor each here and as one stack there.
(Biases of experts it knows in one layout each: conversion_mapping.py of transformers 5.23.0.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gralora_convert.base import (
    Architecture,
    Kept,
    Merged,
    Patched,
    Recipe,
    Replaced,
    moved,
    pieces,
    spellings,
)
from gralora_convert.disk import Checkpoint, TensorSpec

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
        reading = recipe.architectures[0].reading
        both = (Architecture(held, reading=reading) for held in (recipe.base, merged))
        for ours, theirs in moved(*both) if missing and others else ():
            here, there = ({part.tensor for part in parts} for parts in (ours, theirs))
            if not (here <= missing and there <= others):
                continue
            stored, entry = merged.tensors[theirs[0].tensor], expected[ours[0].tensor]
            if len(ours) == len(theirs) == 1:
                found[ours[0].tensor] = stored
            elif len(theirs) == 1:
                found |= pieces(stored, ours, recipe.base.tensors)
            elif isinstance(entry, Kept):
                cut = pieces(entry.spec, theirs, merged.tensors)
                found |= {name: merged.tensors[name] for name in cut}
                expected |= {name: replace(entry, spec=spec) for name, spec in cut.items()}
                if cut:
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
