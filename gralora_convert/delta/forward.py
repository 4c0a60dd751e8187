"""The update of one layer applied to activations, without forming the delta."""

import torch
from torch import Tensor

from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora

ROWS = 256  # of a dense weight that are cast together


def gralora_product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What the block factors of one module do to activations, without the scaling.

        x (..., in), A (k, in/k, r), B (k, r, out/k)  ->  (..., out)

    Any number of leading dimensions, none and empty ones included. Costs 2 r (in + out) flops per
    row; the LoRA with the same delta weight (rank k r) costs k times that. Computes in the dtype
    of its arguments, which must agree (or in that of `torch.autocast`).

    >>> A, B = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    >>> gralora_product(torch.ones(6), A, B)
    tensor([12., 12., 12., 12., 12., 12., 12., 12., 12., 12.])

    Index order after PEFT 0.21.2, tuners/gralora/layer.py, forward; arXiv 2505.20355.
    """
    k, m, r = A.shape
    inner = torch.einsum("tni,nir->tnr", x.reshape(-1, k, m), A)
    # Column j*s + t of A[n] feeds output block j; row n*s + t of B[j] takes input block n.
    mixed = inner.reshape(-1, k, k, r // k).transpose(1, 2).reshape(-1, k, r)
    return torch.einsum("tjr,jro->tjo", mixed, B).reshape(*x.shape[:-1], k * B.shape[2])


def forward_path(delta: Delta, x: Tensor) -> Tensor:
    """What an adapter adds to a layer's output: the forward path, not the product of a matrix.

    x (..., in) -> (..., out), in x's dtype.
    """
    match delta:
        case Gralora():
            y = gralora_product(x, delta.A.to(x.dtype), delta.B.to(x.dtype)) * delta.scaling
            return y if delta.general is None else y + forward_path(delta.general, x)
        case Lora():
            return x @ delta.A.to(x.dtype).T @ delta.B.to(x.dtype).T * delta.scaling
        case Dense(weight=weight):  # never a copy of all of it in a wider dtype
            return torch.cat([x @ rows.to(x.dtype).T for rows in torch.split(weight, ROWS)], dim=-1)
