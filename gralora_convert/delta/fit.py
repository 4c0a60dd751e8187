"""Best approximations of a delta by LoRA, GraLoRA and Hybrid GraLoRA of a given rank; no files.

The blocks of a GraLoRA are independent, so ||X - G||^2 is a sum over the k*k blocks, and the
truncated SVD of each block is the optimum (Eckart-Young, block by block); LoRA is k = 1. From
factors L R of a block only the core of two thin QRs is decomposed, never the dense matrix. All
of it is computed in float64.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from gralora_convert.delta.exact import check_divides
from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora
from gralora_convert.delta.products import add_rows_, dense
from gralora_convert.delta.svd import (
    SINGLE,
    Method,
    blocks_of,
    finite,
    options_of,
    squared_norm,
    truncate,
)

Fitted = TypeVar("Fitted", Gralora, Lora)

SWEEPS = 10
LEAST_GAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Fit(Generic[Fitted]):
    """A fitted delta with its squared distance from the source and the source's squared norm.

    `error2` is the exact sum of what was dropped (Frobenius, float64), before the factors are
    rounded to their dtype.
    """

    delta: Fitted
    error2: float
    norm2: float

    @property
    def relative_error(self) -> float:
        """||source - delta|| / ||source||; 0 for a zero source.

        >>> Fit(Lora(torch.ones(1, 2), torch.ones(2, 1), 1.0), 1.0, 4.0).relative_error
        0.5
        """
        return math.sqrt(self.error2 / self.norm2) if self.norm2 > 0 else 0.0


# --- fits ---


def to_lora(
    delta: Delta,
    r: int,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    method: Method = "auto",
    generator: torch.Generator | None = None,
    near: Lora | None = None,
) -> Fit[Lora]:
    """The LoRA of rank r nearest to the delta in the Frobenius norm.

    GraLoRA A (k, in/k, r'), B (k, r', out/k), dense (out, in), LoRA  ->  A (r, in), B (out, r)

    From factors by QR and the SVD of their core, never through the dense matrix. A dense delta
    with a side above 512 takes a randomised SVD (oversampling 16, two power iterations, about
    0.03 % above the optimum) unless `method` is "exact"; `near`, a fit of rank r to nearly the same
    delta, stands for the iterations. The factors are balanced, sqrt(S) on both sides, and rounded
    to `dtype`; where the delta has rank below r, new rows of A are as PEFT starts them and B is
    zero there. A missing generator is seed 0.

    Raises:
        ValueError: r < 1, a zero scaling, or a delta that is not finite.

    >>> delta = Gralora(torch.ones(2, 3, 4), torch.ones(2, 4, 5), 1.0)
    >>> fit = to_lora(delta, 2)
    >>> fit.delta.A.shape, fit.delta.B.shape, round(fit.relative_error, 6)
    (torch.Size([2, 6]), torch.Size([10, 2]), 0.0)

    Eckart-Young; randomised SVD after Halko, Martinsson, Tropp, arXiv 0909.4061, alg. 4.4.
    """
    options = options_of(scaling, dtype, method, generator)
    check_divides(1, r)
    block = next(blocks_of(delta, 1, r, options, near))
    left, right, error2, norm2 = truncate(block, r, options)
    return Fit(Lora(right.T.to(dtype), left.to(dtype), scaling), error2, norm2)


def to_gralora(
    delta: Delta,
    k: int,
    r: int,
    *,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    method: Method = "auto",
    generator: torch.Generator | None = None,
    near: Gralora | None = None,
) -> Fit[Gralora]:
    """The pure GraLoRA of k and r nearest to the delta in the Frobenius norm.

    LoRA A (l, in), B (out, l), dense (out, in), any GraLoRA  ->  A (k, in/k, r), B (k, r, out/k)

    The optimum for this k and r: each block is truncated to rank r/k. It is exact from
    `exact_rank` on. Factors, dtypes, method, generator and `near` are as in `to_lora`.

    Raises:
        ValueError: k does not divide in, out and r, r < k, a zero scaling, or a delta that is
            not finite.

    >>> delta = Lora(torch.ones(1, 6), torch.ones(4, 1), 3.0)
    >>> fit = to_gralora(delta, k=2, r=2)
    >>> fit.delta.A.shape, fit.delta.B.shape, round(fit.relative_error, 6)
    (torch.Size([2, 3, 2]), torch.Size([2, 2, 2]), 0.0)

    Eckart-Young block by block; layout of PEFT 0.21.2, tuners/gralora/layer.py,
    get_delta_weight (arXiv 2505.20355, eq. 4).
    """
    options = options_of(scaling, dtype, method, generator)
    n_out, n_in = delta.out_features, delta.in_features
    check_divides(k, n_in, n_out, r)
    s, error2, norm2 = r // k, 0.0, 0.0
    a = torch.empty(k, n_in // k, k, s, dtype=dtype)  # n, i, j, t
    b = torch.empty(k, k, s, n_out // k, dtype=dtype)  # j, n, t, o
    for place, block in enumerate(blocks_of(delta, k, s, options, near)):
        j, n = divmod(place, k)
        left, right, lost2, size2 = truncate(block, s, options)
        a[n, :, j], b[j, n] = right, left.T
        error2, norm2 = error2 + lost2, norm2 + size2
    return Fit(Gralora(a.view(k, -1, r), b.view(k, r, -1), scaling), error2, norm2)


def to_hybrid(
    delta: Delta,
    k: int,
    r: int,
    hybrid_r: int,
    *,
    sweeps: int = SWEEPS,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    method: Method = "auto",
    generator: torch.Generator | None = None,
) -> Fit[Gralora]:
    """A Hybrid GraLoRA near the delta: alternating fits of the general part and the blocks.

    any delta (out, in)  ->  A (k, in/k, r), B (k, r, out/k), general_A (h, in), general_B (out, h)

    Each half sweep is the best fit of one part to what the other leaves, beginning with the
    general part, so the error never grows; it ends after `sweeps`, or when a sweep gains less
    than 0.1 % of the error. A local optimum. The dense matrix is formed, in float64 unless it comes
    in float32. Factors, dtypes, method and generator are as in `to_lora`; randomised SVDs begin
    where the last sweep has ended.

    Raises:
        ValueError: as `to_gralora`, or hybrid_r < 1 or sweeps < 1.

    >>> fit = to_hybrid(Dense(torch.eye(4)), k=2, r=2, hybrid_r=2)
    >>> fit.delta.general_A.shape, fit.relative_error < 0.8
    (torch.Size([2, 4]), True)

    Alternating exact minimisers of the objective of Eckart-Young; Hybrid GraLoRA of
    arXiv 2505.20355, section 3.
    """
    check_divides(1, hybrid_r, sweeps)
    options = vars(options_of(scaling, torch.float64, method, generator))
    is_single = isinstance(delta, Dense) and delta.weight.dtype == torch.float32
    target = dense(delta, torch.float32 if is_single else torch.float64)
    size2 = squared_norm(Dense(target))

    def residual(part: Gralora | Lora) -> Dense:
        rest = target.clone()
        add_rows_(rest, part, 0, weight=-1.0)
        return Dense(rest)

    general = to_lora(Dense(target), hybrid_r, **options).delta
    blocks = to_gralora(residual(general), k, r, **options)
    for _ in range(sweeps - 1):
        last = general, blocks
        general = to_lora(residual(blocks.delta), hybrid_r, near=general, **options).delta
        blocks = to_gralora(residual(general), k, r, near=blocks.delta, **options)
        before, after = math.sqrt(last[1].error2), math.sqrt(blocks.error2)
        if after >= before:
            general, blocks = last
        if before - after <= LEAST_GAIN * before:
            break
    if is_single and blocks.error2 <= SINGLE * size2:
        whole = Dense(target.double())
        return to_hybrid(
            whole, k, r, hybrid_r, sweeps=sweeps, scaling=scaling, dtype=dtype, method=method,
            generator=generator,
        )  # fmt: skip
    a, b = blocks.delta.A.to(dtype), blocks.delta.B.to(dtype)
    hybrid = Gralora(a, b, scaling, general.A.to(dtype), general.B.to(dtype))
    return Fit(hybrid, blocks.error2, size2)


# --- ranks ---


def spectra(
    delta: Delta,
    k: int = 1,
    *,
    limit: int | None = None,
    method: Method = "auto",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The squared error of the best fit by rank: what `smallest_rank` chooses from.

    delta (out, in)  ->  tails (q + 1), float64, non-increasing

    tails[s] is the squared error of `to_gralora` with r = k*s, or of `to_lora` with r = s for
    k = 1; tails[0] is the squared norm. q is the smaller side of a block, or `limit` if less;
    with a limit the randomised SVD serves for large dense blocks.

    Raises:
        ValueError: k does not divide in and out, limit < 1, or a delta that is not finite.

    >>> spectra(Dense(torch.diag(torch.tensor([2.0, 1.0]))))
    tensor([5., 1., 0.], dtype=torch.float64)

    Eckart-Young.
    """
    options = options_of(1.0, torch.float64, method, generator)
    n_out, n_in = delta.out_features, delta.in_features
    check_divides(k, n_in, n_out)
    full = min(n_in, n_out) // k
    count = full if limit is None else min(full, limit)
    check_divides(1, count)
    tails = torch.zeros(count + 1, dtype=torch.float64)
    for block in blocks_of(delta, k, count, options):
        squares = torch.linalg.svdvals(finite(block.core)).square().cpu()
        dropped = squares.flip(0).cumsum(0).flip(0)[: count + 1]
        tails[: len(dropped)] += dropped
        tails += block.lost2
    return tails


def smallest_rank(tails: Sequence[Tensor], tolerance: float) -> int:
    """The smallest rank at which several modules together fit within a relative error.

    tails: what `spectra` gives for each module. The rank s >= 1 is the first with
    sum tails[s] <= tolerance^2 * sum tails[0]; a GraLoRA needs r = k*s, a LoRA r = s.

    Raises:
        ValueError: no tails, or none of the ranks within the spectra reaches the tolerance.

    >>> smallest_rank([torch.tensor([5.0, 1.0, 0.0]), torch.tensor([4.0, 0.0])], 0.4)
    1

    Eckart-Young, summed over modules.
    """
    length = max((len(t) for t in tails), default=0)
    if length < 2:
        raise ValueError("no spectrum to choose a rank from")
    total = torch.zeros(length, dtype=torch.float64)
    for tail in tails:
        total += torch.cat([tail.double(), tail[-1:].double().expand(length - len(tail))])
    reached = torch.nonzero(total <= tolerance**2 * total[0]).flatten().tolist()
    if not reached:
        raise ValueError(f"no rank up to {length - 1} has a relative error of {tolerance}")
    return max(1, int(reached[0]))


def smallest_ranks(
    tails: Sequence[Tensor], tolerance: float, costs: Sequence[int], limit: int
) -> list[int]:
    """A rank for each module, at most `limit`, with which several modules together fit within a
    relative error at the least sum of rank * cost; one rank for all where that is not less.

    tails: as for `smallest_rank`, at least of rank 1; costs: in + out of each module

    From the full ranks down, what goes is always the singular value that is least for its cost.

    Raises:
        ValueError: as `smallest_rank`, within the limit.

    >>> smallest_ranks([torch.tensor([9.0, 5.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 0.0])],
    ...                0.4, [4, 4], 2)
    [2, 1]

    Eckart-Young, summed over modules; greedy, so up to one rank above the least sum.
    """
    tails = [tail[: limit + 1].double() for tail in tails]
    same = smallest_rank(tails, tolerance)
    # what each rank above the first holds, for its cost; never more than the rank before it
    gains = [(-tail.diff()[1:]).cummin(0).values for tail in tails]
    values = torch.cat([gain / cost for gain, cost in zip(gains, costs, strict=True)])
    order = values.argsort(stable=True)
    left = torch.cat(gains)[order].cumsum(0) + sum(tail[-1] for tail in tails)
    gone = order[left <= tolerance**2 * sum(tail[0] for tail in tails)]
    owners = torch.cat([torch.full((len(gain),), n) for n, gain in enumerate(gains)])
    fewer = owners[gone].bincount(minlength=len(tails)).tolist()
    ranks = [len(tail) - 1 - less for tail, less in zip(tails, fewer, strict=True)]
    uniform = [min(same, len(tail) - 1) for tail in tails]
    return min(ranks, uniform, key=lambda held: sum(map(operator.mul, held, costs)))


def exact_rank(source: Delta, to: Literal["lora", "gralora", "hybrid"], k: int = 1) -> int:
    """The smallest r at which the conversion is exact, for generic factors of these shapes.

    LoRA(l) -> GraLoRA  k * min(l, out/k, in/k)      GraLoRA(k', r) -> LoRA  min(out, in, k'*r)
    dense -> GraLoRA    k * min(out/k, in/k)         GraLoRA(k', r) -> GraLoRA(k)  k * rank of the
    dense -> LoRA       min(out, in)                     block that meets most old blocks

    A general part of h adds h to the rank of each block. To Hybrid it is the r of the blocks
    beside a general part that takes over the LoRA or general part of the source: k for a LoRA.
    Factors with dependent columns may need less: `spectra` tells.

    Raises:
        ValueError: k does not divide in and out.

    >>> exact_rank(Gralora(torch.ones(2, 12, 4), torch.ones(2, 4, 12), 1.0), "gralora", k=3)
    24

    A block of rank-s pieces has the rank of a largest flow from its row strips to its column
    strips with capacity s between them, the heights and the widths (a minimal cut bounds it).
    """
    n_out, n_in = source.out_features, source.in_features
    k = 1 if to == "lora" else k
    check_divides(k, n_in, n_out)
    side = min(n_in, n_out) // k
    match source:
        case Dense():
            return k * side
        case Lora():
            return k if to == "hybrid" else k * min(source.r, side)
        case Gralora():
            h = 0 if to == "hybrid" else source.hybrid_r
            return k * min(_largest_piece(source, k) + h, side)


def _largest_piece(source: Gralora, k: int) -> int:
    """The largest generic rank of a block of the new k, without the general part."""
    heights = {_strips(source.out_features, source.k, k, u) for u in range(k)}
    widths = {_strips(source.in_features, source.k, k, u) for u in range(k)}
    return max(
        min(
            sum(sorted(height)[:cut]) + sum(min(w, source.s * (len(height) - cut)) for w in width)
            for cut in range(len(height) + 1)
        )
        for height in heights
        for width in widths
    )


def _strips(size: int, old: int, new: int, u: int) -> tuple[int, ...]:
    """The lengths in which the u-th of `new` equal parts of a side meets the `old` parts."""
    start, stop, step = u * size // new, (u + 1) * size // new, size // old
    cuts = [start, *(c for c in range(0, size, step) if start < c < stop), stop]
    return tuple(b - a for a, b in itertools.pairwise(cuts))
