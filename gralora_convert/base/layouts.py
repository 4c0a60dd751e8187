"""One parameter in two checkpoints of a model: a tensor here, several there (experts, stacked)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gralora_convert.base.architecture import Architecture
from gralora_convert.disk import DTYPE_BITS, Rows, TensorSpec

Tensors = Mapping[str, TensorSpec]


def moved(
    one: Architecture, other: Architecture
) -> Iterator[tuple[tuple[Rows, ...], tuple[Rows, ...]]]:
    """Where each parameter lies in both, if all of it is one tensor in one of them and whole
    tensors in the other."""
    for parameter, ours in one.layout.items():
        theirs = other.layout.get(parameter, ())
        whole = _are_whole(ours, one.base.tensors) and _are_whole(theirs, other.base.tensors)
        if whole and theirs and 1 in (len(ours), len(theirs)):
            yield ours, theirs


def _are_whole(parts: tuple[Rows, ...], tensors: Tensors) -> bool:
    return all(
        part.order is None and part.start == 0 and tensors[part.tensor].shape[:1] == (part.count,)
        for part in parts
    )


def pieces(stack: TensorSpec, parts: tuple[Rows, ...], like: Tensors) -> Tensors:
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
