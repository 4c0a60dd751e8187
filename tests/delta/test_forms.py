"""Delta weights and their exact layouts, against explicit loops and against PEFT."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gralora_convert.delta.exact import (
    gralora_to_hybrid,
    gralora_to_lora,
    hybrid_to_gralora,
    lora_to_gralora,
    lora_to_hybrid,
    pad,
    pad_lora,
    with_scaling,
)
from gralora_convert.delta.forms import (
    Delta,
    Dense,
    Gralora,
    Lora,
    is_finite,
    require_device,
    tensors_of,
)
from gralora_convert.delta.products import add_rows_, delta_weight, dense, elements, rows
from gralora_convert.errors import MisuseError
from tests import oracle

SCALINGS = st.sampled_from([0.25, 0.5, 1.0, 2.0, -4.0])


def integers(draw: torch.Generator, *shape: int) -> Tensor:
    """Small whole numbers: sums of their products are exact in float32."""
    return torch.randint(-4, 5, shape, generator=draw).float()


@st.composite
def graloras(draw: st.DrawFn, hybrid: bool | None = None) -> Gralora:
    k, s, m, p = (draw(st.integers(1, top)) for top in (4, 3, 4, 4))
    h = draw(st.integers(1, 3)) if hybrid else 0 if hybrid is False else draw(st.integers(0, 3))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    A, B = integers(seeded, k, m, k * s), integers(seeded, k, k * s, p)
    general = (integers(seeded, h, k * m), integers(seeded, k * p, h)) if h else (None, None)
    return Gralora(A, B, draw(SCALINGS), *general)


@st.composite
def loras(draw: st.DrawFn) -> tuple[Lora, int]:
    """A LoRA, and a k that divides its sides."""
    k, rank, m, p = (draw(st.integers(1, top)) for top in (4, 5, 4, 4))
    seeded = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return Lora(integers(seeded, rank, k * m), integers(seeded, k * p, rank), draw(SCALINGS)), k


def truth(delta: Delta) -> Tensor:
    match delta:
        case Gralora():
            parts = (delta.general_A, delta.general_B)
            general = [None if x is None else x.double().numpy() for x in parts]
            factors = (delta.A.double().numpy(), delta.B.double().numpy())
            return torch.from_numpy(oracle.gralora_delta(*factors, delta.scaling, *general))
        case Lora():
            factors = (delta.A.double().numpy(), delta.B.double().numpy())
            return torch.from_numpy(oracle.lora_delta(*factors, delta.scaling))
        case Dense():
            return delta.weight.double()


def same(delta: Delta, other: Delta) -> bool:
    return torch.equal(dense(delta), dense(other))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# --- the delta weight ---


@given(graloras())
def test_dense_is_the_sum_of_the_definition(delta: Gralora) -> None:
    assert torch.equal(dense(delta, torch.float64), truth(delta))
    factors = (delta.A, delta.B, delta.scaling, delta.general_A, delta.general_B)
    assert torch.equal(delta_weight(*factors), truth(delta).float())


@given(loras())
def test_dense_lora_is_the_sum_of_the_definition(drawn: tuple[Lora, int]) -> None:
    assert torch.equal(dense(drawn[0], torch.float64), truth(drawn[0]))


@given(graloras(hybrid=True))
def test_the_general_part_adds(delta: Gralora) -> None:
    assert delta.general_A is not None
    assert delta.general_B is not None
    blocks = Gralora(delta.A, delta.B, delta.scaling)
    general = Lora(delta.general_A, delta.general_B, delta.scaling)
    assert torch.equal(dense(delta), dense(blocks) + dense(general))


def _absolute(factors: Gralora | Lora) -> Gralora | Lora:
    tensors = {name: tensor.abs() for name, tensor in tensors_of(factors).items()}
    return replace(factors, scaling=abs(factors.scaling), **tensors)  # type: ignore[arg-type]


@given(graloras(), st.booleans(), st.data())
def test_rows_of_any_cut_are_rows_of_the_dense_delta(
    delta: Gralora, transposed: bool, data: st.DataObject
) -> None:
    lora = gralora_to_lora(delta)
    whole = truth(delta).T if transposed else truth(delta)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    weight = data.draw(st.sampled_from([1.0, -1.0, 0.5]))
    forms: list[Delta] = [delta, lora, Dense(truth(delta))]
    places = torch.randint(len(whole), (3,)), torch.randint(whole.shape[1], (3,))
    for factors in (delta, lora):
        found = elements(factors, *(places[::-1] if transposed else places))
        assert torch.equal(found, whole[places])
        sizes = elements(_absolute(factors), *(places[::-1] if transposed else places))
        other = elements(factors, *(places[::-1] if transposed else places), absolute=True)
        assert torch.equal(other, sizes)
    for form in forms:
        tile = torch.full((stop - start, whole.shape[1]), 3.0, dtype=torch.float64)
        add_rows_(tile, form, start, transposed=transposed, weight=weight)
        assert torch.equal(tile, 3.0 + weight * whole[start:stop])
        assert torch.equal(rows(form, start, stop, transposed=transposed), whole[start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    draw = generator()
    A, B = (torch.randn(2, 4, 6, generator=draw), torch.randn(2, 6, 3, generator=draw))
    weight = delta_weight(A.to(dtype), B.to(dtype))
    assert weight.dtype == torch.float32
    exact = truth(Gralora(A.to(dtype), B.to(dtype), 1.0))
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-5)
    assert delta_weight(A.double(), B.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 4, 6), (3, 6, 3)), "one k and one r"),
        (((2, 4, 6), (2, 4, 3)), "one k and one r"),
        (((4, 6), (2, 4, 3)), "one k and one r"),
        (((2, 4, 5), (2, 5, 3)), "not a multiple of k=2"),
        (((2, 4, 6), (2, 6, 3), (1, 8)), "come together"),
        (((2, 4, 6), (2, 6, 3), (1, 8), (6, 2)), r"general_B \(6, 2\)"),
        (((2, 4, 6), (2, 6, 3), (1, 7), (6, 1)), r"general_A \(1, 7\)"),
        (((2, 4, 6), (2, 6, 3), (8,), (6, 1)), r"general_A \(8,\)"),
    ],
)
def test_factors_that_do_not_belong_together(
    shapes: tuple[tuple[int, ...], ...], words: str
) -> None:
    tensors = [torch.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=words):
        delta_weight(tensors[0], tensors[1], 1.0, *tensors[2:])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: Lora(x(2, 4), x(6, 3), 1.0), r"A \(2, 4\) and B \(6, 3\)"),
        (lambda x: Lora(x(4), x(6, 1), 1.0), r"A \(4,\)"),
        (lambda x: Dense(x(2, 3, 4)), r"weight \(2, 3, 4\)"),
        (lambda x: Lora(x(2, 4).int(), x(6, 2), 1.0), "A has dtype torch.int32"),
        (lambda x: Dense(x(2, 3).bool()), "weight has dtype torch.bool"),
        (lambda x: Gralora(x(2, 4, 2), x(2, 2, 3), 1.0, x(1, 8), x(6, 1).long()), "general_B has"),
    ],
)
def test_values_that_cannot_exist(
    make: Callable[[Callable[..., Tensor]], Delta], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make(torch.ones)


FORMS: list[Delta] = [
    Gralora(torch.ones(2, 4, 2), torch.ones(2, 2, 3), 1.0),
    Lora(torch.ones(1, 8), torch.ones(6, 1), 1.0),
    Dense(torch.ones(6, 8)),
]


@pytest.mark.parametrize("form", FORMS)
def test_tiles_that_are_not_rows_of_the_delta(form: Delta) -> None:
    for tile, start in ((torch.ones(3, 8), 4), (torch.ones(2, 8), -1), (torch.ones(7, 8), 0)):
        with pytest.raises(ValueError, match="within the 6 rows"):
            add_rows_(tile, form, start)
    with pytest.raises(ValueError, match="within the 8 rows"):
        add_rows_(torch.ones(2, 6), form, 7, transposed=True)
    for tile in (torch.ones(2, 1), torch.ones(2, 6), torch.ones(6)):
        with pytest.raises(ValueError, match="rows of 8 columns"):
            add_rows_(tile, form, 0)
    with pytest.raises(ValueError, match="bfloat16, float32 or float64"):
        add_rows_(torch.ones(2, 8, dtype=torch.bfloat16), form, 0)
    for start, stop in ((4, 7), (-1, 2), (3, 3)):
        with pytest.raises(ValueError, match="within the 6 rows"):
            rows(form, start, stop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_delta_of_16_bits_is_rounded_once(dtype: torch.dtype) -> None:
    draw = generator()
    A, B = torch.randn(2, 16, 32, generator=draw), torch.randn(2, 32, 16, generator=draw)
    delta = Gralora(A, B, 0.3)
    assert torch.equal(dense(delta, dtype), dense(delta).to(dtype))


def test_gradients_reach_the_factors() -> None:
    draw = generator()
    shapes = ((2, 3, 4), (2, 4, 5), (1, 6), (10, 1))
    factors = [torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes]
    A, B, general_A, general_B = (factor.requires_grad_() for factor in factors)

    def weight(*parts: Tensor) -> Tensor:
        return delta_weight(parts[0], parts[1], 0.5, *parts[2:])

    assert torch.autograd.gradcheck(weight, (A, B, general_A, general_B))


# --- exact layouts ---


@given(graloras())
def test_to_lora_is_exact(delta: Gralora) -> None:
    lora = gralora_to_lora(delta)
    assert (lora.r, lora.scaling) == (delta.k * delta.r + delta.hybrid_r, delta.scaling)
    assert same(lora, delta)


@given(loras())
def test_tiled_gralora_is_exact(drawn: tuple[Lora, int]) -> None:
    lora, k = drawn
    tiled = lora_to_gralora(lora, k)
    assert (tiled.k, tiled.r, tiled.scaling) == (k, k * lora.r, lora.scaling)
    assert same(tiled, lora)


@given(loras())
def test_one_block_is_the_lora_itself(drawn: tuple[Lora, int]) -> None:
    lora = drawn[0]
    one = lora_to_gralora(lora, 1)
    assert torch.equal(one.A[0], lora.A.T)
    assert torch.equal(one.B[0], lora.B.T)
    back = gralora_to_lora(one)
    assert torch.equal(back.A, lora.A)
    assert torch.equal(back.B, lora.B)


@given(loras(), st.integers(1, 3))
def test_hybrid_around_a_lora_is_exact(drawn: tuple[Lora, int], s: int) -> None:
    lora, k = drawn
    hybrid = lora_to_hybrid(lora, k, k * s, generator())
    assert (hybrid.k, hybrid.r, hybrid.hybrid_r) == (k, k * s, lora.r)
    assert hybrid.general_A is lora.A
    assert hybrid.general_B is lora.B
    assert same(hybrid, lora)
    assert not hybrid.B.any()
    assert hybrid.A.all()


@given(graloras())
def test_pure_gralora_of_a_hybrid_is_exact(delta: Gralora) -> None:
    pure = hybrid_to_gralora(delta)
    assert (pure.r, pure.hybrid_r) == (delta.r + delta.k * delta.hybrid_r, 0)
    assert same(pure, delta)


@given(graloras(), st.integers(0, 3))
def test_hybrid_around_a_gralora_is_exact(delta: Gralora, more: int) -> None:
    h = max(1, delta.hybrid_r + more)
    hybrid = gralora_to_hybrid(delta, h, generator())
    assert (hybrid.hybrid_r, hybrid.scaling) == (h, delta.scaling)
    assert hybrid.A is delta.A
    assert hybrid.B is delta.B
    assert same(hybrid, delta)
    assert hybrid.general_A is not None
    assert hybrid.general_B is not None
    assert bool((hybrid.general_A[delta.hybrid_r :] != 0).all())
    assert not hybrid.general_B[:, delta.hybrid_r :].any()


@given(graloras(), st.integers(0, 3))
def test_padded_slots_leave_the_delta_and_can_be_trained(delta: Gralora, more: int) -> None:
    k, s = delta.k, delta.s
    padded = pad(delta, k * (s + more), generator())
    assert (padded.s, padded.scaling, padded.hybrid_r) == (s + more, delta.scaling, delta.hybrid_r)
    assert same(padded, delta)
    new_a = padded.A.view(k, -1, k, s + more)[..., s:]
    assert torch.equal(padded.A.view(k, -1, k, s + more)[..., :s], delta.A.view(k, -1, k, s))
    assert bool((new_a != 0).all())
    assert bool((new_a.abs() <= 1 / math.sqrt(delta.A.shape[1])).all())


@given(loras(), st.integers(0, 3), st.booleans())
def test_padded_lora_is_exact(drawn: tuple[Lora, int], more: int, train: bool) -> None:
    lora = drawn[0]
    padded = pad_lora(lora, lora.r + more, generator() if train else None)
    assert same(padded, lora)
    assert torch.equal(padded.A[: lora.r], lora.A)
    assert bool((padded.A[lora.r :] != 0).all()) if train else not padded.A[lora.r :].any()
    assert not padded.B[:, lora.r :].any()


@given(graloras(), SCALINGS)
def test_scaling_by_powers_of_two_is_exact(delta: Gralora, scaling: float) -> None:
    moved = with_scaling(delta, scaling)
    assert moved.scaling == scaling
    assert moved.A is delta.A
    assert same(moved, delta)
    assert same(with_scaling(gralora_to_lora(delta), scaling), delta)


def test_scaling_is_rounded_once_to_the_dtype_of_b() -> None:
    draw = generator()
    lora = Lora(torch.randn(2, 4), torch.randn(5, 2, generator=draw).bfloat16(), 1.0)
    moved = with_scaling(lora, 3.0)
    assert moved.B.dtype == torch.bfloat16
    assert torch.equal(moved.B, (lora.B.float() * (1 / 3)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layouts_keep_the_dtype(dtype: torch.dtype) -> None:
    lora = Lora(torch.ones(2, 4, dtype=dtype), torch.ones(6, 2, dtype=dtype), 1.0)
    tiled, hybrid = lora_to_gralora(lora, 2), lora_to_hybrid(lora, 2, 2, generator())
    results = [tiled, hybrid, hybrid_to_gralora(hybrid), pad(tiled, 6, generator())]
    flat: list[Gralora | Lora] = [pad_lora(lora, 3, generator()), with_scaling(lora, 0.3)]
    for delta in [*flat, *results]:
        assert (delta.A.dtype, delta.B.dtype) == (dtype, dtype)


def test_layouts_of_factors_that_are_not_contiguous() -> None:
    draw = generator()
    A, B = (integers(draw, 6, 4, 2).transpose(0, 2), integers(draw, 3, 6, 2).transpose(0, 2))
    general_A, general_B = integers(draw, 8, 1).T, integers(draw, 1, 6).T
    delta = Gralora(A, B, 1.0, general_A, general_B)
    copy = Gralora(A.contiguous(), B.contiguous(), 1.0, general_A, general_B)
    assert same(hybrid_to_gralora(delta), copy)
    assert same(pad(delta, 8, generator()), copy)
    assert same(lora_to_gralora(Lora(general_A, general_B, 1.0), 2), Lora(general_A, general_B, 1))


def test_refused_shapes() -> None:
    lora = Lora(torch.ones(2, 4), torch.ones(6, 2), 1.0)
    gralora = lora_to_gralora(lora, 2)
    with pytest.raises(ValueError, match="k=3"):
        lora_to_gralora(lora, 3)
    with pytest.raises(ValueError, match="k=0"):
        lora_to_gralora(lora, 0)
    for r in (0, 3):
        with pytest.raises(ValueError, match=f"{r} is not a positive multiple of k=2"):
            lora_to_hybrid(lora, 2, r, generator())
    with pytest.raises(ValueError, match="r=2 is smaller"):
        pad(gralora, 2, generator())
    with pytest.raises(ValueError, match="not a positive multiple"):
        pad(gralora, 5, generator())
    with pytest.raises(ValueError, match="r=1 is smaller"):
        pad_lora(lora, 1)
    hybrid = gralora_to_hybrid(gralora, 2, generator())
    with pytest.raises(ValueError, match="r=1 is smaller"):
        gralora_to_hybrid(hybrid, 1, generator())
    with pytest.raises(ValueError, match="0 is not a positive"):
        gralora_to_hybrid(gralora, 0, generator())
    for scaling in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="no inverse"):
            with_scaling(lora, scaling)


# --- PEFT ---


def peft_layer(layer: nn.Module, **config: Any) -> Any:
    """PEFT's GraLoRA layer around `layer`, random also where PEFT starts at zero."""
    torch.manual_seed(1)
    options = peft.GraloraConfig(target_modules=["x"], **({"init_weights": False} | config))
    model = peft.get_peft_model(nn.ModuleDict({"x": layer}), options)
    return model.base_model.model.x


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("h", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_delta_weight_is_that_of_peft(k: int, h: int, conv: bool) -> None:
    layer = Conv1D(12, 8) if conv else nn.Linear(8, 12)
    live = peft_layer(layer, r=8, alpha=5, gralora_k=k, hybrid_r=h)
    general = (live.gralora_A_general["default"], live.gralora_B_general["default"])
    A, B = live.gralora_A["default"].detach(), live.gralora_B["default"].detach()
    more = [g.weight.detach() for g in general] if h else []
    expected = live.get_delta_weight("default").detach()
    found = delta_weight(A, B, live.scaling["default"], *more)
    found = found.T if conv else found
    eps = torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * eps)
    assert live.scaling["default"] == 5 / (8 + h)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_new_factors_are_distributed_as_those_of_peft() -> None:
    live = peft_layer(nn.Linear(256, 128), r=32, gralora_k=2, init_weights=True)
    theirs = live.gralora_A["default"].detach()
    lora = Lora(torch.ones(1, 256), torch.ones(128, 1), 1.0)
    ours = lora_to_hybrid(lora, 2, 32, generator())
    assert ours.A.shape == theirs.shape
    assert not live.gralora_B["default"].any()
    bound = 1 / math.sqrt(128)
    for values in (ours.A, theirs):
        assert 0.99 * bound < float(values.abs().max()) <= bound
        assert abs(float(values.std()) - bound / math.sqrt(3)) < 0.02 * bound


@pytest.mark.parametrize("name", ["warp", "", "meta", "\0", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(MisuseError, match="cannot be used"):
        require_device(name)


FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_not_finite_is_seen_among_any_values(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    every = torch.tensor([0.0, -0.0, 1.0, -1.0, largest, -largest], dtype=dtype)
    for values in (every, every.abs(), -every.abs(), every[:0]):
        assert is_finite(values)
        for bad in (float("inf"), -float("inf"), float("nan"), -float("nan")):
            assert not is_finite(torch.cat([values, torch.tensor([bad], dtype=dtype)]))


def test_columns_cut_from_a_matrix_are_judged_too() -> None:
    matrix = torch.ones(5, 4)
    matrix[2, 1] = float("nan")
    assert [is_finite(matrix[:, i : i + 1]) for i in range(4)] == [True, False, True, True]
    column = torch.tensor([1.0, float("nan")]).as_strided((2, 1), (1, 7))  # of any last stride
    assert column.is_contiguous()
    assert not is_finite(column)
    assert not is_finite(matrix.T)
