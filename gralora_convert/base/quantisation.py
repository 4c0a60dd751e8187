"""Whether the weights of a base are quantised, and how: by its config, or by its tensors alone.

Names of methods are those of transformers 5.23 (quantizers/auto.py), names of tensors those that
its integrations and the libraries behind them write.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gralora_convert.base.scales import scales_of
from gralora_convert.disk import FLOATING, Checkpoint, TensorSpec

ADVICE = (
    "Merge into the original 16-bit model, or convert the adapter to a LoRA and serve it on this "
    "one. A merge that is quantised back to the grid of its base loses the update."
)

# transformers 5.23 writes codes under the old names, and no quantization_config
RESAVED = (
    "Was it saved by transformers after dequantising? That folder is broken: give the original "
    "base, or save it again with save_original_format=False."
)


class _Sign(NamedTuple):
    """A tensor `STEM.leaf` that only this method writes, if one of `beside` stands beside it."""

    method: str
    beside: tuple[str, ...] = ()


_SIGNS: Mapping[str, tuple[_Sign, ...]] = {
    "weight_scale_inv": (_Sign("fp8, block scales", ("weight",)),),
    "absmax": (_Sign("bitsandbytes 4-bit"),),
    "quant_map": (_Sign("bitsandbytes 4-bit"),),
    "SCB": (_Sign("bitsandbytes 8-bit"),),
    "qweight": (
        _Sign("FP-Quant", ("dqweight", "forward_hadamard_matrix")),
        _Sign("GPTQ", ("g_idx",)),
        _Sign("GPTQ or AWQ"),
    ),
    "codes": (_Sign("AQLM", ("codebooks",)),),
    "centroids": (_Sign("VPTQ"),),
    "indices": (_Sign("VPTQ", ("centroids", "centroids.weight")),),
    "dense_weights": (_Sign("SpQR", ("row_offsets",)),),
    "weight_scales": (_Sign("EETQ", ("weight",)),),
    "tables2": (_Sign("HIGGS", ("scales",)),),
    "W_q": (_Sign("HQQ"),),
    "_data": (_Sign("quanto"),),
    "weight_packed": (_Sign("compressed-tensors"),),
    "weight_scale_2": (_Sign("NVFP4 (ModelOpt)"),),
    "weight_sf": (_Sign("NVFP4"),),
    "quantized_weight_values": (_Sign("FourOverSix"),),
    "_weight_qdata": (_Sign("torchao"),),
    "weight:qdata": (_Sign("torchao"),),
}
_SCALED = ("weight_scale", "scales", "scale", "weight_zero_point", "input_scale", "scale_weight")
_BY_DTYPE = {"U32": "MLX or Metal", "I32": "packed integers", "U8": "packed integers", "I8": "int8"}


def quantised_by(base: Checkpoint) -> str | None:
    """The name of the quantisation of a base, None when its weights are plain numbers."""
    return by_config(base) or _by_tensors(base.tensors)


def is_config_alone(base: Checkpoint) -> bool:
    """Whether a config says quantised what no tensor is: weights that were dequantised, or that
    loaders are to quantise."""
    codes = any(spec.dtype.startswith("F8_E") for spec in base.tensors.values())
    return by_config(base) is not None and not codes and _by_tensors(base.tensors) is None


def unread_tensor(base: Checkpoint) -> str | None:
    """A tensor that is packed, or belongs to one, in a way that is not read here, and why; None
    where all are plain numbers or codes with scales."""
    scales = scales_of(base)
    if scales.problems:
        name, why = next(iter(scales.problems.items()))
        return f"{name} {why}, and"
    left = scales.companions(scales.specs, base.tensors).union(scales.specs)
    rest = {name: spec for name, spec in base.tensors.items() if name not in left}
    method = _by_tensors(rest)
    if method is None:
        return None if scales.specs or by_config(base) is None else "what its config describes"
    return f"what is {method}"


def plain_under_packed_names(base: Checkpoint) -> str | None:
    """A tensor of 16 bits that has the name of MXFP4 blocks: transformers 5.23 saves so what it
    dequantised."""
    return next(
        (
            name
            for name, spec in base.tensors.items()
            if name.endswith("_proj_blocks") and ".experts." in name and spec.dtype in FLOATING
        ),
        None,
    )


def companion(base: Checkpoint, module: str) -> str | None:
    """A tensor beside the weight of `module` (its name on disk) that belongs to a quantised one."""
    names = (f"{module}.{leaf}" for leaf in (*_SIGNS, *_SCALED))
    return next((name for name in names if name in base.tensors), None)


def by_config(base: Checkpoint) -> str | None:
    """The method that the config, or one within it, names."""
    for config in nested(base.config):
        inside = config.get("quantization")
        if isinstance(inside, Mapping) and "bits" in inside:
            return f"MLX {inside['bits']}-bit"
        for name in ("quantization_config", "compression_config"):
            found = config.get(name)
            if not isinstance(found, Mapping) or not found:
                continue
            method = found.get("quant_method") or found.get("quant_algo")
            if found.get("load_in_4bit") or found.get("load_in_8bit"):
                method = f"bitsandbytes {4 if found.get('load_in_4bit') else 8}-bit"
            return str(method or f"a {name} of its config")
    return None


def _by_tensors(tensors: Mapping[str, TensorSpec]) -> str | None:
    for name, spec in tensors.items():
        stem, _, leaf = name.rpartition(".")
        for sign in _SIGNS.get(leaf, ()):
            if not sign.beside or any(f"{stem}.{other}" in tensors for other in sign.beside):
                return sign.method
        if leaf.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
            return "MXFP4"
        if leaf == "weight" and len(spec.shape) == 2 and spec.dtype not in FLOATING:
            scaled = any(f"{stem}.{other}" in tensors for other in _SCALED)
            if spec.dtype in _BY_DTYPE:
                return _BY_DTYPE[spec.dtype]
            if scaled:
                return f"{spec.dtype} with scales"
    return None


def nested(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """A config and all objects in it."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from nested(value)
