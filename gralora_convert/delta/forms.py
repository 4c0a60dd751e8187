"""Delta weights as values: GraLoRA, Hybrid GraLoRA, LoRA, dense; torch only, no files.

Index order (PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight; arXiv 2505.20355, eq. 4):
in = k*m, out = k*p, r = k*s; A4 = A.view(k, m, k, s)[n, i, j, t] and
B4 = B.view(k, k, s, p)[j, n, t, o]

    delta[j*p + o, n*m + i] = scaling * sum_t A4[n, i, j, t] * B4[j, n, t, o]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from gralora_convert.errors import MisuseError


@dataclass(frozen=True, eq=False)
class Gralora:
    """The update of one module: A (k, in/k, r), B (k, r, out/k), and for Hybrid GraLoRA
    general_A (h, in), general_B (out, h), all under one scaling.

    Any floating dtypes. scaling is alpha / (r + h).

    Raises:
        ValueError: the shapes do not belong together, r is not a multiple of k, only one general
            factor is given, or a dtype is not floating.

    >>> hybrid = Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 0.5,
    ...                  torch.ones(1, 6), torch.ones(10, 1))
    >>> hybrid.k, hybrid.r, hybrid.s, hybrid.hybrid_r, hybrid.in_features, hybrid.out_features
    (2, 4, 2, 1, 6, 10)

    Layout of PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """

    A: Tensor
    B: Tensor
    scaling: float
    general_A: Tensor | None = None
    general_B: Tensor | None = None

    def __post_init__(self) -> None:
        found = (tuple(self.A.shape), tuple(self.B.shape))
        if [len(shape) for shape in found] != [3, 3] or found[1][:2] != (self.k, self.r):
            raise ValueError(f"A {found[0]} and B {found[1]} need one k and one r")
        if self.k < 1 or self.r % self.k:
            raise ValueError(f"r={self.r} is not a multiple of k={self.k}")
        check_floating(A=self.A, B=self.B, general_A=self.general_A, general_B=self.general_B)
        if self.general_A is None and self.general_B is None:
            return
        if self.general_A is None or self.general_B is None:
            raise ValueError("general_A and general_B come together")
        found = (tuple(self.general_A.shape), tuple(self.general_B.shape))
        h = self.hybrid_r if found[0] else 0
        if found != ((h, self.in_features), (self.out_features, h)):
            raise ValueError(
                f"general_A {found[0]} and general_B {found[1]} need shapes "
                f"(h, {self.in_features}) and ({self.out_features}, h)"
            )

    @property
    def k(self) -> int:
        return self.A.shape[0]

    @property
    def r(self) -> int:
        return self.A.shape[2]

    @property
    def s(self) -> int:
        return self.r // self.k

    @property
    def hybrid_r(self) -> int:
        return 0 if self.general_A is None else self.general_A.shape[0]

    @property
    def general(self) -> "Lora | None":
        """The general part as the LoRA that it is."""
        if self.general_A is None or self.general_B is None:
            return None
        return Lora(self.general_A, self.general_B, self.scaling)

    @property
    def in_features(self) -> int:
        return self.k * self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.k * self.B.shape[2]


@dataclass(frozen=True, eq=False)
class Lora:
    """The update scaling * B @ A with A (l, in), B (out, l); any floating dtypes.

    Raises:
        ValueError: the shapes do not belong together, or a dtype is not floating.

    >>> Lora(torch.ones(3, 8), torch.ones(12, 3), 2.0).r
    3

    Layout of PEFT 0.21.2, tuners/lora/layer.py, get_delta_weight.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def __post_init__(self) -> None:
        found = (tuple(self.A.shape), tuple(self.B.shape))
        if [len(shape) for shape in found] != [2, 2] or found[0][0] != found[1][1]:
            raise ValueError(f"A {found[0]} and B {found[1]} need shapes (l, in) and (out, l)")
        check_floating(A=self.A, B=self.B)

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]


@dataclass(frozen=True, eq=False)
class Dense:
    """The update itself, weight (out, in), of any floating dtype.

    Raises:
        ValueError: the weight is not a matrix, or its dtype is not floating.

    >>> Dense(torch.ones(3, 2)).out_features
    3
    """

    weight: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight {tuple(self.weight.shape)} needs shape (out, in)")
        check_floating(weight=self.weight)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


Delta = Gralora | Lora | Dense
Factored = TypeVar("Factored", Gralora, Lora)
AnyDelta = TypeVar("AnyDelta", bound=Delta)


def check_floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, a floating dtype was needed")


def terms(delta: Delta) -> int:
    """Products per element of the delta: s + h for GraLoRA, the rank for LoRA, 1 for dense.

    >>> terms(Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 1.0))
    2
    """
    match delta:
        case Gralora():
            return delta.s + delta.hybrid_r
        case Lora():
            return delta.r
        case Dense():
            return 1


def require_device(name: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device `name`, on which tensors of `dtype` can be made and read here.

    Raises:
        MisuseError: this torch has no such device, or the device no such numbers (mps: float64).

    >>> require_device("cpu")
    device(type='cpu')
    """
    if not isinstance(name, str):
        raise MisuseError(f"the device {name!r} is not a name such as 'cpu' or 'cuda:0'")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise MisuseError(
            f"`device={name!r}` cannot be used: torch knows no such device",
            hint="Is it cpu, cuda or mps?",
        ) from problem
    try:
        torch.zeros(1, dtype=dtype, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as problem:
        # torch asserts that it was built for cuda, and imports what other devices need
        reason = str(problem).split(". ")[0].split("\n")[0][:200]
        raise MisuseError(
            f"`device={name!r}` cannot be used: {reason}", hint="Is it cpu, cuda or mps?"
        ) from problem
    return device


def device_for(name: str, dtype: torch.dtype) -> torch.device:
    """The device `name` where it has numbers of `dtype`, else the CPU: mps knows no float64.

    Raises:
        MisuseError: as `require_device`.

    >>> device_for("cpu", torch.float64)
    device(type='cpu')
    """
    device = require_device(name)
    return torch.device("cpu") if (device.type, dtype) == ("mps", torch.float64) else device


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite: the least and the largest are, in one pass and without a copy.

    >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if not tensor.numel():
        return True
    least, largest = tensor.detach().aminmax()  # NaN if any value is
    return math.isfinite(least) and math.isfinite(largest)


def tensors_of(delta: Delta) -> dict[str, Tensor]:
    """The factors that a delta has (of a dense one: its weight) by the name of the field.

    >>> list(tensors_of(Lora(torch.ones(1, 2), torch.ones(3, 1), 1.0)))
    ['A', 'B']
    """
    values = ((field.name, getattr(delta, field.name)) for field in fields(delta))
    return {name: value for name, value in values if isinstance(value, Tensor)}


def mapped(delta: AnyDelta, change: Callable[[Tensor], Tensor]) -> AnyDelta:
    """The delta with each of its factors (of a dense one: its weight) changed."""
    changed = {name: change(tensor) for name, tensor in tensors_of(delta).items()}
    return replace(delta, **changed)  # type: ignore[arg-type]


def to_device(delta: AnyDelta, device: str | torch.device) -> AnyDelta:
    """The same delta with its tensors on `device`.

    >>> to_device(Lora(torch.ones(1, 2), torch.ones(3, 1), 1.0), "meta").A.is_meta
    True
    """
    return mapped(delta, lambda tensor: tensor.to(device))
