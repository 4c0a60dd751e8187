"""The linear layers that differ between two checkpoints, by their names in memory."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from gralora_convert.base import Architecture, read_parameter
from gralora_convert.delta import Dense, half_ulp, is_finite
from gralora_convert.disk import FLOATING, Rows, TensorSpec, torch_dtype
from gralora_convert.errors import InvalidAdapterError, UnsupportedError

ROWS = 128  # of a weight that are looked at together
Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer that differs: its name in memory, where its weight lies in both checkpoints,
    and its (out, in); `transposed`: stored (in, out)."""

    name: str
    parts: tuple[Rows, ...]
    shape: tuple[int, int]
    transposed: bool
    before: Tensors = field(repr=False)
    after: Tensors = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """float32 holds the difference of two weights of 16 bits far below their rounding."""
        specs = [held[part.tensor] for part in self.parts for held in (self.before, self.after)]
        short = all(spec.dtype in ("BF16", "F16") for spec in specs)
        return torch.float32 if short else torch.float64

    def delta(self, device: str) -> Dense:
        difference = read_parameter(self.parts, self.after).to(device, self.dtype)
        difference -= read_parameter(self.parts, self.before).to(device)
        if not is_finite(difference):
            raise InvalidAdapterError(
                "the difference of the two weights is not finite", where=self.name,
                hint="Leave it out with `exclude`.",
            )  # fmt: skip
        return Dense(difference.T if self.transposed else difference)

    @property
    def nbytes(self) -> int:
        """Bytes of the difference."""
        rows, columns = self.shape
        return self.dtype.itemsize * rows * columns

    def rounding2(self) -> float | None:
        """The squared norm that rounding the tuned weight to 16 bits accounts for: a twelfth of
        the squared unit in the last place, element by element. None for wider weights."""
        dtype = self.after[self.parts[0].tensor].dtype
        if dtype not in ("BF16", "F16"):
            return None
        weight = read_parameter(self.parts, self.after)
        found = 0.0
        for start in range(0, len(weight), ROWS):
            unit = 2 * half_ulp(weight[start : start + ROWS].float(), torch_dtype(dtype))
            found += float(unit.square_().sum()) / 12
        return found


def linear_layers(
    names: Architecture, changed: Set[str], before: Tensors, after: Tensors
) -> tuple[list[Module], set[str]]:
    """The linear layers (the output head is none) of which a tensor changed; and the tensors of
    which a changed part is no linear layer."""
    listed = names.linear_modules()
    known, found, lost = None if listed is None else set(listed), list[Module](), set[str]()

    def add(parameter: str, parts: tuple[Rows, ...]) -> bool:
        module = _module(names, known, parameter, parts, before, after)
        found.extend([module] if module else [])
        return module is not None

    for name, spec in before.items():
        if name in changed and names.is_whole(name):
            add(names.parameter(name), (Rows(name, 0, spec.shape[0] if spec.shape else 1),))
    for parameter, parts in names.origins.items():
        if not any(p.tensor in changed and not names.is_whole(p.tensor) for p in parts):
            continue
        if _differs(parts, before, after) and not add(parameter, parts):
            lost.update(part.tensor for part in parts)
    return found, lost


def _module(
    names: Architecture,
    linear: Set[str] | None,
    parameter: str,
    parts: tuple[Rows, ...],
    before: Tensors,
    after: Tensors,
) -> Module | None:
    """A parameter as a linear layer; None when it is none. `linear` are the known ones."""
    name = parameter.removesuffix(".weight")
    pairs = [(before[part.tensor], after[part.tensor]) for part in parts]
    if name == parameter or any(
        len(old.shape) != 2 or old.shape != new.shape or not {old.dtype, new.dtype} <= FLOATING
        for old, new in pairs
    ):
        return None
    if linear is None:
        if names.is_embedding(name) or name.endswith("lm_head"):
            return None
        transposed = names.reading.is_transposed(name) or False
        # one that is not square fits its module only as it is stored: PEFT loads it, or says no
        is_unsaid = names.reading.is_transposed(name) is None and names.may_hold_conv1d
        if is_unsaid and _is_square(pairs[0][0], parts):
            raise UnsupportedError(
                "differs and is square, and whether it is an nn.Linear, a Conv1D or none of them "
                "cannot be told without the architecture", where=name,
                hint="Put the model's config.json beside its weights, or say it: "
                f"`fan_in_fan_out={ {name: False} }` for nn.Linear, "
                f"`fan_in_fan_out={ {name: True} }` for Conv1D, `exclude={[name]}` to leave it "
                "out; * stands for any part of a name.",
            )  # fmt: skip
    elif name not in linear or names.is_uncalled(name) or _is_read_past(names, name, parts):
        return None
    else:
        transposed = names.kind(name) == "Conv1D"
    rows, columns = sum(part.count for part in parts), pairs[0][0].shape[1]
    return Module(name, parts, (columns, rows) if transposed else (rows, columns), transposed,
                  before, after)  # fmt: skip


def _is_read_past(names: Architecture, name: str, parts: Sequence[Rows]) -> bool:
    """Whether the forward reads the layer's weight past an adapter on it."""
    return names.is_attention_output(name, parts[0].tensor.removesuffix(".weight"))


def _is_square(spec: TensorSpec, parts: Sequence[Rows]) -> bool:
    return sum(part.count for part in parts) == spec.shape[1]


def _differs(parts: Sequence[Rows], before: Tensors, after: Tensors) -> bool:
    """Whether the rows of one parameter differ; others of the same tensor may."""
    return not torch.equal(
        read_parameter(parts, before).double(), read_parameter(parts, after).double()
    )
