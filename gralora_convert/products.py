"""Deltas made dense, whole or some rows at a time; two ways that can check each other.

`Stack.add_rows_` (and `add_rows_`) is the fast one, for merges: one batched product per block row.
`rows` sums the formula of `delta` term by term, in float64 by default. Torch only, no files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_convert.delta import Delta, Dense, Gralora, Lora

__all__ = ["Stack", "add_rows_", "delta_weight", "dense", "row_blocks", "rows"]


@dataclass(frozen=True, eq=False)
class Stack:
    """The factors of a delta laid out for adding its rows, or those of its transpose.

    left (K, K, height, q) and right (K, K, q, width) hold the factors of block row u and block
    column v at [u, v]: for GraLoRA K = k and q = s + h (a general part stands behind each slot),
    for LoRA K = 1 and q its rank. float32 or float64.

    >>> stack = Stack.of(Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 0.5))
    >>> stack.left.shape, stack.right.shape
    (torch.Size([2, 2, 5, 2]), torch.Size([2, 2, 2, 3]))

    PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight; arXiv 2505.20355, eq. 4.
    """

    left: Tensor
    right: Tensor
    scaling: float

    @classmethod
    def of(
        cls, delta: Gralora | Lora, dtype: torch.dtype = torch.float32, *, transposed: bool = False
    ) -> "Stack":
        """The stack of a delta, with `transposed` of delta.T: a Conv1D stores its weight so."""
        if isinstance(delta, Lora):
            left, right = (delta.A.T, delta.B.T) if transposed else (delta.B, delta.A)
            return cls(
                left.to(dtype)[None, None].contiguous(),
                right.to(dtype)[None, None].contiguous(),
                delta.scaling,
            )
        k, s = delta.k, delta.s
        a4 = delta.A.to(dtype).view(k, -1, k, s).permute(2, 0, 1, 3)  # j, n, i, t
        b4 = delta.B.to(dtype).view(k, k, s, -1)  # j, n, t, o
        if transposed:
            left, right = a4.transpose(0, 1), b4.transpose(0, 1)  # n, j, i, t and n, j, t, o
        else:
            left, right = b4.transpose(2, 3), a4.transpose(2, 3)  # j, n, o, t and j, n, t, i
        if delta.general_A is not None and delta.general_B is not None:
            general = Lora(delta.general_A, delta.general_B, delta.scaling)
            u, d = (
                (general.A.T, general.B.T) if transposed else (general.B, general.A)
            )  # (rows, h), (h, columns)
            heights = u.to(dtype).view(k, 1, -1, general.r).expand(-1, k, -1, -1)
            widths = d.to(dtype).view(general.r, k, -1).transpose(0, 1).expand(k, -1, -1, -1)
            left, right = torch.cat([left, heights], dim=3), torch.cat([right, widths], dim=2)
        return cls(left.contiguous(), right.contiguous(), delta.scaling)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the delta (or of its transpose)."""
        return len(self.left) * self.left.shape[2], len(self.right) * self.right.shape[3]

    def add_rows_(self, tile: Tensor, start: int, *, weight: float = 1.0) -> None:
        """Adds weight * rows [start, start + len(tile)) to the tile, in place.

        One batched product per block row writes straight into the tile: no temporary of its size.

        Raises:
            ValueError: the tile is not rows of the delta, or not of the dtype of the stack.
        """
        stop = start + tile.shape[0]
        _check_tile(self.shape, tile, start)
        if tile.dtype != self.left.dtype:
            raise ValueError(f"the tile has dtype {tile.dtype}, {self.left.dtype} was needed")
        count, height = self.left.shape[1], self.left.shape[2]
        for u in range(start // height, math.ceil(stop / height)):
            first, last = max(start, u * height), min(stop, (u + 1) * height)
            blocks = tile[first - start : last - start].view(last - first, count, -1)
            blocks.transpose(0, 1).baddbmm_(  # v, row, column
                self.left[u, :, first - u * height : last - u * height],
                self.right[u],
                alpha=weight * self.scaling,
            )


def _check_tile(shape: tuple[int, int], tile: Tensor, start: int) -> None:
    rows, columns = shape
    stop = start + tile.shape[0]
    if not 0 <= start < stop <= rows:
        raise ValueError(f"rows {start}:{stop} are not within the {rows} rows of the delta")
    if tile.ndim != 2 or tile.shape[1] != columns:
        raise ValueError(f"the tile {tuple(tile.shape)} needs rows of {columns} columns")
    if tile.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the tile has dtype {tile.dtype}, float32 or float64 was needed")


def add_rows_(
    tile: Tensor, delta: Delta, start: int, *, transposed: bool = False, weight: float = 1.0
) -> None:
    """Adds weight * delta[start:start+rows] to the tile (rows, in), in place.

    With `transposed`, weight * delta.T[start:start+rows] to a tile (rows, out): the weight of a
    Conv1D is stored so. A tile may begin and end anywhere in a block row.

    float32 or float64 tiles; sums are of the tile's dtype. For many tiles make a `Stack` once.

    Raises:
        ValueError: the tile is not rows of the delta, or not float32 or float64.

    >>> tile = torch.zeros(2, 6)
    >>> add_rows_(tile, Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 0.5), start=4)
    >>> tile[:, 0]
    tensor([1., 1.])

    PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight.
    """
    size = (delta.out_features, delta.in_features)
    _check_tile(size[::-1] if transposed else size, tile, start)
    if isinstance(delta, Dense):
        update = delta.weight.T if transposed else delta.weight
        tile.add_(update[start : start + len(tile)], alpha=weight)
    else:
        Stack.of(delta, tile.dtype, transposed=transposed).add_rows_(tile, start, weight=weight)


def _check_rows(delta: Delta, start: int, stop: int, transposed: bool) -> None:
    count = delta.in_features if transposed else delta.out_features
    if not 0 <= start < stop <= count:
        raise ValueError(f"rows {start}:{stop} are not within the {count} rows of the delta")


def dense(delta: Delta, dtype: torch.dtype = torch.float32) -> Tensor:
    """The delta as a matrix (out, in), on the device of its factors.

    Sums are float32 (float64 for a float64 dtype), rounded once to `dtype`; differentiable.

    >>> dense(Lora(torch.ones(1, 2), torch.ones(3, 1), 0.5)).shape
    torch.Size([3, 2])
    """
    if isinstance(delta, Dense):
        return delta.weight.to(dtype)
    shape, wide = (delta.out_features, delta.in_features), torch.promote_types(dtype, torch.float32)
    matrix = torch.zeros(shape, dtype=wide, device=delta.A.device)
    add_rows_(matrix, delta, 0)
    return matrix.to(dtype)


def delta_weight(
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    general_A: Tensor | None = None,
    general_B: Tensor | None = None,
) -> Tensor:
    """The delta weight (out, in) of GraLoRA factors: what a merge adds to a Linear's weight.

    A (k, in/k, r)   B (k, r, out/k)   general_A (h, in)   general_B (out, h)  ->  (out, in)

    In float32, or in float64 if A is; half-precision factors are not rounded again. Gradients
    reach the factors. The weight of a Conv1D is stored transposed and takes the transpose.

    Raises:
        ValueError: as `Gralora`.

    >>> delta_weight(torch.ones(2, 3, 4), torch.ones(2, 4, 5), scaling=0.5).shape
    torch.Size([10, 6])

    PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight; arXiv 2505.20355, eq. 4.
    """
    delta = Gralora(A, B, scaling, general_A, general_B)
    return dense(delta, torch.promote_types(A.dtype, torch.float32))


def rows(
    delta: Delta,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float64,
    *,
    transposed: bool = False,
) -> Tensor:
    """delta[start:stop] (rows of delta.T with `transposed`), by the sum over t of the formula
    above: shares no code with `add_rows_`, so that each can check the other.

    (stop - start, in), with `transposed` (stop - start, out), of the given floating dtype.

    Raises:
        ValueError: start:stop is not within the rows of the delta.

    >>> delta = Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), scaling=0.5)
    >>> rows(delta, 0, 1)
    tensor([[1., 1., 1., 1., 1., 1.]], dtype=torch.float64)
    """
    _check_rows(delta, start, stop, transposed)
    match delta:
        case Gralora():
            parts = [
                torch.einsum("xvt,vyt->xvy", left.to(dtype), right.to(dtype)).flatten(1)
                for left, right in row_blocks(delta, start, stop, transposed=transposed)
            ]
            result = torch.cat(parts).mul_(delta.scaling)
            if delta.general_A is not None and delta.general_B is not None:
                general = Lora(delta.general_A, delta.general_B, delta.scaling)
                result += rows(general, start, stop, dtype, transposed=transposed)
            return result
        case Lora(A=A, B=B):
            left, right = (A.T, B.T) if transposed else (B, A)
            return delta.scaling * (left[start:stop].to(dtype) @ right.to(dtype))
        case Dense(weight=weight):
            return (weight.T if transposed else weight)[start:stop].to(dtype)


def row_blocks(
    delta: Gralora, start: int, stop: int, *, transposed: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors behind rows start:stop, a block row at a time: left (x, k, s), right (k, y, s);
    row x of the block row is the concatenation over v of left[x, v] @ right[v].T.

    >>> delta = Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), scaling=0.5)
    >>> [tuple(left.shape) for left, _ in row_blocks(delta, 3, 9)]
    [(2, 2, 2), (4, 2, 2)]
    """
    k, s = delta.k, delta.s
    a4, b4 = delta.A.view(k, -1, k, s), delta.B.view(k, k, s, -1)
    height = a4.shape[1] if transposed else b4.shape[3]
    for u in range(start // height, math.ceil(stop / height)):
        within = slice(
            max(start, u * height) - u * height, min(stop, (u + 1) * height) - u * height
        )
        if transposed:  # u = n: left[i, j, t], right[j, o, t]
            yield a4[u, within], b4[:, u].transpose(1, 2)
        else:  # u = j: left[o, n, t], right[n, i, t]
            yield b4[u, :, :, within].permute(2, 0, 1), a4[:, :, u]
