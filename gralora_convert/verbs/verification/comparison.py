"""One stored matrix against the base's and the updates that belong in it, tile by tile.

What is there as a merge would write it, bit for bit, needs no bound; a sample of it is measured, by
another formula. The rest is measured element by element. Only where the verdict is no, a second
pass finds out why.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gralora_convert.delta import (
    BlockSums,
    Delta,
    Evidence,
    Gralora,
    Survival,
    Verdict,
    compare,
    explain,
    half_ulp,
    tolerance,
    worst_ratio,
)
from gralora_convert.disk import (
    FLOATING,
    TensorSpec,
    bytes_of,
    element_bytes,
    read_into,
    read_rows,
    torch_dtype,
)
from gralora_convert.verbs.verification.expected import Expected, Stored
from gralora_convert.verbs.verification.factored import WRONG, Factored, worst_of
from gralora_convert.verbs.verification.probes import Outputs, Probe

TILE_ELEMENTS = 1 << 17  # half a MiB of float32: what is made of a tile stays in the cache
# Rows of a wide matrix are looked at together where they fit: the lengths of the factors' columns,
# which the bound needs, cost as much as the product of one row.
TILE_ROWS, WIDE_ELEMENTS = 8, 1 << 20
EVIDENCE_ELEMENTS = 1 << 19
RUN = 8  # rows of a large matrix that are looked at together

Progress = Callable[[int], None]
Others = Iterable[tuple[str, Callable[[], Delta]]]


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one tensor, or on the part of it that belongs to `module`: `worst` is the
    largest |difference| / bound (right: at most 1)."""

    tensor: str
    module: str
    worst: float
    what: str = ""
    survival: Survival | None = None
    output_worst: float | None = None
    kept: bool = False  # a tensor that no adapter touches
    dtype: str = ""  # in which an adapted matrix is stored

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Row":
        """The row of which `dataclasses.asdict` made these."""
        survival = fields["survival"]
        return cls(**fields | {"survival": survival and Survival(**survival)})

    def as_json(self) -> dict[str, object]:
        row: dict[str, object] = {"tensor": self.tensor, "module": self.module, "worst": self.worst}
        if self.what:
            row["what"] = self.what
        return row | (self.survival.as_json() if self.survival else {})


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is found of some rows that an update adds to."""

    worst: float = 0.0
    survival: Survival = field(default_factory=Survival)
    outputs: tuple[Outputs, ...] = ()

    def __add__(self, other: "_Seen") -> "_Seen":
        worst, survival = max(self.worst, other.worst), self.survival + other.survival
        return _Seen(worst, survival, self.outputs + other.outputs)


class Comparison:
    """A stored matrix `after` against `before` + `updates`. Without `expected`, what a merge would
    write, every element is measured. `each` is `map`, or that of several workers."""

    def __init__(
        self,
        before: TensorSpec,
        after: TensorSpec,
        updates: Sequence[Factored],
        expected: Expected | None = None,
        *,
        probe: bool = False,
        device: str = "cpu",
        progress: Progress = lambda count: None,
        each: Callable[..., Iterator[list[_Seen]]] = map,
    ) -> None:
        self.before, self.after, self.updates, self.expected = before, after, updates, expected
        self.probe, self.device, self.progress, self.each = probe, device, progress, each
        self.dtype = torch_dtype(after.dtype)
        wide = "F64" in (before.dtype, after.dtype) or after.dtype == "F32"
        self.wide = torch.float64 if wide else torch.float32

    def found(self, others: Callable[[str], Others] = lambda module: ()) -> Iterator[Row]:
        """What became of each update, in a row that names its module; and of the rows that get
        none, if they changed."""
        for rows_ in self._idle():
            if ratio := difference(self.before, self.after, rows=rows_):
                what = "rows that no adapter touches were changed"
                yield Row("", "", ratio, what, Survival())
        found = self._passed(self.expected)
        if self.expected and any(seen.worst <= 1 < (out or 0.0) for seen, out in found):
            found = self._passed(None)  # the quick bound of the outputs says no: take the full one
        for update, (seen, output) in zip(self.updates, found, strict=True):
            what, kept = "", seen.survival
            if seen.worst == WRONG:
                what = "holds NaN or infinity"
            elif seen.worst > 1:
                what, kept = self._explained(update, others(update.module))
            yield Row("", update.module, seen.worst, what, kept, output)

    def _idle(self) -> Iterator[tuple[int, int]]:
        """The rows that no update touches."""
        position = 0
        for update in sorted(self.updates, key=lambda update: update.rows.start):
            if update.rows.start > position:
                yield position, update.rows.start
            position = max(position, update.rows.stop)
        if position < self.before.shape[0]:
            yield position, self.before.shape[0]

    def _tiles(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        columns = self.before.shape[1]
        wide = min(TILE_ROWS, WIDE_ELEMENTS // columns)
        count = max(1, TILE_ELEMENTS // columns, wide)
        for start in range(first, last, count):
            yield start, min(start + count, last)

    def _passed(self, expected: Expected | None) -> list[tuple[_Seen, float | None]]:
        """What one pass finds of each update, and the largest ratio of its outputs."""
        height, columns = self.before.shape
        probes = [Probe(u, self.updates, columns) if self.probe else None for u in self.updates]
        spans = expected.spans if expected else [*self._tiles(0, height)]
        totals = [_Seen() for _ in self.updates]
        look = partial(self._looked, expected, probes)
        for span, found in zip(spans, self.each(look, range(len(spans)), spans), strict=True):
            for place, (probe, seen) in enumerate(zip(probes, found, strict=True)):
                totals[place] += replace(seen, outputs=())
                if probe:
                    probe.add(seen.outputs)
            self.progress((span[1] - span[0]) * self.after.nbytes // height)
        return [(seen, p.worst() if p else None) for seen, p in zip(totals, probes, strict=True)]

    def _looked(
        self,
        expected: Expected | None,
        probes: Sequence[Probe | None],
        tile: int,
        span: tuple[int, int],
    ) -> list[_Seen]:
        """What is found of the rows of one tile, by update."""
        stored = expected.compared(tile) if expected else None
        found = []
        for update, probe in zip(self.updates, probes, strict=True):
            rows = max(span[0], update.rows.start), min(span[1], update.rows.stop)
            if rows[0] >= rows[1]:
                found.append(_Seen())
            elif stored is None:
                found.append(self._measured(self._tiles(*rows), probe))
            else:
                sample = self._measured(update.sampled(*rows))
                found.append(sample + replace(self._rest(stored, rows, probe), survival=Survival()))
        return found

    def _rest(self, stored: Stored, rows: tuple[int, int], probe: Probe | None) -> _Seen:
        """What is found of rows beside what their sample says: of its elements that are unlike, or
        of all where one of those might be wrong."""
        unlike = stored.unlike and stored.unlike.within(*rows)
        is_coded = self.before.scale is not None and unlike is not None and len(unlike.rows)
        worst = WRONG if unlike is None else worst_of(unlike, self.updates, self.dtype)
        if worst > 1 or is_coded:  # others round decoded codes first
            return self._measured(self._tiles(*rows), probe)
        if probe is None:
            return _Seen(worst)
        outputs = []
        for start, stop in self._tiles(*rows):
            pair = stored.rows(start, stop, self.device, self.wide)
            outputs.append(probe.outputs_of_right(*pair, self.dtype, start))
        return _Seen(worst, outputs=tuple(outputs))

    def _measured(self, tiles: Iterable[tuple[int, int]], probe: Probe | None = None) -> _Seen:
        """What is found where every element is measured; float32 decides where it can."""
        seen = _Seen()
        for tile in tiles:
            before, after, found = self._judged(*tile, self.wide)
            if self.wide != torch.float64 and not (
                found.worst < WRONG and found.survival.energy > 0
            ):
                before, after, found = self._judged(*tile, torch.float64)
            outputs = (probe.outputs(before, after, found.bound, tile[0]),) if probe else ()
            seen += _Seen(min(found.worst, WRONG), found.survival, outputs)
        return seen

    def _read(self, start: int, stop: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        one = read_rows(self.before, start, stop).to(self.device, wide)
        return one, read_rows(self.after, start, stop).to(self.device, wide)

    def _judged(
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

    def _explained(self, update: Factored, others: Others) -> tuple[str, Survival]:
        """What happened, in a clause, and what is there of the update."""
        delta, kept = update.delta, Survival()
        sums, wrong = BlockSums(delta.k if isinstance(delta, Gralora) else 1), list[int]()
        for start, stop in self._tiles(update.rows.start, update.rows.stop):
            before, after, found = self._judged(start, stop, torch.float64, quick=False)
            kept += found.survival
            exact = before + found.delta
            outside = (after - exact).abs() > found.bound
            wrong += (outside.any(1).nonzero().flatten() + start).tolist()
            right = exact.to(self.dtype).double() - before
            sums.add(
                after - before, right, found.delta, outside,
                start=update.span(start, stop)[0], total=update.delta_rows,
                transposed=update.transposed,
            )  # fmt: skip
        return explain(self._evidence(update, wrong), sums, others), kept

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


def difference(
    one: TensorSpec,
    other: TensorSpec,
    progress: Progress = lambda count: None,
    rows: tuple[int, int] | None = None,
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
        if not is_cast and element_bytes(one, start, stop) == element_bytes(other, start, stop):
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


def _elements(spec: TensorSpec, start: int, stop: int) -> Tensor:
    if spec.scale is not None:
        width = spec.shape[1]
        first = start // width
        values = read_rows(spec, first, -(-stop // width)).view(-1)
        return values[start - first * width : stop - first * width]
    values = torch.empty(stop - start, dtype=torch_dtype(spec.dtype))
    read_into(spec, start * values.itemsize, bytes_of(values))
    return values
