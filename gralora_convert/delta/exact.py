"""Conversions that lose nothing: other factors of the same delta."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gralora_convert.delta.forms import Factored, Gralora, Lora


def gralora_to_lora(delta: Gralora) -> Lora:
    """The LoRA with the same delta, at the rank k*r + h that generic factors need.

    GraLoRA  A (k, in/k, r), B (k, r, out/k)  ->  LoRA  A (k*r, in), B (out, k*r)
    Hybrid   ... and general (h, in), (out, h) ->       A (k*r + h, in), B (out, k*r + h)

    Nothing is computed: row (n, j, t) of A holds row (j, t) of A[n].T, so that A is block diagonal,
    and column (n, j, t) of B what it meets. The scaling stays (`with_scaling` folds it into B).

    >>> A, B = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    >>> lora = gralora_to_lora(Gralora(A, B, 0.5))
    >>> lora.A.shape, lora.B.shape
    (torch.Size([8, 6]), torch.Size([10, 8]))

    Layout after PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight.
    """
    k, s = delta.k, delta.s
    m, p = delta.A.shape[1], delta.B.shape[2]
    a4, b4 = delta.A.view(k, m, k, s), delta.B.view(k, k, s, p)
    a = delta.A.new_zeros(k, k, s, k, m)  # n, j, t, n', i
    b = delta.B.new_zeros(k, p, k, k, s)  # j', o, n, j, t
    for n in range(k):
        a[n, :, :, n] = a4[n].permute(1, 2, 0)  # j, t, i
    for j in range(k):
        b[j, :, :, j] = b4[j].permute(2, 0, 1)  # o, n, t
    lora_a, lora_b = a.reshape(k * delta.r, k * m), b.reshape(k * p, k * delta.r)
    if (general := delta.general) is not None:
        lora_a = torch.cat([lora_a, general.A])
        lora_b = torch.cat([lora_b, general.B], dim=1)
    return Lora(lora_a, lora_b, delta.scaling)


def lora_to_gralora(delta: Lora, k: int) -> Gralora:
    """The GraLoRA with the same delta and r = k*l: each block holds a copy of its factors.

    LoRA  A (l, in), B (out, l)  ->  GraLoRA  A (k, in/k, k*l), B (k, k*l, out/k)

    Nothing is computed; the scaling stays, so alpha = scaling * k*l. k = 1 is the LoRA itself.

    Raises:
        ValueError: k does not divide in and out.

    >>> lora_to_gralora(Lora(torch.ones(3, 8), torch.ones(12, 3), 2.0), 2).A.shape
    torch.Size([2, 4, 6])

    Rank min(l, in/k, out/k) of each of the k*k blocks: r is minimal while l fits in a block.
    """
    check_divides(k, delta.in_features, delta.out_features)
    a = delta.A.T.reshape(k, -1, 1, delta.r)  # n, i, j, t
    b = delta.B.reshape(k, -1, delta.r).transpose(1, 2).unsqueeze(1)  # j, n, t, o
    return Gralora(
        a.expand(-1, -1, k, -1).reshape(k, -1, k * delta.r),
        b.expand(-1, k, -1, -1).reshape(k, k * delta.r, -1),
        delta.scaling,
    )


def lora_to_hybrid(delta: Lora, k: int, r: int, generator: torch.Generator) -> Gralora:
    """The Hybrid GraLoRA with the same delta: the LoRA is the general part, the blocks are new.

    LoRA  A (l, in), B (out, l)  ->  general_A, general_B unchanged, A (k, in/k, r), B zero

    New A is uniform in +-1/sqrt(in/k) and new B zero, as PEFT starts a module; the scaling
    stays, so alpha = scaling * (r + l).

    Raises:
        ValueError: k does not divide in, out and r, or r < k.

    >>> lora = Lora(torch.ones(3, 8), torch.ones(12, 3), 2.0)
    >>> lora_to_hybrid(lora, 2, 4, torch.Generator().manual_seed(0)).hybrid_r
    3

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    check_divides(k, delta.in_features, delta.out_features, r)
    m, p = delta.in_features // k, delta.out_features // k
    a = kaiming(delta.A.new_empty(k, m, r), m, generator)
    return Gralora(a, delta.B.new_zeros(k, r, p), delta.scaling, delta.A, delta.B)


def hybrid_to_gralora(delta: Gralora) -> Gralora:
    """The pure GraLoRA with the same delta and r' = r + k*h, by concatenation in each slot.

    A (k, in/k, r), general_A (h, in)  ->  A (k, in/k, r + k*h); B likewise

    Nothing is computed; the scaling stays. A pure GraLoRA comes back as it is.

    >>> A, B = torch.ones(2, 4, 2), torch.ones(2, 2, 6)
    >>> hybrid_to_gralora(Gralora(A, B, 1.0, torch.ones(3, 8), torch.ones(12, 3))).r
    8

    Slots after PEFT 0.21.2, tuners/gralora/layer.py, get_delta_weight.
    """
    if delta.general is None:
        return delta
    k, s = delta.k, delta.s
    tiled = lora_to_gralora(delta.general, k)
    a = [x.reshape(k, -1, k, x.shape[2] // k) for x in (delta.A, tiled.A)]  # n, i, j, t
    b = [x.reshape(k, k, x.shape[1] // k, -1) for x in (delta.B, tiled.B)]  # j, n, t, o
    r = k * (s + delta.hybrid_r)
    return Gralora(
        torch.cat(a, dim=3).reshape(k, -1, r), torch.cat(b, dim=2).reshape(k, r, -1), delta.scaling
    )


def gralora_to_hybrid(delta: Gralora, hybrid_r: int, generator: torch.Generator) -> Gralora:
    """The Hybrid GraLoRA with the same delta: its general part grows to rank hybrid_r.

    A, B unchanged, general_A (h, in)  ->  general_A (hybrid_r, in), general_B (out, hybrid_r)

    The new part of general_A is uniform in +-1/sqrt(in), that of general_B zero, as PEFT starts a
    module; the scaling stays, so alpha = scaling * (r + hybrid_r). A pure GraLoRA has h = 0.

    Raises:
        ValueError: hybrid_r < 1, or smaller than it was.

    >>> delta = Gralora(torch.ones(2, 4, 2), torch.ones(2, 2, 6), 1.0)
    >>> gralora_to_hybrid(delta, 3, torch.Generator().manual_seed(0)).general_A.shape
    torch.Size([3, 8])

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    check_divides(1, hybrid_r)
    general = pad_lora(general_of(delta), hybrid_r, generator)
    return replace(delta, general_A=general.A, general_B=general.B)


def general_of(delta: Gralora) -> Lora:
    """The general part, of rank 0 where there is none."""
    a, b = delta.A.new_empty(0, delta.in_features), delta.B.new_empty(delta.out_features, 0)
    return delta.general or Lora(a, b, delta.scaling)


def with_scaling(delta: Factored, scaling: float) -> Factored:
    """The same delta under another scaling: B and general_B times delta.scaling / scaling.

    The product is taken in float32 (float64 for float64 factors) and rounded to the dtype of B;
    exact where the ratio is a power of two.

    Raises:
        ValueError: the scaling is zero or not finite.

    >>> with_scaling(Lora(torch.ones(1, 2), torch.ones(2, 1), 2.0), 0.5).B.flatten()
    tensor([4., 4.])
    """
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling={scaling} has no inverse")
    if scaling == delta.scaling:
        return delta
    ratio = delta.scaling / scaling

    def scaled(B: Tensor) -> Tensor:
        return (B.to(torch.promote_types(B.dtype, torch.float32)) * ratio).to(B.dtype)

    if isinstance(delta, Lora):
        return replace(delta, B=scaled(delta.B), scaling=scaling)
    general_B = None if delta.general_B is None else scaled(delta.general_B)
    return replace(delta, B=scaled(delta.B), general_B=general_B, scaling=scaling)


def pad(delta: Gralora, r: int, generator: torch.Generator) -> Gralora:
    """The GraLoRA of larger r with the same delta: each of the k slots grows from s to r/k.

    A (k, in/k, r_old), B (k, r_old, out/k)  ->  A (k, in/k, r), B (k, r, out/k)

    The new part of A is uniform in +-1/sqrt(in/k), that of B zero, so that both can be trained;
    the scaling and the general part stay.

    Raises:
        ValueError: r is smaller than it was, or not a multiple of k.

    >>> delta = Gralora(torch.ones(2, 4, 2), torch.ones(2, 2, 6), 1.0)
    >>> pad(delta, 4, torch.Generator().manual_seed(0)).B[0, :, 0]
    tensor([1., 0., 1., 0.])

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    k, s, m = delta.k, delta.s, delta.A.shape[1]
    check_divides(k, r)
    if r < delta.r:
        raise ValueError(f"r={r} is smaller than the r={delta.r} of the delta")
    a = kaiming(delta.A.new_empty(k, m, k, r // k), m, generator)  # n, i, j, t
    b = delta.B.new_zeros(k, k, r // k, delta.B.shape[2])  # j, n, t, o
    a[..., :s] = delta.A.reshape(k, m, k, s)
    b[:, :, :s] = delta.B.reshape(k, k, s, -1)
    return replace(delta, A=a.reshape(k, m, r), B=b.reshape(k, r, -1))


def pad_lora(delta: Lora, r: int, generator: torch.Generator | None = None) -> Lora:
    """The LoRA of larger rank with the same delta: rows after the end of A, columns after B's.

    A (l, in), B (out, l)  ->  A (r, in), B (out, r)

    The new part is zero. With a generator that of A is uniform in +-1/sqrt(in), so that it can be
    trained. The scaling stays.

    Raises:
        ValueError: r is smaller than it was.

    >>> pad_lora(Lora(torch.ones(1, 2), torch.ones(3, 1), 1.0), 2).B[0]
    tensor([1., 0.])

    PEFT 0.21.2, tuners/lora/layer.py, reset_lora_parameters.
    """
    more = r - delta.r
    if more < 0:
        raise ValueError(f"r={r} is smaller than the r={delta.r} of the delta")
    a = delta.A.new_zeros(more, delta.in_features)
    if generator is not None:
        a = kaiming(a, delta.in_features, generator)
    b = delta.B.new_zeros(delta.out_features, more)
    return replace(delta, A=torch.cat([delta.A, a]), B=torch.cat([delta.B, b], dim=1))


def kaiming(tensor: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    """The tensor filled uniformly in +-1/sqrt(fan_in): kaiming_uniform_ with a = sqrt(5).

    >>> float(kaiming(torch.empty(100), 4, torch.Generator().manual_seed(0)).abs().max()) <= 0.5
    True

    PEFT 0.21.2, tuners/gralora/layer.py, update_layer.
    """
    bound = 1 / math.sqrt(fan_in)
    values = torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
    return tensor.copy_(values.uniform_(-bound, bound, generator=generator))


def check_divides(k: int, *sizes: int) -> None:
    """Raises ValueError unless k >= 1 divides all sizes and none of them is zero."""
    for size in sizes:
        if k < 1 or size < 1 or size % k:
            raise ValueError(f"{size} is not a positive multiple of k={k}")


def direct_sum(matrices: Sequence[Tensor]) -> Tensor:
    """The block-diagonal matrix of these blocks; one block is itself.

    >>> direct_sum([torch.ones(1, 1), torch.ones(1, 2)])
    tensor([[1., 0., 0.],
            [0., 1., 1.]])
    """
    if len(matrices) == 1:
        return matrices[0]
    result: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return result


def permute_rows(delta: Gralora | Lora, order: Sequence[int]) -> Lora:
    """The LoRA whose row i is row order[i] of the delta; a permutation breaks the blocks of a
    GraLoRA, not its rank.

    >>> lora = Lora(torch.ones(1, 1), torch.tensor([[1.0], [2.0], [3.0]]), 1.0)
    >>> permute_rows(lora, [2, 0, 1]).B.flatten()
    tensor([3., 1., 2.])
    """
    lora = gralora_to_lora(delta) if isinstance(delta, Gralora) else delta
    return Lora(lora.A, lora.B[torch.tensor(order, device=lora.B.device)], lora.scaling)
