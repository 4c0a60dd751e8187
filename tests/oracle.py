"""The slow truth about delta weights: loops in numpy float64, importing nothing of ours."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gralora_delta(
    A: Array,
    B: Array,
    scaling: float,
    general_A: Array | None = None,
    general_B: Array | None = None,
) -> Array:
    """(out, in) from A (k, in/k, r), B (k, r, out/k), general_A (h, in), general_B (out, h)."""
    k, m, r = A.shape
    s, p = r // k, B.shape[2]
    delta = np.zeros((k * p, k * m))
    for j in range(k):
        for n in range(k):
            for o in range(p):
                for i in range(m):
                    for t in range(s):
                        delta[j * p + o, n * m + i] += A[n, i, j * s + t] * B[j, n * s + t, o]
    if general_A is not None and general_B is not None:
        delta += lora_delta(general_A, general_B, 1.0)
    return scaling * delta


def lora_delta(A: Array, B: Array, scaling: float) -> Array:
    """(out, in) from A (l, in), B (out, l)."""
    delta = np.zeros((B.shape[0], A.shape[1]))
    for o in range(B.shape[0]):
        for i in range(A.shape[1]):
            for t in range(A.shape[0]):
                delta[o, i] += B[o, t] * A[t, i]
    return scaling * delta


def tails(matrix: Array, k: int) -> Array:
    """The squared error of the best fit by k*k blocks of rank 0, 1, 2, ... (Eckart-Young)."""
    p, m = matrix.shape[0] // k, matrix.shape[1] // k
    result = np.zeros(min(p, m) + 1)
    for j in range(k):
        for n in range(k):
            block = matrix[j * p : (j + 1) * p, n * m : (n + 1) * m]
            values = np.linalg.svd(block, compute_uv=False)
            for rank in range(len(result)):
                result[rank] += np.sum(values[rank:] ** 2)
    return result
