"""Is a stored matrix M a rounding of W + D? Bounds that are derived, and what rounding kept.

Error model: the sum in float32 has `terms` products per element, the result is rounded once to the
stored dtype (twice, where another tool rounds D first). The bound is a forward error bound, so a
right merge never exceeds it; see N. Higham, Accuracy and Stability of Numerical Algorithms, ch. 3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora, terms
from gralora_convert.delta.products import row_blocks, rows

_EXPONENT = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of `dtype` at |values|, in the dtype of the values.

    Values are float64, or float32 for a `dtype` of 16 bits. Below the smallest normal number, zero
    included, the spacing stays that of subnormals. Never zero: in float64 it is at least 2^-1074,
    where half a subnormal unit could not be held. Infinite where the value is not finite.

    >>> half_ulp(torch.tensor([1.0, 1.5, 2.0]).double(), torch.float16) * 2**11
    tensor([1., 1., 2.], dtype=torch.float64)

    IEEE 754 binary formats; N. Higham, Accuracy and Stability of Numerical Algorithms, section 2.1.
    """
    return _powers(values).clamp_min_(_least_power(dtype)).mul_(torch.finfo(dtype).eps / 2)


def _powers(values: Tensor) -> Tensor:
    """The powers of two at or below |values|: their exponent bits alone; zero for subnormals."""
    integers, mask = _EXPONENT[values.dtype]
    return values.contiguous().view(integers).bitwise_and(mask).view(values.dtype)


def _least_power(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).smallest_normal, 2.0**-1021)


def _half_ulps_length(values: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """The Euclidean lengths of `half_ulp` over `dim`, from above."""
    least = _least_power(dtype) * math.sqrt(values.shape[dim])
    lengths: Tensor = torch.linalg.vector_norm(_powers(values), dim=dim)
    return lengths.add_(least).mul_(torch.finfo(dtype).eps / 2)


def magnitude_rows(
    delta: Delta,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float64,
    *,
    transposed: bool = False,
) -> Tensor:
    """An upper bound of the sums of absolute products behind delta[start:stop], in `dtype`: by
    Cauchy-Schwarz per block, so that no product of absolute factors has to be formed.

    (stop - start, in), with `transposed` rows of the transpose, (stop - start, out).

    Raises:
        ValueError: a GraLoRA without the rows start:stop.

    >>> delta = Gralora(torch.ones(2, 3, 4), -torch.ones(2, 4, 5), scaling=0.5)
    >>> magnitude_rows(delta, 0, 1)[0, :2].round(decimals=9)
    tensor([1., 1.], dtype=torch.float64)
    """
    match delta:
        case Gralora():
            factors = row_blocks(delta, start, stop, transposed=transposed)
            lengths = ((_lengths(x).to(dtype), _lengths(y).to(dtype)) for x, y in factors)
            blocks = [torch.einsum("xv,vy->xvy", x, y).flatten(1) for x, y in lengths]
            bound = torch.cat(blocks) * abs(delta.scaling)
            if (general := delta.general) is not None:
                bound += magnitude_rows(general, start, stop, dtype, transposed=transposed)
            return bound
        case Lora(A=A, B=B):
            left, right = (A.T, B) if transposed else (B, A.T)
            heights = abs(delta.scaling) * _lengths(left[start:stop])
            return heights.to(dtype)[:, None] * _lengths(right).to(dtype)
        case Dense(weight=weight):
            return (weight.T if transposed else weight)[start:stop].to(dtype).abs()


def _lengths(factor: Tensor) -> Tensor:
    """Euclidean lengths over the last dimension, summed in float64: the squares of float32 values
    may overflow or vanish in float32, and a bound that does so decides nothing."""
    wide = factor.to(torch.float64, copy=True)  # float64 factors, too, stay as they are
    return wide.square_().sum(-1).sqrt_()  # several times faster than vector_norm


def tolerance(
    after: Tensor,
    exact: Tensor,
    *,
    magnitude: Tensor,
    terms: int,
    dtype: torch.dtype,
    delta: Tensor | None = None,
    delta_dtype: torch.dtype | None = None,
) -> Tensor:
    """The largest |after - exact| that a right merge can have, per element, in `exact`'s dtype.

    half_ulp(max(|after|, |exact|)) + (terms + 4) u magnitude [+ half_ulp(delta)]

    `exact` is W + D in float64, `magnitude` >= |W| + sum |products|, `terms` the number of products
    per element, u = 2^-24 (2^-53 where `dtype`, the stored one, is float64). Where `exact` itself
    was computed in float32, its own error is as large again: u doubles. With `delta_dtype`, D may
    have been rounded to it first (what PEFT does with 16-bit adapters).

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> tolerance(one, one, magnitude=0 * one, terms=4, dtype=torch.bfloat16) * 2**8
    tensor([1.], dtype=torch.float64)

    N. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the 4 are the scaling,
    its product, the last sum and second-order terms.
    """
    bound = half_ulp(torch.maximum(after.abs(), exact.abs()), dtype)
    unit = _unit(dtype) * (2 if exact.dtype == torch.float32 else 1)
    bound = bound.add(magnitude, alpha=(terms + 4) * unit)
    if delta is not None and delta_dtype is not None:
        bound += half_ulp(delta, delta_dtype)
    return bound


def rounding_lengths(
    after: Tensor,
    moved: Tensor,
    *,
    terms: int,
    dtype: torch.dtype,
    dim: int,
    delta_dtype: torch.dtype | None = None,
) -> Tensor:
    """Euclidean lengths over `dim` of the `tolerance` of stored values that are right, from above:

    |half_ulp(after)| + (terms + 4) u (|after| + 2 |moved|), |after| <= 4 half_ulp(after) / eps

    `moved` is what was added; it stands for the sums of absolute products behind it, and for the
    delta where that may have been rounded to `delta_dtype`: |half_ulp(moved)| comes to it.

    >>> one = torch.ones(4, 1)
    >>> rounding_lengths(one, one, terms=0, dtype=torch.bfloat16, dim=0) * 2**7
    tensor([1.0005])
    """
    unit = _unit(dtype) * (2 if after.dtype == torch.float32 else 1) * (terms + 4)
    halves = _half_ulps_length(after, dtype, dim)
    added = torch.linalg.vector_norm(moved, dim=dim)
    halves.mul_(1 + 4 * unit / torch.finfo(dtype).eps).add_(added, alpha=2 * unit)
    if delta_dtype is not None:
        halves += _half_ulps_length(moved, delta_dtype, dim)
    return halves


def _unit(dtype: torch.dtype) -> float:
    """The unit roundoff of the sums behind a stored `dtype`."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2


def admissible(
    exact: Tensor,
    delta: Tensor,
    *,
    magnitude: Tensor,
    terms: int,
    dtype: torch.dtype,
    delta_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The least and the largest value that a right merge may store, per element, in `dtype`.

    The sum may be off by what `tolerance` grants it, before it is rounded; arguments as there,
    `exact` in float64. Where both ends are the same number, all right merges store it.

    >>> one, none = torch.ones(1).double(), torch.zeros(1).double()
    >>> admissible(one, none, magnitude=none, terms=4, dtype=torch.bfloat16)
    (tensor([1.], dtype=torch.bfloat16), tensor([1.], dtype=torch.bfloat16))
    """
    error = magnitude * ((terms + 4) * _unit(dtype))
    if delta_dtype is not None:
        error += half_ulp(delta, delta_dtype)
    return (exact - error).to(dtype), (exact + error).to(dtype)


def worst_ratio(after: Tensor, exact: Tensor, bound: Tensor) -> float:
    """max |after - exact| / bound: at most 1 for every right merge; infinity when not finite.

    >>> worst_ratio(torch.tensor([1.0, 3.0]), torch.ones(2), torch.full((2,), 4.0))
    0.5
    """
    if after.numel() == 0:
        return 0.0
    ratio = float(((after - exact).abs() / bound).max())
    return ratio if ratio == ratio else float("inf")


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of an update rounding kept, as sums over elements, so that parts add up.

    `along` = <M-W, D>, `energy` = <D, D>, `error` = |M-W-D|^2 (Frobenius), `changed` of `elements`.

    >>> whole = Survival(1.0, 2.0, 0.5, 3, 4) + Survival(1.0, 2.0, 0.5, 1, 4)
    >>> whole.kept, whole.noise, whole.share_changed
    (0.5, 0.5, 0.5)
    """

    along: float = 0.0
    energy: float = 0.0
    error: float = 0.0
    changed: int = 0
    elements: int = 0

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.along + other.along,
            self.energy + other.energy,
            self.error + other.error,
            self.changed + other.changed,
            self.elements + other.elements,
        )

    @property
    def kept(self) -> float:
        """<M-W, D> / <D, D>: the share of the update that is there; 1 without an update."""
        return self.along / self.energy if self.energy else 1.0

    @property
    def noise(self) -> float:
        """|M-W-D| / |D|: what rounding added, relative to the update; 0 without an update."""
        return float((self.error / self.energy) ** 0.5) if self.energy else 0.0

    @property
    def share_changed(self) -> float:
        """The share of elements that the update moved at all."""
        return self.changed / self.elements if self.elements else 0.0

    def as_json(self) -> dict[str, float]:
        return {"kept": self.kept, "noise": self.noise, "changed": self.share_changed}


def survival(before: Tensor, after: Tensor, delta: Tensor) -> Survival:
    """What became of `delta` between `before` and `after` (as stored); all of one
    wide dtype.

    >>> before, delta = torch.ones(2).double(), torch.tensor([1.0, 0.001]).double()
    >>> after = (before + delta).bfloat16().double()
    >>> survival(before, after, delta).share_changed
    0.5
    """
    moved = after - before
    rest = moved - delta
    return Survival(
        _dot(moved, delta),
        _dot(delta, delta),
        _dot(rest, rest),
        int(torch.count_nonzero(moved)),
        delta.numel(),
    )


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten(), other.flatten()))


@dataclass(frozen=True, slots=True)
class Addend:
    """What the rows `place` of some compared rows get: `weight` times the rows of `delta` (of its
    transpose, for `transposed`) from `first` on. `rounded` is the dtype of 16 bits that the delta
    may have been rounded to before it was added."""

    delta: Delta
    place: slice
    first: int
    transposed: bool = False
    weight: float = 1.0
    rounded: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `compare` found: the largest |difference| / `bound`, what rounding kept, and the bound
    and the sum of the addends behind them, per element."""

    worst: float
    survival: Survival
    bound: Tensor
    delta: Tensor


def compare(
    before: Tensor,
    after: Tensor,
    addends: Sequence[Addend],
    *,
    dtype: torch.dtype,
    quick: bool = False,
    origin: Tensor | None = None,
    slack: Tensor | None = None,
) -> Verdict:
    """Whether `after` is a rounding to `dtype` of `before` + the addends, and by how much.

    before (rows, columns)   after (rows, columns)

    Both are float64, or float32 for a `dtype` of 16 bits, on the device of the result. With
    `quick`, the bound takes |delta| for the sums of absolute products, which is at most those, at
    hand, and nearly always enough; only where that says no, those are formed. `origin` is what the
    update is counted from, if that is not `before`; `slack` widens the bound, per element.

    >>> delta = Lora(torch.ones(1, 2), torch.ones(3, 1), 0.5)
    >>> before = torch.ones(3, 2).double()
    >>> after = (before + rows(delta, 0, 3)).bfloat16().double()
    >>> found = compare(before, after, [Addend(delta, slice(0, 3), 0)], dtype=torch.bfloat16)
    >>> found.worst, found.survival.kept
    (0.0, 1.0)

    `tolerance` has the bound and its source.
    """
    delta = _sum(rows, addends, before)
    exact = before + delta
    products = sum(terms(addend.delta) for addend in addends)
    rounded = next((a.rounded for a in addends if a.rounded is not None), None)

    def judged(sizes: Tensor) -> tuple[float, Tensor]:
        bound = tolerance(
            after, exact, magnitude=sizes.add_(before.abs()), terms=products, dtype=dtype,
            delta=delta, delta_dtype=rounded,
        )  # fmt: skip
        bound = bound if slack is None else bound + slack
        return worst_ratio(after, exact, bound), bound

    worst, bound = judged(delta.abs() if quick else _sum(magnitude_rows, addends, before))
    if quick and worst > 1:
        worst, bound = judged(_sum(magnitude_rows, addends, before))
    kept = survival(before if origin is None else origin, after, delta)
    return Verdict(worst, kept, bound, delta)


def _sum(of: Callable[..., Tensor], addends: Sequence[Addend], like: Tensor) -> Tensor:
    """The sum over addends of `of` (`rows` or `magnitude_rows`), of the shape and dtype of `like`;
    it may be an addend itself."""
    total = None
    for addend in addends:
        span = addend.first, addend.first + addend.place.stop - addend.place.start
        part = of(addend.delta, *span, like.dtype, transposed=addend.transposed).to(like.device)
        if addend.weight != 1:
            part = part * (addend.weight if of is rows else abs(addend.weight))
        if len(addends) == 1 and span[1] - span[0] == len(like):
            return part
        if total is None:
            total = torch.zeros_like(like)
        total[addend.place] += part
    return torch.zeros_like(like) if total is None else total
