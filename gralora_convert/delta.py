"""Delta weights as values: GraLoRA, Hybrid GraLoRA, LoRA, dense; torch only, no files.

Index order (PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight; arXiv 2505.20355, eq. 4):
in = k*m, out = k*p, r = k*s; A4 = A.view(k, m, k, s)[n, i, j, t] and
B4 = B.view(k, k, s, p)[j, n, t, o]

    delta[j*p + o, n*m + i] = scaling * sum_t A4[n, i, j, t] * B4[j, n, t, o]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Delta",
    "Dense",
    "Gralora",
    "Lora",
    "add_rows_",
    "dense",
    "gralora_to_lora",
    "permute_rows",
    "rows",
    "terms",
    "to_device",
]


@dataclass(frozen=True, eq=False)
class Gralora:
    """The update of one module: A (k, in/k, r), B (k, r, out/k), and for Hybrid GraLoRA
    general_A (h, in), general_B (out, h), all under one scaling."""

    A: Tensor
    B: Tensor
    scaling: float
    general_A: Tensor | None = None
    general_B: Tensor | None = None

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
    """The update scaling * B @ A with A (l, in), B (out, l)."""

    A: Tensor
    B: Tensor
    scaling: float

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
    """The update itself, weight (out, in)."""

    weight: Tensor


Delta = Gralora | Lora | Dense


def terms(delta: Delta) -> int:
    """Products per element of the delta: s + h for GraLoRA, the rank for LoRA."""
    match delta:
        case Gralora():
            return delta.s + delta.hybrid_r
        case Lora():
            return delta.r
        case Dense():
            return 1


def to_device(delta: Delta, device: str) -> Delta:
    """The same delta with its tensors on `device`."""
    match delta:
        case Gralora(general_A=ga, general_B=gb):
            return Gralora(
                delta.A.to(device),
                delta.B.to(device),
                delta.scaling,
                None if ga is None else ga.to(device),
                None if gb is None else gb.to(device),
            )
        case Lora():
            return Lora(delta.A.to(device), delta.B.to(device), delta.scaling)
        case Dense():
            return Dense(delta.weight.to(device))


def gralora_to_lora(delta: Gralora) -> Lora:
    """The LoRA with the same delta: A (k*r + h, in), B (out, k*r + h), the same scaling.

    Nothing is computed: rows (n, j, t) of A hold the blocks A[n].T, and B the blocks that they
    meet. Rank k*r + h, which is minimal for generic factors.
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


def permute_rows(delta: Gralora | Lora, order: Sequence[int]) -> Lora:
    """The LoRA whose row i is row order[i] of the delta; a permutation breaks the blocks of a
    GraLoRA, not its rank."""
    lora = gralora_to_lora(delta) if isinstance(delta, Gralora) else delta
    return Lora(lora.A, lora.B[torch.tensor(order)], lora.scaling)


def add_rows_(
    tile: Tensor, delta: Delta, start: int, *, transposed: bool = False, weight: float = 1.0
) -> None:
    """Adds weight * delta[start:start+rows] to the tile, in place."""
    stop = start + tile.shape[0]
    match delta:
        case Gralora():
            _add_blocks_(tile, delta, start, stop, transposed, weight)
            if delta.general_A is not None and delta.general_B is not None:
                general = Lora(delta.general_A, delta.general_B, delta.scaling)
                add_rows_(tile, general, start, transposed=transposed, weight=weight)
        case Lora(A=A, B=B):
            left, right = (A.T[start:stop], B.T) if transposed else (B[start:stop], A)
            tile.addmm_(left.to(tile.dtype), right.to(tile.dtype), alpha=weight * delta.scaling)
        case Dense(weight=update):
            update = update.T if transposed else update
            tile.add_(update[start:stop], alpha=weight)


def _add_blocks_(
    tile: Tensor, delta: Gralora, start: int, stop: int, transposed: bool, weight: float
) -> None:
    k, s = delta.k, delta.s
    a4 = delta.A.to(tile.dtype).view(k, -1, k, s)
    b4 = delta.B.to(tile.dtype).view(k, k, s, -1)
    height = a4.shape[1] if transposed else b4.shape[3]
    width = b4.shape[3] if transposed else a4.shape[1]
    alpha = weight * delta.scaling
    for u in range(start // height, math.ceil(stop / height)):
        first, last = max(start, u * height), min(stop, (u + 1) * height)
        place, within = (
            slice(first - start, last - start),
            slice(first - u * height, last - u * height),
        )
        for v in range(k):
            block = tile[place, v * width : (v + 1) * width]
            if transposed:
                block.addmm_(a4[u, within, v], b4[v, u], alpha=alpha)
            else:
                block.addmm_(b4[u, v][:, within].T, a4[v, :, u].T, alpha=alpha)


def dense(delta: Delta, dtype: torch.dtype = torch.float32) -> Tensor:
    """delta as a matrix (out, in)."""
    if isinstance(delta, Dense):
        return delta.weight.to(dtype)
    matrix = torch.zeros(delta.out_features, delta.in_features, dtype=dtype)
    add_rows_(matrix, delta, 0)
    return matrix


def rows(
    delta: Delta,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float64,
    *,
    transposed: bool = False,
) -> Tensor:
    """delta[start:stop] by the formula of the forward path, independent of add_rows_."""
    match delta:
        case Gralora():
            k, s = delta.k, delta.s
            a4 = delta.A.to(dtype).view(k, -1, k, s)
            b4 = delta.B.to(dtype).view(k, k, s, -1)
            if transposed:
                m = a4.shape[1]
                picks = torch.arange(start, stop)
                result = torch.einsum(
                    "xjt,xjto->xjo", a4[picks // m, picks % m], b4.transpose(0, 1)[picks // m]
                ).reshape(stop - start, -1)
            else:
                p = b4.shape[3]
                picks = torch.arange(start, stop)
                result = torch.einsum(
                    "xnt,xnit->xni",
                    b4[picks // p, :, :, picks % p],
                    a4.permute(2, 0, 1, 3)[picks // p],
                ).reshape(stop - start, -1)
            result *= delta.scaling
            if delta.general_A is not None and delta.general_B is not None:
                result += rows(
                    Lora(delta.general_A, delta.general_B, delta.scaling),
                    start,
                    stop,
                    dtype,
                    transposed=transposed,
                )
            return result
        case Lora(A=A, B=B):
            left, right = (A.T, B.T) if transposed else (B, A)
            return delta.scaling * (left[start:stop].to(dtype) @ right.to(dtype))
        case Dense(weight=weight):
            return (weight.T if transposed else weight)[start:stop].to(dtype)
