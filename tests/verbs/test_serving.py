"""Exported LoRAs under the rules of the servers: what vLLM checks, what llama.cpp scales by."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.adapting import Case
from benchmarks.architectures import judge
from gralora_convert.adapters import LoraConfig
from gralora_convert.cli.summaries import commands
from gralora_convert.disk import Checkpoint
from gralora_convert.verbs.serving import (
    SERVED_RANKS,
    Exported,
    refusals,
    served_rank,
)
from tests.builders import write_model
from tests.command import run_ok

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SERVERS = ["vllm", "sglang", "llama.cpp"]
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


ATTENTION = ["q_proj", "k_proj", "v_proj"]


def exported(
    *leaves: str, values: Sequence[str] = (), base: str | None = None, **fields: Any
) -> Exported:
    """A LoRA on these layers of the first block, and on others by their whole names."""
    parents = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn"}
    modules = [
        leaf
        if "." in leaf or leaf == "lm_head"
        else f"model.layers.0.{parents.get(leaf, 'mlp')}.{leaf}"
        for leaf in leaves
    ]
    config = LoraConfig(**{"r": 16, "target_modules": list(leaves), **fields})
    held = None if base is None else Checkpoint.open(FIXTURES / "bases" / base)
    return Exported(config, modules, values, held)


@pytest.mark.parametrize(
    ("lora", "reasons"),
    [
        (exported(*ATTENTION, "gate_proj", "down_proj"), {}),
        (exported("q_proj"), {"sglang": "v_proj where q_proj"}),
        (exported("k_proj", "v_proj"), {"sglang": "q_proj where k_proj"}),
        (exported("up_proj"), {"sglang": "gate_proj where up_proj"}),
        (exported("gate_proj", r=513), {"vllm": "ranks up to 512: `r=512`"}),
        (exported("gate_proj", rank_pattern={"gate_proj": 600}),
         {"vllm": "ranks up to 512", "sglang": "one rank for all"}),
        (exported("gate_proj", use_rslora=True),
         {"sglang": "global fields alone", "llama.cpp": "lora_alpha alone"}),
        (exported("gate_proj", target_modules=".*gate_proj"), {"sglang": "no pattern"}),
        (exported("gate_proj", bias="all"), dict.fromkeys(SERVERS, "does not load biases")),
        (exported("gate_proj", values=["lm_head.weight"], modules_to_save=["lm_head"]),
         dict.fromkeys(SERVERS, "does not load saved modules")),
        (exported("gate_proj", values=["score.weight"], modules_to_save=["score"]),
         dict.fromkeys(SERVERS[1:], "does not load saved modules")),
        (exported("gate_proj", use_dora=True), dict.fromkeys(SERVERS, "does not load use_dora")),
        (exported("transformer.h.0.attn.c_attn"),
         {"vllm": "no LoRA for GPT2LMHeadModel", "sglang": "names (c_attn)",
          "llama.cpp": "factors of c_attn transposed"}),
        (exported("transformer.h.0.attn.c_attn", base="llama"), {"sglang": "names (c_attn)"}),
        (exported("encoder.layer.0.query", base="bert"), {"sglang": "names (query)"}),
        (exported("blocks.0.gate_proj"), {"sglang": "not below layers.N"}),
        (exported("lm_head", base="llama"), {}),
        (exported("lm_head", base="llama-tied"), {"llama.cpp": "head that is tied"}),
        (exported(*(f"layers.0.experts.{n}.w{i}" for n in (0, 1) for i in (1, 2, 3))),
         {"sglang": "names (w1, w2, w3)"}),
        (exported(*(f"layers.0.experts.{n}.w{i}" for n in (0, 1) for i in (1, 3))),
         {"sglang": "names (w1, w3)", **dict.fromkeys(("vllm", "llama.cpp"), "all experts")}),
        (exported(*(f"layers.0.experts.{n}.{name}_proj" for n in (0, 1)
                    for name in ("gate", "up", "down"))), {"sglang": "LoRAs of experts right"}),
        (exported("layers.0.mlp.gate"), {"vllm": "LoRAs of routers", "sglang": "names (gate)"}),
        (exported("layers.0.block_sparse_moe.gate"), {"sglang": "names (gate)"}),
        (exported("layers.0.self_attn.kv_b_proj"), {"sglang": "LoRAs of kv_b_proj right"}),
        (exported(*(f"layers.0.experts.1.w{i}" for i in (1, 2, 3))),
         {"sglang": "names (w1, w2, w3)", **dict.fromkeys(("vllm", "llama.cpp"), "all experts")}),
    ],
    ids=lambda value: " ".join(value.modules) if isinstance(value, Exported) else "",
)  # fmt: skip
def test_each_engine_takes_it_or_says_why_not(lora: Exported, reasons: dict[str, str]) -> None:
    found = {name: why for name, why in refusals(lora).items() if why}
    assert found.keys() == reasons.keys()
    assert all(reason in found[name] for name, reason in reasons.items()), found


def test_no_line_is_printed_for_what_an_engine_refuses(tmp_path: Path) -> None:
    fixtures = FIXTURES / "peft-0.21.2"
    for name, refused in (("gpt2-gralora", "has no LoRA"), ("llama-saved-head", "does not load")):
        told = run_ok("convert", fixtures / name, "--to", "lora", "-o", tmp_path / name).stdout
        assert not any(start in told for start in ("vllm serve", "sglang serve", "llama-server"))
        assert f"not by vLLM, which {refused}" in told
        assert "to serve: merge it" in told
    out = tmp_path / "all"
    told = run_ok("convert", fixtures / "llama-all-linear", "--to", "lora", "-o", out).stdout
    for engine in SERVERS:
        for line in commands(engine, 8, "float32", str(out)):
            assert line in told
    assert "DTYPE" not in told


def test_the_dtype_is_the_bases_own(tmp_path: Path) -> None:
    adapter = shutil.copytree(FIXTURES / "peft-0.21.2/llama-bf16", tmp_path / "adapter")
    told = run_ok("convert", adapter, "--to", "lora", "-o", tmp_path / "here").stdout
    assert "vllm serve MODEL --dtype bfloat16 " in told
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    told = run_ok("convert", adapter, "--to", "lora", "-o", tmp_path / "elsewhere").stdout
    assert "vllm serve MODEL --dtype DTYPE " in told
    assert "DTYPE is MODEL's own" in told


def test_a_merge_in_float32_says_how_it_stays_so(tmp_path: Path) -> None:
    arguments = [FIXTURES / "peft-0.21.2/llama-bf16", "--base", FIXTURES / "bases/llama-bf16"]
    told = run_ok("merge", *arguments, "-o", tmp_path / "wide", "--dtype", "float32").stdout
    assert "serve it with --dtype float32" in told
    assert "--outtype f32" in told
    assert "--outtype" not in run_ok("merge", *arguments, "-o", tmp_path / "kept").stdout


def test_the_base_tells_how_many_experts_there_are(tmp_path: Path) -> None:
    stack = "model.layers.0.block_sparse_moe.experts"
    layers = [f"{stack}.{n}.w{i}" for n in range(4) for i in (1, 2, 3)]
    base = Checkpoint.open(
        write_model(tmp_path, {f"{name}.weight": torch.zeros(4, 4) for name in layers})
    )
    config = LoraConfig(r=4, target_modules=layers)
    for held in (layers, layers[:6]):
        for modules in (held, held[:-1]):
            why = refusals(Exported(config, modules, base=base))
            assert bool(why["vllm"]) == bool(why["llama.cpp"]) == (modules != layers)


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        (Case("deepseek_v3", "AutoModelForCausalLM"), "loses the factors of"),
        (Case("laguna", "AutoModelForCausalLM"), "loses the factors of 3 layers"),
        (Case("mamba2", "AutoModelForCausalLM"), "refuses LoRAs of 2 layers"),
        (Case("qwen2_moe", "AutoModelForCausalLM"), ""),  # shared experts that PEFT reads
    ],
    ids=lambda value: value.model_type if isinstance(value, Case) else None,
)
def test_what_peft_loses_of_a_lora_is_told(case: Case, refused: str, tmp_path: Path) -> None:
    """As `benchmarks.architectures --lora` found by loading each in PEFT, which is judge here."""
    found = judge(case, tmp_path, lora=True)
    assert found.kind == ("refused" if refused else "right"), found
    assert refused in found.reason
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base", "--to", "lora"]
    told = run_ok("convert", *arguments, "-o", tmp_path / "anyway")
    assert (f"note: PEFT 0.21.2 {refused}" in told.stderr) == bool(refused)
