"""The memory of workers: what each uses again and again, and the factors that they share."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from gralora_convert.adapters import Update
from gralora_convert.disk import TensorSpec, bytes_of, open_regular, pread_exact, read_into

if TYPE_CHECKING:
    import torch

    from gralora_convert.delta import Gralora, Lora, Stack


class Buffer(NamedTuple):
    """A matrix in memory that is used again, and its bytes."""

    tensor: "torch.Tensor"
    data: memoryview


class Buffers(threading.local):
    """Each worker's own memory, by purpose, which only grows, and the file that it reads.

    Views are kept, too: whoever makes one lets go of Python's lock, and other workers wake for it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int, int], Buffer] = {}
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def read(self, spec: TensorSpec, start: int, buffer: memoryview) -> None:
        """As `read_into`, but the file stays open for the next tile."""
        if spec.strides is not None:
            read_into(spec, start, buffer)
            return
        if self._file is None or self._path != spec.file:
            self._file, self._path = open_regular(spec.file), spec.file
        pread_exact(self._file.fileno(), buffer, spec.offset + start, spec.file)

    def get(self, purpose: str, rows: int, columns: int, dtype: "torch.dtype") -> Buffer:
        import torch

        key = (purpose, dtype, rows, columns)
        found = self._views.get(key)
        if found is not None:
            return found
        count = rows * columns
        memory = self._memory.get((purpose, dtype))
        if memory is None or memory.numel() < count:
            memory = self._memory[purpose, dtype] = torch.empty(count, dtype=dtype)
            self._views = {k: v for k, v in self._views.items() if k[:2] != (purpose, dtype)}
        tensor = memory[:count].view(rows, columns)
        found = self._views[key] = Buffer(tensor, bytes_of(tensor))
        return found


class Shared:
    """An update with its factors, as they are and laid out for adding: read at its first use and
    dropped after its last."""

    def __init__(self, update: Update, uses: int) -> None:
        self.update, self.rows, self._uses = update, update.in_order, uses
        self._value: tuple[Gralora | Lora, Stack] | None = None
        self._lock = threading.Lock()

    def get(self, device: "torch.device", dtype: "torch.dtype") -> "tuple[Gralora | Lora, Stack]":
        from gralora_convert.delta import Stack

        with self._lock:
            if self._value is None:
                delta = self.update.delta(str(device))
                stack = Stack(delta, dtype, transposed=self.update.transposed)
                self._value = delta, stack
            return self._value

    def meet(self, start: int, stop: int) -> tuple[slice, int] | None:
        """Which of the rows `start:stop` of the tensor it adds to, counted from `start`, and the
        first row of its delta there."""
        met = self.rows.meet(start, stop)
        if met is None:
            return None
        assert isinstance(met[1], slice)  # in order
        return met[0], met[1].start

    def release(self) -> None:
        with self._lock:
            self._uses -= 1
            if self._uses == 0:
                self._value = None
