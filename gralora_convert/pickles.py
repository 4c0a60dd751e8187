"""`torch.save` files as tensor files: read without torch, and without running anything in them.

A file of `torch.save` (torch >= 1.6) is an uncompressed zip: `data.pkl` names the tensors, one
entry per storage holds raw bytes. The unpickler below knows dictionaries and tensors only, so
every tensor becomes a place in the file, like one of a safetensors file.
Layout after torch 2.13: `_save` of torch/serialization.py, `_rebuild_tensor_v2` of torch/_utils.py.
"""

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_convert.errors import printable
from gralora_convert.tensors import (
    DTYPE_BITS,
    DTYPE_OF_TORCH,
    TensorFile,
    TensorFileError,
    TensorSpec,
    are_sizes,
    file_stamp,
    open_regular,
    refuse_pointer,
)

__all__ = ["read_pickle"]

MAX_PICKLE_BYTES = 64 * 1024 * 1024
_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_RESAVE = "Save it again as safetensors: `safetensors.torch.save_file(tensors, path)`."


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numel: int


class _Tensor:
    """A tensor as the pickle describes it; nothing in it is trusted yet."""

    def __init__(self, storage: object, offset: object, shape: object, strides: object) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def __setstate__(self, state: object) -> None:
        """Attributes that a pickle would set are dropped."""


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object, *_: object
) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: object, offset: object, shape: object, strides: object, *rest: object
) -> _Tensor:
    match storage, rest:  # an untyped storage; the dtype stands beside it (float8 and the like)
        case _Storage(key=key, numel=numel), (_, _, _TypedStorage(dtype=dtype), *_):
            return _Tensor(_Storage(dtype, key, numel), offset, shape, strides)
    raise pickle.UnpicklingError("a tensor is not described as torch.save does")


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


class _TypedStorage:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class _TensorUnpickler(pickle.Unpickler):
    """Understands `dict`, `OrderedDict`, numbers, strings and tensors; refuses every other name."""

    def find_class(self, module: str, name: str) -> object:
        match module, name:
            case "collections", "OrderedDict":
                return OrderedDict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return _rebuild_tensor
            case "torch._utils", "_rebuild_tensor_v3":
                return _rebuild_tensor_v3
            case "torch._utils", "_rebuild_parameter":
                return _rebuild_parameter
            case "torch", "Size":
                return tuple
            case "torch" | "torch.storage", _ if name in _STORAGES:
                return _TypedStorage(_STORAGES[name])
            case "torch", _ if name in DTYPE_OF_TORCH:
                return _TypedStorage(DTYPE_OF_TORCH[name])
            case "torch.storage", "UntypedStorage":
                return _TypedStorage("U8")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", _TypedStorage(dtype=dtype), str(key), _, int(numel)) if numel >= 0:
                return _Storage(dtype, key, numel)
        raise pickle.UnpicklingError("it refers to something that is no storage")


def read_pickle(path: Path) -> TensorFile:
    """The tensors of a `torch.save` file that holds a plain dictionary of tensors.

    Raises:
        UnreadableError: missing, not a regular file.
        TensorFileError: not such a file; `reason` tells an unsafe pickle, a nested dictionary and
            the format before torch 1.6 from damage.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        start = file.read(128)
        refuse_pointer(start, path)
        if not start.startswith(b"PK\x03\x04"):
            legacy = start.startswith((b"\x80\x02\x8a\x0a\x6c\xfc\x9c", b"\x80"))
            raise TensorFileError(
                "is a pickle of torch before 1.6" if legacy else "is not a file of torch.save",
                where=path,
                hint=_RESAVE,
                reason="legacy-pickle" if legacy else "unreadable",
            )
        try:
            with zipfile.ZipFile(file) as archive:
                description, storages = _entries(archive, path)
                tensors = _unpickle(description, path)
                places = {key: _data_start(file.fileno(), info) for key, info in storages.items()}
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
            raise TensorFileError(f"is a damaged zip archive: {error}", where=path) from error
    specs = {name: _place(name, tensor, places, storages, path) for name, tensor in tensors.items()}
    return TensorFile(path, specs, None, True, file_stamp(status))


def _entries(archive: zipfile.ZipFile, path: Path) -> tuple[bytes, dict[str, zipfile.ZipInfo]]:
    """The bytes of `data.pkl`, and the archive's entry of each storage."""
    infos = archive.infolist()
    pickles = [info for info in infos if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise TensorFileError("is not a file of torch.save: no single data.pkl", where=path)
    prefix = pickles[0].filename.removesuffix("data.pkl")
    for info in infos:
        if info.filename == f"{prefix}byteorder" and archive.read(info) != b"little":
            raise TensorFileError("holds big-endian tensors", where=path, hint=_RESAVE)
        if info.compress_type != zipfile.ZIP_STORED:
            raise TensorFileError("is compressed, which torch.save never does", where=path)
    data = f"{prefix}data/"
    return archive.read(pickles[0]), {
        info.filename.removeprefix(data): info for info in infos if info.filename.startswith(data)
    }


def _unpickle(description: bytes, path: Path) -> dict[str, _Tensor]:
    try:
        value = _TensorUnpickler(io.BytesIO(description)).load()
    except pickle.UnpicklingError as error:
        raise TensorFileError(
            f"is a pickle that holds more than tensors: {printable(error)}; it was not run",
            where=path,
            hint=_RESAVE,
            reason="unsafe-pickle",
        ) from error
    except (
        AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError, OverflowError,
        RecursionError, TypeError, ValueError,
    ) as error:  # what the pickle machine raises on damaged opcodes  # fmt: skip
        raise TensorFileError(f"is a damaged pickle: {error!r}", where=path) from error
    if not isinstance(value, dict):
        raise TensorFileError(
            f"holds a {type(value).__name__}, a dictionary of tensors was needed",
            where=path,
            hint=_RESAVE,
            reason="nested",
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise TensorFileError(
                f"the entry {name!r} is a {type(tensor).__name__.lstrip('_')}, a tensor was needed",
                where=path,
                hint="Save the inner dictionary of tensors alone.",
                reason="nested",
            )
    return value


def _data_start(descriptor: int, info: zipfile.ZipInfo) -> int:
    """The position of an entry's bytes: after its local header, whose length may differ from the
    central one (torch pads it for alignment)."""
    local = os.pread(descriptor, 30, info.header_offset)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename!r}")
    name, extra = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    return info.header_offset + 30 + name + extra


def _place(
    name: str,
    tensor: _Tensor,
    places: Mapping[str, int],
    storages: Mapping[str, zipfile.ZipInfo],
    path: Path,
) -> TensorSpec:
    storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
    if (
        not isinstance(storage, _Storage)
        or storage.key not in places
        or not isinstance(offset, int)
        or not are_sizes(shape)
        or not are_sizes(strides)
        or len(shape) != len(strides)
    ):
        raise TensorFileError(f"tensor {name!r} is not described as torch.save does", where=path)
    size = DTYPE_BITS[storage.dtype] // 8
    numel = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if numel else 0
    if offset < 0 or (numel and (last + 1) * size > storages[storage.key].file_size):
        raise TensorFileError(f"tensor {name!r} reaches beyond its storage", where=path)
    if numel > max(storages[storage.key].file_size, 1):
        raise TensorFileError(f"tensor {name!r} repeats its storage (expanded view)", where=path)
    return TensorSpec(
        name,
        storage.dtype,
        tuple(shape),
        path,
        places[storage.key] + offset * size,
        numel * size,
        None if _is_contiguous(shape, strides) else tuple(strides),
    )


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= n
    return True
