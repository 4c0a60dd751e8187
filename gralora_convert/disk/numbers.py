"""What the bits of floating-point numbers say without being decoded: numpy only, no torch."""

from typing import TYPE_CHECKING

from gralora_convert.disk.specs import DTYPE_BITS, FLOATING, TensorSpec
from gralora_convert.disk.tensors import read_bytes, read_into

if TYPE_CHECKING:
    import numpy

INFINITY = {  # its bits, by the dtype's name in safetensors; whatever lies above is NaN
    "F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80,
}  # fmt: skip


def largest_magnitude(data: memoryview | bytes, width: int) -> int:
    """The bits, without sign, of the largest magnitude among numbers of `width` bytes; 0 of none.

    Magnitudes are in the order of their bits, read as whole numbers: infinity comes after what is
    finite, NaN after infinity. Two passes and no copy: as signed numbers the positive ones lie
    above all others, as unsigned ones the negative.

    >>> hex(largest_magnitude(bytes.fromhex("803f 80bf 0000"), 2))  # bfloat16: 1, -1, 0
    '0x3f80'

    IEEE 754 binary formats.
    """
    import numpy

    if not len(data):
        return 0
    positive = int(numpy.frombuffer(data, f"<i{width}").max())
    negative = int(numpy.frombuffer(data, f"<u{width}").max()) - (1 << 8 * width - 1)
    return max(positive, negative, 0)


CHUNK_BYTES = 8 * 1024 * 1024


def look(spec: TensorSpec) -> tuple[bool, bool]:
    """Whether all values are finite, and whether all are zero; a few MiB in memory at a time."""
    width = DTYPE_BITS[spec.dtype] // 8
    buffer = bytearray(min(CHUNK_BYTES, spec.nbytes))
    zero = True
    for start in range(0, spec.nbytes, CHUNK_BYTES):
        part = memoryview(buffer)[: min(CHUNK_BYTES, spec.nbytes - start)]
        read_into(spec, start, part)
        largest = largest_magnitude(part, width)
        if largest >= INFINITY[spec.dtype]:
            return False, False
        zero = zero and largest == 0
    return True, bool(zero)


COMPARED_ELEMENTS = 512 * 1024  # of two tensors, at a time


def is_zero(spec: TensorSpec) -> bool:
    """Whether every value is (positive) zero."""
    for start in range(0, spec.numel, COMPARED_ELEMENTS):
        held = element_bytes(spec, start, min(start + COMPARED_ELEMENTS, spec.numel))
        if held.count(0) != len(held):
            return False
    return True


def same_values(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors hold the same numbers; NaN equals itself. Dtypes may differ, a few MiB
    are in memory at a time."""
    import numpy

    if one.shape != other.shape:
        return False
    exact = one.dtype == other.dtype or not {one.dtype, other.dtype} <= FLOATING
    if exact and one.dtype != other.dtype:
        return False
    for start in range(0, one.numel, COMPARED_ELEMENTS):
        stop = min(start + COMPARED_ELEMENTS, one.numel)
        if exact:
            if element_bytes(one, start, stop) != element_bytes(other, start, stop):
                return False
        elif not numpy.array_equal(_wide(one, start, stop), _wide(other, start, stop)):
            return False
    return True


def element_bytes(spec: TensorSpec, start: int, stop: int) -> bytearray:
    """The bytes of elements `start:stop`, whole ones: of packed elements, even places."""
    bits = DTYPE_BITS[spec.dtype]
    return read_bytes(spec, start * bits // 8, stop * bits // 8)


def _wide(spec: TensorSpec, start: int, stop: int) -> "numpy.ndarray":
    """Elements `start:stop` of a floating tensor in float64."""
    import numpy

    data = element_bytes(spec, start, stop)
    if spec.dtype == "BF16":
        bits = numpy.frombuffer(data, "<u2").astype("<u4") << 16
        return bits.view("<f4").astype("f8")
    return numpy.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[spec.dtype]).astype(
        "f8"
    )
