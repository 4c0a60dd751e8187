"""What real stacks do that one guesses wrong: said before anything is merged."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import GraloraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations

from tests.builders import random_delta, write_adapter, write_base
from tests.command import run, run_ok
from tests.zoo import outputs

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTER, BASE = FIXTURES / "peft-0.21.2/llama-hybrid", FIXTURES / "bases/llama"
IDS = {"input_ids": torch.arange(2, 18)[None]}


def test_a_merge_beside_its_adapter_is_told_before_loaders_count_it_twice(tmp_path: Path) -> None:
    """transformers 5.23 takes the local weights and puts the adapter on top of them."""
    run_ok("merge", ADAPTER, "--base", BASE, "-o", tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter_*"))
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "merged", both)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(ADAPTER / name, both)
    once, twice, base = (
        outputs(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS)
        for folder in (tmp_path / "merged", both, BASE)
    )
    assert (twice - once).abs().max() > 0.3 * (once - base).abs().max()
    for command in ("validate", "inspect"):
        told = run_ok(command, both).stdout
        assert "model-beside-adapter" in told
        assert "counts twice" in told


def test_a_stray_adapter_in_a_base_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(FIXTURES / "peft-0.21.2/llama-k4" / name, base)
    assert "base-holds-adapter" in run_ok("validate", ADAPTER, "--base", base).stdout
    told = run_ok("merge", ADAPTER, "--base", base, "-o", tmp_path / "merged").stderr
    assert "base-holds-adapter" in told
    assert not list((tmp_path / "merged").glob("adapter_*"))


def mixtral(folder: Path) -> transformers.MixtralForCausalLM:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2"], "all-linear"], ids=str)
def test_experts_that_gralora_does_not_adapt_are_told(
    targets: list[str] | str, tmp_path: Path
) -> None:
    """A LoraConfig of the same names takes experts and router (PEFT 0.21.2)."""
    model = mixtral(tmp_path / "base")
    config = GraloraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    trained = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not any("experts" in name for name in trained)
    told = run_ok("validate", tmp_path / "adapter", "--base", tmp_path / "base").stdout
    assert "experts-not-adapted" in told
    assert "a LoRA would" in told
    if targets != "all-linear":
        assert "'w1' selects no module" in told
        assert "'q_proj'" not in told


def test_a_lora_on_experts_is_named_when_it_is_converted(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(mixtral(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "lora")
    refused = run("convert", tmp_path / "lora", "--to", "gralora", "-o", tmp_path / "out")
    assert refused.status == 2
    assert "(in experts.gate_up_proj)" in refused.stderr
    assert "No GraLoRA can hold a stack of experts" in refused.stderr


def test_a_gate_of_one_row_is_named_with_the_ways_out(tmp_path: Path) -> None:
    """The shared expert's gate of Qwen2-MoE, which all-linear takes for a LoRA."""
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    ))  # fmt: skip
    config = LoraConfig(r=2, target_modules=["q_proj", "shared_expert_gate"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    convert = ["convert", tmp_path / "lora", "--to", "gralora", "-o", tmp_path / "out"]
    refused = run(*convert)
    assert refused.status == 2
    assert "shared_expert_gate: k=2 does not divide its 1 x 32 weight" in refused.stderr
    assert "--k 1 alone does" in refused.stderr
    assert "remove its tensors" in refused.stderr
    run_ok(*convert, "--k", "1")
    file = tmp_path / "lora/adapter_model.safetensors"
    rest = {name: t for name, t in load_file(file).items() if "shared_expert_gate" not in name}
    save_file(rest, file, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "out")
    run_ok(*convert)


def test_a_weight_that_torch_computes_is_no_missing_module(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 8))
    parametrizations.weight_norm(model[1])
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    write_adapter(tmp_path / "adapter", {"0": random_delta(12, 8), "1": random_delta(8, 12)})
    refused = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert refused.status == 2
    assert "torch computes it" in refused.stderr
    assert "remove_parametrizations" in refused.stderr
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")


def test_what_transformers_saved_after_dequantising_is_named_with_the_cure(tmp_path: Path) -> None:
    """fp8: codes with scales and no quantization_config; gpt-oss: BF16 under packed names."""
    tensors = write_base(tmp_path / "fp8", model_type="llama")
    name = "layers.0.up.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "fp8/model.safetensors", metadata={"format": "pt"})
    tensors = write_base(tmp_path / "mxfp4", model_type="gpt_oss")
    tensors["model.layers.0.mlp.experts.down_proj_blocks"] = torch.zeros(2, 4, 4).bfloat16()
    save_file(tensors, tmp_path / "mxfp4/model.safetensors", metadata={"format": "pt"})
    write_adapter(tmp_path / "adapter", {"layers.0.up": random_delta(*tensors[name].shape)})
    for base in ("fp8", "mxfp4"):
        arguments = [tmp_path / "adapter", "--base", tmp_path / base]
        assert run("validate", *arguments).status == 1
        refused = run("merge", *arguments, "-o", tmp_path / "out")
        assert refused.status == 2
        assert "base-quantised" in refused.stderr
        assert "save_original_format=False" in refused.stderr
