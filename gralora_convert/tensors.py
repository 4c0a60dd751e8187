"""One tensor file: which tensors it holds and where their bytes lie. No values, no torch.

Safetensors headers are checked as strictly as the official reader does (format of safetensors
0.8.0, README "Format"): every length and offset before it is used, no holes, no overlaps.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from gralora_convert.errors import (
    ChangedInputError,
    MisuseError,
    UnreadableError,
    UnsupportedError,
)
from gralora_convert.files import (
    Stamp,
    file_stamp,
    open_regular,
    pread_exact,
    reading,
    require_stamp,
)
from gralora_convert.strictjson import parse_json

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = [
    "DTYPE_BITS",
    "TensorFile",
    "TensorFileError",
    "TensorSpec",
    "bytes_of",
    "encode_header",
    "nbytes_of",
    "open_regular",
    "read_array",
    "read_bytes",
    "read_into",
    "read_rows",
    "read_safetensors",
    "read_tensor_file",
    "read_torch",
    "written_dtype",
]

# Bits per element, in the spelling of safetensors 0.8.0 (`Dtype`).
DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})
WRITTEN: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WORD = 2**64
MAX_DIMENSIONS = 64  # of numpy 2
MAX_HEADER_BYTES = 100_000_000  # the cap of the official reader
MAX_TENSORS = 250_000  # of one file; the largest public models have 100 000 in all their files
_TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPE_OF_TORCH: Mapping[str, str] = {name: dtype for dtype, name in _TORCH_NAMES.items()}
_NUMPY_NAMES: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip


class TensorFileError(UnreadableError):
    """Not a readable tensor file; `reason` is one of unreadable, lfs-pointer, unsafe-pickle,
    nested, legacy-pickle."""

    def __init__(
        self, message: str, *, where: object = "", hint: str = "", reason: str = "unreadable"
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor inside a file: its dtype and shape, and where its bytes are; no bytes.

    `strides` (in elements) is set only for a tensor of a `.bin` file that is a view whose elements
    do not lie in order; `offset` is then that of its first element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What one tensor file holds. `stamp` tells later whether the file has changed since."""

    path: Path
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str] | None
    pickled: bool
    stamp: Stamp

    def require_unchanged(self) -> None:
        """Raises `ChangedInputError` when the file is not the one whose header was read."""
        require_stamp(self.path, self.stamp)


def read_tensor_file(path: Path) -> TensorFile:
    """The tensors of a `.safetensors` file or of a pickled `.bin` / `.pt` / `.pth` file.

    Nothing of a pickle is executed: only tensors in plain dictionaries are understood.

    Raises:
        UnreadableError: missing, not a regular file.
        TensorFileError: not what it claims to be.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    from gralora_convert.pickles import read_pickle

    return read_pickle(path)


def read_safetensors(path: Path) -> TensorFile:
    """The header of a safetensors file.

    Raises:
        UnreadableError: missing, not a regular file.
        TensorFileError: lengths, offsets, dtypes or shapes that do not agree with the file.
    """
    with open_regular(path) as file, reading(path):
        status = os.fstat(file.fileno())
        start = file.read(8)
        length = int.from_bytes(start, "little")
        refuse_pointer(start + file.read(120), path)
        if len(start) < 8 or length > min(status.st_size - 8, MAX_HEADER_BYTES):
            raise TensorFileError(
                f"is no safetensors file: it claims a header of {length} bytes in a file of "
                f"{status.st_size}",
                where=path,
                hint="Is it complete? Copy or download it again.",
            )
        file.seek(8)
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise TensorFileError("is no safetensors file: the header is not JSON", where=path)
    if raw.count(b"{") > MAX_TENSORS + 2 or raw.count(b"[") > 2 * MAX_TENSORS:
        raise TensorFileError(f"describes more than {MAX_TENSORS} tensors", where=path)
    header = parse_json(raw, where=path)
    metadata = _metadata(header.pop("__metadata__", None), path)
    data_start = 8 + length
    specs = [_spec(name, info, path, data_start) for name, info in header.items()]
    _require_cover(specs, path, data_start, status.st_size)
    return TensorFile(path, {s.name: s for s in specs}, metadata, False, file_stamp(status))


def refuse_pointer(start: bytes, path: Path) -> None:
    """Raises `TensorFileError` when the file is what git leaves in place of a large file."""
    if start.startswith(b"version https://git-lfs"):
        raise TensorFileError(
            "is a git-lfs pointer, not the weights",
            where=path,
            hint="Fetch the file itself: `git lfs pull`.",
            reason="lfs-pointer",
        )


def _metadata(value: object, path: Path) -> Mapping[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise TensorFileError("__metadata__ of the header must map strings to strings", where=path)
    return value


def _spec(name: str, info: object, path: Path, data_start: int) -> TensorSpec:
    def wrong(what: str) -> TensorFileError:
        return TensorFileError(f"tensor {name!r}: {what}", where=path)

    if not isinstance(info, dict):
        raise wrong("its header entry is no object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise wrong(f"unknown dtype {dtype!r}")
    if not are_sizes(shape):
        raise wrong(f"shape {shape!r} is not a list of sizes")
    if not are_sizes(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets {offsets!r} are not two positions")
    bits = count((*shape, DTYPE_BITS[dtype]))
    if bits is None:
        raise wrong(f"shape {shape} is larger than any memory")
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        needed = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, no whole bytes"
        raise wrong(f"{dtype} of shape {shape} needs {needed}, its offsets span {end - begin}")
    return TensorSpec(name, dtype, tuple(shape), path, data_start + begin, bits // 8)


def are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    """Whether `value` is a list or tuple of numbers that can be sizes; JSON's `true` is none."""
    return isinstance(value, (list, tuple)) and all(
        type(v) is int and 0 <= v < _WORD for v in value
    )


def count(sizes: Sequence[int]) -> int | None:
    """The product of the sizes, or None as soon as it exceeds 64 bits, as the official reader
    computes it: in order, so that a zero hides only what comes after it."""
    product = 1
    for size in sizes:
        product *= size
        if product >= _WORD:
            return None
    return product


def _require_cover(specs: list[TensorSpec], path: Path, position: int, size: int) -> None:
    for spec in sorted(specs, key=lambda s: (s.offset, s.nbytes)):
        if spec.offset != position:
            what = "overlaps the one before it" if spec.offset < position else "leaves a hole"
            raise TensorFileError(f"tensor {spec.name!r} {what} in the file", where=path)
        position += spec.nbytes
    if position != size:
        raise TensorFileError(
            f"is incomplete or padded: its header describes {position} bytes, the file has {size}",
            where=path,
            hint="Copy or download it again.",
        )


def encode_header(
    tensors: list[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """The header of a safetensors file whose data holds `tensors` (name, dtype, shape, nbytes) in
    this order, padded to 8 bytes as the official writer does."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, nbytes in tensors:
        assert name not in header, name
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_bytes(spec: TensorSpec, start: int = 0, stop: int | None = None) -> bytearray:
    """The bytes `start:stop` of the tensor, in the order of its elements, little endian."""
    stop = spec.nbytes if stop is None else stop
    data = bytearray(stop - start)
    read_into(spec, start, memoryview(data))
    return data


def read_into(spec: TensorSpec, start: int, buffer: memoryview) -> None:
    """Fills `buffer` with the bytes of the tensor from `start` on; see `read_bytes`."""
    with open_regular(spec.file) as file:
        if spec.strides is None:
            pread_exact(file.fileno(), buffer, spec.offset + start, spec.file)
        elif len(buffer):
            _gather(spec, spec.strides, file.fileno(), start, buffer)


def _gather(
    spec: TensorSpec, strides: tuple[int, ...], descriptor: int, start: int, buffer: memoryview
) -> None:
    """Fills `buffer` from a tensor whose elements do not lie in order, through a mapping of the
    file: what is needed may lie anywhere in it."""
    import numpy

    size = DTYPE_BITS[spec.dtype] // 8
    last = sum((n - 1) * stride for n, stride in zip(spec.shape, strides, strict=True))
    if os.fstat(descriptor).st_size < spec.offset + (last + 1) * size:  # a mapping would crash
        raise ChangedInputError("became shorter while it was read", where=spec.file)
    with reading(spec.file), mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        view: numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.unsignedinteger]] = numpy.ndarray(
            spec.shape, f"<u{size}", mapped, spec.offset, [stride * size for stride in strides]
        )
        first, stop = start // size, -(-(start + len(buffer)) // size)
        data = view.flat[first:stop].tobytes()
        del view  # or the mapping cannot be closed
    skip = start - first * size
    buffer[:] = data[skip : skip + len(buffer)]


def read_array(spec: TensorSpec) -> "numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.generic]]":
    """The tensor's values in numpy, shape `spec.shape`; BF16 comes widened to float32.

    Raises:
        UnsupportedError: a dtype that numpy has not (float8 and smaller), or an absurd shape.
    """
    import numpy

    _require_holdable(spec)
    data = read_bytes(spec)
    if spec.dtype == "BF16":
        wide = numpy.frombuffer(data, "<u2").astype("<u4") << numpy.uint32(16)
        return wide.view("<f4").reshape(spec.shape)
    if spec.dtype not in _NUMPY_NAMES:
        raise UnsupportedError(
            f"tensor {spec.name!r} has dtype {spec.dtype}, which numpy cannot hold", where=spec.file
        )
    return numpy.frombuffer(data, _NUMPY_NAMES[spec.dtype]).reshape(spec.shape)


def _require_holdable(spec: TensorSpec) -> None:
    """Refuses what a header may state of an empty tensor, and no array can have."""
    if len(spec.shape) > MAX_DIMENSIONS or (count([n or 1 for n in spec.shape]) or _WORD) >= 2**60:
        raise UnsupportedError(
            f"tensor {spec.name!r} has shape {spec.shape}, which no array can have", where=spec.file
        )


def written_dtype(name: str, kept: str) -> str:
    """The safetensors spelling of a dtype that a user names; `kept` for `keep`.

    Raises:
        MisuseError: `name` is neither `keep` nor one of the dtypes that are written.

    >>> written_dtype("bfloat16", "F32"), written_dtype("keep", "F32")
    ('BF16', 'F32')
    """
    if not isinstance(name, str) or name not in ("keep", *WRITTEN):
        raise MisuseError(f"dtype {name!r} is none of keep, {', '.join(WRITTEN)}")
    return WRITTEN.get(name, kept)


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's dtype for a safetensors spelling; `UnsupportedError` when it has none."""
    import torch

    if dtype not in _TORCH_NAMES:
        raise UnsupportedError(f"dtype {dtype} has no counterpart in torch")
    found = getattr(torch, _TORCH_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


def read_rows(spec: TensorSpec, start: int, stop: int) -> "torch.Tensor":
    """Rows `start:stop` of a tensor, in its own dtype; only they are read."""
    import torch

    if (start, stop) == (0, spec.shape[0] if spec.shape else 1) or not spec.numel:
        return read_torch(spec)
    _require_holdable(spec)
    size = spec.nbytes // spec.shape[0]
    data = read_bytes(spec, start * size, stop * size)
    return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).reshape(-1, *spec.shape[1:])


def bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a tensor in the order of its elements: its own memory where it is contiguous
    and on the CPU, else a copy of it.

    >>> import torch
    >>> bytes(bytes_of(torch.tensor([1, 2], dtype=torch.int16)))
    b'\\x01\\x00\\x02\\x00'
    """
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B")


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `dtype` (in the spelling of safetensors) and `shape`.

    >>> nbytes_of("BF16", (3, 2))
    12
    """
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def read_torch(spec: TensorSpec) -> "torch.Tensor":
    """The tensor itself, in its own dtype, in memory of its own."""
    import torch

    _require_holdable(spec)
    dtype = torch_dtype(spec.dtype)
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(read_bytes(spec), dtype=dtype).reshape(spec.shape)
