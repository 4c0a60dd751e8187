"""Which tensor of a tuned checkpoint is which of its base's, whatever their names and layout."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gralora_convert.base import Architecture, Reading, moved, pieces
from gralora_convert.disk import Checkpoint, TensorSpec, same_values
from gralora_convert.errors import UnsupportedError
from gralora_convert.verbs.layers import Tensors


@dataclass(frozen=True, slots=True)
class Pairing:
    """The tensors of both checkpoints under the same names, those of the first where it has them
    (a stack that is several tensors on the other side is taken as those, under their names); the
    parameters that only the second has, each with the outermost module that is new; and notes."""

    before: Tensors
    after: Tensors
    added: Mapping[str, tuple[str, TensorSpec]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def as_tuned(before: Checkpoint, after: Checkpoint, reading: Reading) -> Architecture:
    """The base as the tuned model's class has it (another head, or none), where that is another
    class of the same family and the two call their tensors differently, or the base names none."""
    own, name = Architecture(before, reading=reading), next(iter(after.architectures), None)
    is_named = bool(before.architectures) and before.tensors.keys() == after.tensors.keys()
    if is_named or name in (None, *before.architectures):
        return own
    named = replace(own, class_name=name)
    if after.model_type not in own.text.types or (model := named.blueprint) is None:
        return own
    return named if type(model.model).__name__ == name else own


def paired(names: Architecture, others: Architecture) -> Pairing:
    """The tensors of a base and of its tuned model. Where names differ, those are one that are
    loaded as one; what is not loaded, or a copy that ties make, is no matter.

    Raises:
        UnsupportedError: one of them has more.
    """
    if names.base.tensors.keys() == others.base.tensors.keys():
        return Pairing(names.base.tensors, others.base.tensors)
    old, new = _cut_alike(names, others)
    alone = old.keys() ^ new.keys()
    there = {parameter: name for name, parameter in others.parameters.items()}
    here = {module for tensor in names.base.tensors for module in _above(names.parameter(tensor))}
    renamed, spare, lost = dict[str, str](), set[str](), list[str]()
    added = dict[str, tuple[str, TensorSpec]]()
    for name, parameter in names.parameters.items():
        if name in alone and there.get(parameter) in alone:
            renamed[name] = there[parameter]
    matched = {*renamed, *renamed.values()}
    for name in sorted(alone - matched):
        held = names if name in old else others
        parameter = held.parameter(name)
        outer = next((m for m in reversed(_above(parameter)) if m not in here), None)
        tied = [there[p] for p in others.sharing(parameter) if p in there and there[p] != name]
        if name in held.base.tensors and _is_spare(held, name):
            spare.add(name)
        elif held is others and names.has_parameter(parameter) and outer is not None:
            added[parameter] = outer, new[name]
        elif held is names and tied:
            renamed[name] = tied[0]
        else:
            lost.append(name)
    if lost:
        raise UnsupportedError(
            f"{len(lost)} tensors are in one checkpoint only, first {lost[0]}",
            where=others.base.path,
            hint="Extract from a model with the same tensors as its base.",
        )
    more = f" and {len(spare) - 1} more" if len(spare) > 1 else ""
    notes = (
        [f"{min(spare)}{more}: in one checkpoint only, and not needed: left out"] if spare else []
    )
    old = {name: spec for name, spec in old.items() if name not in spare}
    return Pairing(old, {name: new[renamed.get(name, name)] for name in old}, added, notes)


def _cut_alike(
    names: Architecture, others: Architecture
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """The tensors of both, with stacks cut where the other has a tensor for each matrix."""
    old, new = dict(names.base.tensors), dict(others.base.tensors)
    alone = old.keys() ^ new.keys()
    for ours, theirs in moved(names, others):
        if len(ours) == len(theirs) or not {part.tensor for part in (*ours, *theirs)} <= alone:
            continue
        parts, like, stack, side = (
            (ours, old, theirs[0].tensor, new) if len(theirs) == 1
            else (theirs, new, ours[0].tensor, old)
        )  # fmt: skip
        if cut := pieces(side[stack], parts, like):
            del side[stack]
            side |= cut
    return old, new


def _is_spare(names: Architecture, tensor: str) -> bool:
    """Whether the model is the same without a tensor: it is not loaded, or one that is tied to it
    has its values."""
    tensors, known = names.base.tensors, names.parameters
    shared = set(names.sharing(known[tensor])) if tensor in known else set()
    return names.is_ignored(tensor) or any(
        other != tensor and parameter in shared and same(tensors[tensor], tensors[other])
        for other, parameter in known.items()
    )


def _above(parameter: str) -> list[str]:
    """The modules that a parameter lies within, the closest first."""
    words = parameter.split(".")
    return [".".join(words[:end]) for end in range(len(words) - 1, 0, -1)]


def same(one: TensorSpec, other: TensorSpec) -> bool:
    return one.shape == other.shape and same_values(one, other)
