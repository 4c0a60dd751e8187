"""What a merge would write, beside what is there: one product, one rounding and one comparison of
bits for each element. What is the same is right, and needs no bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor

from gralora_convert.adapters import Update
from gralora_convert.delta import half_ulp
from gralora_convert.disk import TensorSpec, bytes_of, torch_dtype
from gralora_convert.errors import CheckFailedError
from gralora_convert.output import CastTensor, MergedTensor, are_finite

# One element in so many: more of them are looked at with their neighbours at less cost; one by one
# by their factors.
FEW, FEWER = 16, 64
FIRST_ROWS = 64  # say how the rest was made
Differ = numpy.typing.NDArray[numpy.bool_]


class Unlike(NamedTuple):
    """Elements of a stored matrix that are no rounding of the sums of a merge, and what they hold,
    float64; right or wrong."""

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
    """A merge of `before` and the updates, in tiles of whole rows, beside `after`.

    Some tools round the updates to the adapter's 16 bits before they add them: where many elements
    are unlike, the merge is made so.
    """

    def __init__(
        self, before: TensorSpec, after: TensorSpec, updates: Sequence[Update], device: str
    ) -> None:
        self._ours = MergedTensor(before, after.dtype, updates, device=device, check=False)
        self._theirs = CastTensor(after, after.dtype)
        self.spans = [self._ours.span(tile) for tile in range(self._ours.count)]

    @cached_property
    def _ways(self) -> Sequence[torch.dtype | None]:
        """What updates are rounded to before they are added; first what the first rows say."""
        short = {one.adapter.short_dtype(one.module) for one in self._ours.updates} - {None}
        ways = [None, *(torch_dtype(name) for name in sorted(filter(None, short)))]
        rows = 0, min(self.spans[0][1], FIRST_ROWS)

        def unlike(way: torch.dtype | None) -> int:
            return int(numpy.count_nonzero(self._made(*rows, way)[1]))

        return ways if len(ways) == 1 else sorted(ways, key=unlike)

    def compared(self, tile: int) -> Stored:
        start, stop = self.spans[tile]
        before = cache(partial(self._ours.read, start, stop, "before"))
        try:
            unlike = self._unlike(start, stop, before)
        except CheckFailedError:
            unlike = None
        finally:
            self._ours.release()
        return Stored(start, before, self._theirs.read(start, stop, "theirs"), unlike)

    def _unlike(self, start: int, stop: int, before: Callable[[], Tensor]) -> Unlike | None:
        for way in self._ways:
            sums, differ = self._made(start, stop, way)
            if numpy.count_nonzero(differ) * FEW <= differ.size:
                after = self._theirs.read(start, stop, "theirs")
                return _doubtful(
                    torch.from_numpy(numpy.flatnonzero(differ)), start, before, after, sums
                )
        return None

    def _made(self, start: int, stop: int, way: torch.dtype | None) -> tuple[Tensor, Differ]:
        """The sums of some rows made in one way, and where their rounding is not what is there: of
        32 bits and more, not even but for the last one, which the order of the sum decides."""
        sums, written = self._ours.remade(start, stop, way)
        theirs = self._theirs.read(start, stop, "theirs")
        size = theirs.itemsize
        bits = theirs.view(getattr(torch, f"int{8 * size}")).numpy().view(f"u{size}")
        ours = numpy.frombuffer(written, bits.dtype).reshape(bits.shape)
        if size == 2:
            return sums, ours != bits
        if not are_finite(bytes_of(theirs), self._theirs.dtype):
            return sums, numpy.ones(bits.shape, bool)  # bits beside a number's may be no number's
        apart = ours - bits
        apart += 1
        return sums, apart > 2


def _doubtful(
    at: Tensor, start: int, before: Callable[[], Tensor], after: Tensor, sums: Tensor
) -> Unlike | None:
    """Those of the elements `at` some places that no rounding of nearly the same sum explains.

    The sum of n products is off by n u sum |products| + u |sum| at most. What is within half a unit
    in the last place and 2 u (|W| + |D|) of it keeps the bound, which has (n + 4) u (|W| + sum
    |products|) beside that half unit (see `delta.tolerance`).
    """
    rows, columns = start + at // after.shape[1], at % after.shape[1]
    old, new, made = (
        values.reshape(-1)[at.to(values.device)].cpu().double()
        for values in (before() if len(at) else after, after, sums)
    )
    room = half_ulp(torch.maximum(new.abs(), made.abs()), after.dtype)
    room.add_(old.abs() + (made - old).abs(), alpha=torch.finfo(sums.dtype).eps)
    is_doubtful = ~((new - made).abs() < room)
    if int(is_doubtful.sum()) * FEWER > after.numel():
        return None
    return Unlike(*(values[is_doubtful] for values in (rows, columns, old, new)))
