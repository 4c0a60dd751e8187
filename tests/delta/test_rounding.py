"""The rounding bound: every right merge is within it, every wrong one is not."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora, terms
from gralora_convert.delta.products import add_rows_, rows
from gralora_convert.delta.rounding import (
    Survival,
    half_ulp,
    magnitude_rows,
    survival,
    tolerance,
    worst_ratio,
)
from tests import oracle

DOUBLE = torch.float64
SHORT = [torch.bfloat16, torch.float16]
# The dtypes of the base and of what is written.
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


def gralora(
    k: int, s: int, m: int, p: int, h: int = 0, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Gralora:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(k, m, k * s), (k, k * s, p), *([(h, k * m), (k * p, h)] if h else [])]
    factors = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    return Gralora(factors[0], factors[1], 0.37, *factors[2:])


def beside(delta: Gralora, rho: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Gralora]:
    """A random base weight (out, in), and the delta scaled to rho times its norm."""
    draw = torch.Generator().manual_seed(1000 + seed)
    W = torch.randn(delta.out_features, delta.in_features, generator=draw).to(dtype)
    norm = float(rows(delta, 0, delta.out_features).norm())
    return W, replace(delta, scaling=delta.scaling * rho * float(W.double().norm()) / norm)


def merged(W: Tensor, delta: Delta, dtype: torch.dtype) -> Tensor:
    """Sums in float32, one rounding."""
    sums = W.to(torch.float32, copy=True)
    add_rows_(sums, delta, 0)
    return sums.to(dtype)


def ratio(W: Tensor, delta: Delta, M: Tensor, rounded_first: torch.dtype | None = None) -> float:
    """The statistic e of a merge M of W and the delta."""
    D = rows(delta, 0, len(W))
    exact, after = W.double() + D, M.double()
    bound = tolerance(
        after,
        exact,
        magnitude=W.double().abs() + magnitude_rows(delta, 0, len(W)),
        terms=terms(delta),
        dtype=M.dtype,
        delta=D,
        delta_dtype=rounded_first,
    )
    return worst_ratio(after, exact, bound)


# --- units in the last place ---


@pytest.mark.parametrize("dtype", SHORT)
def test_half_ulp_at_every_value_of_16_bits(dtype: torch.dtype) -> None:
    finite = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))
    values = torch.arange(finite + 1, dtype=torch.int16).view(dtype).double()
    gaps = values.diff()
    assert torch.equal(half_ulp(values[:-1], dtype), gaps / 2)
    assert torch.equal(half_ulp(-values[:-1], dtype), gaps / 2)
    assert torch.equal(half_ulp(values[:-1] + 0.9 * gaps, dtype), gaps / 2)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_half_ulp_of_float32_and_float64(value: float) -> None:
    x = torch.tensor([value], dtype=DOUBLE)
    single = float(np.spacing(np.float32(abs(value))))
    assert math.isinf(single) or float(half_ulp(x, torch.float32)) == single / 2
    assert float(half_ulp(x, DOUBLE)) == max(math.ulp(value) / 2, 2.0**-1074)


@given(st.floats(-6e4, 6e4), st.sampled_from([*SHORT, torch.float32]))
def test_one_rounding_is_within_half_an_ulp(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value], dtype=DOUBLE)
    assert bool((x.to(dtype).double() - x).abs() <= half_ulp(x, dtype))


# --- sums of absolute products ---


def absolute(delta: Gralora) -> Tensor:
    """The sums of absolute products, by the oracle."""
    parts = (delta.A, delta.B, delta.general_A, delta.general_B)
    A, B, general_A, general_B = (None if x is None else x.double().abs().numpy() for x in parts)
    assert A is not None
    assert B is not None
    return torch.from_numpy(oracle.gralora_delta(A, B, abs(delta.scaling), general_A, general_B))


@given(
    *(st.integers(1, top) for top in (3, 3, 4, 4)),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_magnitude_bounds_the_sums_of_absolute_products(
    k: int, s: int, m: int, p: int, h: int, negative: bool, transposed: bool, data: st.DataObject
) -> None:
    delta = gralora(k, s, m, p, h, seed=data.draw(st.integers(0, 99)))
    delta = replace(delta, scaling=-delta.scaling if negative else delta.scaling)
    truth = absolute(delta).T if transposed else absolute(delta)
    start = data.draw(st.integers(0, len(truth) - 1))
    stop = data.draw(st.integers(start + 1, len(truth)))
    found = magnitude_rows(delta, start, stop, transposed=transposed)
    assert bool((found >= truth[start:stop] * (1 - 1e-14)).all())
    if s == 1 and h <= 1:  # one product each: nothing to overestimate
        torch.testing.assert_close(found, truth[start:stop])


def test_magnitude_of_a_dense_delta_is_its_absolute_value() -> None:
    weight = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    found = magnitude_rows(Dense(weight), 0, 1, transposed=True)
    assert torch.equal(found, torch.tensor([[1.0, 3.0]], dtype=DOUBLE))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_magnitude_where_squares_leave_float32(size: float) -> None:
    lora = Lora(torch.full((2, 3), size), torch.full((4, 2), 1 / size), 1.0)
    torch.testing.assert_close(magnitude_rows(lora, 0, 4), torch.full((4, 3), 2.0).double())
    blocks = gralora(2, 1, 3, 4)
    moved = replace(blocks, A=blocks.A * size, B=blocks.B / size)
    torch.testing.assert_close(
        magnitude_rows(moved, 0, 8), magnitude_rows(blocks, 0, 8), rtol=1e-6, atol=0
    )
    W = torch.ones(8, 6)
    assert ratio(W, moved, merged(W, moved, torch.float32)) <= 1


# --- right merges ---


@given(
    st.integers(0, 9999),
    st.sampled_from(PAIRS),
    st.floats(math.log(1e-4), math.log(0.3)),
    st.sampled_from([0, 4]),
)
def test_right_merges_raise_no_alarm(
    seed: int, dtypes: tuple[torch.dtype, torch.dtype], log_rho: float, h: int
) -> None:
    base, written = dtypes
    factor = written if base == written else torch.float32
    W, delta = beside(gralora(4, 2, 12, 8, h, seed=seed, dtype=factor), math.exp(log_rho), base)
    assert ratio(W, delta, merged(W, delta, written)) <= 1
    if base == written and factor in SHORT:
        first = W + rows(delta, 0, len(W), torch.float32).to(factor)
        assert ratio(W, delta, first, rounded_first=factor) <= 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("h", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
@pytest.mark.parametrize("adapter_as_base", [False, True])
def test_merges_by_peft_raise_no_alarm(dtype: torch.dtype, h: int, adapter_as_base: bool) -> None:
    torch.manual_seed(3)
    config = peft.GraloraConfig(
        r=8, alpha=5, gralora_k=2, hybrid_r=h, target_modules=["x"], init_weights=False
    )
    base = nn.ModuleDict({"x": nn.Linear(64, 48, dtype=dtype)})
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=not adapter_as_base)
    layer = model.base_model.model.x
    parts = [layer.gralora_A["default"], layer.gralora_B["default"]]
    if h:
        parts += [layer.gralora_A_general["default"].weight]
        parts += [layer.gralora_B_general["default"].weight]
    A, B, *general = (part.detach().clone() for part in parts)
    if adapter_as_base:
        assert A.dtype == dtype
    delta = Gralora(A.float(), B.float(), 5 / (8 + h), *(part.float() for part in general))
    W = layer.base_layer.weight.detach().clone()
    layer.merge()
    rounded = dtype if adapter_as_base and dtype in SHORT else None
    assert 0 < ratio(W, delta, layer.base_layer.weight.detach(), rounded) <= 1


@pytest.mark.parametrize("dtype", SHORT)
def test_the_bound_is_sharp(dtype: torch.dtype) -> None:
    W, delta = beside(gralora(2, 4, 64, 48), 1e-2, dtype)
    assert 0.98 < ratio(W, delta, merged(W, delta, dtype)) <= 1


def test_a_zero_delta_in_float64_is_equal_to_the_base() -> None:
    W = torch.zeros(4, 6, dtype=DOUBLE)
    assert ratio(W, Lora(torch.ones(1, 6), torch.zeros(4, 1), 1.0), W) == 0


# --- wrong merges ---


def blocks(delta: Gralora) -> tuple[Tensor, Tensor]:
    """A as (n, i, j, t), B as (j, n, t, o)."""
    k, s = delta.k, delta.s
    return delta.A.view(k, -1, k, s), delta.B.view(k, k, s, -1)


def transposed_blocks(delta: Gralora) -> Gralora:
    a4, b4 = blocks(delta)
    swapped = a4.transpose(0, 2).reshape_as(delta.A), b4.transpose(0, 1).reshape_as(delta.B)
    return replace(delta, A=swapped[0], B=swapped[1])


def slot_order(delta: Gralora) -> Gralora:
    k, s, m = delta.k, delta.s, delta.A.shape[1]
    return replace(delta, A=delta.A.view(k, m, s, k).transpose(2, 3).reshape(k, m, k * s))


def missing_permute(delta: Gralora) -> Gralora:
    a4, _ = blocks(delta)
    diagonal = torch.zeros_like(a4)
    for j in range(delta.k):
        diagonal[j, :, j] = a4[j, :, j]
    return replace(delta, A=diagonal.reshape_as(delta.A))


def swapped_slots(delta: Gralora) -> Gralora:
    a4, _ = blocks(delta)
    A = a4.clone()
    A[0, :, [0, 1]] = a4[0, :, [1, 0]]
    return replace(delta, A=A.reshape_as(delta.A))


def one_block_missing(delta: Gralora) -> Gralora:
    B = blocks(delta)[1].clone()
    B[1, 1] = 0
    return replace(delta, B=B.reshape_as(delta.B))


def scaled(factor: float) -> Callable[[Gralora], Gralora]:
    return lambda delta: replace(delta, scaling=factor * delta.scaling)


# Which delta was added instead (mathematics of the wrong merges seen in practice).
MISTAKES: dict[str, Callable[[Gralora], Gralora]] = {
    "transposed blocks": transposed_blocks,
    "slot order (s, k)": slot_order,
    "missing permute": missing_permute,
    "two slots swapped": swapped_slots,
    "one block missing": one_block_missing,
    "reversed k": lambda delta: replace(delta, A=delta.A.flip(0)),
    "alpha / r": lambda delta: scaled((delta.r + delta.hybrid_r) / delta.r)(delta),
    "one per cent": scaled(1.01),
    "no hybrid part": lambda delta: replace(delta, general_A=None, general_B=None),
    "twice": scaled(2.0),
    "not at all": scaled(0.0),
    "subtracted": scaled(-1.0),
}
PLACES = [
    (torch.float32, 1e-2),
    (torch.float32, 1e-4),
    (torch.bfloat16, 1e-2),
    (torch.bfloat16, 1e-3),
    (torch.bfloat16, 1e-4),
    (torch.float16, 1e-3),
]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(("dtype", "rho"), PLACES)
def test_wrong_merges_are_never_missed(mistake: str, dtype: torch.dtype, rho: float) -> None:
    for seed in range(2):
        source = gralora(4, 2, 64, 48, 4, seed=seed, dtype=dtype)
        W, delta = beside(source, rho, dtype, seed)
        wrong = merged(W, MISTAKES[mistake](delta), dtype)
        rounded = dtype if dtype in SHORT else None
        assert ratio(W, delta, merged(W, delta, dtype), rounded) <= 1
        assert ratio(W, delta, wrong, rounded) > 1


@pytest.mark.parametrize(("dtype", "rho"), PLACES)
def test_a_merge_into_another_base_is_never_missed(dtype: torch.dtype, rho: float) -> None:
    W, delta = beside(gralora(4, 2, 64, 48, dtype=dtype), rho, dtype)
    draw = torch.Generator().manual_seed(8)
    other = (W.double() * (1 + 1e-3 * torch.randn(W.shape, generator=draw))).to(dtype)
    assert ratio(W, delta, merged(other, delta, dtype), dtype if dtype in SHORT else None) > 1


@pytest.mark.parametrize("dtype", SHORT)
def test_a_wrong_weight_where_the_delta_is_zero(dtype: torch.dtype) -> None:
    source = gralora(2, 2, 6, 5, dtype=dtype)
    dead = replace(source, B=source.B * torch.tensor([0.0, 1.0]).to(dtype).view(2, 1, 1))
    W = torch.full((10, 12), 1e-3, dtype=dtype)
    right = merged(W, dead, dtype)
    wrong = right.clone()
    wrong[0, 0] = 1.02 * wrong[0, 0]
    assert ratio(W, dead, right, dtype) <= 1
    assert ratio(W, dead, wrong, dtype) > 1


def test_the_worst_ratio_of_what_is_no_number() -> None:
    one = torch.ones(2, dtype=DOUBLE)
    assert worst_ratio(one, one, one) == 0
    assert worst_ratio(one[:0], one[:0], one[:0]) == 0
    for value in (math.nan, math.inf, -math.inf):
        broken = torch.tensor([1.0, value], dtype=DOUBLE)
        assert worst_ratio(broken, one, one) == math.inf
        assert worst_ratio(broken, broken, one) == math.inf


# --- what rounding keeps ---


@pytest.mark.parametrize(
    ("dtype", "rho", "kept", "noise", "changed"),
    [
        (torch.bfloat16, 1e-1, 1.000, 0.017, 0.98),
        (torch.bfloat16, 1e-2, 0.999, 0.166, 0.82),
        (torch.bfloat16, 3e-3, 0.925, 0.481, 0.52),
        (torch.bfloat16, 1e-3, 0.533, 0.791, 0.22),
        (torch.bfloat16, 3e-4, 0.182, 0.937, 0.07),
        (torch.float16, 1e-2, 1.000, 0.021, 0.975),
        (torch.float16, 1e-3, 0.999, 0.206, 0.78),
        (torch.float16, 1e-4, 0.447, 0.832, 0.18),
    ],
)
def test_survival_of_a_random_update(
    dtype: torch.dtype, rho: float, kept: float, noise: float, changed: float
) -> None:
    W, delta = beside(gralora(4, 16, 96, 96), rho, dtype)
    D, M = rows(delta, 0, len(W)), merged(W, delta, dtype)
    whole = survival(W.double(), M.double(), D)
    assert whole.kept == pytest.approx(kept, rel=0.04, abs=0.002)
    assert whole.noise == pytest.approx(noise, rel=0.04, abs=0.001)
    assert whole.share_changed == pytest.approx(changed, abs=0.03)
    parts = Survival()
    for start in range(0, len(W), 100):
        tile = slice(start, start + 100)
        parts += survival(W[tile].double(), M[tile].double(), D[tile])
    assert (parts.changed, parts.elements) == (whole.changed, whole.elements)
    for name in ("along", "energy", "error"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert parts.as_json() == pytest.approx(whole.as_json())


def test_survival_without_an_update() -> None:
    assert Survival().as_json() == {"kept": 1.0, "noise": 0.0, "changed": 0.0}
