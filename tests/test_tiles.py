"""Tiles: what counts as a number."""

import pytest
import torch

from gralora_convert.tiles import _is_finite

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_not_finite_is_seen_among_any_values(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    every = torch.tensor([0.0, -0.0, 1.0, -1.0, largest, -largest], dtype=dtype)
    for values in (every, every.abs(), -every.abs(), every[:0]):
        assert _is_finite(values)
        for bad in (float("inf"), -float("inf"), float("nan"), -float("nan")):
            assert not _is_finite(torch.cat([values, torch.tensor([bad], dtype=dtype)]))
