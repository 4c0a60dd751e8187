"""PiSSA, OLoRA and DoRA on matrices, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_convert.delta.forms import Lora
from gralora_convert.delta.products import dense
from gralora_convert.delta.variants import dora, start_of, without_start

sizes = st.integers(2, 9)


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(0, 1000))
def test_a_pissa_starts_from_the_best_part_of_the_weight(m: int, n: int, r: int, seed: int) -> None:
    weight = matrix(m, n, seed)
    start = dense(start_of(weight, "pissa", r, 1.5, transposed=False), torch.float64).numpy()
    u, values, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    best = (u[:, :r] * values[:r]) @ vh[:r]
    lost = np.linalg.norm(weight.double().numpy() - start)
    assert lost == pytest.approx(np.linalg.norm(values[r:]), abs=1e-5)
    if r >= len(values) or values[r - 1] - values[r] > 0.1:  # else the part is not unique
        assert np.abs(start - best).max() < 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_an_olora_starts_from_the_qr_of_the_weight_as_stored(transposed: bool) -> None:
    weight = matrix(6, 6, 0)
    start = start_of(weight, "olora", 2, 1.5, transposed=transposed)
    stored = (weight.T if transposed else weight).double().numpy()
    q, r = np.linalg.qr(stored)
    wanted = 1.5 * q[:, :2] @ r[:2]
    assert np.abs(dense(start).numpy() - (wanted.T if transposed else wanted)).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_a_start_is_taken_off(m: int, n: int, r: int, r0: int, seed: int) -> None:
    one = Lora(matrix(r, n, seed), matrix(m, r, seed + 1), 0.5)
    other = Lora(matrix(r0, n, seed + 2), matrix(m, r0, seed + 3), 2.0)
    rest = without_start(one, other)
    assert rest.scaling == one.scaling
    assert rest.r == min(r + r0, m, n)
    wanted = dense(one, torch.float64) - dense(other, torch.float64)
    assert torch.allclose(dense(rest, torch.float64), wanted, atol=1e-10)


def test_a_dora_sets_the_length_of_each_row() -> None:
    weight, delta = matrix(5, 4, 0), Lora(matrix(2, 4, 1), matrix(5, 2, 2), 0.5)
    magnitude = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.0])
    after = dora(weight, delta, magnitude).weight + weight.double()
    moved = weight.double() + dense(delta, torch.float64)
    assert torch.allclose(after.norm(dim=1), magnitude.double())
    assert torch.allclose(after[:4] / after[:4].norm(dim=1, keepdim=True),
                          moved[:4] / moved[:4].norm(dim=1, keepdim=True))  # fmt: skip
    with pytest.raises(ValueError, match="5 rows"):
        dora(weight, delta, magnitude[:3])
