"""Delta weights as values: GraLoRA, Hybrid GraLoRA, LoRA, dense; torch only, no files.

Index order (PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight; arXiv 2505.20355, eq. 4):
in = k*m, out = k*p, r = k*s; A4 = A.view(k, m, k, s)[n, i, j, t] and
B4 = B.view(k, k, s, p)[j, n, t, o]

    delta[j*p + o, n*m + i] = scaling * sum_t A4[n, i, j, t] * B4[j, n, t, o]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar, overload

import torch
from torch import Tensor

from gralora_convert.bits import INFINITY, largest_magnitude
from gralora_convert.errors import MisuseError

__all__ = [
    "Delta",
    "Dense",
    "Gralora",
    "Lora",
    "are_finite",
    "direct_sum",
    "gralora_to_hybrid",
    "gralora_to_lora",
    "hybrid_to_gralora",
    "is_finite",
    "lora_to_gralora",
    "lora_to_hybrid",
    "pad",
    "pad_lora",
    "permute_rows",
    "require_device",
    "terms",
    "to_device",
    "with_scaling",
]


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
        _check_floating(A=self.A, B=self.B, general_A=self.general_A, general_B=self.general_B)
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
        _check_floating(A=self.A, B=self.B)

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
        _check_floating(weight=self.weight)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


Delta = Gralora | Lora | Dense
_INFINITY = {
    torch.float64: INFINITY["F64"], torch.float32: INFINITY["F32"],
    torch.float16: INFINITY["F16"], torch.bfloat16: INFINITY["BF16"],
}  # fmt: skip
Factored = TypeVar("Factored", Gralora, Lora)


def _check_floating(**tensors: Tensor | None) -> None:
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


def require_device(name: str) -> torch.device:
    """The device `name`, on which tensors can be made and read here.

    Raises:
        MisuseError: this torch has no such device.

    >>> require_device("cpu")
    device(type='cpu')
    """
    if not isinstance(name, str):
        raise MisuseError(f"the device {name!r} is not a name such as 'cpu' or 'cuda:0'")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise MisuseError(
            f"--device {name!r} cannot be used: torch knows no such device",
            hint="Is it cpu or cuda?",
        ) from problem
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as problem:
        # torch asserts that it was built for cuda, and imports what other devices need
        reason = str(problem).split(". ")[0].split("\n")[0][:200]
        raise MisuseError(
            f"--device {name!r} cannot be used: {reason}", hint="Is it cpu or cuda?"
        ) from problem
    return device


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; contiguous tensors on the CPU are judged by `are_finite`.

    >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    if tensor.dtype in _INFINITY and tensor.device.type == "cpu" and tensor.is_contiguous():
        bits = tensor.detach().view(-1).view(torch.uint8)  # one column may have any stride
        return are_finite(bits.numpy().data, tensor.dtype)
    return bool(tensor.isfinite().all())


def are_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether the values of a floating dtype of 16 bits or more, given by their bytes, are finite:
    many times faster than torch.isfinite.

    >>> are_finite(memoryview(bytes.fromhex("803f 807f")), torch.bfloat16)  # 1 and infinity
    False
    """
    return largest_magnitude(data, dtype.itemsize) < _INFINITY[dtype]


@overload
def to_device(delta: Gralora | Lora, device: str | torch.device) -> Gralora | Lora: ...
@overload
def to_device(delta: Delta, device: str | torch.device) -> Delta: ...
def to_device(delta: Delta, device: str | torch.device) -> Delta:
    """The same delta with its tensors on `device`.

    >>> to_device(Lora(torch.ones(1, 2), torch.ones(3, 1), 1.0), "meta").A.is_meta
    True
    """
    tensors = {
        field.name: value.to(device)
        for field in fields(delta)
        if isinstance(value := getattr(delta, field.name), Tensor)
    }
    return replace(delta, **tensors)  # type: ignore[arg-type]


def gralora_to_lora(delta: Gralora) -> Lora:
    """The LoRA with the same delta, at the rank k*r + h that generic factors need.

    GraLoRA  A (k, in/k, r), B (k, r, out/k)  ->  LoRA  A (k*r, in), B (out, k*r)
    Hybrid   ... and general (h, in), (out, h) ->       A (k*r + h, in), B (out, k*r + h)

    Nothing is computed: row (n, j, t) of A holds row (j, t) of A[n].T, so that A is block diagonal,
    and column (n, j, t) of B what it meets. The scaling stays (`with_scaling` folds it into B).

    >>> A, B = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    >>> lora = gralora_to_lora(Gralora(A, B, 0.5))
    >>> lora.A.shape, lora.B.shape
    (torch.Size([8, 6]), torch.Size([10, 8]))

    Layout after PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight.
    """
    k, s = delta.k, delta.s
    m, p = delta.A.shape[1], delta.B.shape[2]
    a4, b4 = delta.A.view(k, m, k, s), delta.B.view(k, k, s, p)
    a = delta.A.new_zeros(k, k, s, k, m)  # n, j, t, n', i
    b = delta.B.new_zeros(k, p, k, k, s)  # j', o, n, j, t
    for n in range(k):
        a[n, :, :, n] = a4[n].permute(1, 2, 0)  # j, t, i
    for j in range(k):
        b[j, :, :, j] = b4[j].permute(2, 0, 1)  # o, n, t
    lora_a, lora_b = a.reshape(k * delta.r, k * m), b.reshape(k * p, k * delta.r)
    if delta.general_A is not None and delta.general_B is not None:
        lora_a = torch.cat([lora_a, delta.general_A])
        lora_b = torch.cat([lora_b, delta.general_B], dim=1)
    return Lora(lora_a, lora_b, delta.scaling)


def lora_to_gralora(delta: Lora, k: int) -> Gralora:
    """The GraLoRA with the same delta and r = k*l: each block holds a copy of its factors.

    LoRA  A (l, in), B (out, l)  ->  GraLoRA  A (k, in/k, k*l), B (k, k*l, out/k)

    Nothing is computed; the scaling stays, so alpha = scaling * k*l. k = 1 is the LoRA itself.

    Raises:
        ValueError: k does not divide in and out.

    >>> lora_to_gralora(Lora(torch.ones(3, 8), torch.ones(12, 3), 2.0), 2).A.shape
    torch.Size([2, 4, 6])

    Rank min(l, in/k, out/k) of each of the k*k blocks: r is minimal while l fits in a block.
    """
    check_divides(k, delta.in_features, delta.out_features)
    a = delta.A.T.reshape(k, -1, 1, delta.r)  # n, i, j, t
    b = delta.B.reshape(k, -1, delta.r).transpose(1, 2).unsqueeze(1)  # j, n, t, o
    return Gralora(
        a.expand(-1, -1, k, -1).reshape(k, -1, k * delta.r),
        b.expand(-1, k, -1, -1).reshape(k, k * delta.r, -1),
        delta.scaling,
    )


def lora_to_hybrid(delta: Lora, k: int, r: int, generator: torch.Generator) -> Gralora:
    """The Hybrid GraLoRA with the same delta: the LoRA is the general part, the blocks are new.

    LoRA  A (l, in), B (out, l)  ->  general_A, general_B unchanged, A (k, in/k, r), B zero

    New A is uniform in +-1/sqrt(in/k) and new B zero, as PEFT starts a module; the scaling
    stays, so alpha = scaling * (r + l).

    Raises:
        ValueError: k does not divide in, out and r, or r < k.

    >>> lora = Lora(torch.ones(3, 8), torch.ones(12, 3), 2.0)
    >>> lora_to_hybrid(lora, 2, 4, torch.Generator().manual_seed(0)).hybrid_r
    3

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    check_divides(k, delta.in_features, delta.out_features, r)
    m, p = delta.in_features // k, delta.out_features // k
    a = kaiming(delta.A.new_empty(k, m, r), m, generator)
    return Gralora(a, delta.B.new_zeros(k, r, p), delta.scaling, delta.A, delta.B)


def hybrid_to_gralora(delta: Gralora) -> Gralora:
    """The pure GraLoRA with the same delta and r' = r + k*h, by concatenation in each slot.

    A (k, in/k, r), general_A (h, in)  ->  A (k, in/k, r + k*h); B likewise

    Nothing is computed; the scaling stays. A pure GraLoRA comes back as it is.

    >>> A, B = torch.ones(2, 4, 2), torch.ones(2, 2, 6)
    >>> hybrid_to_gralora(Gralora(A, B, 1.0, torch.ones(3, 8), torch.ones(12, 3))).r
    8

    Slots after PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight.
    """
    if delta.general_A is None or delta.general_B is None:
        return delta
    k, s = delta.k, delta.s
    tiled = lora_to_gralora(Lora(delta.general_A, delta.general_B, delta.scaling), k)
    a = [x.reshape(k, -1, k, x.shape[2] // k) for x in (delta.A, tiled.A)]  # n, i, j, t
    b = [x.reshape(k, k, x.shape[1] // k, -1) for x in (delta.B, tiled.B)]  # j, n, t, o
    r = k * (s + delta.hybrid_r)
    return Gralora(
        torch.cat(a, dim=3).reshape(k, -1, r), torch.cat(b, dim=2).reshape(k, r, -1), delta.scaling
    )


def gralora_to_hybrid(delta: Gralora, hybrid_r: int, generator: torch.Generator) -> Gralora:
    """The Hybrid GraLoRA with the same delta: its general part grows to rank hybrid_r.

    A, B unchanged, general_A (h, in)  ->  general_A (hybrid_r, in), general_B (out, hybrid_r)

    The new part of general_A is uniform in +-1/sqrt(in), that of general_B zero, as PEFT starts a
    module; the scaling stays, so alpha = scaling * (r + hybrid_r). A pure GraLoRA has h = 0.

    Raises:
        ValueError: hybrid_r < 1, or smaller than it was.

    >>> delta = Gralora(torch.ones(2, 4, 2), torch.ones(2, 2, 6), 1.0)
    >>> gralora_to_hybrid(delta, 3, torch.Generator().manual_seed(0)).general_A.shape
    torch.Size([3, 8])

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    check_divides(1, hybrid_r)
    general_A, general_B = delta.general_A, delta.general_B
    if general_A is None or general_B is None:
        general_A = delta.A.new_empty(0, delta.in_features)
        general_B = delta.B.new_empty(delta.out_features, 0)
    general = pad_lora(Lora(general_A, general_B, delta.scaling), hybrid_r, generator)
    return replace(delta, general_A=general.A, general_B=general.B)


def with_scaling(delta: Factored, scaling: float) -> Factored:
    """The same delta under another scaling: B and general_B times delta.scaling / scaling.

    The product is taken in float32 (float64 for float64 factors) and rounded to the dtype of B;
    exact where the ratio is a power of two.

    Raises:
        ValueError: the scaling is zero or not finite.

    >>> with_scaling(Lora(torch.ones(1, 2), torch.ones(2, 1), 2.0), 0.5).B.flatten()
    tensor([4., 4.])
    """
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling={scaling} has no inverse")
    if scaling == delta.scaling:
        return delta
    ratio = delta.scaling / scaling

    def scaled(B: Tensor) -> Tensor:
        return (B.to(torch.promote_types(B.dtype, torch.float32)) * ratio).to(B.dtype)

    if isinstance(delta, Lora):
        return replace(delta, B=scaled(delta.B), scaling=scaling)
    general_B = None if delta.general_B is None else scaled(delta.general_B)
    return replace(delta, B=scaled(delta.B), general_B=general_B, scaling=scaling)


def pad(delta: Gralora, r: int, generator: torch.Generator) -> Gralora:
    """The GraLoRA of larger r with the same delta: each of the k slots grows from s to r/k.

    A (k, in/k, r_old), B (k, r_old, out/k)  ->  A (k, in/k, r), B (k, r, out/k)

    The new part of A is uniform in +-1/sqrt(in/k), that of B zero, so that both can be trained;
    the scaling and the general part stay.

    Raises:
        ValueError: r is smaller than it was, or not a multiple of k.

    >>> delta = Gralora(torch.ones(2, 4, 2), torch.ones(2, 2, 6), 1.0)
    >>> pad(delta, 4, torch.Generator().manual_seed(0)).B[0, :, 0]
    tensor([1., 0., 1., 0.])

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    k, s, m = delta.k, delta.s, delta.A.shape[1]
    check_divides(k, r)
    if r < delta.r:
        raise ValueError(f"r={r} is smaller than the r={delta.r} of the delta")
    a = kaiming(delta.A.new_empty(k, m, k, r // k), m, generator)  # n, i, j, t
    b = delta.B.new_zeros(k, k, r // k, delta.B.shape[2])  # j, n, t, o
    a[..., :s] = delta.A.reshape(k, m, k, s)
    b[:, :, :s] = delta.B.reshape(k, k, s, -1)
    return replace(delta, A=a.reshape(k, m, r), B=b.reshape(k, r, -1))


def pad_lora(delta: Lora, r: int, generator: torch.Generator | None = None) -> Lora:
    """The LoRA of larger rank with the same delta: rows after the end of A, columns after B's.

    A (l, in), B (out, l)  ->  A (r, in), B (out, r)

    The new part is zero. With a generator that of A is uniform in +-1/sqrt(in), so that it can be
    trained. The scaling stays.

    Raises:
        ValueError: r is smaller than it was.

    >>> pad_lora(Lora(torch.ones(1, 2), torch.ones(3, 1), 1.0), 2).B[0]
    tensor([1., 0.])

    PEFT 0.21.2, tuners/lora/layer.py, reset_lora_parameters.
    """
    more = r - delta.r
    if more < 0:
        raise ValueError(f"r={r} is smaller than the r={delta.r} of the delta")
    a = delta.A.new_zeros(more, delta.in_features)
    if generator is not None:
        a = kaiming(a, delta.in_features, generator)
    b = delta.B.new_zeros(delta.out_features, more)
    return replace(delta, A=torch.cat([delta.A, a]), B=torch.cat([delta.B, b], dim=1))


def kaiming(tensor: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    """The tensor filled uniformly in +-1/sqrt(fan_in): kaiming_uniform_ with a = sqrt(5).

    >>> float(kaiming(torch.empty(100), 4, torch.Generator().manual_seed(0)).abs().max()) <= 0.5
    True

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    bound = 1 / math.sqrt(fan_in)
    values = torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return tensor.copy_(values.uniform_(-bound, bound, generator=generator))


def check_divides(k: int, *sizes: int) -> None:
    """Raises ValueError unless k >= 1 divides all sizes and none of them is zero."""
    for size in sizes:
        if k < 1 or size < 1 or size % k:
            raise ValueError(f"{size} is not a positive multiple of k={k}")


def direct_sum(matrices: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix of these blocks; one block is itself.

    >>> direct_sum([torch.ones(1, 1), torch.ones(1, 2)])
    tensor([[1., 0., 0.],
            [0., 1., 1.]])
    """
    if len(matrices) == 1:
        return matrices[0]
    result: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return result


def permute_rows(delta: Gralora | Lora, order: Sequence[int]) -> Lora:
    """The LoRA whose row i is row order[i] of the delta; a permutation breaks the blocks of a
    GraLoRA, not its rank.

    >>> lora = Lora(torch.ones(1, 1), torch.tensor([[1.0], [2.0], [3.0]]), 1.0)
    >>> permute_rows(lora, [2, 0, 1]).B.flatten()
    tensor([3., 1., 2.])
    """
    lora = gralora_to_lora(delta) if isinstance(delta, Gralora) else delta
    return Lora(lora.A, lora.B[torch.tensor(order, device=lora.B.device)], lora.scaling)
