"""`convert`: every result loads in real PEFT without a warning and computes what it should."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import gralora_convert as gc
from gralora_convert.delta import Gralora, dense
from tests.builders import random_delta, write_adapter, write_base
from tests.command import run, run_ok
from tests.models import ARCHITECTURES, Architecture, close, load, outputs, save_base, train

LLAMA = Architecture(ARCHITECTURES["llama"].build, ["q_proj", "down_proj"])
GPT2 = Architecture(ARCHITECTURES["gpt2"].build, ["c_attn", "c_proj"])


def step(model: torch.nn.Module, steps: int) -> list[float]:
    """A few steps of gradient descent on all that is trainable; the losses on the way."""
    losses = []
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=5e-3)
    model.train()
    for _ in range(steps):
        logits = model(**LLAMA.inputs).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), LLAMA.inputs["input_ids"][:, 1:].flatten()
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def lora(base: Path, architecture: Architecture, folder: Path, **config: Any) -> PeftModel:
    """A LoRA that PEFT trained for some steps and saved."""
    torch.manual_seed(2)
    options: dict[str, Any] = {"target_modules": architecture.targets, "r": 4, "lora_alpha": 6}
    model = load(base, architecture.auto)
    adapted = get_peft_model(model, LoraConfig(**(options | config), task_type="CAUSAL_LM"))
    step(adapted, 8)
    adapted.save_pretrained(folder)
    return adapted


def in_peft(base: Path, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """The adapter in real PEFT; any warning fails."""
    model = load(base, "AutoModelForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval()


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda f: next(iter(f), "plain"),
)
@pytest.mark.parametrize("to", ["gralora", "hybrid"])
def test_a_lora_goes_on_as_gralora_from_where_it_was(
    to: str, features: dict[str, Any], tmp_path: Path
) -> None:
    architecture = GPT2 if "bias" in features else LLAMA
    base = save_base(architecture, tmp_path / "base")
    source = lora(base, architecture, tmp_path / "lora", **features)
    expected = outputs(source)
    out = run_ok("convert", tmp_path / "lora", "--to", to, "-o", tmp_path / "new")
    assert "exact" in out.stdout
    converted = in_peft(base, tmp_path / "new", trainable=True)
    assert close(outputs(converted), expected) <= 1e-5
    before = {n: p.detach().clone() for n, p in converted.named_parameters() if p.requires_grad}
    losses = step(converted, 6)
    assert losses[-1] < losses[0]
    moved = [n for n, p in converted.named_parameters() if n in before and (p != before[n]).any()]
    assert len(moved) == len(before)  # every factor learns
    assert run("validate", tmp_path / "new", "--base", base).status == 0


SOURCES: dict[str, dict[str, Any]] = {
    "plain": {"gralora_k": 2},
    "hybrid": {"gralora_k": 4, "hybrid_r": 3, "alpha": 10.5},
    "biased": {"bias": "gralora_only"},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_gralora_to_lora_is_the_same_function_merged_or_not(
    architecture: Architecture, source: str, tmp_path: Path
) -> None:
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter", **SOURCES[source])
    expected = outputs(adapted)
    run_ok("convert", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    k, h = SOURCES[source].get("gralora_k", 2), SOURCES[source].get("hybrid_r", 0)
    assert config["r"] == config["lora_alpha"] == min(k * 8 + h, 16)
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    as_lora = in_peft(base, tmp_path / "lora")
    assert close(outputs(as_lora), expected) <= 1e-5
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    ours = dict(load(tmp_path / "merged", architecture.auto).named_parameters())
    for name, parameter in as_lora.merge_and_unload().named_parameters():
        assert torch.allclose(parameter, ours[name], atol=2e-6), name


@pytest.mark.parametrize(
    ("arguments", "exact"),
    [
        (["--to", "gralora", "--k", "4"], True),
        (["--to", "gralora", "--r", "16"], True),
        (["--to", "hybrid", "--hybrid-r", "2"], True),
        (["--to", "gralora", "--alpha", "5"], True),
        (["--to", "gralora", "--k", "4", "--r", "8", "--allow-inexact"], False),
        (["--to", "gralora", "--r", "4", "--allow-inexact"], False),
        (["--to", "lora", "--r", "6", "--allow-inexact"], False),
        (["--to", "lora", "--max-error", "0.3"], False),
        (["--to", "gralora", "--max-error", "0.3"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_within_the_family(arguments: list[str], exact: bool, tmp_path: Path) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    adapted = train(base, LLAMA, tmp_path / "adapter", gralora_k=2, steps=20)
    receipt = run_ok(
        "convert", tmp_path / "adapter", *arguments, "-o", tmp_path / "new", "--json"
    ).json
    error = receipt["error"]
    assert isinstance(error, float)
    source, result = gc.Adapter.open(tmp_path / "adapter"), gc.Adapter.open(tmp_path / "new")
    pairs = [(dense(source.delta(m)).double(), dense(result.delta(m)).double())
             for m in source.modules]  # fmt: skip
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    total = sum(float(a.square().sum()) for a, _ in pairs)
    measured = (lost / total) ** 0.5
    assert measured == pytest.approx(error, rel=0.01, abs=1e-6)
    assert (error < 1e-6) is exact
    if "--max-error" in arguments:
        assert error <= 0.3
    in_peft(base, tmp_path / "new")
    if exact:
        assert close(outputs(in_peft(base, tmp_path / "new")), outputs(adapted)) <= 1e-5


def test_what_would_be_lost_is_refused_with_the_rank_that_loses_nothing(tmp_path: Path) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    train(base, LLAMA, tmp_path / "adapter", gralora_k=2, steps=20)
    refused = run("convert", tmp_path / "adapter", "--to", "lora", "--r", "6", "-o", tmp_path / "x")
    assert refused.status == 2
    assert "exact from r=16" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "feature",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=lambda f: next(iter(f.values())),
)
def test_loras_that_are_more_than_their_factors_are_refused_by_name(
    feature: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    lora(base, LLAMA, tmp_path / "lora", **feature)
    for command in (["convert", "--to", "gralora"], ["merge", "--base", base]):
        refused = run(*command, tmp_path / "lora", "-o", tmp_path / "out")
        assert refused.status == 2
        assert (feature.get("init_lora_weights") or "dora") in refused.stderr.lower()
        assert not (tmp_path / "out").exists()


def test_bytes_do_not_depend_on_jobs(tmp_path: Path) -> None:
    deltas = {
        name: random_delta(*shape, r=8, k=2, hybrid_r=2, seed=i)
        for i, (name, shape) in enumerate({"a": (24, 32), "b": (32, 24), "c": (16, 16)}.items())
    }
    adapter = write_adapter(tmp_path / "adapter", deltas)
    write_base(tmp_path / "base")
    made = []
    for jobs in (1, 3):
        gc.convert(adapter, to="lora", r=5, allow_inexact=True).write(
            tmp_path / f"out{jobs}", jobs=jobs
        )
        made.append((tmp_path / f"out{jobs}" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_bfloat16_adapters_stay_bfloat16(tmp_path: Path) -> None:
    deltas = {"a": random_delta(24, 32, r=8, k=2)}
    short = {n: Gralora(d.A.bfloat16(), d.B.bfloat16(), d.scaling) for n, d in deltas.items()}
    adapter = write_adapter(tmp_path / "adapter", short)
    gc.convert(adapter, to="lora").write(tmp_path / "lora")
    result = gc.Adapter.open(tmp_path / "lora")
    assert {spec.dtype for spec in result.tensors.values()} == {"BF16"}
    assert torch.equal(dense(result.delta("a")), dense(gc.Adapter.open(adapter).delta("a")))
