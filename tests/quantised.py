"""Tiny models in fp8, by the code of those who write such checkpoints: transformers'
`Fp8Quantize`, and compressed-tensors' observers and compressor (what llm-compressor calls)."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize, _dequantize_fp8_weight

Tensors = dict[str, torch.Tensor]
BLOCK = 32  # of the tiny models; published ones have 128

# name -> options of the writer
FP8: dict[str, dict[str, Any]] = {
    "blocks": {},
    "blocks-e8m0": {"scale_fmt": "ue8m0"},
    "tensor": {"weight_block_size": None},
    "tensor-static": {"weight_block_size": None, "activation_scheme": "static"},
}
COMPRESSED = {"channel": "FP8_DYNAMIC", "tensor": "FP8", "block": "FP8_BLOCK"}
FORMATS = [*(f"fp8 {name}" for name in FP8), *(f"ct {name}" for name in COMPRESSED)]


def llama(seed: int = 0, **settings: Any) -> Any:
    """Rows and columns that are multiples of no block, but for `hidden_size=64`."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    config = transformers.LlamaConfig(**(sizes | settings))
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def write(folder: Path, how: str, model: Any = None) -> Tensors:
    """A base in one of `FORMATS` at `folder`; its weights as the writer's own code decodes them, in
    float32."""
    writer, name = how.split(" ")
    model = llama() if model is None else model
    if writer == "fp8":
        return _by_transformers(folder, model, FP8[name])
    return _by_compressed_tensors(folder, model, COMPRESSED[name])


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            yield name, module


def _by_transformers(folder: Path, model: Any, options: dict[str, Any]) -> Tensors:
    config = FineGrainedFP8Config(**({"weight_block_size": (BLOCK, BLOCK)} | options))
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=config))
    model.save_pretrained(folder)
    tensors, plain = load_file(folder / "model.safetensors"), Tensors()
    for name, layer in _layers(model):
        made = quantise.convert({f"{name}.weight": layer.weight.data})
        assert len(made) == 2, "the sizes are no multiples of the blocks"
        tensors |= made
        weight, scale = made[f"{name}.weight"], made[f"{name}.weight_scale_inv"]
        plain[f"{name}.weight"] = _dequantize_fp8_weight(
            weight, scale.float(), config.weight_block_size, torch.float32
        )
        if config.activation_scheme == "static":
            tensors[f"{name}.activation_scale"] = torch.tensor(0.02)
    _save(folder, tensors, config.to_dict())
    return plain


def _by_compressed_tensors(folder: Path, model: Any, preset: str) -> Tensors:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights.block_structure = scheme.weights.block_structure and [BLOCK, BLOCK]
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for _, layer in _layers(model):
        scale, _ = calculate_qparams(*_extremes(layer.weight.data.float(), scheme.weights),
                                     scheme.weights)  # fmt: skip
        held = layer.weight_scale.data
        held.copy_(scale.to(held.dtype).view(held.shape))
        if hasattr(layer, "input_scale"):
            layer.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tensors = load_file(folder / "model.safetensors")
    return {
        f"{name}.weight": dequantize(
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].float(),
            args=scheme.weights, dtype=torch.float32,
        )
        for name, _ in _layers(model)
    }  # fmt: skip


def _extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if args.block_structure:
        rows, columns = args.block_structure
        tall, wide = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        padded = torch.zeros(tall * rows, wide * columns)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.view(tall, rows, wide, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return weight.min().view(1), weight.max().view(1)


def _save(folder: Path, tensors: Tensors, quantisation: dict[str, Any]) -> None:
    held = {name: value.contiguous() for name, value in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=quantisation)


def edit(folder: Path, **settings: Any) -> None:
    """Changes the config.json of a folder; None takes a setting away."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **settings}
    kept = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(kept, indent=2))


def plain_model(folder: Path, plain: Tensors, dtype: torch.dtype = torch.float32) -> Any:
    """The base's model with the decoded weights, without quantisation."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).to(dtype)
    held = load_file(folder / "model.safetensors")
    known = {name: plain.get(name, value) for name, value in held.items()}
    known.setdefault("lm_head.weight", known["model.embed_tokens.weight"])
    state = {name: known[name].to(dtype) for name in model.state_dict()}
    model.load_state_dict(state)
    return model


def adapt(model: Any, folder: Path, targets: list[str], size: float = 0.05, **more: Any) -> Any:
    """A GraLoRA on the model by PEFT, saved; the adapted model in evaluation mode."""
    settings: dict[str, Any] = {"r": 8, "gralora_k": 2, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, GraloraConfig(target_modules=targets, **(settings | more)))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "gralora_" in name:
            parameter.data = torch.randn_like(parameter) * size
    adapted.save_pretrained(folder)
    return adapted.eval()
