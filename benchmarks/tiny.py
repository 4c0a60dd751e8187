"""Every model type of transformers as a tiny model, and something to feed it."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers

LARGEST = 40_000_000  # parameters of a model that still counts as small
SIZES: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "hidden_dim": 48, "n_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "word_embed_proj_dim": 32, "d_kv": 8,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64,
    "embedding_size": 32, "image_size": 32, "patch_size": 8, "num_channels": 3,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "prediction_length": 4, "context_length": 16, "emb_dim": 32, "n_words": 64,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16, "encoder_hash_byte_group_vocab": 16,
}  # fmt: skip
# Sizes that some configs check against others, from those most often at fault.
DOUBTFUL = (
    ("head_dim",), ("image_size", "patch_size"), ("embed_dim", "hidden_dim", "dim"),
    ("num_attention_heads", "num_key_value_heads", "num_heads", "n_heads", "head_dim"),
    ("hidden_size", "d_model", "head_dim", "embedding_size"),
)  # fmt: skip
LAYERS = frozenset(name for name in SIZES if name.endswith(("layers", "layer")))
TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
INDEXES = (
    "deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes",
    "cross_attention_layers", "window_block_indexes", "full_attention_layer_idxs",
    "hybrid_layer_ids",
)  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1], "layer_type": "basic",
}  # fmt: skip


def _resnet(*stages: int) -> dict[str, Any]:
    """In place of a backbone of timm."""
    backbone = {**RESNET, "out_features": [f"stage{stage}" for stage in stages]}
    return {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": backbone,
    }  # fmt: skip


OWN: Mapping[str, Mapping[str, Any]] = {  # what single types need beside
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "dots3_note": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "chameleon": {"vocabulary_map": {"IMGIMGBS0Z": 3, "<image>": 4}},
    "detr": _resnet(4),
    "conditional_detr": _resnet(4),
    "dab-detr": _resnet(4),
    "table-transformer": _resnet(4),
    "deformable_detr": _resnet(2, 3, 4),
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [48, 48],
    },
    "luke": {"entity_vocab_size": 64, "entity_emb_size": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "bridgetower": {"num_hidden_layers": 2},
    "mllama_text_model": {"rope_scaling": {"rope_type": "default"}},  # 4.57 has no default
}
DROPOUTS = ("dropout", "drop", "pdrop", "layerdrop", "drop_path_rate", "mask_time_prob")


def _names(default: Mapping[str, Any], leave: frozenset[str]) -> dict[str, Any]:
    """The sizes of one config made small, but those in `leave`."""
    values: dict[str, Any] = {}
    for name, value in default.items():
        is_list = isinstance(value, list | tuple)
        if name in SIZES and name not in leave:
            values[name] = type(value)([SIZES[name]] * len(value)) if is_list else SIZES[name]
        elif isinstance(value, float) and name.rpartition("_")[2] in DROPOUTS:
            values[name] = 0.0
        elif name in TYPES and is_list:
            values[name] = value[:2]
        elif name in INDEXES and is_list:
            values[name] = [0]
        elif name == "depths" and is_list:
            values[name] = [1] * len(value)
    return values


def configs(model_type: str) -> Iterator[Any]:
    """Small configs of a type, from the smallest; those that it refuses are left out."""
    cls = transformers.CONFIG_MAPPING[model_type]

    def shrink(config: Any, leave: frozenset[str]) -> dict[str, Any]:
        values = _names(config.to_dict(), leave)
        for name, inner in vars(config).items():
            if isinstance(inner, transformers.PretrainedConfig):
                values[name] = {"model_type": inner.model_type, **shrink(inner, leave)}
        return {**values, **OWN.get(config.model_type, {})}

    default = cls()
    every = frozenset(SIZES) - LAYERS - {"vocab_size"}
    for leave in itertools.chain([()], DOUBTFUL, [every, frozenset(SIZES) - LAYERS]):
        try:
            config = cls(**shrink(default, frozenset(leave)))
        except Exception:
            continue
        config.architectures = config.architectures or []  # some auto classes choose by them
        yield config


def build(auto: str, model_type: str) -> Any:
    """A tiny model with random weights that differ everywhere.

    Raises:
        ValueError: none of the small configs gives one; the message is the first's complaint.
    """
    first: Exception | None = None
    found = False
    for config in configs(model_type):
        found = True
        try:
            model = _build(auto, config)
        except Exception as error:
            first = first or error
            continue
        if model is not None:
            return model
    if first is not None:
        raise ValueError(f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}")
    raise ValueError("does not become small" if found else "no small config is valid")


def _build(auto: str, config: Any) -> Any:
    maker = getattr(transformers, auto)
    with torch.device("meta"):
        try:
            if count(maker.from_config(config)) > LARGEST:
                return None
        except RuntimeError:  # its constructor reads values: no meta tensors
            pass
    torch.manual_seed(0)
    model = maker.from_config(config)
    if count(model) > LARGEST:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2]])  # BART classifies by what stands at the end


def inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """What the model may accept, the most likely first."""
    config = model.config
    inner = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]

    def size(*names: str, default: int = 0) -> int:
        for one in inner:
            for name in names:
                value = getattr(one, name, None)
                if isinstance(value, list | tuple) and value:
                    value = value[0]
                if isinstance(value, int) and value:
                    return value
        return default

    side, channels = size("image_size", default=32), size("num_channels", default=3)
    generator = torch.Generator().manual_seed(3)
    mels = size("num_mel_bins", "input_size", "feature_size", default=80)
    frames = 2 * size("max_source_positions", default=32)
    parts = {
        "input_ids": IDS,
        "decoder_input_ids": IDS[:, :5],
        "pixel_values": torch.randn(1, channels, side, side, generator=generator),
        "input_values": torch.randn(1, 4000, generator=generator),
        "input_features": torch.randn(1, mels, min(frames, 3000), generator=generator),
    }
    ways = (
        ("input_ids", "decoder_input_ids"), ("input_ids",), ("pixel_values",),
        ("input_ids", "pixel_values"), ("input_values",), ("input_features",),
        ("input_features", "decoder_input_ids"), ("input_values", "decoder_input_ids"),
        ("pixel_values", "decoder_input_ids"),
    )  # fmt: skip
    for names in ways:
        yield {name: parts[name] for name in names}


def forward(model: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """All floating outputs in one row; None when the model does not take these inputs."""
    named = outputs(model, given)
    return torch.cat(list(named.values())) if named else None


def outputs(model: Any, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating outputs by name, each in a row; none when the model does not take these. Of a
    model that only generates (Bark), those of its parts."""
    torch.manual_seed(0)
    if type(model).forward is torch.nn.Module.forward:
        parts = [(name, outputs(part, given)) for name, part in model.named_children()]
        return {f"{part}.{name}": found for part, held in parts for name, found in held.items()}
    try:
        with torch.no_grad():
            result = model.eval()(**given)
    except Exception:
        return {}
    named = result if isinstance(result, Mapping) else {"": result}
    found = {}
    for name, value in named.items():
        values = [t.flatten().float() for t in _tensors(value) if t.is_floating_point()]
        if values:
            found[name] = torch.cat(values)
    return found


def _tensors(result: object) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, list | tuple):
        for value in result:
            yield from _tensors(value)
