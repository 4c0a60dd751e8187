"""Inputs of the benchmarks: Llama-shaped models of random bf16 weights, and GraLoRA adapters."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from gralora_convert.adapters.config import GraloraConfig
from gralora_convert.adapters.keys import key_of

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_base(folder: Path, layers: int, *, shards: int = 1, big: int = 0) -> Path:
    """A model of `layers` layers (22: 1.1 B parameters) in `shards` files; `big` rows of a further
    matrix in a file of its own, to have one tensor of that size."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    names = tensors_of(layers)
    per_shard = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        held = dict(list(names.items())[shard * per_shard : (shard + 1) * per_shard])
        file = (
            "model.safetensors"
            if shards == 1
            else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        )
        tensors = {
            name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in held.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_large_tensor(folder: Path, rows: int, columns: int = 4096) -> Path:
    """A folder with one bf16 matrix of rows x columns, made in pieces."""
    path = folder / "model.safetensors"
    if path.exists():
        return folder
    from gralora_convert.disk.tensors import encode_header

    folder.mkdir(parents=True, exist_ok=True)
    nbytes = rows * columns * 2
    torch.manual_seed(0)
    with path.open("wb") as file:
        file.write(
            encode_header([("big.weight", "BF16", (rows, columns), nbytes)], {"format": "pt"})
        )
        for start in range(0, rows, 4096):
            part = torch.randn(min(4096, rows - start), columns).bfloat16()
            file.write(part.view(torch.uint8).numpy().tobytes())
    return folder


def make_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], *, r: int, k: int, hybrid_r: int = 0
) -> Path:
    """An adapter with factors for `modules` (name -> out, in), float32."""
    if (folder / "adapter_config.json").exists():
        return folder
    torch.manual_seed(1)
    tensors = {}
    for module, (rows, columns) in modules.items():
        tensors[key_of(module, "A")] = torch.randn(k, columns // k, r) * 0.02
        tensors[key_of(module, "B")] = torch.randn(k, r, rows // k) * 0.002
        if hybrid_r:
            tensors[key_of(module, "general_A")] = torch.randn(hybrid_r, columns) * 0.02
            tensors[key_of(module, "general_B")] = torch.randn(rows, hybrid_r) * 0.002
    targets = sorted({name.rpartition(".")[2] for name in modules})
    GraloraConfig(
        r=r, gralora_k=k, hybrid_r=hybrid_r, alpha=2 * (r + hybrid_r), target_modules=targets,
        task_type="CAUSAL_LM",
    ).save_pretrained(folder)  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def llama_modules(layers: int) -> dict[str, tuple[int, int]]:
    """Every linear layer of the blocks: 7 per layer."""
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in LINEAR.items()
    }


def tensors_of(layers: int) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        names |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    return names | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
