"""What the bits of floating-point numbers say without being decoded: numpy only, no torch."""

__all__ = ["INFINITY", "largest_magnitude"]

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
