"""What is known of tensors on disk, as values: dtypes, places, parts. Nothing is read here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from gralora_convert.disk.files import Stamp, require_stamp
from gralora_convert.errors import MisuseError, UnreadableError

if TYPE_CHECKING:
    import torch

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
WORD = 2**64
MAX_DIMENSIONS = 64  # of numpy 2
TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPE_OF_TORCH: Mapping[str, str] = {name: dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor inside a file: its dtype and shape, and where its bytes are; no bytes.

    `strides` (in elements) is set only for a tensor of a `.bin` file that is a view whose elements
    do not lie in order; `offset` is then that of its first element. `scale` is set where the bytes
    are read as 8-bit codes of larger numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    scale: "Scale | None" = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def read_as(self) -> str:
        """The dtype that its values are read in."""
        return self.dtype if self.scale is None else "F32"


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of a matrix of codes: the value at (i, j) is the code there times that of `spec`
    at (i // rows, j // columns). The last block of a row or column may be shorter."""

    spec: TensorSpec
    rows: int
    columns: int


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


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `[start, start + count)` of the stored `tensor` hold the rows `[first, ...)` of a matrix
    (a parameter in memory, a delta), or, with `order`, the rows that it lists."""

    tensor: str
    start: int
    count: int
    first: int = 0
    order: tuple[int, ...] | None = None

    @property
    def stop(self) -> int:
        return self.start + self.count

    def meet(self, start: int, stop: int) -> tuple[slice, slice | list[int]] | None:
        """Which of the rows `start:stop` of the tensor are among these, counted from `start`, and
        the rows of the matrix there; None where none are.

        >>> Rows("qkv.weight", start=10, count=6, first=2).meet(8, 12)
        (slice(2, 4, None), slice(2, 4, None))
        """
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return None
        place, begin = slice(first - start, last - start), first - self.start
        if self.order is not None:
            return place, list(self.order[begin : last - self.start])
        return place, slice(begin + self.first, last - self.start + self.first)


def refuse_pointer(start: bytes, path: Path) -> None:
    """Raises `UnreadableError` when the file is what git leaves in place of a large file."""
    if start.startswith(b"version https://git-lfs"):
        raise UnreadableError(
            "is a git-lfs pointer, not the weights",
            where=path,
            hint="Fetch the file itself: `git lfs pull`.",
            reason="lfs-pointer",
        )


def are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    """Whether `value` is a list or tuple of numbers that can be sizes; JSON's `true` is none."""
    return isinstance(value, (list, tuple)) and all(type(v) is int and 0 <= v < WORD for v in value)


def count(sizes: Sequence[int]) -> int | None:
    """The product of the sizes, or None as soon as it exceeds 64 bits, as the official reader
    computes it: in order, so that a zero hides only what comes after it."""
    product = 1
    for size in sizes:
        product *= size
        if product >= WORD:
            return None
    return product


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `dtype` (in the spelling of safetensors) and `shape`.

    >>> nbytes_of("BF16", (3, 2))
    12
    """
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def dtype_name(dtype: "str | torch.dtype") -> str:
    """The name of a dtype that a user gives as text or as torch has it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


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
