"""Exported LoRAs under the rules of the servers: what vLLM checks, what llama.cpp scales by."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from gralora_convert.verbs.serving import SERVED_RANKS, refusals, served_rank
from tests.command import run_ok

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SOURCES = [
    "llama-hybrid", "llama-k4", "llama-regex", "llama-bf16-factors", "gpt2-hybrid-k4", "lora",
    "lora-patterns", "lora-rslora",
]  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_an_exported_lora_keeps_the_rules(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run_ok("convert", FIXTURES / "peft-0.21.2" / name, "--to", "lora", "-o", out).stdout
    config = json.loads((out / "adapter_config.json").read_text())
    r = config["r"]
    # vllm/lora/peft_helper.py: required fields, and what it refuses
    assert config["peft_type"] == "LORA"
    assert config["target_modules"]
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    # one global scale of 1: servers leave patterns out, llama.cpp divides by each tensor's own rank
    assert config["lora_alpha"] == r
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    if not name.startswith("gpt2"):  # which vLLM does not serve
        assert f"--max-lora-rank {served_rank(r)}" in shown
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
        for key in keys:
            # vllm/lora/utils.py, parse_fine_tuned_lora_name
            assert key.startswith("base_model.model.")
            assert key.endswith((".lora_A.weight", ".lora_B.weight"))
            shape = file.get_slice(key).get_shape()
            assert shape[0 if "lora_A" in key else 1] == r
    assert {k.replace("lora_A", "lora_B") for k in keys if "lora_A" in k} == {
        k for k in keys if "lora_B" in k
    }


def test_served_ranks() -> None:
    for r in range(1, SERVED_RANKS[-1] + 1):
        rank = served_rank(r)
        assert rank is not None
        assert r <= rank
        assert not [other for other in SERVED_RANKS if r <= other < rank]
    assert served_rank(SERVED_RANKS[-1] + 1) is None


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("rank", "modules", "extras", "vllm", "sglang"),
    [
        (16, ["self_attn.q_proj", "self_attn.v_proj"], False, "", ""),
        (16, ["mlp.gate_proj"], False, "", ""),
        (16, ["self_attn.q_proj"], False, "", "v_proj where q_proj"),
        (16, ["self_attn.k_proj", "self_attn.v_proj"], False, "", "q_proj where k_proj"),
        (16, ["mlp.up_proj"], False, "", "gate_proj where up_proj"),
        (513, ["mlp.gate_proj"], False, "ranks up to 512", ""),
        (16, ["mlp.gate_proj"], True, "biases or saved modules", "biases or saved modules"),
        (16, ["attn.c_attn"], False, "layers of GPT-2", "layers of GPT-2"),
    ],
)
def test_each_server_takes_it_or_says_why_not(
    rank: int, modules: list[str], extras: bool, vllm: str, sglang: str
) -> None:
    found = refusals(rank, [f"{LAYER}.{module}" for module in modules], extras=extras)
    for server, reason in (("vllm", vllm), ("sglang", sglang)):
        assert reason in found[server]
        assert bool(reason) == bool(found[server])


def test_no_line_is_printed_for_what_a_server_refuses(tmp_path: Path) -> None:
    fixtures = FIXTURES / "peft-0.21.2"
    for name, refused in (("gpt2-gralora", "GPT-2"), ("llama-saved-head", "saved modules")):
        told = run_ok("convert", fixtures / name, "--to", "lora", "-o", tmp_path / name).stdout
        assert "vllm serve" not in told
        assert "sglang.launch_server" not in told
        assert f"not by vLLM, which {'has no' if refused == 'GPT-2' else 'does not load'}" in told
        assert "to serve: merge it" in told
    told = run_ok(
        "convert", fixtures / "llama-all-linear", "--to", "lora", "-o", tmp_path / "all"
    ).stdout
    assert "to serve: vllm serve MODEL --enable-lora" in told
    assert "python -m sglang.launch_server" in told
    assert "--dtype float32 for a model in float32" in told


def test_a_merge_in_float32_says_how_it_stays_so(tmp_path: Path) -> None:
    arguments = [FIXTURES / "peft-0.21.2/llama-bf16", "--base", FIXTURES / "bases/llama-bf16"]
    told = run_ok("merge", *arguments, "-o", tmp_path / "wide", "--dtype", "float32").stdout
    assert "serve it with --dtype float32" in told
    assert "--outtype f32" in told
    assert "--outtype" not in run_ok("merge", *arguments, "-o", tmp_path / "kept").stdout
