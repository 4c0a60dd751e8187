"""Files of others, read defensively: JSON, tensors, the Hub, whole checkpoints. No torch."""

from gralora_convert.disk.checkpoint import Checkpoint, locate
from gralora_convert.disk.files import (
    RECEIPT_NAME,
    Measure,
    file_stamp,
    is_file,
    is_folder,
    is_there,
    meant,
    measured,
    open_regular,
    pread_exact,
    reading,
    require_stamp,
)
from gralora_convert.disk.folders import STEP, is_weights, listing, sidecars
from gralora_convert.disk.hub import cached, config_errors, fetch, parse_name
from gralora_convert.disk.numbers import (
    INFINITY,
    element_bytes,
    is_zero,
    largest_magnitude,
    look,
    same_values,
)
from gralora_convert.disk.specs import (
    DTYPE_BITS,
    DTYPE_OF_TORCH,
    FLOATING,
    WRITTEN,
    Rows,
    Scale,
    TensorFile,
    TensorSpec,
    dtype_name,
    nbytes_of,
    written_dtype,
)
from gralora_convert.disk.strictjson import MAX_JSON_BYTES, dump_json, load_json, parse_json
from gralora_convert.disk.tensors import (
    apply_scales,
    bytes_of,
    decode,
    encode_header,
    read_bytes,
    read_into,
    read_rows,
    read_safetensors,
    read_tensor_file,
    read_torch,
    torch_dtype,
)

__all__ = [
    "DTYPE_BITS", "DTYPE_OF_TORCH", "FLOATING", "INFINITY", "MAX_JSON_BYTES", "RECEIPT_NAME",
    "STEP", "WRITTEN", "Checkpoint", "Measure", "Rows", "Scale", "TensorFile", "TensorSpec",
    "apply_scales", "bytes_of", "cached", "config_errors", "decode", "dtype_name", "dump_json",
    "element_bytes", "encode_header", "fetch", "file_stamp", "is_file", "is_folder", "is_there",
    "is_weights", "is_zero", "largest_magnitude", "listing", "load_json", "locate", "look", "meant",
    "measured", "nbytes_of", "open_regular", "parse_json", "parse_name", "pread_exact",
    "read_bytes", "read_into", "read_rows", "read_safetensors", "read_tensor_file", "read_torch",
    "reading", "require_stamp", "same_values", "sidecars", "torch_dtype", "written_dtype",
]  # fmt: skip
