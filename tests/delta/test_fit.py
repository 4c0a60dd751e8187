"""Fits of a given rank: each is the Eckart-Young optimum, and its error is what it says."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gralora_convert.delta.exact import hybrid_to_gralora, pad
from gralora_convert.delta.fit import (
    Fit,
    exact_rank,
    smallest_rank,
    smallest_ranks,
    spectra,
    to_gralora,
    to_hybrid,
    to_lora,
)
from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora
from gralora_convert.delta.products import dense
from tests import oracle

DOUBLE = torch.float64
ROUND_OFF = 1e-13  # relative to the norm, for computations in float64 on small matrices


def gralora(
    k: int, s: int, m: int, p: int, h: int = 0, *, seed: int = 0, scaling: float = 0.5
) -> Gralora:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=DOUBLE)

    general = (normal(h, k * m), normal(k * p, h)) if h else (None, None)
    return Gralora(normal(k, m, k * s), normal(k, k * s, p), scaling, *general)


def lora(rank: int, n_in: int, n_out: int, *, seed: int = 0, scaling: float = 0.5) -> Lora:
    one = gralora(1, rank, n_in, n_out, seed=seed, scaling=scaling)
    return Lora(one.A[0].T, one.B[0].T, scaling)


@st.composite
def deltas(draw: st.DrawFn) -> tuple[Delta, int]:
    """A delta of any kind, and a k that divides its sides."""
    k_old, k, m, p = (draw(st.integers(1, top)) for top in (4, 4, 3, 3))
    unit = math.lcm(k_old, k)
    n_in, n_out = unit * m, unit * p
    seed, scaling = draw(st.integers(0, 999)), draw(st.sampled_from([0.5, 3.0, -2.0]))
    kind = draw(st.sampled_from(["gralora", "hybrid", "lora", "dense"]))
    if kind == "lora":
        return lora(draw(st.integers(1, 8)), n_in, n_out, seed=seed, scaling=scaling), k
    h = draw(st.integers(1, 3)) if kind == "hybrid" else 0
    s = draw(st.integers(1, 4))
    value = gralora(k_old, s, n_in // k_old, n_out // k_old, h, seed=seed, scaling=scaling)
    return (Dense(dense(value, DOUBLE)) if kind == "dense" else value), k


def distance2(source: Delta, fit: Delta) -> float:
    return float((dense(source, DOUBLE) - dense(fit, DOUBLE)).square().sum())


def assert_optimal(source: Delta, fit: Fit[Lora] | Fit[Gralora], k: int, s: int) -> None:
    """The error is the optimum of the oracle, the formula's, and the measured one."""
    best = oracle.tails(dense(source, DOUBLE).numpy(), k)
    optimum, norm2 = float(best[min(s, len(best) - 1)]), float(best[0])
    slack = ROUND_OFF * norm2
    assert fit.norm2 == pytest.approx(norm2, rel=1e-12)
    assert fit.error2 == pytest.approx(optimum, rel=1e-9, abs=slack)
    assert distance2(source, fit.delta) == pytest.approx(fit.error2, rel=1e-9, abs=slack)


# --- optimality ---


@given(deltas(), st.integers(1, 6), st.sampled_from([1.0, 0.5, -3.0]))
def test_lora_is_the_best_of_its_rank(drawn: tuple[Delta, int], r: int, scaling: float) -> None:
    fit = to_lora(drawn[0], r, scaling=scaling, dtype=DOUBLE)
    assert (fit.delta.r, fit.delta.scaling) == (r, scaling)
    assert_optimal(drawn[0], fit, 1, r)


@given(deltas(), st.integers(1, 4), st.sampled_from([1.0, 0.5, -3.0]))
def test_gralora_is_the_best_of_its_blocks(
    drawn: tuple[Delta, int], s: int, scaling: float
) -> None:
    source, k = drawn
    fit = to_gralora(source, k, k * s, scaling=scaling, dtype=DOUBLE)
    assert (fit.delta.k, fit.delta.s, fit.delta.hybrid_r) == (k, s, 0)
    assert fit.delta.scaling == scaling
    assert_optimal(source, fit, k, s)


@given(deltas())
def test_the_error_never_grows_with_the_rank(drawn: tuple[Delta, int]) -> None:
    source, k = drawn
    blocks = [to_gralora(source, k, k * s).error2 for s in (1, 2, 3, 4)]
    whole = [to_lora(source, r).error2 for r in (1, 2, 4, 8)]
    slack = ROUND_OFF * to_lora(source, 1).norm2
    for errors in (blocks, whole):
        assert all(b <= a + slack for a, b in itertools.pairwise(errors))


@given(deltas())
def test_spectra_are_the_errors_by_rank(drawn: tuple[Delta, int]) -> None:
    source, k = drawn
    best = oracle.tails(dense(source, DOUBLE).numpy(), k)
    found = spectra(source, k)
    assert found.tolist() == pytest.approx(best.tolist(), rel=1e-9, abs=ROUND_OFF * best[0])
    cut = spectra(source, k, limit=2)
    assert torch.equal(cut, found[:3])


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_one_block_is_lora(rank: int, m: int, p: int, r: int) -> None:
    source = lora(rank, m, p)
    one, fit = to_gralora(source, 1, r, dtype=DOUBLE), to_lora(source, r, dtype=DOUBLE)
    assert torch.equal(one.delta.A[0], fit.delta.A.T)
    assert torch.equal(one.delta.B[0], fit.delta.B.T)
    assert (one.error2, one.norm2) == (fit.error2, fit.norm2)


def test_gralora_of_lower_r_and_pure_of_a_hybrid_need_no_new_rank() -> None:
    hybrid = gralora(3, 2, 7, 5, h=2)
    pure = hybrid_to_gralora(hybrid)
    for r in (3, 6, 9):
        found, direct = to_gralora(pure, 3, r), to_gralora(hybrid, 3, r)
        assert found.error2 == pytest.approx(direct.error2, rel=1e-9)
    wider = pad(hybrid, 12, torch.Generator().manual_seed(0))
    assert to_gralora(wider, 3, 6).error2 == pytest.approx(to_gralora(hybrid, 3, 6).error2)


# --- exactness ---

Target = Literal["lora", "gralora"]
PAIRS = [(1, 2), (2, 1), (2, 3), (3, 2), (2, 4), (4, 2), (4, 6), (6, 4), (3, 1), (4, 3), (6, 3)]


def fit_error(source: Delta, to: Target, k: int, r: int) -> float:
    if to == "lora":
        return to_lora(source, r, dtype=DOUBLE).relative_error
    return to_gralora(source, k, r, dtype=DOUBLE).relative_error


def assert_smallest_exact(source: Delta, to: Target, k: int) -> None:
    r = exact_rank(source, to, k)
    assert fit_error(source, to, k, r) < 1e-12
    step = 1 if to == "lora" else k
    assert r == step or fit_error(source, to, k, r - step) > 1e-6


@pytest.mark.parametrize(("old", "new"), PAIRS)
@pytest.mark.parametrize("h", [0, 1])
@pytest.mark.parametrize(("m", "p"), [(12, 12), (24, 12), (1, 2), (6, 3), (3, 6)])
def test_smallest_exact_rank_of_another_k(old: int, new: int, h: int, m: int, p: int) -> None:
    unit = math.lcm(old, new)
    for s in (1, 2, 3):
        source = gralora(old, s, unit * m // old, unit * p // old, h, seed=s)
        assert_smallest_exact(source, "gralora", new)


@given(deltas())
def test_smallest_exact_rank(drawn: tuple[Delta, int]) -> None:
    source, k = drawn
    if isinstance(source, Dense):
        assert fit_error(source, "gralora", k, exact_rank(source, "gralora", k)) < 1e-12
        assert fit_error(source, "lora", 1, exact_rank(source, "lora")) < 1e-12
    else:
        assert_smallest_exact(source, "gralora", k)
        assert_smallest_exact(source, "lora", 1)


@pytest.mark.parametrize(
    ("old", "new", "factor"),
    [(2, 3, 6.0), (3, 2, 8 / 3), (4, 6, 6.0), (6, 4, 8 / 3), (2, 4, 2.0), (4, 2, 2.0), (2, 6, 3.0)],
)
def test_exact_rank_of_wide_modules_by_the_published_factors(
    old: int, new: int, factor: float
) -> None:
    source = Gralora(torch.ones(old, 960 // old, old), torch.ones(old, old, 960 // old), 1.0)
    assert exact_rank(source, "gralora", new) == round(factor * source.r)


def test_exact_rank_of_named_pairs() -> None:
    pure, hybrid = gralora(2, 2, 10, 12), gralora(2, 2, 10, 12, h=3)
    wide, flat = lora(4, 20, 24), Dense(torch.ones(24, 20))
    assert exact_rank(pure, "lora") == 8
    assert exact_rank(hybrid, "lora") == 11
    assert exact_rank(pure, "gralora", 2) == 4
    assert exact_rank(hybrid, "gralora", 2) == 10
    assert exact_rank(hybrid, "hybrid", 2) == 4
    assert exact_rank(wide, "gralora", 4) == 16
    assert exact_rank(wide, "hybrid", 4) == 4
    assert exact_rank(wide, "lora") == 4
    assert exact_rank(flat, "lora") == 20
    assert exact_rank(flat, "gralora", 4) == 20
    with pytest.raises(ValueError, match="k=3"):
        exact_rank(wide, "gralora", 3)


# --- factors ---


def everything(source: Delta, dtype: torch.dtype) -> Sequence[Fit[Lora] | Fit[Gralora]]:
    return [
        to_lora(source, 4, dtype=dtype),
        to_gralora(source, 2, 4, dtype=dtype),
        to_hybrid(source, 2, 2, 2, dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_have_the_dtype_and_the_error_of_its_rounding(dtype: torch.dtype) -> None:
    source = gralora(4, 1, 6, 5)
    for fit in everything(source, dtype):
        assert (fit.delta.A.dtype, fit.delta.B.dtype) == (dtype, dtype)
        measured = math.sqrt(distance2(source, fit.delta) / fit.norm2)
        assert abs(measured - fit.relative_error) < 2 * torch.finfo(dtype).eps
    assert to_lora(source, 2).delta.A.dtype == torch.float32


def test_factors_are_balanced() -> None:
    source = gralora(2, 3, 8, 6)
    fit = to_gralora(source, 4, 8, scaling=0.25, dtype=DOUBLE).delta
    a = fit.A.view(4, -1, 4, 2).square().sum(1).permute(1, 0, 2)
    b = fit.B.view(4, 4, 2, -1).square().sum(3)
    torch.testing.assert_close(a, b)
    one = to_lora(source, 3, scaling=-2.0, dtype=DOUBLE).delta
    torch.testing.assert_close(one.A.square().sum(1), one.B.square().sum(0))


@pytest.mark.parametrize("source", [lora(1, 8, 6), gralora(2, 1, 4, 3), Dense(torch.eye(6, 8))])
def test_ranks_above_that_of_the_delta_can_be_trained(source: Delta) -> None:
    for fit in (to_lora(source, 9).delta, to_gralora(source, 2, 10).delta):
        live_a, live_b = fit.A.abs(), fit.B.abs()
        if isinstance(fit, Lora):
            a, b = live_a.amax(1), live_b.amax(0)
        else:
            a = fit.A.view(2, -1, 2, 5).abs().amax(1).permute(1, 0, 2)
            b = fit.B.view(2, 2, 5, -1).abs().amax(3)
        assert bool((a > 1e-3).all())
        assert bool((b == 0).any())
        assert bool(((b == 0) | (b > 1e-3)).all())
        assert distance2(source, fit) < 1e-10


def zero_b(delta: Gralora) -> Gralora:
    return Gralora(delta.A, torch.zeros_like(delta.B), 1.0)


@pytest.mark.parametrize(
    "source",
    [
        zero_b(gralora(2, 1, 6, 6)),
        Dense(torch.zeros(12, 12)),
        Lora(torch.ones(2, 12), torch.zeros(12, 2), 1),
    ],
)
def test_a_zero_delta(source: Delta) -> None:
    for k in (1, 2, 3):
        fit = to_gralora(source, k, 6)
        assert (fit.error2, fit.norm2, fit.relative_error) == (0, 0, 0)
        assert not fit.delta.B.any()
        assert fit.delta.A.all()
        assert not spectra(source, k).any()
    assert not dense(to_hybrid(source, 2, 2, 2).delta).any()


def test_a_dead_block_beside_live_ones() -> None:
    source = gralora(4, 1, 6, 6)
    B = source.B.clone()
    B[1, 0:2] = 0
    dead = Gralora(source.A, B, source.scaling)
    for k in (1, 2, 3, 4):
        fit = to_gralora(dead, k, exact_rank(dead, "gralora", k), dtype=DOUBLE)
        assert distance2(dead, fit.delta) < 1e-24 * fit.norm2


# --- the randomised decomposition ---


def power_law(n_out: int, n_in: int, *, decay: float = 1.0) -> Dense:
    draw = torch.Generator().manual_seed(5)
    left, _ = torch.linalg.qr(torch.randn(n_out, n_out, generator=draw, dtype=DOUBLE))
    right, _ = torch.linalg.qr(torch.randn(n_in, n_in, generator=draw, dtype=DOUBLE))
    side = min(n_out, n_in)
    values = torch.arange(1, side + 1, dtype=DOUBLE) ** -decay
    return Dense((left[:, :side] * values) @ right[:, :side].T)


@pytest.mark.parametrize(("k", "r"), [(1, 8), (2, 16)])
def test_randomised_fit_is_within_a_hundredth_of_the_optimum(k: int, r: int) -> None:
    source = power_law(240, 180)
    exact = to_gralora(source, k, r, method="exact")
    near = to_gralora(source, k, r, method="randomised", dtype=DOUBLE)
    assert exact.relative_error * (1 - 1e-12) <= near.relative_error <= 1.01 * exact.relative_error
    assert near.norm2 == pytest.approx(exact.norm2, rel=1e-12)
    assert distance2(source, near.delta) == pytest.approx(near.error2, rel=1e-9)
    again = to_gralora(source, k, r, method="randomised", dtype=DOUBLE)
    assert torch.equal(again.delta.A, near.delta.A)
    other = torch.Generator().manual_seed(1)
    moved = to_gralora(source, k, r, method="randomised", dtype=DOUBLE, generator=other)
    assert not torch.equal(moved.delta.A, near.delta.A)


def test_randomised_recovery_of_a_known_gralora() -> None:
    source = gralora(2, 4, 90, 120)
    fit = to_gralora(Dense(dense(source, DOUBLE)), 2, 8, method="randomised", dtype=DOUBLE)
    assert fit.relative_error < 1e-13
    assert distance2(source, fit.delta) < 1e-24 * fit.norm2


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 2])
def test_float32_is_as_near_and_knows_its_error(k: int, decay: float) -> None:
    """Down to where float32 cannot tell what is lost, which is then found in float64."""
    source = power_law(240, 180, decay=decay)
    single = Dense(source.weight.float())
    exact = to_gralora(single, k, 16, method="exact")
    near = to_gralora(single, k, 16, method="randomised", dtype=DOUBLE)
    assert exact.relative_error * (1 - 1e-5) <= near.relative_error <= 1.01 * exact.relative_error
    assert distance2(single, near.delta) == pytest.approx(near.error2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_sweeps_that_begin_where_the_last_one_ended_are_as_good(
    noise: float, dtype: torch.dtype
) -> None:
    parts = [dense(gralora(2, 4, 90, 120), DOUBLE), dense(lora(4, 180, 240, scaling=0.2), DOUBLE)]
    more = torch.randn(240, 180, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    source = Dense((parts[0] + parts[1] + noise * more).to(dtype))
    exact = to_hybrid(source, 2, 8, 4, method="exact")
    near = to_hybrid(source, 2, 8, 4, method="randomised", dtype=DOUBLE)
    assert near.relative_error <= 1.01 * exact.relative_error + 1e-9
    assert distance2(source, near.delta) == pytest.approx(near.error2, rel=1e-3)


def test_large_sides_are_randomised_unless_asked_not_to_be() -> None:
    draw = torch.Generator().manual_seed(2)
    source = Dense(torch.randn(520, 530, generator=draw))
    automatic, exact = to_lora(source, 4), to_lora(source, 4, method="exact")
    assert exact.error2 < automatic.error2 < 1.01 * exact.error2
    assert to_lora(source, 4, method="randomised").error2 == automatic.error2
    assert to_lora(source, 500).error2 == to_lora(source, 500, method="exact").error2


def test_limited_spectra_of_large_blocks() -> None:
    source = power_law(240, 180)
    full = spectra(source)
    near = spectra(source, limit=20, method="randomised")
    assert len(near) == 21
    torch.testing.assert_close(near.sqrt(), full[:21].sqrt(), rtol=0.01, atol=0)


# --- the alternating fit ---


def low_rank_and_blocks(noise: float = 0.0) -> Dense:
    draw = torch.Generator().manual_seed(3)
    target = dense(lora(3, 32, 24, scaling=1.0), DOUBLE) + dense(
        gralora(4, 1, 8, 6, scaling=1.0), DOUBLE
    )
    disturbed = torch.randn(24, 32, generator=draw, dtype=DOUBLE)
    return Dense(target + noise * disturbed * target.norm() / disturbed.norm())


def test_hybrid_error_is_measured_and_falls_with_the_sweeps() -> None:
    source = low_rank_and_blocks()
    errors = []
    for sweeps in (1, 2, 4, 10):
        fit = to_hybrid(source, 4, 4, 3, sweeps=sweeps, dtype=DOUBLE)
        assert distance2(source, fit.delta) == pytest.approx(fit.error2, rel=1e-9)
        assert fit.norm2 == pytest.approx(float(source.weight.square().sum()))
        errors.append(fit.relative_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    alone = (to_lora(source, 3).relative_error, to_gralora(source, 4, 4).relative_error)
    assert errors[-1] < 0.5 * min(alone)


def test_hybrid_fit_of_a_noisy_sum_is_no_worse_than_the_noise() -> None:
    assert to_hybrid(low_rank_and_blocks(0.1), 4, 4, 3, sweeps=40).relative_error < 0.11


def test_hybrid_fit_of_a_lora_is_the_lora() -> None:
    fit = to_hybrid(lora(3, 16, 12), 2, 2, 3, dtype=DOUBLE)
    assert fit.relative_error < 1e-13
    assert (fit.delta.k, fit.delta.r, fit.delta.hybrid_r, fit.delta.scaling) == (2, 2, 3, 1.0)


@given(deltas(), st.integers(1, 2), st.integers(1, 3), st.sampled_from([1.0, -0.5]))
def test_hybrid_fit_is_no_worse_than_its_general_part(
    drawn: tuple[Delta, int], s: int, h: int, scaling: float
) -> None:
    source, k = drawn
    fit = to_hybrid(source, k, k * s, h, sweeps=3, scaling=scaling, dtype=DOUBLE)
    alone = to_lora(source, h)
    slack = ROUND_OFF * fit.norm2
    assert fit.error2 <= alone.error2 + slack
    assert distance2(source, fit.delta) == pytest.approx(fit.error2, rel=1e-9, abs=slack)


# --- a rank from a tolerance ---


@given(st.lists(deltas().map(lambda d: d[0]), min_size=1, max_size=3), st.floats(0.01, 0.9))
def test_smallest_rank_is_the_first_within_the_tolerance(
    sources: list[Delta], tolerance: float
) -> None:
    tails = [spectra(source) for source in sources]
    r = smallest_rank(tails, tolerance)

    def error(rank: int) -> float:
        fits = [to_lora(source, rank) for source in sources]
        return math.sqrt(sum(f.error2 for f in fits) / sum(f.norm2 for f in fits))

    assert error(r) <= tolerance * (1 + 1e-9)
    assert r == 1 or error(r - 1) > tolerance * (1 - 1e-9)


def test_smallest_rank_refuses_what_the_spectra_do_not_show() -> None:
    tails = [torch.tensor([4.0, 2.0, 1.0], dtype=DOUBLE)]
    assert smallest_rank(tails, 0.5) == 2
    assert smallest_rank(tails, 1.0) == 1
    with pytest.raises(ValueError, match="no rank up to 2"):
        smallest_rank(tails, 0.4)
    with pytest.raises(ValueError, match="no rank up to 3"):  # the limited one stays at 3
        smallest_rank([torch.tensor([4.0, 2.0, 1.0, 0.0]), torch.tensor([4.0, 3.0])], 0.5)
    with pytest.raises(ValueError, match="no spectrum"):
        smallest_rank([], 0.4)


@given(
    st.lists(st.lists(st.floats(1e-3, 10), min_size=1, max_size=4), min_size=1, max_size=3),
    st.floats(0.01, 0.9), st.integers(0, 3), st.lists(st.integers(1, 9), min_size=3, max_size=3),
)  # fmt: skip
def test_ranks_of_their_own_are_within_the_tolerance_and_no_larger_than_one_rank(
    values: list[list[float]], tolerance: float, more: int, costs: list[int]
) -> None:
    held = [torch.tensor(sorted(row, reverse=True), dtype=DOUBLE).square() for row in values]
    tails = [torch.cat([t.flip(0).cumsum(0).flip(0), torch.zeros(1)]) for t in held]
    costs = costs[: len(tails)]
    same = smallest_rank(tails, tolerance)

    def fits(ranks: Sequence[int]) -> bool:
        left = sum(float(tail[rank]) for tail, rank in zip(tails, ranks, strict=True))
        return left <= tolerance**2 * sum(float(tail[0]) for tail in tails) * (1 + 1e-12)

    def cost(ranks: Sequence[int]) -> int:
        return sum(map(operator.mul, ranks, costs))

    ranks = smallest_ranks(tails, tolerance, costs, same + more)
    assert fits(ranks)
    assert 1 <= min(ranks) <= max(ranks) <= same + more
    assert cost(ranks) <= cost([min(same, len(tail) - 1) for tail in tails])
    every = itertools.product(*(range(1, min(len(t), same + more + 1)) for t in tails))
    assert cost(ranks) < min(map(cost, filter(fits, every))) + max(costs)


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: to_lora(d, 0), "0 is not a positive"),
        (lambda d: to_gralora(d, 3, 3), "k=3"),
        (lambda d: to_gralora(d, 2, 3), "3 is not a positive multiple of k=2"),
        (lambda d: to_gralora(d, 0, 3), "k=0"),
        (lambda d: to_hybrid(d, 2, 2, 0), "0 is not a positive"),
        (lambda d: to_hybrid(d, 2, 2, 1, sweeps=0), "0 is not a positive"),
        (lambda d: to_lora(d, 1, scaling=0.0), "no inverse"),
        (lambda d: to_lora(d, 1, scaling=math.nan), "no inverse"),
        (lambda d: spectra(d, 3), "k=3"),
        (lambda d: spectra(d, limit=0), "0 is not a positive"),
    ],
)
def test_refused_arguments(call: Callable[[Delta], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(Dense(torch.ones(8, 10)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    bad = torch.ones(2, 6)
    bad[0, 1] = value
    broken = lora(2, 6, 4)
    sources: list[Delta] = [Dense(bad), Lora(bad, broken.B.float(), 1.0)]
    A = gralora(2, 1, 3, 4).A.clone()
    A[0, 0, 0] = value
    sources.append(Gralora(A, gralora(2, 1, 3, 4).B, 1.0))
    for source in sources:
        for call in (lambda d: to_lora(d, 1), lambda d: to_gralora(d, 2, 2), spectra):
            with pytest.raises(ValueError, match="not finite"):
                call(source)
