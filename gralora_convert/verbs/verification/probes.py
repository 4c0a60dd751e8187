"""Probe inputs through one module: base + full adapter path against the merged weight."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import Tensor

from gralora_convert.delta import forward_path, rounding_lengths, terms, to_device, worst_ratio
from gralora_convert.verbs.verification.factored import WRONG, Factored

PROBES = 4
# |sum of x_i e_i| for normal x exceeds 8 |e| once in 8e14 draws, whatever e is (Gaussian tail).
DEVIATIONS = 8.0


@dataclass(frozen=True, slots=True)
class Outputs:
    """What some rows of a stored weight do to the probes: outputs after minus before, and the sums
    that bound them."""

    place: slice
    moved: Tensor
    sums: Tensor
    squares: Tensor


class Probe:
    """Probe inputs through a module: base + full adapter path against the merged weight.

    The inputs are normal and know nothing of the weights; so the sum of x_i e_i over errors that
    each keep their bound is at most 8 |bound|, but for one draw in 10^15, and never more than
    |x| . bound.
    """

    def __init__(self, update: Factored, updates: Sequence[Factored], columns: int) -> None:
        self.update = update
        n_in = update.rows.count if update.transposed else columns
        n_out = columns if update.transposed else update.rows.count
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(PROBES, n_in, dtype=torch.float64, generator=generator)
        self.x = x.float().double()  # float32 holds them
        self.squares = torch.zeros(n_out, dtype=torch.float64)
        self.sums = torch.zeros(PROBES, n_out, dtype=torch.float64)
        self.difference = torch.zeros(PROBES, n_out, dtype=torch.float64)
        self.terms, self.rounded = 0, update.rounded
        for one in updates:  # all that is added to these rows
            if met := one.rows.meet(update.rows.start, update.rows.stop):
                self.difference -= self._path(one, met[0])
                self.terms += terms(one.delta)

    def _path(self, one: Factored, place: slice) -> Tensor:
        """What `one` makes of the probes in these rows: at `place` among them are its own."""
        delta = to_device(one.delta, "cpu")
        begin = self.update.rows.start + place.start - one.rows.start + one.rows.first
        own = slice(begin, begin + place.stop - place.start)
        if one.transposed:  # rows of the stored weight are inputs
            x = torch.zeros(PROBES, delta.in_features, dtype=torch.float64)
            x[:, own] = self.x[:, place]
            return forward_path(delta, x)
        path = torch.zeros(PROBES, self.update.rows.count, dtype=torch.float64)
        path[:, place] = forward_path(delta, self.x)[:, own]
        return path

    def outputs(self, before: Tensor, after: Tensor, bound: Tensor, start: int) -> Outputs:
        """What the rows of the stored weight from `start` on contribute; `bound` by element."""
        x, place = self._inputs(start, len(after))
        moved, bound = after.cpu().double() - before.cpu().double(), bound.cpu().double()
        if self.update.transposed:
            return Outputs(place, x @ moved, x.abs() @ bound, bound.square().sum(0))
        return Outputs(place, x @ moved.T, x.abs() @ bound.T, bound.square().sum(1))

    def outputs_of_right(
        self, before: Tensor, after: Tensor, dtype: torch.dtype, start: int
    ) -> Outputs:
        """The same of rows that are right, by a bound that is coarser and cheap
        (`rounding_lengths`), with sums in the dtype of `before` and `after`.

        Their errors come to the bound: of n terms at most 8 sqrt(n) u |x| |moved|, but for one sum
        in 10^9 (N. Higham, T. Mary, A new approach to probabilistic rounding error analysis, 2019,
        theorem 2.4 with lambda = 8).
        """
        x, place = self._inputs(start, len(after))
        moved, dim = after - before, 0 if self.update.transposed else 1
        summed = ceil(DEVIATIONS * sqrt(moved.shape[dim]))
        lengths = (
            rounding_lengths(
                after,
                moved,
                terms=self.terms + summed,
                dtype=dtype,
                dim=dim,
                delta_dtype=self.rounded,
            )
            .cpu()
            .double()
        )
        moved = moved.cpu()
        outputs = x.to(moved.dtype) @ (moved if self.update.transposed else moved.T)
        sums = x.norm(dim=1)[:, None] * lengths
        return Outputs(place, outputs.double(), sums, lengths.square())

    def _inputs(self, start: int, count: int) -> tuple[Tensor, slice]:
        """The inputs that meet these rows of the stored weight, and the outputs that they make."""
        place = slice(start - self.update.rows.start, start - self.update.rows.start + count)
        return (self.x[:, place], slice(None)) if self.update.transposed else (self.x, place)

    def add(self, found: Iterable[Outputs]) -> None:
        for outputs in found:
            self.difference[:, outputs.place] += outputs.moved
            self.sums[:, outputs.place] += outputs.sums
            self.squares[outputs.place] += outputs.squares

    def worst(self) -> float:
        bound = torch.minimum(self.sums, DEVIATIONS * self.squares.sqrt())
        zero = torch.zeros_like(self.difference)
        return min(worst_ratio(self.difference, zero, bound), WRONG)
