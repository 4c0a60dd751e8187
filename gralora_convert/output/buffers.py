"""The memory of workers, which is used again and again."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from gralora_convert.disk import TensorSpec, bytes_of, open_regular, pread_exact, read_into

if TYPE_CHECKING:
    import torch


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
