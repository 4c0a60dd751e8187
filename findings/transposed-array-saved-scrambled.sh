#!/usr/bin/env bash
# safetensors' NumPy writer stores a transposed array scrambled: its memory under its new shape.
#
# safetensors 0.8.0 (0.7.0 was right), numpy 2.4.6, Python 3.11.
#
# `array.T` is a view whose memory keeps the old order. `safetensors.numpy.save` (and `save_file`)
# writes that memory as it lies, with the shape of the view: the file holds other values under the
# right name, dtype and shape. Nothing is raised. `numpy.ascontiguousarray` before it avoids this.
#
# Expected: the values of the array, as 0.7.0 writes them, or an error.
#
# Output seen:
#
#     0.7.0: [[0, 3], [1, 4], [2, 5]] comes back as [[0, 3], [1, 4], [2, 5]]
#     0.8.0: [[0, 3], [1, 4], [2, 5]] comes back as [[0, 1], [2, 3], [4, 5]]
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
cat >"$work/transposed.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

array = np.arange(6, dtype=np.int32).reshape(2, 3).T
back = load(save({"t": array}))["t"]
print(f"{safetensors.__version__}: {array.tolist()} comes back as {back.tolist()}")
assert back.shape == array.shape
assert np.array_equal(back, array) == (sys.argv[1] == "right"), "the writer has changed"
assert np.array_equal(load(save({"t": np.ascontiguousarray(array)}))["t"], array)
PYTHON
"$work/venv/bin/pip" install --quiet numpy==2.4.6 safetensors==0.7.0
"$work/venv/bin/python" "$work/transposed.py" right
"$work/venv/bin/pip" install --quiet safetensors==0.8.0
"$work/venv/bin/python" "$work/transposed.py" wrong
