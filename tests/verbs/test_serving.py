"""Exported LoRAs under the rules of the servers: what vLLM checks, what llama.cpp scales by."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from gralora_convert.verbs.serving import SERVED_RANKS, served_rank
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
