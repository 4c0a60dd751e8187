"""What went wrong in a merge: which delta was added instead of the right one.

A wrong merge adds some other matrix. The usual mistakes each have a delta of their own, made from
the same factors; the one that explains the stored weights names the mistake.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gralora_convert.delta import Delta, Dense, Lora

__all__ = ["BlockShares", "mistakes", "verdict"]

NOT_APPLIED = 0.05  # |c / c_pred| below it: nothing of the update is there
LITTLE = 0.3  # less of what was added lies along D than this: it is not this update
OFF = 0.1  # a block (or the scaling) whose share is off by more than this is named


def mistakes(delta: Delta) -> Iterator[tuple[str, Delta]]:
    """The deltas of the usual mistakes, with what to call them."""
    if isinstance(delta, Dense):
        return
    yield "the update is applied twice", replace(delta, scaling=2 * delta.scaling)
    yield "the update is subtracted instead of added (sign)", replace(delta, scaling=-delta.scaling)
    if isinstance(delta, Lora):
        yield "the factors are used without alpha / r", replace(delta, scaling=1.0)
        return
    k, s, m, p = delta.k, delta.s, delta.A.shape[1], delta.B.shape[2]
    a4, b4 = delta.A.view(k, m, k, s), delta.B.view(k, k, s, p)
    if delta.general_A is not None:
        yield "the hybrid part is missing", replace(delta, general_A=None, general_B=None)
        without = (delta.r + delta.hybrid_r) / delta.r
        yield (
            "scaled by alpha / r instead of alpha / (r + hybrid_r)",
            replace(delta, scaling=delta.scaling * without),
        )
        yield "the blocks are missing", replace(delta, A=torch.zeros_like(delta.A))
    if k == 1:
        return
    swapped = a4.permute(2, 1, 0, 3).reshape_as(delta.A)
    yield (
        "the blocks are transposed (row and column of each block swapped)",
        replace(delta, A=swapped, B=b4.transpose(0, 1).reshape_as(delta.B)),
    )
    slots = delta.A.view(k, m, s, k).transpose(2, 3).reshape_as(delta.A)
    yield "the rank slots are ordered (s, k) instead of (k, s)", replace(delta, A=slots)
    slots = delta.B.view(k, s, k, p).transpose(1, 2).reshape_as(delta.B)
    yield "the rank slots of B are ordered (s, k) instead of (k, s)", replace(delta, B=slots)
    yield "the blocks are in reversed order", replace(delta, A=delta.A.flip(0))
    yield "the blocks are in reversed order", replace(delta, B=delta.B.flip(0))
    diagonal = torch.zeros_like(a4)
    for j in range(k):
        diagonal[j, :, j] = a4[j, :, j]
    yield "only the diagonal blocks are there", replace(delta, A=diagonal.reshape_as(delta.A))


@dataclass
class BlockShares:
    """How much of the update is in the stored weights, per block: sums of <M-W, D>, of the same for
    the right rounding, and of <D, D>; each (k, k), [block row of out, block column of in]. And
    |M-W|^2, found and for the right rounding, over all of them."""

    found: Tensor
    predicted: Tensor
    energy: Tensor
    moved2: float = 0.0
    right2: float = 0.0

    @classmethod
    def zeros(cls, k: int) -> "BlockShares":
        found, predicted, energy = torch.zeros(3, k, k, dtype=torch.float64)
        return cls(found, predicted, energy)

    def add(
        self, moved: Tensor, right: Tensor, delta: Tensor, start: int, total: int, transposed: bool
    ) -> None:
        """Adds rows `[start, start + len(delta))` of a stored matrix of `total` rows."""
        k = len(self.found)
        block = torch.arange(start, start + len(delta)) * k // total
        for sums, values in (
            (self.found, moved * delta),
            (self.predicted, right * delta),
            (self.energy, delta * delta),
        ):
            by_column = values.view(len(delta), k, -1).sum(2)
            part = torch.zeros(k, k, dtype=torch.float64).index_add_(0, block, by_column)
            sums += part.T if transposed else part
        self.moved2 += float(moved.square().sum())
        self.right2 += float(right.square().sum())

    @property
    def share(self) -> float:
        """c / c_pred over the whole module: 1 when right, 0 not applied, 2 twice, -1 subtracted."""
        predicted = float(self.predicted.sum())
        return float(self.found.sum()) / predicted if predicted else 1.0

    @property
    def explained(self) -> float:
        """How much of what was added lies along D, relative to a right merge (whose rounding noise
        does not): near 0 when something else was added."""
        if not self.moved2 or not self.right2:
            return 0.0
        found = float(self.found.sum()) ** 2 / self.moved2
        return found / (float(self.predicted.sum()) ** 2 / self.right2 or 1.0)

    def off(self) -> list[tuple[int, int]]:
        """The blocks whose share is off by more than a tenth."""
        wrong = (self.found - self.predicted).abs() > OFF * self.predicted.abs()
        wrong &= self.energy > 0
        return [(int(j), int(n)) for j, n in wrong.nonzero().tolist()]


def verdict(shares: BlockShares, named: str | None) -> str:
    """One clause on what happened, `named` being the mistake that explains the weights."""
    c = shares.share
    off = shares.off()
    blocks = len(shares.found) ** 2
    if not shares.moved2 or (abs(c) < NOT_APPLIED and shares.moved2 < OFF * shares.right2):
        return "the update is not applied"
    if named is not None:
        return named
    if shares.explained < LITTLE:
        return "another update was added: another adapter, or another base"
    if 0 < len(off) < blocks:
        listed = ", ".join(str(place) for place in off[:8])
        what = "is" if len(off) == 1 else "are"
        return f"of {blocks} blocks, {listed} {what} wrong (row block, column block)"
    if abs(c - 1) > 2e-3:
        return f"the scaling is off by a factor of {c:.4g}"
    return "differs by more than rounding: another base, or rounded more than once"
