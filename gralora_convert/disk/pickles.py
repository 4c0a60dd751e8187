"""`torch.save` files as tensor files: read without torch, and without running anything in them.

A file of `torch.save` (torch >= 1.6) is an uncompressed zip: `data.pkl` names the tensors, one
entry per storage holds raw bytes. What `data.pkl` says is worked out by `unpickling.py`; here every
tensor becomes a place in the file, like one of a safetensors file.
Layout after torch 2.13, `_save` of torch/serialization.py.
"""

import io
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from gralora_convert.disk.files import file_stamp, open_regular, reading
from gralora_convert.disk.specs import (
    DTYPE_BITS,
    MAX_DIMENSIONS,
    TensorFile,
    TensorFileError,
    TensorSpec,
    are_sizes,
    count,
    refuse_pointer,
)
from gralora_convert.disk.unpickling import RESAVE, PickledTensor, unpickle

MAX_PICKLE_BYTES = 16 * 1024 * 1024  # some 80 000 tensors
_Storages = Mapping[str, tuple[int, int]]  # key -> position in the file, bytes


def read_pickle(path: Path) -> TensorFile:
    """The tensors of a `torch.save` file that holds a plain dictionary of tensors.

    Raises:
        UnreadableError: missing, not a regular file.
        TensorFileError: not such a file; `reason` tells an unsafe pickle, a nested dictionary and
            the format before torch 1.6 from damage.
    """
    with open_regular(path) as file, reading(path):
        status = os.fstat(file.fileno())
        start = file.read(128)
        refuse_pointer(start, path)
        if not start.startswith(b"PK\x03\x04"):
            legacy = start.startswith(b"\x80")  # the pickle protocol; then a magic number of torch
            raise TensorFileError(
                "is a pickle of torch before 1.6" if legacy else "is not a file of torch.save",
                where=path,
                hint=RESAVE,
                reason="legacy-pickle" if legacy else "unreadable",
            )
        try:
            with zipfile.ZipFile(_Bounded(file)) as archive:
                description, entries = _entries(archive, path)
                storages = _places(file.fileno(), entries, status.st_size)
        except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:
            raise TensorFileError(f"is a damaged zip archive: {error}", where=path) from error
    tensors = _unpickle(description, path)
    specs = {name: _spec(name, tensor, storages, path) for name, tensor in tensors.items()}
    return TensorFile(path, specs, None, True, file_stamp(status))


class _Bounded(io.BufferedReader):
    """A file of which no long part is read at once: `zipfile` takes the directory as one, whatever
    length the archive claims for it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(io.FileIO(file.fileno(), closefd=False))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return super().read(size)


def _entries(archive: zipfile.ZipFile, path: Path) -> tuple[bytes, dict[str, zipfile.ZipInfo]]:
    """The bytes of `data.pkl`, and the archive's entry of each storage."""
    infos = {info.filename: info for info in archive.infolist()}
    if len(infos) < len(archive.infolist()):
        raise TensorFileError("is a zip archive that holds one name twice", where=path)
    for info in infos.values():
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise TensorFileError(
                "is compressed or encrypted, which torch.save never does", where=path, hint=RESAVE
            )
    pickles = [info for name, info in infos.items() if name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise TensorFileError("is not a file of torch.save: no single data.pkl", where=path)
    prefix = pickles[0].filename.removesuffix("data.pkl")
    order = infos.get(f"{prefix}byteorder")
    if order and (order.file_size > 16 or archive.read(order) != b"little"):
        raise TensorFileError("holds big-endian tensors", where=path, hint=RESAVE)
    data = f"{prefix}data/"
    return archive.read(pickles[0]), {
        name.removeprefix(data): info for name, info in infos.items() if name.startswith(data)
    }


def _places(descriptor: int, entries: Mapping[str, zipfile.ZipInfo], size: int) -> _Storages:
    """Where each storage lies in the file of `size` bytes.

    Raises:
        BadZipFile: one lies beyond its end, or two overlap.
    """
    found = {key: (_data_start(descriptor, info), info.file_size) for key, info in entries.items()}
    end = 0
    for start, nbytes in sorted(found.values()):
        if start < end:
            raise zipfile.BadZipFile("two storages overlap")
        end = start + nbytes
    if end > size:
        raise zipfile.BadZipFile("a storage reaches beyond the end of the file")
    return found


def _data_start(descriptor: int, info: zipfile.ZipInfo) -> int:
    """The position of an entry's bytes: after its local header, whose length may differ from the
    central one (torch pads it for alignment)."""
    if not 0 <= info.header_offset < 2**63:
        raise zipfile.BadZipFile(f"an absurd position of {info.filename!r}")
    local = os.pread(descriptor, 30, info.header_offset)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename!r}")
    name, extra = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    return info.header_offset + 30 + name + extra


def _unpickle(description: bytes, path: Path) -> dict[str, PickledTensor]:
    value = unpickle(description, where=path)

    def nested(what: str) -> TensorFileError:
        return TensorFileError(
            what, where=path, hint="Save the dictionary of tensors alone.", reason="nested"
        )

    if not isinstance(value, dict):
        raise nested(f"holds one {_kind(value)}, a dictionary of tensors was needed")
    for name, tensor in value.items():
        if not isinstance(name, str):
            raise nested(f"the key {name!r} is of type {_kind(name)}, a string was needed")
        if not isinstance(tensor, PickledTensor):
            raise nested(f"the entry {name!r} is of type {_kind(tensor)}, a tensor was needed")
    return value


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, PickledTensor) else type(value).__name__.lstrip("_")


def _spec(name: str, tensor: PickledTensor, storages: _Storages, path: Path) -> TensorSpec:
    def wrong(what: str, hint: str = "") -> TensorFileError:
        return TensorFileError(f"tensor {name!r} {what}", where=path, hint=hint)

    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if (
        tensor.storage not in storages
        or not isinstance(offset, int)
        or offset < 0
        or not are_sizes(shape)
        or not are_sizes(strides)
        or len(shape) != len(strides)
        or len(shape) > MAX_DIMENSIONS
    ):
        raise wrong("is not described as torch.save does")
    start, nbytes = storages[tensor.storage]
    size = DTYPE_BITS[tensor.dtype] // 8
    numel = count(shape)
    if numel == 0:
        return TensorSpec(name, tensor.dtype, tuple(shape), path, start, 0)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (last + 1) * size > nbytes:
        raise wrong("reaches beyond its storage")
    if numel is None or numel > nbytes:
        raise wrong("repeats its storage (expanded view)", "Save a contiguous copy of it.")
    return TensorSpec(
        name,
        tensor.dtype,
        tuple(shape),
        path,
        start + offset * size,
        numel * size,
        None if _is_contiguous(shape, strides) else _used(shape, strides),
    )


def _used(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides, without those of single elements, which may be any number."""
    return tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True))


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    wanted = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(
        n == 1 or stride == step for n, stride, step in zip(shape, strides, wanted, strict=True)
    )
