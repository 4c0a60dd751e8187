"""Parameters in memory -> rows of tensors on disk, by transformers' own conversion mapping.

transformers renames tensors while it loads them, and for some architectures cuts, joins or permutes
them (core_model_loading.py, conversion_mapping.py, 5.23). Renames are asked key by key, from the
real names on disk. Where values move, every row is followed: the parameters of the model are
replaced by the numbers of their rows and sent through the reverse conversion.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from gralora_convert.checkpoint import Checkpoint

__all__ = ["Origin", "origins"]


@dataclass(frozen=True, slots=True)
class Origin:
    """A part of a parameter on disk: rows `[start, start + count)` of `tensor` hold the rows
    `[delta_start, ...)` of the parameter, or, with `order`, the rows that it lists."""

    tensor: str
    start: int
    count: int
    delta_start: int = 0
    order: tuple[int, ...] | None = None


def origins(model: torch.nn.Module, base: Checkpoint) -> dict[str, tuple[Origin, ...]]:
    """Name of a parameter of `model` (on the meta device) -> where its rows lie in `base`.

    Parameters whose values do not lie on disk as whole rows are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, tuple[Origin, ...]] = {}
    for name, spec in base.tensors.items():
        parameter, converter = rename_source_key(name, renamings, converters, prefix, state)
        if converter is None and parameter in state and spec.shape:
            found[parameter] = (Origin(name, 0, spec.shape[0]),)
    moved = {n: t for n, t in state.items() if n not in found and 1 <= t.ndim <= 2}
    if converters:
        found |= _followed(model, moved, base, prefix)
    return found


def _followed(
    model: torch.nn.Module, moved: Mapping[str, torch.Tensor], base: Checkpoint, prefix: str
) -> dict[str, tuple[Origin, ...]]:
    """Origins of parameters whose rows the conversion moves."""
    from transformers.core_model_loading import revert_weight_conversion

    names, numbered, position = list(moved), {}, 0
    starts = {}
    for name in names:
        rows = moved[name].shape[0]
        ids = torch.arange(position, position + rows, dtype=torch.float64)
        numbered[name] = ids if moved[name].ndim == 1 else ids[:, None]
        starts[name] = position
        position += rows
    try:
        on_disk = revert_weight_conversion(model, numbered)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return {}  # an operation that needs more than rows
    pieces: dict[str, list[Origin]] = {name: [] for name in names}
    ends = {name: starts[name] + moved[name].shape[0] for name in names}
    for disk_name, ids in on_disk.items():
        tensor = _existing(disk_name, base, prefix)
        if tensor is None or base.tensors[tensor].shape[:1] != ids.shape[:1] or ids[0].numel() != 1:
            continue
        for name, origin in _segments(tensor, ids.flatten().long().tolist(), starts, ends):
            pieces[name].append(origin)
    return {
        name: tuple(found)
        for name, found in pieces.items()
        if sum(origin.count for origin in found) == moved[name].shape[0]
    }


def _existing(name: str, base: Checkpoint, prefix: str) -> str | None:
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in base.tensors), None)


def _segments(
    tensor: str, ids: list[int], starts: Mapping[str, int], ends: Mapping[str, int]
) -> Iterator[tuple[str, Origin]]:
    """The runs of rows of one disk tensor that belong to one parameter each."""
    row = 0
    while row < len(ids):
        name = next(n for n in starts if starts[n] <= ids[row] < ends[n])
        stop = row
        while stop < len(ids) and starts[name] <= ids[stop] < ends[name]:
            stop += 1
        order = [number - starts[name] for number in ids[row:stop]]
        if order == list(range(order[0], order[0] + len(order))):
            yield name, Origin(tensor, row, stop - row, order[0])
        else:
            yield name, Origin(tensor, row, stop - row, 0, tuple(order))
        row = stop
