"""One tensor file: which tensors it holds and where their bytes lie. No values, no torch.

Safetensors headers are checked as strictly as the official reader does (format of safetensors
0.8.0, README "Format"): every length and offset before it is used, no holes, no overlaps.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_convert.disk.files import file_stamp, open_regular, pread_exact, reading
from gralora_convert.disk.pickles import read_pickle
from gralora_convert.disk.specs import (
    DTYPE_BITS,
    MAX_DIMENSIONS,
    TORCH_NAMES,
    WORD,
    TensorFile,
    TensorFileError,
    TensorSpec,
    are_sizes,
    count,
    refuse_pointer,
)
from gralora_convert.disk.strictjson import parse_json
from gralora_convert.errors import ChangedInputError, UnreadableError, UnsupportedError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the cap of the official reader
MAX_TENSORS = 250_000  # of one file; the largest public models have 100 000 in all their files


def read_tensor_file(path: Path) -> TensorFile:
    """The tensors of a `.safetensors` file or of a pickled `.bin` / `.pt` / `.pth` file.

    Nothing of a pickle is executed: only tensors in plain dictionaries are understood.

    Raises:
        UnreadableError: missing, not a regular file.
        TensorFileError: not what it claims to be.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
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


def _require_holdable(spec: TensorSpec) -> None:
    """Refuses what a header may state of an empty tensor, and no array can have."""
    if len(spec.shape) > MAX_DIMENSIONS or (count([n or 1 for n in spec.shape]) or WORD) >= 2**60:
        raise UnsupportedError(
            f"tensor {spec.name!r} has shape {spec.shape}, which no array can have", where=spec.file
        )


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's dtype for a safetensors spelling; `UnsupportedError` when it has none."""
    import torch

    if dtype not in TORCH_NAMES:
        raise UnsupportedError(f"dtype {dtype} has no counterpart in torch")
    found = getattr(torch, TORCH_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found


def read_rows(spec: TensorSpec, start: int, stop: int) -> "torch.Tensor":
    """Rows `start:stop` of a tensor, in the dtype that it is read as; only they are read."""
    import torch

    if spec.scale is not None:
        return _decoded(spec, start, stop)
    _require_holdable(spec)
    dtype, shape = torch_dtype(spec.dtype), (stop - start, *spec.shape[1:])[: len(spec.shape)]
    size = spec.nbytes // max(1, math.prod(spec.shape[:1]))
    data = read_bytes(spec, start * size, stop * size)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


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


def read_torch(spec: TensorSpec) -> "torch.Tensor":
    """The tensor itself, in the dtype that it is read as, in memory of its own."""
    return read_rows(spec, 0, spec.shape[0] if spec.shape else 1)


def _decoded(spec: TensorSpec, start: int, stop: int) -> "torch.Tensor":
    """Rows `start:stop` of a matrix of fp8 codes with scales, in float32."""
    import torch

    shape, width = (stop - start, spec.shape[1]), spec.shape[1]
    data = read_bytes(spec, start * width, stop * width)
    codes = torch.frombuffer(data, dtype=torch.int8) if data else torch.empty(0, dtype=torch.int8)
    values = torch.empty(shape, dtype=torch.float32)
    decode(codes.view(shape), values, torch.empty(shape, dtype=torch.int16))
    apply_scales(values, spec, start)
    return values


def decode(codes: "torch.Tensor", values: "torch.Tensor", halves: "torch.Tensor") -> None:
    """Writes 1/256 of the values of float8_e4m3fn `codes` (int8) into `values` (float32), through
    `halves` (int16); all of one shape. NaN for the two codes of NaN.

    A code has 4 bits of exponent (bias 7) and 3 of mantissa; the same bits in the place that they
    have in a float16 (bias 15) mean 2^-8 of it. torch's own conversion takes several times longer.

    >>> import torch
    >>> values, code = torch.empty(2), torch.tensor([1.5, -448.0]).to(torch.float8_e4m3fn)
    >>> decode(code.view(torch.int8), values, torch.empty(2, dtype=torch.int16))
    >>> values * 256
    tensor([   1.5000, -448.0000])

    OCP 8-bit Floating Point Specification 1.0, section 5.
    """
    import torch

    halves.copy_(codes)  # the sign in the upper 9 bits
    halves.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values.copy_(halves.view(torch.float16))
    if codes.numel() and (int(codes.max()) == 127 or int(codes.view(torch.uint8).max()) == 255):
        values[(codes & 0x7F) == 0x7F] = float("nan")


def apply_scales(values: "torch.Tensor", spec: TensorSpec, start: int) -> None:
    """Multiplies `values` (float32, as `decode` writes them), rows of `spec` from `start` on, by
    256 times their scales; a row of scales at a time is laid out over the columns.

    Raises:
        UnreadableError: a scale that is no finite number.
    """
    scale = spec.scale
    assert scale is not None
    if not values.numel():
        return
    stop = start + len(values)
    first, last = start // scale.rows, -(-stop // scale.rows)
    whole = scale.spec.numel == 1
    held = read_torch(scale.spec) if whole else read_rows(scale.spec, first, last)
    grid = held.float().reshape(1 if whole else last - first, -1)
    if not bool(grid.isfinite().all()):
        raise UnreadableError(
            "a scale that is NaN or infinite", where=f"{scale.spec.file}: {scale.spec.name}",
            hint="Is the file damaged? Copy or download it again.",
        )  # fmt: skip
    grid = grid * 256
    if grid.shape[1] > 1:
        grid = grid.repeat_interleave(scale.columns, 1)[:, : values.shape[1]]
    if scale.rows == 1:
        values.mul_(grid)
        return
    for block, row in enumerate(grid, start=first):
        begin, end = max(block * scale.rows, start), min((block + 1) * scale.rows, stop)
        values[begin - start : end - start].mul_(row)
