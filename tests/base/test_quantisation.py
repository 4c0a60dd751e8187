"""Quantised bases are recognised by config or tensors alone, and refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gralora_convert.base.quantisation import quantised_by
from gralora_convert.disk.checkpoint import Checkpoint
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok

Q = "layers.0.up"
BYTES = torch.zeros(4, 4, dtype=torch.uint8)
INTS = torch.zeros(4, 4, dtype=torch.int32)
FLOATS = torch.ones(4, 4)
FP8 = torch.ones(4, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("method", "tensors"),
    [
        ("bitsandbytes 4-bit", {"weight": BYTES, "weight.absmax": FLOATS}),
        ("bitsandbytes 8-bit", {"weight": FLOATS.to(torch.int8), "SCB": FLOATS}),
        ("GPTQ", {"qweight": INTS, "qzeros": INTS, "scales": FLOATS, "g_idx": INTS}),
        ("GPTQ or AWQ", {"qweight": INTS, "qzeros": INTS, "scales": FLOATS}),
        ("compressed-tensors", {"weight_packed": INTS, "weight_scale": FLOATS}),
        ("fp8, block scales", {"weight": FP8, "weight_scale_inv": FLOATS}),
        ("F8_E4M3 with scales", {"weight": FP8, "weight_scale": FLOATS}),
        ("NVFP4 (ModelOpt)", {"weight": BYTES, "weight_scale": FP8, "weight_scale_2": FLOATS}),
        ("MXFP4", {"down_proj_blocks": BYTES, "down_proj_scales": BYTES}),
        ("HQQ", {"W_q": BYTES, "meta": FLOATS}),
        ("quanto", {"weight._data": FLOATS.to(torch.int8), "weight._scale": FLOATS}),
        ("torchao", {"_weight_qdata": FLOATS.to(torch.int8), "_weight_scale": FLOATS}),
        ("EETQ", {"weight": FLOATS.to(torch.int8), "weight_scales": FLOATS}),
        ("AQLM", {"codes": INTS, "codebooks": FLOATS, "scales": FLOATS}),
        ("VPTQ", {"indices": INTS, "centroids.weight": FLOATS}),
        ("SpQR", {"dense_weights": INTS, "row_offsets": INTS}),
        ("HIGGS", {"weight": INTS, "scales": FLOATS, "tables": FLOATS, "tables2": FLOATS}),
        ("MLX or Metal", {"weight": INTS.to(torch.uint32), "scales": FLOATS, "biases": FLOATS}),
        ("packed integers", {"weight": BYTES, "weight_scale": FLOATS}),  # BitNet
        ("int8", {"weight": FLOATS.to(torch.int8), "weight_scale": FLOATS}),
    ],
)
def test_tensors_alone_tell(method: str, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = {"norm.weight": FLOATS[0], **{f"{Q}.{leaf}": value for leaf, value in tensors.items()}}
    write_model(tmp_path / "base", {name: value.clone() for name, value in base.items()})
    assert quantised_by(Checkpoint.open(tmp_path / "base")) == method
    write_adapter(tmp_path / "adapter", {Q: random_delta(4, 4, r=2)})
    for command in (["merge", "-o", tmp_path / "out"], ["validate"]):
        outcome = run(command[0], tmp_path / "adapter", "--base", tmp_path / "base", *command[1:])
        assert outcome.status == (2 if command[0] == "merge" else 1)
        text = outcome.stderr + outcome.stdout
        assert f"({method})" in text
        assert "16-bit model" in text  # the advice
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("bitsandbytes 4-bit", {"quantization_config": {"load_in_4bit": True}}),
        ("bitsandbytes 8-bit", {"quantization_config": {"load_in_8bit": True}}),
        ("awq", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
        ("fp8", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
        ("compressed-tensors", {"compression_config": {"quant_method": "compressed-tensors"}}),
        ("NVFP4", {"quantization_config": {"quant_algo": "NVFP4"}}),
        ("MLX 4-bit", {"quantization": {"group_size": 64, "bits": 4}}),
        ("a quantization_config of its config", {"quantization_config": {"unheard": "of"}}),
    ],
)
def test_the_config_tells_first(method: str, config: dict[str, Any], tmp_path: Path) -> None:
    write_base(tmp_path, model_type="llama", **config)
    assert quantised_by(Checkpoint.open(tmp_path)) == method


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_plain_bases_are_not_quantised(config: dict[str, Any], tmp_path: Path) -> None:
    """Scales of norms, integer buffers and names that end alike are no quantisation."""
    shapes: dict[str, torch.Tensor] = {
        "a.weight": FLOATS, "a.scale": FLOATS[0], "position_ids": INTS, "b.indices": INTS,
        "c.codes": INTS, "d.weight": INTS[0], "down_proj_blocks": FLOATS,
    }  # fmt: skip
    write_model(tmp_path, {name: value.clone() for name, value in shapes.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantised_by(Checkpoint.open(tmp_path)) is None


def test_a_lone_8_bit_weight_is_refused_only_where_it_is_adapted(tmp_path: Path) -> None:
    """A base that holds some weights in 8 bits without scales: other layers can be merged."""
    tensors = write_base(tmp_path / "base")
    tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"].to(torch.float8_e4m3fn)
    write_model(tmp_path / "base", tensors)
    every = {name: random_delta(*shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "all", every)
    refused = run("merge", tmp_path / "all", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert refused.status == 2
    assert "layers.0.up: [base-quantised] has dtype F8_E4M3" in refused.stderr
    del every["layers.0.up"]
    write_adapter(tmp_path / "some", every)
    outcome = run("merge", tmp_path / "some", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert outcome.status == 0


def gpt_oss(folder: Path) -> transformers.GptOssForCausalLM:
    """As published: experts packed in MXFP4, everything else in bfloat16."""
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
        vocab_size=64, layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, wide, tall = value.shape
            packed = (experts, tall, wide // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 255, (*packed, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full(packed, 120, dtype=torch.uint8)
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_file = folder / "config.json"
    method = {"quantization_config": {"quant_method": "mxfp4"}}
    edited = json.loads(config_file.read_text()) | method
    config_file.write_text(json.dumps(edited))
    return model


def trained(model: torch.nn.Module, folder: Path, targets: list[str]) -> None:
    config = GraloraConfig(r=8, gralora_k=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "gralora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    adapted.save_pretrained(folder)


def test_packed_experts_are_copied_where_attention_is_adapted(tmp_path: Path) -> None:
    """gpt-oss: PEFT's GraLoRA adapts its attention, which is plain."""
    trained(gpt_oss(tmp_path / "base"), tmp_path / "adapter", ["q_proj", "k_proj", "o_proj"])
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    assert "base-quantised-beside" in run_ok("validate", *arguments).stdout
    told = run_ok("merge", *arguments, "-o", tmp_path / "merged").stderr
    assert "8 packed tensors" in told
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "merged"))
    assert before.keys() == after.keys()
    for name in before:
        touched = any(f".{leaf}.weight" in name for leaf in ("q_proj", "k_proj", "o_proj"))
        assert torch.equal(before[name], after[name]) != touched, name
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("base", "merged")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    run_ok("verify", *arguments, "--merged", tmp_path / "merged", "--level", "modules")
    refused = run("merge", *arguments, "-o", tmp_path / "cast", "--dtype", "float32")
    assert refused.status == 2
    assert "what is MXFP4 cannot be written as float32" in refused.stderr
    assert not (tmp_path / "cast").exists()


def test_a_config_that_says_quantised_over_plain_tensors_is_told_as_such(tmp_path: Path) -> None:
    write_base(tmp_path / "base", quantization_config={"quant_method": "fp8"})
    write_adapter(tmp_path / "adapter", {"layers.0.up": random_delta(*SHAPES["layers.0.up"])})
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    refused = run("merge", *arguments, "-o", tmp_path / "out")
    assert refused.status == 2
    assert "says quantised (fp8), but no tensor is" in refused.stderr
    assert "remove quantization_config" in refused.stderr


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_inv", "weight_packed"])
def test_half_of_a_pair_is_no_plain_weight(leaf: str, tmp_path: Path) -> None:
    """What transformers 5 saves of a model that it dequantised: scales beside plain weights."""
    tensors = write_base(tmp_path / "base")
    tensors[f"layers.0.up.{leaf}"] = torch.ones(1, 1)
    tensors["layers.1.up.weight"] = tensors["layers.1.up.weight"].to(torch.float8_e4m3fn)
    tensors["layers.1.up.weight_scale"] = torch.ones(1, 1)
    write_model(tmp_path / "base", tensors)
    write_adapter(tmp_path / "adapter", {"layers.0.up": random_delta(*SHAPES["layers.0.up"])})
    refused = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert refused.status == 2
    assert f"layers.0.up.{leaf} stands beside it" in refused.stderr
    assert "save_original_format=False" in refused.stderr


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_says_how_codes_are_read_is_seen_wherever_it_stands(
    key: str, tmp_path: Path
) -> None:
    weights = {"type": "float", "num_bits": 8}
    inside = {key: {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}},
    }}  # fmt: skip
    for name, config in (("outer", inside), ("inner", {"text_config": inside})):
        base = tmp_path / name
        tensors = write_base(base, model_type="llama", **config)
        tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"].to(torch.float8_e4m3fn)
        tensors["layers.0.up.weight_scale"] = torch.ones(1, 1)
        tensors["layers.1.up.weight"] = tensors["layers.1.up.weight"].to(torch.float8_e4m3fn)
        tensors["layers.1.up.weight_scale"] = torch.ones(1, 1)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        adapter = write_adapter(tmp_path / f"{name}-adapter", {Q: random_delta(*SHAPES[Q])})
        run_ok("merge", adapter, "--base", base, "-o", tmp_path / f"{name}-out")
        config = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        held = config if name == "outer" else config["text_config"]
        assert held[key]["ignore"] == ["layers.0.up"]
