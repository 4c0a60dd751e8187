"""An update with its factors at hand, and the rows of a stored matrix that it belongs to."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gralora_convert.adapters import Update
from gralora_convert.delta import (
    Addend,
    Gralora,
    Lora,
    elements,
    terms,
    tolerance,
    worst_ratio,
)
from gralora_convert.disk import Rows, torch_dtype
from gralora_convert.verbs.verification.expected import Unlike

WRONG = sys.float_info.max  # the ratio of what is missing or not finite; JSON has no infinity
SAMPLED = 512  # of so many rows of a block one run is measured
SHARE = 64  # a run of one row in so many
GOLDEN = 0.6180339887498949  # places that differ from run to run, and are the same in every pass


@dataclass(frozen=True, slots=True)
class Factored:
    """An update with its delta on the device, its weight in the scaling: `rows` of a stored matrix
    get the rows of the delta (its transpose, for `transposed`) that they name. `rounded` is the
    dtype that the delta may have been rounded to."""

    module: str
    delta: Gralora | Lora
    rows: Rows
    transposed: bool = False
    rounded: torch.dtype | None = None

    @classmethod
    def of(cls, update: Update, device: str) -> "Factored":
        delta, short = update.delta(device), update.adapter.short_dtype(update.module)
        return cls(
            update.module, replace(delta, scaling=delta.scaling * update.weight), update.in_order,
            update.transposed, None if short is None else torch_dtype(short),
        )  # fmt: skip

    @property
    def delta_rows(self) -> int:
        """The rows of the whole delta (of its transpose, for `transposed`)."""
        return self.delta.in_features if self.transposed else self.delta.out_features

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the delta that belong to rows `start:stop` of the matrix."""
        begin = start - self.rows.start + self.rows.first
        return begin, begin + stop - start

    def addend(self, start: int, stop: int) -> Addend | None:
        """What rows `start:stop` of the matrix get of it."""
        met = self.rows.meet(start, stop)
        if met is None or not isinstance(met[1], slice):
            return None
        return Addend(self.delta, met[0], met[1].start, self.transposed, rounded=self.rounded)

    def sampled(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs of rows from each of its blocks, within rows `start:stop` of the matrix: one row in
        64, at places that differ from run to run."""
        height = self.delta_rows // (self.delta.k if isinstance(self.delta, Gralora) else 1)
        parts = -(-height // SAMPLED)
        run = max(1, height // parts // SHARE)
        begin, end = self.span(start, stop)
        for part in range(begin * parts // height, -(-end * parts // height)):
            first, last = part * height // parts, (part + 1) * height // parts
            place = first + int(part * GOLDEN % 1 * max(last - first - run, 0))
            if max(place, begin) < min(place + run, end):
                shift = start - begin
                yield max(place, begin) + shift, min(place + run, end) + shift


def worst_of(unlike: Unlike, updates: Sequence[Factored], dtype: torch.dtype) -> float:
    """The largest |difference| / bound of single elements of a matrix with these updates, float64.
    The bound takes the sums of absolute products, which are less than `magnitude_rows`."""
    delta, sizes, products, rounded = torch.zeros_like(unlike.after), unlike.before.abs(), 0, None
    for one in updates:
        inside = (unlike.rows >= one.rows.start) & (unlike.rows < one.rows.stop)
        rows, columns = unlike.rows[inside], unlike.columns[inside]
        if len(rows):
            rows = rows - one.rows.start + one.rows.first
            places = (columns, rows) if one.transposed else (rows, columns)
            delta[inside] += _elements(one.delta, *places)
            sizes[inside] += _elements(one.delta, *places, absolute=True)
            products, rounded = products + terms(one.delta), rounded or one.rounded
    exact = unlike.before + delta
    bound = tolerance(
        unlike.after, exact, magnitude=sizes, terms=products, dtype=dtype, delta=delta,
        delta_dtype=rounded,
    )  # fmt: skip
    return worst_ratio(unlike.after, exact, bound)


def _elements(
    delta: Gralora | Lora, out: Tensor, into: Tensor, *, absolute: bool = False
) -> Tensor:
    device = delta.A.device
    return elements(delta, out.to(device), into.to(device), absolute=absolute).cpu()
