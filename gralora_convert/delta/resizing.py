"""The shape of an adapter that is asked for, and what it costs to bring a delta into it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, assert_never, get_args, overload

import torch

from gralora_convert.delta.exact import (
    general_of,
    gralora_to_lora,
    hybrid_to_gralora,
    lora_to_hybrid,
    pad,
    pad_lora,
    with_scaling,
)
from gralora_convert.delta.fit import Fit, exact_rank, to_gralora, to_hybrid, to_lora
from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora, mapped
from gralora_convert.delta.forward import forward_path
from gralora_convert.delta.svd import Method, squared_norm, svd_effort
from gralora_convert.errors import CheckFailedError, MisuseError, is_number

Made = TypeVar("Made", Gralora, Lora)
Kind = Literal["gralora", "hybrid", "lora"]
EXACT = 1e-6  # relative errors below it are those of float32 factors
PROBES = 32

# What one module lost: squared error and squared norm (Frobenius).
Loss = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """What every module of the result looks like; `k` is 1 for LoRA, of which single modules may
    have other ranks, with the same alpha."""

    kind: Kind
    k: int
    r: int
    hybrid_r: int
    scaling: float
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """scaling * (r + hybrid_r), whole where it can be."""
        alpha = self.scaling * (self.r + self.hybrid_r)
        return int(alpha) if float(alpha).is_integer() else alpha

    def of(self, module: str) -> "Shape":
        """What one module looks like.

        >>> Shape("lora", 1, 8, 0, 1.0, {"q_proj": 4}).of("q_proj").scaling
        2.0
        """
        r = self.ranks.get(module, self.r)
        return self if r == self.r else replace(self, r=r, scaling=self.alpha / r)

    def outline(self, rows: int, columns: int, dtype: torch.dtype) -> Gralora | Lora:
        """A module of weight (rows, columns) = (out, in): its shapes and dtype, no values."""
        made = functools.partial(torch.empty, dtype=dtype, device="meta")
        k, r, h = self.k, self.r, self.hybrid_r
        if self.kind == "lora":
            return Lora(made(r, columns), made(rows, r), self.scaling)
        general = (made(h, columns), made(rows, h)) if h else (None, None)
        return Gralora(made(k, columns // k, r), made(k, r, rows // k), self.scaling, *general)

    def as_json(self) -> dict[str, object]:
        return {
            "to": self.kind, "r": self.r, "k": self.k, "hybrid_r": self.hybrid_r,
            "alpha": self.alpha, "scaling": self.scaling,
            **({"ranks": dict(self.ranks)} if self.ranks else {}),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for of a result; None: the verb's default.

    Raises:
        MisuseError: numbers that cannot be meant.
    """

    to: Kind
    k: int | None = None
    r: int | None = None
    hybrid_r: int | None = None
    alpha: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        if self.to not in get_args(Kind):
            raise MisuseError(f"the result {self.to!r} is none of {', '.join(get_args(Kind))}")
        for name, least in (("k", 1), ("r", 1), ("hybrid_r", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise MisuseError(f"{name}={value!r} is not a whole number of at least {least}")
        if self.alpha is not None and not is_number(self.alpha):
            raise MisuseError(f"alpha={self.alpha!r} is not a finite number")
        if self.max_error is None:
            return
        if not is_number(self.max_error) or not 0 < self.max_error < 1:
            raise MisuseError(f"`max_error={self.max_error!r}` is not a number between 0 and 1")
        if self.r is not None:
            raise MisuseError(
                "`max_error` chooses the rank and excludes `r`", hint="Give one of them."
            )
        if self.to == "hybrid":
            raise MisuseError(
                "`max_error` chooses the rank of a LoRA or GraLoRA, not of a Hybrid",
                hint="Give `r`.",
            )

    def blocks(self, default: int) -> int:
        """k of the result.

        Raises:
            MisuseError: what is asked for does not go together.
        """
        if self.to == "lora" and (self.k is not None or self.hybrid_r):
            raise MisuseError("a LoRA has neither k nor hybrid_r", hint="Leave them out.")
        if self.to == "gralora" and self.hybrid_r:
            raise MisuseError("a pure GraLoRA has no hybrid_r", hint='Use `to="hybrid"`.')
        return 1 if self.to == "lora" else self.k or default

    def shape(self, k: int, r: int, hybrid_r: int, scaling: float) -> Shape:
        """The shape of the result, with `alpha` in place of `scaling` where it is given.

        Raises:
            MisuseError: k does not divide r, or the scaling is zero or not finite.
        """
        if r < 1 or r % k:
            raise MisuseError(f"r={r} is not a positive multiple of k={k}")
        scaling = scaling if self.alpha is None else self.alpha / (r + hybrid_r)
        if not math.isfinite(scaling) or scaling == 0:
            raise MisuseError(f"a scaling of {scaling} cannot carry an update")
        return Shape(self.to, k, r, hybrid_r, scaling)


def require_divisible(k: int, module: str, weight: tuple[int, int], or_else: str = "") -> None:
    """Raises `MisuseError` unless k divides both sides of a module's weight."""
    if k < 1 or any(size % k for size in weight):
        raise MisuseError(
            f"k={k} does not divide its {weight[0]} x {weight[1]} weight",
            where=module,
            hint=f"Choose a k that divides every adapted layer{or_else}."
            if math.gcd(*weight) > 1
            else f"`k=1` alone does: take it, or remove its tensors to go on without{or_else}.",
        )


def least_rank(delta: Delta, to: Kind, k: int, general: int) -> int:
    """The smallest exact r of one module for factors of full rank; what a general part of rank
    `general` cannot hold of the source's goes into the blocks."""
    if to != "hybrid" or isinstance(delta, Dense):
        return exact_rank(delta, "gralora" if to == "hybrid" else to, k)
    side = min(delta.in_features, delta.out_features) // k
    if isinstance(delta, Lora):
        return k * max(1, min(delta.r - general, side))
    more = max(0, delta.hybrid_r - general)
    return min(exact_rank(delta, "hybrid", k) + k * more, k * side)


def resize(
    delta: Delta,
    shape: Shape,
    generator: torch.Generator | None = None,
    *,
    method: Method = "auto",
) -> Fit[Gralora] | Fit[Lora]:
    """`delta` as `shape`, with what was lost: exact where a rewriting of its factors can be, else
    the best fit. Factors have the dtype of the delta's, float32 for a dense one. A missing
    generator is seed 0.

    >>> lora = Lora(torch.ones(1, 4), torch.ones(6, 1), 1.0)
    >>> resize(lora, Shape("gralora", k=2, r=2, hybrid_r=0, scaling=1.0)).error2
    0.0
    """
    generator = generator or torch.Generator().manual_seed(0)
    match shape.kind:
        case "lora":
            return _as_lora(delta, shape, method, generator)
        case "gralora":
            return _as_gralora(delta, shape, method, generator)
        case "hybrid":
            return _as_hybrid(delta, shape, method, generator)
        case other:
            assert_never(other)


def effort(shape: Shape, weight: tuple[int, int], method: Method = "auto") -> int:
    """What `resize` takes for a dense delta of this (out, in), in bytes copied (0.3 ns): measured
    on one core, good for even shares of several processes.

    >>> effort(Shape("lora", 1, 32, 0, 1.0), (2048, 2048)) < effort(
    ...     Shape("gralora", 4, 32, 0, 1.0), (2048, 2048)
    ... )
    True
    """
    k, ranks = shape.k, (shape.r // shape.k, shape.hybrid_r)
    fits = [(k, ranks[0])] + [(1, ranks[1])] * bool(shape.hybrid_r)
    if shape.kind != "lora":  # and the LoRA of as many parameters beside it
        fits.append((1, min(shape.r + shape.hybrid_r, *weight)))
    return sum(k * k * svd_effort(weight[0] // k, weight[1] // k, rank, method) for k, rank in fits)


def _fitted_dtype(delta: Delta) -> torch.dtype:
    return torch.float32 if isinstance(delta, Dense) else delta.A.dtype


def _as_lora(delta: Delta, shape: Shape, method: Method, generator: torch.Generator) -> Fit[Lora]:
    lora = gralora_to_lora(delta) if isinstance(delta, Gralora) else delta
    if isinstance(lora, Lora) and lora.r <= shape.r:
        return _exact(pad_lora(with_scaling(lora, shape.scaling), shape.r))
    dtype = _fitted_dtype(delta)
    return to_lora(
        delta, shape.r, scaling=shape.scaling, dtype=dtype, method=method, generator=generator
    )


def _as_gralora(
    delta: Delta, shape: Shape, method: Method, generator: torch.Generator
) -> Fit[Gralora]:
    if isinstance(delta, Gralora) and delta.k == shape.k:
        pure = hybrid_to_gralora(delta)
        if pure.r <= shape.r:
            return _exact(pad(with_scaling(pure, shape.scaling), shape.r, generator))
    return to_gralora(
        delta, shape.k, shape.r, scaling=shape.scaling, dtype=_fitted_dtype(delta),
        method=method, generator=generator,
    )  # fmt: skip


def _as_hybrid(
    delta: Delta, shape: Shape, method: Method, generator: torch.Generator
) -> Fit[Gralora]:
    """Exact where the general part and the blocks hold all; else alternating fits."""
    k, r, h = shape.k, shape.r, shape.hybrid_r
    if isinstance(delta, Lora) and delta.r <= h:
        general = pad_lora(with_scaling(delta, shape.scaling), h, generator)
        return _exact(lora_to_hybrid(general, k, r, generator))
    kept = isinstance(delta, Gralora) and delta.hybrid_r <= h
    if not isinstance(delta, Dense) and (kept or least_rank(delta, "hybrid", k, h) <= r):
        general, rest = _divided(delta, h)
        fit = _as_gralora(rest, replace(shape, kind="gralora"), method, generator)
        general = pad_lora(with_scaling(general, shape.scaling), h, generator)
        both = replace(fit.delta, general_A=general.A, general_B=general.B)
        return Fit(both, fit.error2, squared_norm(delta))
    return to_hybrid(
        delta, k, r, h, scaling=shape.scaling, dtype=_fitted_dtype(delta), method=method,
        generator=generator,
    )  # fmt: skip


@overload
def _divided(delta: Lora, h: int) -> tuple[Lora, Lora]: ...
@overload
def _divided(delta: Gralora | Lora, h: int) -> tuple[Lora, Gralora | Lora]: ...
def _divided(delta: Gralora | Lora, h: int) -> tuple[Lora, Gralora | Lora]:
    """The first h terms of the general part (of a LoRA: of all), and the rest for the blocks."""
    if isinstance(delta, Lora):
        head = Lora(delta.A[:h], delta.B[:, :h], delta.scaling)
        return head, Lora(delta.A[h:], delta.B[:, h:], delta.scaling)
    head, tail = _divided(general_of(delta), h)
    rest = (tail.A, tail.B) if h < delta.hybrid_r else (None, None)
    return head, Gralora(delta.A, delta.B, delta.scaling, *rest)


def _exact(delta: Made) -> Fit[Made]:
    """A layout that loses nothing, with the norm of its delta for the overall error."""
    return Fit(delta, 0.0, squared_norm(delta))


def stored(
    module: str, source: Delta, fit: Fit[Gralora] | Fit[Lora], dtype: torch.dtype, *, verify: bool
) -> Gralora | Lora:
    """The fit of `source` in the dtype that is written, on the CPU; `verify` runs both on probes.

    Raises:
        CheckFailedError: the factors lose more than rounding may, or give other outputs.
    """
    made: Gralora | Lora = mapped(fit.delta, lambda factor: _rounded(module, factor, dtype))
    if verify:
        require_same(module, source, made, fit.error2, dtype)
    return made


def _rounded(module: str, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float16 ends at 65504, and below 6e-5 it has few digits left."""
    made = factor.to("cpu", dtype)
    if dtype == torch.float16 and factor.dtype != dtype:
        held = factor.to("cpu").double()
        lost = float((made.double() - held).norm())
        if not lost <= torch.finfo(dtype).eps * float(held.norm()):
            raise CheckFailedError(
                "float16 cannot hold its factors: values up to "
                f"{float(held.abs().max()):.3g} would lose more than by rounding",
                where=module, hint='Give `dtype="float32"` or `dtype="bfloat16"`.',
            )  # fmt: skip
    return made


def require_same(
    module: str, source: Delta, made: Gralora | Lora, error2: float, dtype: torch.dtype
) -> None:
    """The forward paths of source and result (as stored) on probe inputs, in float64.

    For normal inputs the mean squared difference is the squared Frobenius error: beyond twice the
    expected error and the rounding of the stored factors, chance is less than 1e-12.

    Raises:
        CheckFailedError: they differ by more than that.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(PROBES, made.in_features, dtype=torch.float64, generator=generator)
    device = source.weight.device if isinstance(source, Dense) else source.A.device
    difference = forward_path(made, x) - forward_path(source, x.to(device)).cpu()
    found = float(difference.norm()) / math.sqrt(PROBES)
    rounding = 4 * torch.finfo(dtype).eps * (_size(made) + _size(source))
    allowed = 2 * math.sqrt(error2) + rounding
    if not found <= allowed:
        raise CheckFailedError(
            f"gives other outputs than its source: difference {found:.3g}, up to {allowed:.3g} "
            "was expected",
            where=module,
            hint="Nothing was published. Please report this with the inputs.",
        )


def _size(delta: Delta) -> float:
    """What bounds the norm of a delta, and the rounding of its factors: |A| |B|."""
    match delta:
        case Dense(weight=weight):
            return float(weight.norm())
        case Lora(A=A, B=B):
            return abs(delta.scaling) * float(A.double().norm() * B.double().norm())
        case Gralora(A=A, B=B):
            size = abs(delta.scaling) * float(A.double().norm() * B.double().norm())
            return size if delta.general is None else size + _size(delta.general)


def relative(losses: Mapping[str, Loss]) -> float:
    """The relative error of several modules together, summed in the order of their names, so that
    it does not depend on which thread was first."""
    error2, norm2 = (sum(losses[module][i] for module in sorted(losses)) for i in (0, 1))
    return math.sqrt(error2 / norm2) if norm2 else 0.0


def loss_json(losses: Mapping[str, Loss]) -> dict[str, object]:
    """Overall error, worst module and a row for each, for a receipt."""
    errors = {module: relative({module: losses[module]}) for module in sorted(losses)}
    return {
        "error": relative(losses),
        "worst_module": max(errors, key=errors.__getitem__, default=""),
        "modules": [{"module": module, "error": error} for module, error in errors.items()],
    }
