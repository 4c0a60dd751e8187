"""Is a stored matrix M a rounding of W + D? Bounds that are derived, and what rounding kept.

Error model: the sum in float32 has `terms` products per element, the result is rounded once to the
stored dtype (twice, where another tool rounds D first). The bound is a forward error bound, so a
right merge never exceeds it; see N. Higham, Accuracy and Stability of Numerical Algorithms, ch. 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gralora_convert.delta import Delta, Dense, Gralora, Lora, row_blocks

__all__ = ["Survival", "half_ulp", "magnitude_rows", "survival", "tolerance", "worst_ratio"]


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of `dtype` at |values|; float64 in, float64 out."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs()).exponent.to(torch.float64) - 1
    smallest = torch.frexp(torch.tensor(info.smallest_normal, dtype=torch.float64)).exponent - 1
    return torch.exp2(exponent.clamp_min(float(smallest))) * (info.eps / 2)


def magnitude_rows(delta: Delta, start: int, stop: int, *, transposed: bool = False) -> Tensor:
    """An upper bound of the sums of absolute products behind delta[start:stop], float64: by
    Cauchy-Schwarz per block, so that no product of absolute factors has to be formed."""
    match delta:
        case Gralora():
            bound = torch.cat(
                [
                    torch.einsum("xv,vy->xvy", _lengths(left), _lengths(right)).flatten(1)
                    for left, right in row_blocks(delta, start, stop, transposed=transposed)
                ]
            ) * abs(delta.scaling)
            if delta.general_A is not None and delta.general_B is not None:
                general = Lora(delta.general_A, delta.general_B, delta.scaling)
                bound += magnitude_rows(general, start, stop, transposed=transposed)
            return bound
        case Lora(A=A, B=B):
            left, right = (A.T, B) if transposed else (B, A.T)
            return abs(delta.scaling) * _lengths(left[start:stop])[:, None] * _lengths(right)
        case Dense(weight=weight):
            return (weight.T if transposed else weight)[start:stop].double().abs()


def _lengths(factor: Tensor) -> Tensor:
    """Upper bounds of the Euclidean lengths over the last dimension, float64; summed in the
    factor's own dtype, whose rounding the margin covers."""
    lengths: Tensor = torch.linalg.vector_norm(factor, dim=-1)
    return lengths.double() * (1 + 1e-4)


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
    """The largest |after - exact| that a right merge can have, per element, float64.

    `exact` is W + D in float64, `magnitude` >= |W| + sum |products|, `terms` the number of products
    per element. With `delta_dtype`, D may have been rounded to it first (what PEFT does with 16-bit
    adapters).
    """
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    bound = half_ulp(torch.maximum(after.abs(), exact.abs()), dtype)
    bound = bound + (terms + 4) * unit * magnitude
    if delta is not None and delta_dtype is not None:
        bound = bound + half_ulp(delta, delta_dtype)
    return bound


def worst_ratio(after: Tensor, exact: Tensor, bound: Tensor) -> float:
    """max |after - exact| / bound: at most 1 for every right merge; infinity when not finite."""
    if after.numel() == 0:
        return 0.0
    ratio = float(((after - exact).abs() / bound).max())
    return ratio if ratio == ratio else float("inf")


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of an update rounding kept, as sums over elements, so that parts add up.

    `kept` = <M-W, D> / <D, D>, `noise` = |M-W-D| / |D| (Frobenius), `share_changed` of elements.
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
        return self.along / self.energy if self.energy else 1.0

    @property
    def noise(self) -> float:
        return float((self.error / self.energy) ** 0.5) if self.energy else 0.0

    @property
    def share_changed(self) -> float:
        return self.changed / self.elements if self.elements else 0.0

    def as_json(self) -> dict[str, float]:
        return {"kept": self.kept, "noise": self.noise, "changed": self.share_changed}


def survival(before: Tensor, after: Tensor, delta: Tensor) -> Survival:
    """What became of `delta` between `before` (as stored) and `after` (as stored), all float64."""
    moved = after - before
    return Survival(
        float((moved * delta).sum()),
        float(delta.square().sum()),
        float((moved - delta).square().sum()),
        int((moved != 0).sum()),
        delta.numel(),
    )
