"""An adapter that lives in memory as a folder of PEFT's: its factors and values as they are now."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch

from gralora_convert.config import CONFIG_NAME, PEFT_VERSION, GraloraConfig, LoraConfig
from gralora_convert.delta import Gralora, Lora
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.keys import Role, key_of
from gralora_convert.plan import Computed, OutputFile, Part, Plan
from gralora_convert.specs import DTYPE_OF_TORCH
from gralora_convert.tensors import bytes_of
from gralora_convert.version import __version__

__all__ = ["config_of", "folder_of"]

_ROLES: tuple[Role, ...] = ("A", "B", "general_A", "general_B")


def folder_of(
    config: GraloraConfig | LoraConfig,
    deltas: Mapping[str, Gralora | Lora],
    values: Mapping[str, torch.Tensor],
) -> Plan:
    """The plan of an adapter's folder; `values` are trained biases and saved modules by path.

    PEFT 0.21.2 reads it without a warning (peft_model.py, from_pretrained).

    Raises:
        UnsupportedError: a LoRA whose factors PEFT stores in pieces.
    """
    if isinstance(config, LoraConfig) and config.extra.get("use_bdlora"):
        raise UnsupportedError("a BD-LoRA stores blocks of its factors, and is not written here")
    parts = [*_factors(deltas), *_values(values, deltas)]
    written = replace(config, inference_mode=True, peft_version=PEFT_VERSION)
    receipt = {"tool": "gralora-convert", "version": __version__, "command": "save"}
    return Plan(
        command="save",
        files=(OutputFile("adapter_model.safetensors", tuple(parts)),),
        receipt=lambda: dict(receipt),
        texts={CONFIG_NAME: written.to_json()},
    )


def _factors(deltas: Mapping[str, Gralora | Lora]) -> Iterator[Part]:
    for module, delta in deltas.items():
        method: Literal["gralora", "lora"] = "gralora" if isinstance(delta, Gralora) else "lora"
        for role in _ROLES:
            factor = getattr(delta, role, None)
            if factor is not None:
                yield _part(key_of(module, role, method), factor)


def _values(values: Mapping[str, torch.Tensor], deltas: Mapping[str, object]) -> Iterator[Part]:
    for path, value in values.items():
        module, _, leaf = path.rpartition(".")
        own = leaf == "bias" and module in deltas
        yield _part(key_of(module, "bias") if own else key_of(path, "parameter"), value)


def _part(key: str, value: torch.Tensor) -> Part:
    source = Computed(max(1, value.nbytes), lambda tile: bytes_of(value), value.nbytes)
    dtype = DTYPE_OF_TORCH[str(value.dtype).removeprefix("torch.")]
    return Part(key, dtype, tuple(value.shape), value.nbytes, source)


def config_of(
    deltas: Mapping[str, Gralora | Lora], *, dropout: float, fan_in_fan_out: bool
) -> GraloraConfig:
    """The config that deltas alone imply.

    Raises:
        MisuseError: one config cannot describe them all.
    """
    shapes = {
        (delta.r, delta.k, delta.hybrid_r, delta.scaling) if isinstance(delta, Gralora) else None
        for delta in deltas.values()
    }
    first = next(iter(shapes))
    if len(shapes) > 1 or first is None:
        raise MisuseError(
            "the deltas are not GraLoRAs of one r, k, hybrid_r and scaling, which a config needs",
            hint="Attach an adapter from disk, or save its parts with torch.",
        )
    r, k, hybrid_r, scaling = first
    return GraloraConfig(
        r=r, gralora_k=k, hybrid_r=hybrid_r, alpha=scaling * (r + hybrid_r),
        target_modules=list(deltas), gralora_dropout=dropout, fan_in_fan_out=fan_in_fan_out,
    )  # fmt: skip
