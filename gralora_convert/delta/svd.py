"""The blocks of a delta in float64, each decomposed from its factors, and their truncation.

From factors L R of a block only the core of two thin QRs is decomposed, never the dense matrix.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gralora_convert.delta.exact import direct_sum, gralora_to_lora, kaiming
from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora, is_finite, tensors_of

Method = Literal["auto", "exact", "randomised"]

EXACT_SIDE = 512  # up to this block side the exact SVD costs no more than the randomised one
OVERSAMPLE = 16
POWER_ITERATIONS = 2
# Shares of the squared norm: what is lost is that of the rest, formed where less is left than the
# difference of two norms can tell, and found in float64 where float32 cannot hold it.
RESIDUAL, SINGLE = 1e-3, 1e-9


@dataclass(frozen=True, eq=False)
class Block:
    """One block as left @ core @ right.T, the columns of left (p, a) and right (m, b)
    orthonormal and None for the identity; `lost2` is the squared norm outside of it."""

    core: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    lost2: float = 0.0


@dataclass(frozen=True)
class Options:
    """How a fit is made: the scaling and dtype of its factors, the SVD of dense blocks ("auto":
    randomised above a side of 512), and the source of all random numbers."""

    scaling: float
    dtype: torch.dtype
    method: Method
    generator: torch.Generator


def options_of(
    scaling: float, dtype: torch.dtype, method: Method, generator: torch.Generator | None
) -> Options:
    """The options, with seed 0 for a missing generator.

    Raises:
        ValueError: the scaling is zero or not finite.
    """
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling={scaling} has no inverse")
    return Options(scaling, dtype, method, generator or torch.Generator().manual_seed(0))


def blocks_of(
    delta: Delta, k: int, rank: int, options: Options, near: Gralora | Lora | None = None
) -> Iterator[Block]:
    """The k*k blocks of the delta, in the order (0, 0), (0, 1), ... of (j, n).

    `rank` is what a randomised decomposition of a dense block must reach; `near`, a fit of these
    k and rank to almost the same delta, is where it begins. A GraLoRA of another k is taken as its
    LoRA, restricted to each block.
    """
    if not isinstance(delta, Dense):
        for factor in tensors_of(delta).values():
            finite(factor)
    match delta:
        case Dense(weight=weight):
            starts = iter([]) if near is None else (right.T for _, right in _slots(near))
            for block_rows in weight.chunk(k):
                for block in block_rows.chunk(k, dim=1):
                    yield _project(finite(block), rank, options, next(starts, None))
        case Lora(A=A, B=B):
            lefts = [_qr(x) for x in (delta.scaling * B.double()).chunk(k)]
            rights = [_qr(x.T) for x in A.double().chunk(k, dim=1)]
            for ql, rl in lefts:
                for qr, rr in rights:
                    yield Block(rl @ rr.T, ql, qr)
        case Gralora() if k == 1 and delta.k > 1:
            yield _whole(delta)
        case Gralora() if k == delta.k:
            for left, right in _slots(delta):
                yield _from_product(left, right)
        case Gralora():
            for left, right in _restricted(delta, k):
                yield _from_product(left, right)


def squared_norm(delta: Delta) -> float:
    """The squared Frobenius norm of a delta, from its factors, in float64.

    >>> squared_norm(Lora(torch.ones(1, 2), torch.ones(3, 1), 2.0))
    24.0
    """
    if isinstance(delta, Dense):
        return float(delta.weight.double().square().sum())
    return sum(_squares(delta))


def _squares(delta: Gralora | Lora) -> list[float]:
    """The squared norm of each block: |L R|^2 = <L'L, RR'>, which rounding may leave below zero."""
    pairs = _slots(delta)
    return [max(float(((x.T @ x) * (y @ y.T)).sum()), 0.0) for x, y in pairs]


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    return q, r


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, singular values and v (not transposed), by a QR first: several times faster where one
    side is much the longer."""
    if matrix.shape[0] < matrix.shape[1]:
        v, values, u = _svd(matrix.T)
        return u, values, v
    q, r = _qr(matrix)
    u, values, vh = torch.linalg.svd(r)
    return q @ u, values, vh.T


def _from_product(left: Tensor, right: Tensor) -> Block:
    """The block left (p, c) @ right (c, m)."""
    (ql, rl), (qr, rr) = _qr(left), _qr(right.T)
    return Block(rl @ rr.T, ql, qr)


def _slots(delta: Gralora | Lora) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors (p, s + h), (s + h, m) of each block."""
    if isinstance(delta, Lora):
        yield delta.scaling * delta.B.double(), delta.A.double()
        return
    k, s = delta.k, delta.s
    a4 = delta.A.double().reshape(k, -1, k, s)
    b4 = delta.scaling * delta.B.double().reshape(k, k, s, -1)
    p, m = b4.shape[3], a4.shape[1]
    for j in range(k):
        for n in range(k):
            left, right = b4[j, n].T, a4[n, :, j].T
            if (general := delta.general) is not None:
                up = delta.scaling * general.B[j * p : (j + 1) * p].double()
                down = general.A[:, n * m : (n + 1) * m].double()
                left, right = torch.cat([left, up], dim=1), torch.cat([right, down])
            yield left, right


def _restricted(delta: Gralora, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The factors of each block of another k: the columns of the LoRA that reach it."""
    lora = gralora_to_lora(delta)
    n_out, n_in = delta.out_features // k, delta.in_features // k
    for j in range(k):
        left = delta.scaling * lora.B[j * n_out : (j + 1) * n_out].double()
        for n in range(k):
            right = lora.A[:, n * n_in : (n + 1) * n_in].double()
            used = left.any(dim=0) & right.any(dim=1)
            yield left[:, used], right[used]


def _whole(delta: Gralora) -> Block:
    """The whole of a GraLoRA: thin QRs per block row and column, and a core of side k*r + h.

    The bases of the block rows have disjoint support, so their direct sum is orthonormal.
    """
    k, s = delta.k, delta.s
    lefts = [_qr(delta.scaling * x.T) for x in delta.B.double()]  # (p, r), columns (n, t)
    rights = [_qr(x) for x in delta.A.double()]  # (m, r), columns (j, t)
    rl = torch.stack([r for _, r in lefts]).reshape(k, -1, k, s)  # j, a, n, t
    rr = torch.stack([r for _, r in rights]).reshape(k, -1, k, s)  # n, b, j, t
    core = torch.einsum("jant,nbjt->janb", rl, rr).reshape(k * rl.shape[1], k * rr.shape[1])
    left = direct_sum([q for q, _ in lefts])
    right = direct_sum([q for q, _ in rights])
    if (general := delta.general) is None:
        return Block(core, left, right)
    left, up = _extend(left, delta.scaling * general.B.double())
    right, down = _extend(right, general.A.T.double())
    wide = up @ down.T
    wide[: core.shape[0], : core.shape[1]] += core
    return Block(wide, left, right)


def _extend(basis: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of both (block Gram-Schmidt, twice), and the columns in it."""
    within = basis.T @ columns
    rest = columns - basis @ within
    again = basis.T @ rest
    q, r = _qr(rest - basis @ again)
    return torch.cat([basis, q], dim=1), torch.cat([within + again, r])


def _is_exact(size: Sequence[int], width: int, method: Method, *, is_near: bool = False) -> bool:
    side = min(size)
    small = (side <= EXACT_SIDE and not is_near) or 2 * width >= side
    return method == "exact" or (method == "auto" and small) or width >= side


def svd_effort(rows: int, columns: int, rank: int, method: Method) -> int:
    """What the decomposition of a dense block takes, in bytes copied (0.3 ns), as measured: that
    of the QR and the SVD of a square core, or of the passes over the block."""
    side, width = min(rows, columns), rank + OVERSAMPLE
    if _is_exact((rows, columns), width, method):
        return (rows * columns * side * 5 + side**3 * 13) // 6
    return rows * columns * (13 + width * 5 // 6)


def _project(block: Tensor, rank: int, options: Options, near: Tensor | None = None) -> Block:
    """A dense block, or its projection on a randomised basis of `rank` + 16 directions.

    In float32 where the block is, and something is lost that float32 can tell from rounding. The
    range finder with power iterations of Halko, Martinsson, Tropp, arXiv 0909.4061, alg. 4.4; with
    `near` (m, rank), which has nearly the directions of its rows, no iterations are needed.
    """
    width = rank + OVERSAMPLE
    if _is_exact(block.shape, width, options.method, is_near=near is not None):
        return Block(block.double())
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    size = block.shape[1], width if near is None else OVERSAMPLE
    start = torch.randn(size, dtype=block.dtype, generator=options.generator).to(block.device)
    if near is not None:
        start = torch.cat([_qr(near.to(block))[0], start / math.sqrt(size[0])], dim=1)
    basis = _qr(block @ start)[0]
    for _ in range(POWER_ITERATIONS if near is None else 0):
        basis = _qr(block @ _qr(block.T @ basis)[0])[0]
    core = basis.T @ block
    lost2, norm2 = _lost(block, basis, core)
    if lost2 <= SINGLE * norm2 and block.dtype == torch.float32:
        return _project(block.double(), rank, options, near)
    return Block(core.double(), basis.double(), None, lost2)


def _lost(block: Tensor, basis: Tensor, core: Tensor) -> tuple[float, float]:
    """|block - basis @ core|^2 and |block|^2, where core is basis.T @ block."""
    norm2 = _square(block)
    lost2 = norm2 - _square(core)
    if lost2 < RESIDUAL * norm2:
        lost2 = _square(torch.addmm(block, basis, core, alpha=-1))
    return lost2, norm2


def _square(matrix: Tensor) -> float:
    """The squared Frobenius norm, row by row in the matrix's dtype, then in float64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def block_norms(delta: Gralora | Lora) -> Tensor:
    """The Frobenius norms of the blocks, (k, k) float64, rows j of the output, columns n of the
    input; (1, 1) for LoRA. From the factors: ||L R||^2 = sum((L'L) * (R R')).

    >>> block_norms(Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 1.0)).round(decimals=3)
    tensor([[7.7460, 7.7460],
            [7.7460, 7.7460]], dtype=torch.float64)
    """
    k = 1 if isinstance(delta, Lora) else delta.k
    return torch.tensor(_squares(delta), dtype=torch.float64).sqrt().view(k, k)


def energies(delta: Gralora | Lora) -> Tensor:
    """The squared singular values of the delta, (r) float64, largest first; r its LoRA's rank.

    From the Gram matrices of the factors, a hundred times faster than their QR and true to about
    1e-15 of the largest: enough for shares of energy, not for ranks near the precision.

    >>> energies(Lora(torch.eye(2, 3), torch.eye(4, 2), 2.0))
    tensor([4., 4.], dtype=torch.float64)
    """
    lora = delta if isinstance(delta, Lora) else gralora_to_lora(delta)
    left, right = lora.scaling * finite(lora.B).double(), finite(lora.A).double()
    values, vectors = torch.linalg.eigh(left.T @ left)
    half = vectors * values.clamp(min=0).sqrt()
    squares: Tensor = torch.linalg.eigvalsh(half.T @ (right @ right.T) @ half)
    return squares.clamp(min=0).flip(0)


def finite(matrix: Tensor) -> Tensor:
    """The matrix itself; raises ValueError if it has a nan or an infinity."""
    if not is_finite(matrix):
        raise ValueError("the delta has values that are not finite")
    return matrix


def truncate(block: Block, rank: int, options: Options) -> tuple[Tensor, Tensor, float, float]:
    """Balanced factors left (p, rank), right (m, rank) with scaling * left @ right.T the best
    fit, its squared error, and the squared norm of the block.

    Beyond the numerical rank left is zero and right random, so that both can be trained: two
    zero factors would never receive a gradient.

    >>> options = options_of(1.0, torch.float64, "auto", None)
    >>> left, right, error2, norm2 = truncate(Block(torch.eye(3).double()), 2, options)
    >>> left.shape, round(error2, 9), round(norm2, 9)
    (torch.Size([3, 2]), 1.0, 3.0)

    Eckart-Young; numerical rank as of numpy.linalg.matrix_rank (eps * side * sigma_1).
    """
    u, values, v = _svd(finite(block.core))
    left, right = u[:, :rank], v[:, :rank]
    left = left if block.left is None else block.left @ left
    right = right if block.right is None else block.right @ right
    norm2 = float(values.square().sum()) + block.lost2
    error2 = float(values[rank:].square().sum()) + block.lost2
    noise = torch.finfo(values.dtype).eps * max(block.core.shape) * values[:1]
    live = int((values[:rank] > noise).sum())
    roots = (values[:live] / abs(options.scaling)).sqrt()
    new_left = left.new_zeros(left.shape[0], rank)
    new_right = kaiming(left.new_empty(right.shape[0], rank), right.shape[0], options.generator)
    new_left[:, :live] = math.copysign(1.0, options.scaling) * left[:, :live] * roots
    new_right[:, :live] = right[:, :live] * roots
    return new_left, new_right, error2, norm2
