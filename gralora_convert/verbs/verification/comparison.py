"""One stored matrix against the base's and the updates that belong in it, tile by tile.

The verdict is one pass of cheap arithmetic. Only where it is no, a second pass finds out why.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gralora_convert.adapters import Update
from gralora_convert.delta import (
    Addend,
    BlockSums,
    Delta,
    Evidence,
    Gralora,
    Lora,
    Survival,
    Verdict,
    compare,
    explain,
    features,
    forward_path,
    half_ulp,
    to_device,
    tolerance,
    worst_ratio,
)
from gralora_convert.disk import (
    DTYPE_BITS,
    FLOATING,
    Rows,
    TensorSpec,
    bytes_of,
    read_bytes,
    read_into,
    read_rows,
    torch_dtype,
)
from gralora_convert.system import usable_cpus

TILE_ELEMENTS = 1 << 17  # half a MiB of float32: what is made of a tile stays in the cache
# Rows of a wide matrix are looked at together where they fit: the lengths of the factors' columns,
# which the bound needs, cost as much as the product of one row.
TILE_ROWS, WIDE_ELEMENTS = 8, 1 << 20
EVIDENCE_ELEMENTS = 1 << 19
RUN = 8  # rows of a large matrix that are looked at together
PROBES = 4
# |sum of x_i e_i| for normal x exceeds 8 |e| once in 8e14 draws, whatever e is (Gaussian tail).
DEVIATIONS = 8.0
WRONG = sys.float_info.max  # the ratio of what is missing or not finite; JSON has no infinity

Progress = Callable[[int], None]
Others = Iterable[tuple[str, Callable[[], Delta]]]


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
        return features(self.delta)[0 if self.transposed else 1]

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


@dataclass(frozen=True, slots=True)
class Found:
    """What a comparison found of one module: `worst` is the largest |difference| / bound."""

    module: str
    worst: float
    what: str
    survival: Survival
    output_worst: float | None


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What some rows of a stored weight do to the probes: outputs after minus before, and the sums
    that bound them."""

    place: slice
    moved: Tensor
    sums: Tensor
    squares: Tensor


@dataclass(frozen=True, slots=True)
class _Tile:
    worst: float
    survival: Survival
    nbytes: int
    outputs: _Outputs | None


class Comparison:
    """A stored matrix `after` against `before` + `updates`."""

    def __init__(
        self,
        before: TensorSpec,
        after: TensorSpec,
        updates: Sequence[Factored],
        *,
        probe: bool = False,
        device: str = "cpu",
        progress: Progress = lambda count: None,
    ) -> None:
        self.before, self.after, self.updates = before, after, updates
        self.probe, self.device, self.progress = probe, device, progress
        self.dtype = torch_dtype(after.dtype)
        wide = "F64" in (before.dtype, after.dtype) or after.dtype == "F32"
        self.wide = torch.float64 if wide else torch.float32

    def found(self, others: Callable[[str], Others] = lambda module: ()) -> Iterator[Found]:
        """What became of each update; and of the rows that get none, under an empty name, if they
        are not the base's."""
        for rows_ in self._idle():
            ratio = difference(self.before, self.after, self.progress, rows_)
            if ratio:
                yield Found(
                    "", ratio, "rows that no adapter touches were changed", Survival(), None
                )
        for update in self.updates:
            yield self._compared(update, others)

    def _idle(self) -> Iterator[tuple[int, int]]:
        """The rows that no update touches."""
        position = 0
        for update in sorted(self.updates, key=lambda update: update.rows.start):
            if update.rows.start > position:
                yield position, update.rows.start
            position = max(position, update.rows.stop)
        if position < self.before.shape[0]:
            yield position, self.before.shape[0]

    def _tiles(self, update: Factored) -> Iterator[tuple[int, int]]:
        columns = self.before.shape[1]
        wide = min(TILE_ROWS, WIDE_ELEMENTS // columns)
        count = max(1, TILE_ELEMENTS // columns, wide)
        for start in range(update.rows.start, update.rows.stop, count):
            yield start, min(start + count, update.rows.stop)

    def _compared(self, update: Factored, others: Callable[[str], Others]) -> Found:
        worst, kept = 0.0, Survival()
        probe = _Probe(update, self.updates, self.before.shape[1]) if self.probe else None
        measure = partial(self._tile, update, probe)
        with ThreadPoolExecutor(usable_cpus()) as workers:
            for tile in workers.map(measure, self._tiles(update)):
                worst, kept = max(worst, tile.worst), kept + tile.survival
                if probe is not None and tile.outputs is not None:
                    probe.add(tile.outputs)
                self.progress(tile.nbytes)
        what = ""
        if worst == WRONG:
            what = "holds NaN or infinity"
        elif worst > 1:
            what = self._explained(update, others(update.module))
        return Found(update.module, worst, what, kept, None if probe is None else probe.worst())

    def _tile(self, update: Factored, probe: "_Probe | None", span: tuple[int, int]) -> "_Tile":
        """What is found of rows `start:stop`; float32 decides where it can."""
        before, after, found = self._measured(*span, self.wide)
        if self.wide != torch.float64 and not (found.worst < WRONG and found.survival.energy > 0):
            before, after, found = self._measured(*span, torch.float64)
        outputs = None
        if probe is not None:
            one, two, bound = (t.cpu().double() for t in (before, after, found.bound))
            outputs = probe.outputs(one, two, bound, *span)
        nbytes = (span[1] - span[0]) * self.after.nbytes // self.after.shape[0]
        return _Tile(min(found.worst, WRONG), found.survival, nbytes, outputs)

    def _read(self, start: int, stop: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        one = _rows(self.before, start, stop).to(self.device, wide)
        return one, _rows(self.after, start, stop).to(self.device, wide)

    def _measured(
        self, start: int, stop: int, wide: torch.dtype, *, quick: bool = True
    ) -> tuple[Tensor, Tensor, Verdict]:
        """Rows `start:stop` before and after, and what `compare` says of them."""
        before, after = self._read(start, stop, wide)
        addends = [found for u in self.updates if (found := u.addend(start, stop))]
        origin = slack = None
        if self.before.scale is not None:  # others round the decoded codes before they add
            origin = before.to(self.dtype).to(wide)
            slack = _decoding_slack(before, self.dtype)
        return before, after, compare(
            before, after, addends, dtype=self.dtype, quick=quick, origin=origin, slack=slack
        )  # fmt: skip

    # Only for what is wrong ----------------------------------------------------------------------

    def _explained(self, update: Factored, others: Others) -> str:
        """What happened, in a clause."""
        delta = update.delta
        sums, wrong = BlockSums(delta.k if isinstance(delta, Gralora) else 1), list[int]()
        for start, stop in self._tiles(update):
            before, after, found = self._measured(start, stop, torch.float64, quick=False)
            exact = before + found.delta
            outside = (after - exact).abs() > found.bound
            wrong += (outside.any(1).nonzero().flatten() + start).tolist()
            right = exact.to(self.dtype).double() - before
            sums.add(
                after - before, right, found.delta, outside,
                start=update.span(start, stop)[0], total=update.delta_rows,
                transposed=update.transposed,
            )  # fmt: skip
        return explain(self._evidence(update, wrong), sums, others)

    def _evidence(self, update: Factored, wrong: Sequence[int]) -> Evidence:
        """All rows of a small matrix; of a large one runs from everywhere, half of them where it
        is wrong."""
        budget = max(RUN, EVIDENCE_ELEMENTS // self.before.shape[1])
        if update.rows.count <= budget:
            runs = [(update.rows.start, update.rows.stop)]
        else:
            count = max(1, budget // (2 * RUN))
            even = range(update.rows.start, update.rows.stop, -(-update.rows.count // count))
            starts = {row // RUN * RUN for row in (*even, *wrong[:: -(-len(wrong) // count)])}
            runs = [
                (max(row, update.rows.start), min(row + RUN, update.rows.stop))
                for row in sorted(starts)
                if row < update.rows.stop
            ]
        pairs = [self._read(*run, torch.float64) for run in runs]
        return Evidence(
            update.delta,
            [update.span(*run) for run in runs],
            torch.cat([before for before, _ in pairs]),
            torch.cat([after for _, after in pairs]),
            self.dtype,
            update.transposed,
        )


class _Probe:
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
        self.x = torch.randn(PROBES, n_in, dtype=torch.float64, generator=generator)
        self.squares = torch.zeros(n_out, dtype=torch.float64)
        self.sums = torch.zeros(PROBES, n_out, dtype=torch.float64)
        self.difference = torch.zeros(PROBES, n_out, dtype=torch.float64)
        for one in updates:  # all that is added to these rows
            if met := one.rows.meet(update.rows.start, update.rows.stop):
                self.difference -= self._path(one, met[0])

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

    def outputs(
        self, before: Tensor, after: Tensor, bound: Tensor, start: int, stop: int
    ) -> "_Outputs":
        """What rows `start:stop` of the stored weight contribute."""
        place = slice(start - self.update.rows.start, stop - self.update.rows.start)
        if self.update.transposed:
            x, everywhere = self.x[:, place], slice(None)
            moved, sums = x @ after - x @ before, x.abs() @ bound
            return _Outputs(everywhere, moved, sums, bound.square().sum(0))
        moved, sums = self.x @ after.T - self.x @ before.T, self.x.abs() @ bound.T
        return _Outputs(place, moved, sums, bound.square().sum(1))

    def add(self, outputs: "_Outputs") -> None:
        self.difference[:, outputs.place] += outputs.moved
        self.sums[:, outputs.place] += outputs.sums
        self.squares[outputs.place] += outputs.squares

    def worst(self) -> float:
        bound = torch.minimum(self.sums, DEVIATIONS * self.squares.sqrt())
        zero = torch.zeros_like(self.difference)
        return min(worst_ratio(self.difference, zero, bound), WRONG)


def difference(
    one: TensorSpec, other: TensorSpec, progress: Progress, rows: tuple[int, int] | None = None
) -> float:
    """0 when `other` is `one`, bit for bit, or in another dtype `one` rounded to it; else the
    largest difference in units of half the last place of `other`'s dtype, at least 2; WRONG where
    that means nothing. Of all rows, or of `rows`."""
    if one.shape != other.shape:
        return WRONG
    worst, is_cast = 0.0, one.dtype != other.dtype or one.scale is not None
    width = one.numel // one.shape[0] if rows else 1
    begin, end = (rows[0] * width, rows[1] * width) if rows else (0, one.numel)
    for start in range(begin, end, TILE_ELEMENTS):
        stop = min(start + TILE_ELEMENTS, end)
        progress((stop - start) * other.nbytes // max(other.numel, 1))
        if not is_cast and _bytes(one, start, stop) == _bytes(other, start, stop):
            continue
        if one.read_as not in FLOATING or other.dtype not in FLOATING:
            return WRONG
        dtype = torch_dtype(other.dtype)
        values = _elements(one, start, stop)
        expected, found = values.to(dtype).double(), _elements(other, start, stop).double()
        if one.scale is not None:
            bound = _decoding_slack(values.double(), dtype)
            if worst_ratio(found, values.double(), bound) <= 1:
                continue
        if is_cast and torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True):
            continue
        bound = tolerance(found, expected, magnitude=torch.zeros(()), terms=0, dtype=dtype)
        worst = max(worst, min(worst_ratio(found, expected, bound), WRONG), 2.0)
    return worst


def _decoding_slack(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a right rounding to `dtype` may be from decoded codes, which are products in float32
    themselves."""
    return half_ulp(values, dtype).add_(values.abs(), alpha=torch.finfo(torch.float32).eps)


def _bytes(spec: TensorSpec, start: int, stop: int) -> bytearray:
    """Elements `start:stop`, as bytes."""
    bits = DTYPE_BITS[spec.dtype]
    return read_bytes(spec, start * bits // 8, stop * bits // 8)


def _elements(spec: TensorSpec, start: int, stop: int) -> Tensor:
    if spec.scale is not None:
        width = spec.shape[1]
        first = start // width
        values = read_rows(spec, first, -(-stop // width)).view(-1)
        return values[start - first * width : stop - first * width]
    values = torch.empty(stop - start, dtype=torch_dtype(spec.dtype))
    read_into(spec, start * values.itemsize, bytes_of(values))
    return values


def _rows(spec: TensorSpec, start: int, stop: int) -> Tensor:
    width = spec.shape[1]
    return _elements(spec, start * width, stop * width).view(stop - start, width)
