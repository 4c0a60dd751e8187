"""Variants of LoRA whose update depends on the weight that they were trained on; no files.

W is (out, in) as an nn.Linear holds it, D = scaling * B @ A. PiSSA and OLoRA took their first
factors out of the base, so that the update of the original base is D - scaling * B0 @ A0. DoRA
sets the length of each row: W + update = magnitude * (W + D) / |W + D|.
"""

from typing import Literal

import torch
from torch import Tensor

from gralora_convert.delta.fit import to_lora
from gralora_convert.delta.forms import Dense, Lora
from gralora_convert.delta.products import dense

Start = Literal["pissa", "olora"]


def start_of(weight: Tensor, start: Start, r: int, scaling: float, *, transposed: bool) -> Lora:
    """What a PiSSA or OLoRA of rank r took out of the weight (out, in) when it began.

    The best rank-r part of W (PiSSA), or the first r columns and rows of its QR decomposition
    times the scaling (OLoRA; of the weight as it is stored, so `transposed` for a Conv1D).
    float32, as PEFT computes it; the start does not depend on signs or on how S is split.

    >>> start_of(torch.diag(torch.tensor([3.0, 1.0])), "pissa", 1, 2.0, transposed=False).r
    1

    PEFT 0.21.2, tuners/lora/layer.py, pissa_init, olora_init.
    """
    matrix = weight.float()
    if start == "pissa":
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        return Lora(vh[:r], u[:, :r] * values[:r], 1.0)
    q, rows = torch.linalg.qr(matrix.T if transposed else matrix)
    if transposed:
        return Lora(q[:, :r].T, rows[:r].T, scaling)
    return Lora(rows[:r], q[:, :r], scaling)


def without_start(delta: Lora, start: Lora) -> Lora:
    """The update of the original base: delta - start, rank at most l + l0, float64.

    Both are large and nearly the same, so they are subtracted in float64 and factored anew:
    factors of the difference can then be rounded without harm.

    >>> one = Lora(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    >>> float(dense(without_start(one, one)).abs().max()) < 1e-12
    True
    """
    a = torch.cat([delta.A, start.A]).double()
    b = torch.cat([delta.scaling * delta.B.double(), -start.scaling * start.B.double()], dim=1)
    rank = min(a.shape[0], a.shape[1], b.shape[0])
    fit = to_lora(Lora(a, b, 1.0), rank, scaling=delta.scaling, dtype=torch.float64)
    return fit.delta


def dora(weight: Tensor, delta: Lora, magnitude: Tensor) -> Dense:
    """The update of a DoRA: weight (out, in), magnitude (out)  ->  (out, in), float64.

    diag(g) (W + D) - W with g = magnitude / |W + D|, row by row; of full rank.

    Raises:
        ValueError: the magnitude has not one number for each row.

    >>> W, zero = torch.tensor([[3.0, 4.0]]), Lora(torch.zeros(1, 2), torch.zeros(1, 1), 1.0)
    >>> dora(W, zero, torch.tensor([10.0])).weight
    tensor([[3., 4.]], dtype=torch.float64)

    PEFT 0.21.2, tuners/lora/dora.py, forward; arXiv 2402.09353, eq. 5.
    """
    if magnitude.numel() != weight.shape[0]:
        raise ValueError(f"magnitude {tuple(magnitude.shape)} for {weight.shape[0]} rows")
    moved = dense(delta, torch.float64).add_(weight)
    lengths = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    moved.mul_(magnitude.double().reshape(-1, 1) / lengths).sub_(weight)
    return Dense(moved)
