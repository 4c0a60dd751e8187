"""Adapters and bases of any shape, without transformers or PEFT: fast, and exactly known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gralora_convert.adapters.config import GraloraConfig
from gralora_convert.adapters.keys import key_of
from gralora_convert.delta.forms import Gralora

Deltas = Mapping[str, Gralora]
SHAPES = {"layers.0.up": (32, 24), "layers.0.down": (24, 32), "layers.1.up": (32, 24)}


def random_delta(
    out_features: int,
    in_features: int,
    *,
    r: int = 8,
    k: int = 2,
    hybrid_r: int = 0,
    alpha: float = 16.0,
    size: float = 1.0,
    seed: int = 0,
) -> Gralora:
    """A delta with normal factors; `size` scales it."""
    g = torch.Generator().manual_seed(seed)
    general_a = torch.randn(hybrid_r, in_features, generator=g) * 0.1 if hybrid_r else None
    general_b = torch.randn(out_features, hybrid_r, generator=g) * size if hybrid_r else None
    return Gralora(
        torch.randn(k, in_features // k, r, generator=g) * 0.1,
        torch.randn(k, r, out_features // k, generator=g) * size,
        alpha / (r + hybrid_r),
        general_a,
        general_b,
    )


def write_adapter(folder: Path, deltas: Deltas, **config: Any) -> Path:
    """A PEFT folder that holds `deltas` (all of one r, k, hybrid_r and scaling)."""
    first = next(iter(deltas.values()))
    options: dict[str, Any] = {
        "r": first.r,
        "gralora_k": first.k,
        "hybrid_r": first.hybrid_r,
        "alpha": first.scaling * (first.r + first.hybrid_r),
        "target_modules": list(deltas),
    }
    GraloraConfig(**(options | config)).save_pretrained(folder)
    tensors = {}
    for module, delta in deltas.items():
        tensors[key_of(module, "A")] = delta.A.contiguous()
        tensors[key_of(module, "B")] = delta.B.contiguous()
        if delta.general_A is not None and delta.general_B is not None:
            tensors[key_of(module, "general_A")] = delta.general_A.contiguous()
            tensors[key_of(module, "general_B")] = delta.general_B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_base(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """A folder with a matrix of each shape, a norm and an embedding; returns its tensors."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.weight": torch.randn(*shape, generator=g).to(dtype)
        for name, shape in shapes.items()
    }
    tensors["norm.weight"] = torch.randn(24, generator=g).to(dtype)
    tensors["embed_tokens.weight"] = torch.randn(10, 24, generator=g).to(dtype)
    write_model(folder, tensors, **config)
    return tensors


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """A folder that holds `tensors` in one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
