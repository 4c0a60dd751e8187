"""Adapters of one tower of a model with two: they land in their own, or are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import GraloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.command import run, run_ok
from tests.zoo import IDS

FAMILIES = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2", "metaclip_2": "MetaClip2"}
TOWERS = ("text", "vision")
SIZES: Mapping[str, Mapping[str, int]] = {
    "equal": {},
    "deeper": {"num_hidden_layers": 3},
    "wider": {"hidden_size": 64},
}


def save_base(family: str, vision: Mapping[str, int], folder: Path) -> None:
    """Two towers; `vision` is what is larger in that one."""
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4}  # fmt: skip
    text = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, "projection_size": 32, **common}  # fmt: skip
    image = {"image_size": 16, "patch_size": 8, "num_patches": 4, **common, **vision}
    prefix = FAMILIES[family]
    more = {"projection_dim": 16} if "clip" in family else {}
    config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=image, **more)
    torch.manual_seed(0)
    getattr(transformers, f"{prefix}Model")(config).save_pretrained(folder)


def load(family: str, tower: str, folder: Path) -> PreTrainedModel:
    cls = getattr(transformers, f"{FAMILIES[family]}{tower.capitalize()}Model")
    loaded: PreTrainedModel = cls.from_pretrained(folder).eval()
    return loaded


def train(model: PreTrainedModel, targets: Any, folder: Path, task: str | None) -> PeftModel:
    config = GraloraConfig(r=4, alpha=8, target_modules=targets, task_type=task)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "gralora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    adapted.eval().save_pretrained(folder)
    return adapted


def outputs(family: str, tower: str, model: torch.nn.Module) -> torch.Tensor:
    """The hidden states of a tower, or of PEFT's model around one."""
    inputs: dict[str, torch.Tensor] = {}
    if tower == "text":
        inputs["input_ids"] = torch.arange(3, 11)[None]
    elif family == "siglip2":
        generator = torch.Generator().manual_seed(0)
        inputs["pixel_values"] = torch.randn(1, 4, 192, generator=generator)
        inputs["pixel_attention_mask"] = torch.ones(1, 4, dtype=torch.long)
        inputs["spatial_shapes"] = torch.tensor([[2, 2]])
    else:
        generator = torch.Generator().manual_seed(0)
        inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    bare = model.base_model.model if isinstance(model, PeftModel) else model
    with torch.no_grad():
        hidden: torch.Tensor = bare(**inputs).last_hidden_state
    return hidden


def distance(family: str, tower: str, merged: Path, adapted: PeftModel) -> float:
    found = outputs(family, tower, load(family, tower, merged))
    return float((found - outputs(family, tower, adapted)).abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_that_was_trained_decides(
    family: str, tower: str, size: str, tmp_path: Path
) -> None:
    save_base(family, SIZES[size], tmp_path / "base")
    listed = tower == "text"  # the names in a list, or one expression
    targets = ["q_proj", "v_proj"] if listed else r"encoder\.layers\.\d+\.self_attn\.[qv]_proj"
    adapted = train(load(family, tower, tmp_path / "base"), targets, tmp_path / "adapter", None)
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert distance(family, tower, tmp_path / "out", adapted) <= 1e-5


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_towers_that_fit_equally_are_not_chosen_from(
    family: str, tower: str, tmp_path: Path
) -> None:
    save_base(family, {}, tmp_path / "base")
    model = load(family, tower, tmp_path / "base")
    adapted = train(model, ["q_proj", "v_proj"], tmp_path / "adapter", "FEATURE_EXTRACTION")
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    refused = run(*arguments)
    assert refused.status == 2
    assert "part-ambiguous" in refused.stderr
    assert not (tmp_path / "out").exists()
    for name in TOWERS:
        assert f"encoder={name}_model.encoder" in refused.stderr
    run_ok(*arguments, "--key-map", f"encoder={tower}_model.encoder")
    assert distance(family, tower, tmp_path / "out", adapted) <= 1e-5


def test_towers_of_other_sizes_are_told_by_the_shapes(tmp_path: Path) -> None:
    save_base("clip", SIZES["wider"], tmp_path / "base")
    for tower in TOWERS:
        model = load("clip", tower, tmp_path / "base")
        folder, out = tmp_path / f"{tower}-adapter", tmp_path / tower
        adapted = train(model, ["q_proj", "v_proj"], folder, "FEATURE_EXTRACTION")
        run_ok("merge", folder, "--base", tmp_path / "base", "-o", out)
        assert distance("clip", tower, out, adapted) <= 1e-5


def test_the_config_beside_the_adapter_names_the_class(tmp_path: Path) -> None:
    save_base("siglip", {}, tmp_path / "base")
    model = load("siglip", "vision", tmp_path / "base")
    folder, out = tmp_path / "adapter", tmp_path / "out"
    adapted = train(model, ["q_proj", "v_proj"], folder, "FEATURE_EXTRACTION")
    model.config.architectures = ["SiglipVisionModel"]
    model.config.save_pretrained(folder)
    run_ok("merge", folder, "--base", tmp_path / "base", "-o", out)
    assert distance("siglip", "vision", out, adapted) <= 1e-5


def test_a_stack_of_t5_is_the_half_that_is_named(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(3, 11)[None]
    adapted = train(encoder.encoder, ["q", "v"], tmp_path / "adapter", None)
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    refused = run(*arguments)
    assert refused.status == 2
    assert "block=encoder.block" in refused.stderr
    done = run_ok(*arguments, "--key-map", "block=encoder.block")
    assert "base-prefix" not in done.stderr
    merged = transformers.T5EncoderModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted = adapted.base_model.model(input_ids=ids).last_hidden_state
        assert (merged(input_ids=ids).last_hidden_state - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_text_model_of_a_larger_one_is_found_by_its_class(
    task: str | None, tmp_path: Path
) -> None:
    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
              "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=120, video_token_id=121,
        vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = transformers.Qwen3_5ForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted = train(model, ["q_proj", "v_proj"], tmp_path / "adapter", task)
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    merged = transformers.Qwen3_5ForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        wanted = adapted.base_model.model(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - wanted).abs().max() <= 1e-5


def test_an_encoder_trained_alone_is_merged_into_the_whole(tmp_path: Path) -> None:
    """PEFT's FEATURE_EXTRACTION names no class: T5EncoderModel, of which the base is more."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        encoder,
        GraloraConfig(r=4, gralora_k=2, target_modules=["q"], task_type="FEATURE_EXTRACTION"),
    )
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.3
    adapted.save_pretrained(tmp_path / "adapter")
    right = adapted.eval()(IDS).last_hidden_state
    told = run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "m")
    assert "part-trained" in told.stderr
    merged = transformers.T5EncoderModel.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(merged(IDS).last_hidden_state, right, rtol=0, atol=1e-5)
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "block.1" not in k}, path)
    lost = run("validate", tmp_path / "adapter", "--base", tmp_path / "base")
    assert lost.status == 1  # a layer is missing: that is no part
