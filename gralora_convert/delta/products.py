"""Deltas made dense, whole or some rows at a time; two ways that can check each other.

`Stack.add_rows_` (and `add_rows_`) is the fast one, for merges: one batched product per block row.
`rows` sums the formula of `delta` term by term, in float64 by default. Torch only, no files.
"""

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora, terms

HELD = 2 * 1024 * 1024  # elements of a block row's left factors that are laid out in one piece


class Stack:
    """A delta ready for adding many runs of its rows, or of its transpose's, in any order.

    The rows of block row u are one batched product over the block columns v: left (v, row, q) by
    right (v, q, column), where for GraLoRA q = s + h (a general part stands behind each slot), for
    LoRA there is one block of its rank. They are laid out for the block rows that are being added
    only, so that a large delta is never held twice.

    Factors come in float32 or float64 as the tiles; several threads may share a stack.

    >>> stack = Stack(Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 0.5))
    >>> stack.shape
    (10, 6)

    PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight; arXiv 2505.20355, eq. 4.
    """

    def __init__(
        self,
        delta: Gralora | Lora,
        dtype: torch.dtype = torch.float32,
        *,
        transposed: bool = False,
    ) -> None:
        size = (delta.out_features, delta.in_features)
        self.shape: tuple[int, int] = size[::-1] if transposed else size
        self.dtype, self._scaling = dtype, delta.scaling
        # views [u, v, row, t] and [u, v, t, column]; of the general part (row, h) and (h, column)
        self._left4, self._right4 = _views(delta, transposed)
        self._general = _general_views(delta, transposed)
        self._blocks, self._height = self._left4.shape[0], self._left4.shape[2]
        self._terms = terms(delta)
        self._held: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._lock = threading.Lock()

    def add_rows_(self, tile: Tensor, start: int, *, weight: float = 1.0) -> None:
        """Adds weight * rows [start, start + len(tile)) to the tile, in place.

        Raises:
            ValueError: the tile is not rows of the delta, or not of the dtype of the stack.
        """
        stop = start + tile.shape[0]
        _check_tile(self.shape, tile, start)
        if tile.dtype != self.dtype:
            raise ValueError(f"the tile has dtype {tile.dtype}, {self.dtype} was needed")
        height = self._height
        for u in range(start // height, math.ceil(stop / height)):
            first, last = max(start, u * height), min(stop, (u + 1) * height)
            blocks = tile[first - start : last - start].view(last - first, self._blocks, -1)
            left, right = self._block_row(u)
            if left is None:
                left = self._left(u, first, last)
            else:
                left = left[:, first - u * height : last - u * height]
            # v, row, column
            blocks.transpose(0, 1).baddbmm_(left, right, alpha=weight * self._scaling)

    def _block_row(self, u: int) -> tuple[Tensor | None, Tensor]:
        """The left factors of block row u, None where they are large, and the right ones."""
        with self._lock:
            if u not in self._held:
                while len(self._held) > 1:  # workers are in two block rows at most, in order
                    del self._held[min(self._held)]
                rows = u * self._height, (u + 1) * self._height
                is_small = self._height * self._blocks * self._terms <= HELD
                self._held[u] = self._left(u, *rows) if is_small else None, self._right(u)
            return self._held[u]

    def _left(self, u: int, first: int, last: int) -> Tensor:
        """Left factors of rows [first, last), all in block row u: (v, row, q)."""
        left = self._left4[u, :, first - u * self._height : last - u * self._height].to(self.dtype)
        if self._general is None:
            return left.contiguous()
        heights = self._general[0][first:last].to(self.dtype).expand(self._blocks, -1, -1)
        return torch.cat([left, heights], dim=2)

    def _right(self, u: int) -> Tensor:
        """Right factors of block row u: (v, q, column)."""
        right = self._right4[u].to(self.dtype)
        if self._general is None:
            return right.contiguous()
        general = self._general[1].to(self.dtype)
        widths = general.reshape(len(general), self._blocks, -1).transpose(0, 1)  # v, h, column
        return torch.cat([right, widths], dim=1)


def _views(delta: Gralora | Lora, transposed: bool) -> tuple[Tensor, Tensor]:
    """The factors by block row u and block column v; apart from `row_blocks`, which checks them."""
    if isinstance(delta, Lora):
        left, right = (delta.A.T, delta.B.T) if transposed else (delta.B, delta.A)
        return left[None, None], right[None, None]
    k, s = delta.k, delta.s
    a4, b4 = delta.A.view(k, -1, k, s), delta.B.view(k, k, s, -1)  # n, i, j, t and j, n, t, o
    if transposed:  # u = n, v = j
        return a4.permute(0, 2, 1, 3), b4.permute(1, 0, 2, 3)
    return b4.permute(0, 1, 3, 2), a4.permute(2, 0, 3, 1)  # u = j, v = n


def _general_views(delta: Gralora | Lora, transposed: bool) -> tuple[Tensor, Tensor] | None:
    general = delta.general if isinstance(delta, Gralora) else None
    if general is None:
        return None
    return (general.A.T, general.B.T) if transposed else (general.B, general.A)


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
        Stack(delta, tile.dtype, transposed=transposed).add_rows_(tile, start, weight=weight)


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
            if (general := delta.general) is not None:
                result += rows(general, start, stop, dtype, transposed=transposed)
            return result
        case Lora(A=A, B=B):
            left, right = (A.T, B.T) if transposed else (B, A)
            return delta.scaling * (left[start:stop].to(dtype) @ right.to(dtype))
        case Dense(weight=weight):
            return (weight.T if transposed else weight)[start:stop].to(dtype)


def elements(delta: Gralora | Lora, out: Tensor, into: Tensor, *, absolute: bool = False) -> Tensor:
    """delta[out, into] for indices of one length n each: (n,), float64, by the formula of `delta`;
    for `absolute` the sums of absolute products.

    For a few elements here and there of a large delta; shares no code with `add_rows_`.

    >>> delta = Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), scaling=0.5)
    >>> elements(delta, torch.tensor([0, 9]), torch.tensor([5, 1]))
    tensor([1., 1.], dtype=torch.float64)
    """

    def products(left: Tensor, right: Tensor) -> Tensor:
        found = left.double() * right.double()
        return (found.abs_() if absolute else found).sum(1)

    scaling = abs(delta.scaling) if absolute else delta.scaling
    if isinstance(delta, Lora):
        return scaling * products(delta.B[out], delta.A[:, into].T)
    k, s, (_, m, _), p = delta.k, delta.s, delta.A.shape, delta.B.shape[2]
    a4, b4 = delta.A.view(k, m, k, s), delta.B.view(k, k, s, p)  # n, i, j, t and j, n, t, o
    j, n = out // p, into // m
    found = products(b4.transpose(2, 3)[j, n, out % p], a4[n, into % m, j])
    if (general := delta.general) is not None:
        found += products(general.B[out], general.A[:, into].T)
    return scaling * found


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
