"""What a merge would write, beside what is there: one product, one rounding and one comparison of
bits for each element. What is the same is right, and needs no bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from gralora_convert.adapters import Update
from gralora_convert.disk import TensorSpec
from gralora_convert.errors import CheckFailedError
from gralora_convert.output import CastTensor, MergedTensor

FEW = 64  # one element in so many: more of them are measured with their neighbours at less cost


class Unlike(NamedTuple):
    """Elements of a stored matrix that a merge would write otherwise, and what they hold, float64;
    right or wrong: other sums may be rounded to a neighbour."""

    rows: Tensor
    columns: Tensor
    before: Tensor
    after: Tensor

    def within(self, start: int, stop: int) -> "Unlike":
        """Those of rows `start:stop`."""
        inside = (self.rows >= start) & (self.rows < stop)
        return Unlike(*(values[inside] for values in self))


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows of a stored matrix from `start` on, in memory that the worker uses again, and the
    elements that are unlike; None where those are many, or a sum is no number."""

    start: int
    before: Callable[[], Tensor]
    after: Tensor
    unlike: Unlike | None

    def rows(self, start: int, stop: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Some of them before and after."""
        chosen = slice(start - self.start, stop - self.start)
        return self.before()[chosen].to(device, dtype), self.after[chosen].to(device, dtype)


class Expected:
    """A merge of `before` and the updates, in tiles of whole rows, beside `after`."""

    def __init__(
        self, before: TensorSpec, after: TensorSpec, updates: Sequence[Update], device: str
    ) -> None:
        self._ours = MergedTensor(before, after.dtype, updates, device=device, check=False)
        self._ours.changed = True  # nobody asks
        self._theirs = CastTensor(after, after.dtype)
        self.spans = [self._ours.span(tile) for tile in range(self._ours.count)]

    def compared(self, tile: int) -> Stored:
        start, stop = self.spans[tile]
        before = cache(partial(self._ours.read, start, stop))
        after = self._theirs.read(start, stop, "theirs")
        return Stored(start, before, after, self._unlike(tile, before, after))

    def _unlike(self, tile: int, before: Callable[[], Tensor], after: Tensor) -> Unlike | None:
        try:
            data = self._ours.produce(tile)
        except CheckFailedError:
            return None
        theirs = after.view(getattr(torch, f"int{8 * after.itemsize}")).numpy()
        differ = numpy.frombuffer(data, theirs.dtype).reshape(theirs.shape) != theirs
        if numpy.count_nonzero(differ) * FEW > differ.size:
            return None
        at = torch.from_numpy(numpy.flatnonzero(differ))
        rows, columns = self.spans[tile][0] + at // after.shape[1], at % after.shape[1]
        values = (
            values.view(-1)[at].double() for values in (before() if len(at) else after, after)
        )
        return Unlike(rows, columns, *values)
