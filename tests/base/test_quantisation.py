"""Quantised bases are recognised by config or tensors alone, and refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_convert.base.quantisation import quantisation
from gralora_convert.disk.checkpoint import Checkpoint
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run

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
    assert quantisation(Checkpoint.open(tmp_path / "base")) == method
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
    assert quantisation(Checkpoint.open(tmp_path)) == method


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_plain_bases_are_not_quantised(config: dict[str, Any], tmp_path: Path) -> None:
    """Scales of norms, integer buffers and names that end alike are no quantisation."""
    shapes: dict[str, torch.Tensor] = {
        "a.weight": FLOATS, "a.scale": FLOATS[0], "position_ids": INTS, "b.indices": INTS,
        "c.codes": INTS, "d.weight": INTS[0], "down_proj_blocks": FLOATS,
    }  # fmt: skip
    write_model(tmp_path, {name: value.clone() for name, value in shapes.items()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantisation(Checkpoint.open(tmp_path)) is None


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
