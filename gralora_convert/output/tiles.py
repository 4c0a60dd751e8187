"""One dense tensor, made tile by tile: read rows, add updates in float32, round once, check.

The workers of a plan call `MergedTensor.produce` for different tiles at the same time. Factors are
read when the first tile of a tensor needs them and dropped after its last; stored bytes and sums
live in buffers that each worker uses again and again. Headers say how a tensor is cut; torch is
imported for the first tile.
"""

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gralora_convert.adapters import Update, require_finite
from gralora_convert.disk import (
    DTYPE_BITS,
    FLOATING,
    INFINITY,
    Rows,
    TensorSpec,
    apply_scales,
    bytes_of,
    decode,
    dtype_name,
    largest_magnitude,
    read_torch,
    torch_dtype,
)
from gralora_convert.errors import CheckFailedError, UnsupportedError
from gralora_convert.output.buffers import Buffer, Buffers, Shared
from gralora_convert.output.parts import Account, Computed, Copied

if TYPE_CHECKING:
    import torch

    from gralora_convert.delta import Survival

# Of sums. What fits a second-level cache is slower: small tiles make workers wait for Python's
# lock, where most of a small tile's time goes.
TILE_BYTES = 4 * 1024 * 1024
CHECKED_SHARE = 64  # one row in so many is recomputed while it is hot
PARTS = 4  # a tensor is checked in at least so many places


_buffers = Buffers()


class _Tiles:
    """A stored matrix cut into tiles of whole rows, each read and cast by a worker."""

    def __init__(self, spec: TensorSpec, dtype: str) -> None:
        for name in (spec.read_as, dtype):
            if name not in FLOATING:
                raise UnsupportedError(
                    f"tensor {spec.name!r} has dtype {name}, a floating dtype of 16 bits or more "
                    "was needed",
                    where=spec.file,
                )
        self.spec, self.dtype = spec, dtype
        self.columns = math.prod(spec.shape[1:]) if spec.shape else 1
        self.rows = spec.shape[0] if spec.shape else 1
        self._sums = "F64" if "F64" in (spec.read_as, dtype) else "F32"
        row_bytes = self.columns * DTYPE_BITS[self._sums] // 8
        self.tile_rows = max(1, min(self.rows, TILE_BYTES // max(row_bytes, 1)))
        self.count = math.ceil(self.rows / self.tile_rows)

    @cached_property
    def stored(self) -> "torch.dtype":
        return torch_dtype(self.spec.read_as)

    @cached_property
    def written(self) -> "torch.dtype":
        return torch_dtype(self.dtype)

    @cached_property
    def sums(self) -> "torch.dtype":
        return torch_dtype(self._sums)

    def source(self) -> Computed:
        size = self.tile_rows * self.row_bytes
        return Computed(size, self.produce, self.memory, self.account)

    def produce(self, tile: int) -> memoryview:
        """The bytes of one tile, in this worker's buffer."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """Bytes that the tiles keep alive together."""
        return 0

    @property
    def account(self) -> Account | None:
        return None

    @property
    def row_bytes(self) -> int:
        return self.columns * DTYPE_BITS[self.dtype] // 8

    def span(self, tile: int) -> tuple[int, int]:
        start = tile * self.tile_rows
        return start, min(start + self.tile_rows, self.rows)

    def read(self, start: int, stop: int, purpose: str = "stored") -> "torch.Tensor":
        """Rows `start:stop` as stored (codes: as what they mean), in this worker's buffer for that
        purpose."""
        import torch

        stored = _buffers.get(purpose, stop - start, self.columns, self.stored)
        if self.spec.scale is not None:
            codes = _buffers.get("codes", stop - start, self.columns, torch.int8)
            halves = _buffers.get("halves", stop - start, self.columns, torch.int16)
            _buffers.read(self.spec, start * self.columns, codes.data)
            decode(codes.tensor, stored.tensor, halves.tensor)
            apply_scales(stored.tensor, self.spec, start)
            return stored.tensor
        width = self.columns * self.stored.itemsize
        _buffers.read(self.spec, start * width, stored.data)
        return stored.tensor

    def round(
        self,
        sums: "torch.Tensor",
        stored: "Callable[[], torch.Tensor]",
        *,
        keep_infinite: bool = False,
    ) -> Buffer:
        """The sums in the dtype that is written: the one rounding. `stored` reads them again.

        With `keep_infinite`, what was NaN or infinite may stay so (a mask, a buffer).
        """
        import torch

        if self.written == sums.dtype and sums.device.type == "cpu":
            written = Buffer(sums, bytes_of(sums))
        else:
            written = _buffers.get("written", len(sums), self.columns, self.written)
            written.tensor.copy_(sums)
        if are_finite(written.data, self.dtype):
            return written
        was_finite = stored().isfinite()
        if keep_infinite and torch.equal(was_finite, written.tensor.isfinite()):
            return written
        if bool(was_finite.all()):
            largest = torch.finfo(self.written).max
            name = dtype_name(self.written)
            raise CheckFailedError(
                f"the result exceeds the largest {name} ({largest:g}) or is not a number",
                where=self.spec.name,
                hint="Write a wider dtype (`dtype='float32'`), or check the adapter's values.",
            )
        raise CheckFailedError(
            "holds NaN or infinity in the base", where=f"{self.spec.file}: {self.spec.name}"
        )


class CastTensor(_Tiles):
    """A tensor of the base in another dtype."""

    def produce(self, tile: int) -> memoryview:
        stored = self.read(*self.span(tile))
        return self.round(stored, lambda: stored, keep_infinite=True).data


class TrainedTensor(_Tiles):
    """A full tensor of an adapter (a head, a bias), in the dtype that is written."""

    def produce(self, tile: int) -> memoryview:
        stored = self.read(*self.span(tile))
        require_finite(stored, self.spec)
        return self.round(stored, lambda: stored).data


def taken(spec: TensorSpec, dtype: str) -> Copied | Computed:
    """A full tensor of an adapter as the output holds it; its values must be finite."""
    if not spec.nbytes or (spec.dtype == dtype and dtype not in FLOATING):
        return Copied(spec)
    return TrainedTensor(spec, dtype).source()


class PatchedTensor(_Tiles):
    """A tensor of the base of which some rows are replaced (a bias that is fused on disk)."""

    def __init__(
        self, spec: TensorSpec, dtype: str, parts: Sequence[tuple[Rows, TensorSpec]]
    ) -> None:
        super().__init__(spec, dtype)
        self.parts = tuple(parts)

    @property
    def memory(self) -> int:
        return sum(source.nbytes for _, source in self.parts)

    def produce(self, tile: int) -> memoryview:
        start, stop = self.span(tile)
        stored = self.read(start, stop)
        for rows, source in self.parts:
            if met := rows.meet(start, stop):
                values = read_torch(source).reshape(-1, self.columns)
                require_finite(values, source)
                stored[met[0]] = values[met[1]]
        return self.round(stored, lambda: stored).data


class MergedTensor(_Tiles):
    """A tensor of the base plus the updates of one or several modules.

    With `check`, one row in 64 is recomputed by the formula of the forward path and compared with
    the bytes about to be written; `worst` is then the largest difference relative to the bound that
    one rounding allows, and `survival` says how much of the update came through.
    """

    def __init__(
        self,
        spec: TensorSpec,
        dtype: str,
        updates: Sequence[Update],
        *,
        device: str = "cpu",
        check: bool = True,
    ) -> None:
        super().__init__(spec, dtype)
        self.updates, self._device = tuple(updates), device
        # of checked rows; float32 is exact enough for a rounding to 16 bits (`tolerance` allows)
        self._checks = "F32" if DTYPE_BITS[dtype] == 16 and self._sums == "F32" else "F64"
        groups = max(PARTS, *(update.adapter.blocks for update in updates)) if check else 0
        self._checked = self._samples(min(groups, self.rows)) if groups else {}
        self._shared = [Shared(update, self.count) for update in updates]
        self._lock = threading.Lock()
        self.worst = 0.0
        self.changed = False
        self._kept: dict[int, Survival] = {}  # by first row, so that threads do not change sums
        if device != "cpu":
            self.device  # noqa: B018 - refused now if there is none

    @cached_property
    def checks(self) -> "torch.dtype":
        return torch_dtype(self._checks)

    @cached_property
    def device(self) -> "torch.device":
        from gralora_convert.delta import device_for

        wide = self._checks == "F64" or any(update.is_wide for update in self.updates)
        return device_for(self._device, torch_dtype("F64" if wide else "F32"))

    @property
    def survival(self) -> "Survival":
        """What rounding kept of the update, over the rows that were checked."""
        from gralora_convert.delta import Survival

        return sum((self._kept[row] for row in sorted(self._kept)), Survival())

    @property
    def memory(self) -> int:
        return sum(update.nbytes for update in self.updates)

    @property
    def account(self) -> Account:
        return self

    def save(self) -> dict[str, object]:
        """What making the tiles has found out."""
        with self._lock:
            kept = {str(row): dataclasses.astuple(found) for row, found in self._kept.items()}
            return {"worst": self.worst, "changed": self.changed, "kept": kept}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Learns what another run or rank has found out about some of the tiles."""
        from gralora_convert.delta import Survival

        self.worst, self.changed = max(self.worst, saved["worst"]), self.changed or saved["changed"]
        self._kept |= {int(row): Survival(*found) for row, found in saved["kept"].items()}

    def produce(self, tile: int) -> memoryview:
        import torch

        start, stop = self.span(tile)
        stored = self.read(start, stop)
        checked = self._checked.get(tile, ())
        try:
            before = [stored[sample].to(self.checks, copy=True) for sample in checked]
            unchanged = None if self.changed else stored.clone()
            sums = self._sum(stored, start, stop)
            written = self.round(sums, lambda: self.read(start, stop))
            if unchanged is not None and not torch.equal(
                unchanged.to(self.written), written.tensor
            ):
                self.changed = True
            for sample, rows_before in zip(checked, before, strict=True):
                self._check_rows(rows_before, written.tensor[sample], start + sample.start)
        finally:
            self.release()
        return written.data

    def remade(
        self, start: int, stop: int, short: "torch.dtype | None" = None
    ) -> tuple["torch.Tensor", memoryview]:
        """The sums of rows `start:stop` and the bytes written for them, in this worker's buffers.
        With `short`, updates are rounded to that dtype before they are added.

        Raises:
            CheckFailedError: as `round`.
        """
        sums = self._sum(self.read(start, stop), start, stop, short)
        return sums, self.round(sums, lambda: self.read(start, stop)).data

    def release(self) -> None:
        """Lets go of factors after one tile."""
        for one in self._shared:
            one.release()

    def _sum(
        self, stored: "torch.Tensor", start: int, stop: int, short: "torch.dtype | None" = None
    ) -> "torch.Tensor":
        """Rows `start:stop` of base + updates; in place where the dtype allows it."""
        if self.device.type != "cpu":
            sums = stored.to(self.device, self.sums)
        elif self.stored == self.sums:
            sums = stored
        else:
            sums = _buffers.get("sums", stop - start, self.columns, self.sums).tensor
            sums.copy_(stored)
        for one in self._shared:
            if met := one.meet(start, stop):
                _, stack = one.get(self.device, self.sums)
                into = sums[met[0]]
                if short is not None:
                    update = _buffers.get("update", len(into), self.columns, self.sums).tensor
                    into = update.zero_().to(sums.device)
                stack.add_rows_(into, met[1], weight=one.update.weight)
                if short is not None:
                    sums[met[0]] += into.to(short)
        return sums

    def _samples(self, groups: int) -> dict[int, list[slice]]:
        """Tile -> the rows in it that are checked: a run of rows from each of `groups` equal parts
        of the tensor, so that no block of an update goes unseen; its place differs from part to
        part."""
        samples: dict[int, list[slice]] = {}
        height = self.rows / groups
        count = max(1, round(height / CHECKED_SHARE))
        for group in range(groups):
            place = (group * 0.6180339887498949) % 1.0
            row = int(height * group + place * max(height - count, 0))
            tile = row // self.tile_rows
            start = row - tile * self.tile_rows
            first, last = self.span(tile)
            samples.setdefault(tile, []).append(slice(start, min(start + count, last - first)))
        return samples

    def _check_rows(self, before: "torch.Tensor", written: "torch.Tensor", start: int) -> None:
        """Compares checked rows (from row `start` of the tensor) with base + delta, in `checks`."""
        from gralora_convert.delta import Addend, compare

        stop = start + len(before)
        addends = [
            Addend(
                one.get(self.device, self.sums)[0], *met, one.update.transposed, one.update.weight
            )
            for one in self._shared
            if (met := one.meet(start, stop))
        ]
        # what rounding the decoded codes themselves loses is no loss of the update
        origin = None if self.spec.scale is None else before.to(self.written).to(self.checks)
        found = compare(
            before, written.to(self.checks), addends, dtype=self.written, quick=True, origin=origin
        )
        with self._lock:
            self.worst = max(self.worst, found.worst)
            self._kept[start] = found.survival


def are_finite(data: memoryview, dtype: str) -> bool:
    """Whether the values of a floating dtype of 16 bits or more, given by their bytes, are finite:
    many times faster than torch.isfinite.

    >>> are_finite(memoryview(bytes.fromhex("803f 807f")), "BF16")  # 1 and infinity
    False
    """
    return largest_magnitude(data, DTYPE_BITS[dtype] // 8) < INFINITY[dtype]
