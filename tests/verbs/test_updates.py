"""LoRAs that are more than scaling * B @ A: each row of the verdict table, made by real PEFT."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file

import gralora_convert as gc
from gralora_convert.errors import UnsupportedError
from gralora_convert.verbs.updates import Source
from tests.command import run, run_ok
from tests.verbs.test_conversion import GPT2, LLAMA, in_peft
from tests.zoo import ARCHITECTURES, Architecture, close, load, outputs, save_base

Bases = dict[str, Path]


@dataclass(frozen=True)
class Row:
    """A kind of LoRA, and what `convert` needs to read it."""

    config: dict[str, Any]
    architecture: Architecture = LLAMA
    needs_base: bool = False
    options: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "gpt2" if self.architecture is GPT2 else "llama"


BD = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
EXACT: dict[str, Row] = {
    "rslora and patterns": Row({"use_rslora": True, **PATTERNS}),
    "gaussian": Row({"init_lora_weights": "gaussian"}),
    "orthogonal": Row({"init_lora_weights": "orthogonal"}),
    "mica": Row({"init_lora_weights": "mica"}),
    "excluded modules": Row({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    "velora": Row({"velora_config": VeloraConfig()}),
    "monteclora": Row({"monteclora_config": MontecloraConfig()}),
    "bdlora": Row({"use_bdlora": BD}),
    "bias": Row({"bias": "lora_only"}, GPT2),
    "saved": Row({"modules_to_save": ["lm_head"]}),
    "lora_bias": Row({"lora_bias": True}, GPT2, True),
    "lora_bias and bias": Row({"lora_bias": True, "bias": "lora_only"}, GPT2, True),
    "lora_bias and all biases": Row({"lora_bias": True, "bias": "all"}, GPT2, True),
    "pissa": Row({"init_lora_weights": "pissa"}, needs_base=True),
    "pissa of more than the weight": Row(
        {"init_lora_weights": "pissa", "r": 40, "use_rslora": True}, needs_base=True
    ),
    "olora of more than the weight": Row({"init_lora_weights": "olora", "r": 40}, needs_base=True),
    "pissa Conv1D": Row({"init_lora_weights": "pissa"}, GPT2, True),
    "pissa with patterns": Row(
        {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS}, needs_base=True
    ),
    "olora": Row({"init_lora_weights": "olora"}, needs_base=True),
    "olora Conv1D": Row(
        {"init_lora_weights": "olora", "target_modules": r".*attn\.c_proj"}, GPT2, True
    ),
    "dora": Row({"use_dora": True}, needs_base=True, options=["--r", "16"]),
    "dora Conv1D": Row({"use_dora": True}, GPT2, True, ["--r", "16"]),
    "dora on pissa": Row(
        {"use_dora": True, "init_lora_weights": "pissa"}, needs_base=True, options=["--r", "16"]
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": save_base(LLAMA, folder / "llama"),
        "gpt2": save_base(GPT2, folder / "gpt2"),
    }


def write(row: Row, base: Path, folder: Path) -> torch.Tensor:
    """The LoRA as PEFT makes it, every parameter moved as by training; the outputs of PEFT's model
    with it."""
    model = load(base, "AutoModelForCausalLM")
    torch.manual_seed(2)
    options: dict[str, Any] = {"target_modules": row.architecture.targets, "r": 4, "lora_alpha": 6}
    adapted = get_peft_model(model, LoraConfig(**(options | row.config), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(load(base, "AutoModelForCausalLM"), folder)
    return outputs(loaded)


@pytest.mark.parametrize("to", ["gralora", "hybrid", "lora"])
@pytest.mark.parametrize("name", EXACT)
def test_the_result_is_what_peft_loads(name: str, to: str, bases: Bases, tmp_path: Path) -> None:
    row = EXACT[name]
    base = bases[row.name]
    expected = write(row, base, tmp_path / "lora")
    options = [*(["--base", base] if row.needs_base else []), *row.options]
    done = run_ok("convert", tmp_path / "lora", "--to", to, "-o", tmp_path / "new", *options)
    assert "exact" in done.stdout
    assert close(outputs(load(base, "AutoModelForCausalLM")), expected) > 0.05
    assert close(outputs(in_peft(base, tmp_path / "new")), expected) <= 1e-5
    assert run("validate", tmp_path / "new", "--base", base).status == 0


@pytest.mark.parametrize("name", [name for name, row in EXACT.items() if row.needs_base])
def test_without_the_base_they_are_refused(name: str, bases: Bases, tmp_path: Path) -> None:
    row = EXACT[name]
    write(row, bases[row.name], tmp_path / "lora")
    refused = run("convert", tmp_path / "lora", "--to", "lora", "-o", tmp_path / "new")
    assert refused.status == 2
    assert "--base" in refused.stderr
    feature = row.config.get("init_lora_weights") or next(iter(row.config))
    assert feature in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options", [[], ["--r", "6"], ["--r", "6", "--allow-inexact"], ["--max-error", "0.3"]], ids=str
)
def test_a_dora_is_approximated_only_when_asked(
    options: list[str], bases: Bases, tmp_path: Path
) -> None:
    base = bases["llama"]
    expected = write(EXACT["dora"], base, tmp_path / "lora")
    plain = outputs(load(base, "AutoModelForCausalLM"))
    arguments = [tmp_path / "lora", "--to", "lora", "--base", base, "-o", tmp_path / "new"]
    done = run("convert", *arguments, *options)
    if len(options) < 2 or options == ["--r", "6"]:
        assert done.status == 2
        assert "--allow-inexact" in done.stderr
        return
    assert done.status == 0
    assert "approximate" in done.stdout
    found = outputs(in_peft(base, tmp_path / "new"))
    assert close(found, expected) < 0.6 * close(plain, expected)
    receipt = json.loads((tmp_path / "new/gralora_convert.json").read_text())
    source = Source.of(gc.Adapter.open(tmp_path / "lora"), base)
    result = gc.Adapter.open(tmp_path / "new")
    lost = total = 0.0
    for module in result.modules:
        wanted = gc.dense(source.delta(module), torch.float64)
        lost += float((wanted - gc.dense(result.delta(module), torch.float64)).square().sum())
        total += float(wanted.square().sum())
    assert receipt["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "pissa by a random start": ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4"]),
    "kasa": ({"kasa_config": KasaConfig()}, ["kasa"]),
    "alora": ({"alora_invocation_tokens": [3, 4]}, ["alora_invocation_tokens", "serve"]),
    "qalora": ({"use_qalora": True, "qalora_group_size": 4}, ["use_qalora", "serve"]),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, ["embeddings"]),
    "tokens": ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
    "parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
        ["target_parameters"],
    ),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_adapter_can_hold_is_refused_by_name(
    name: str, bases: Bases, tmp_path: Path
) -> None:
    config, words = REFUSED[name]
    write(Row(config), bases["llama"], tmp_path / "lora")
    for base in ([], ["--base", bases["llama"]]):
        refused = run(
            "convert", tmp_path / "lora", "--to", "gralora", "-o", tmp_path / "new", *base
        )
        assert refused.status == 2
        assert refused.stderr.count("\n") == 1
        assert all(word in refused.stderr for word in words), refused.stderr
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"}, {"arrow_config": {"top_k": 2}},
        {"megatron_config": {"tensor_model_parallel_size": 2}}, {"use_bdlora": {"nblocks": 0}},
        {"a_feature_of_tomorrow": 1},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)  # fmt: skip
def test_what_changes_the_mathematics_is_refused_by_name(
    change: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    write(Row({}), bases["llama"], tmp_path / "lora")
    path = tmp_path / "lora/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused = run("convert", tmp_path / "lora", "--to", "gralora", "-o", tmp_path / "new")
    assert refused.status == 2
    name, value = next(iter(change.items()))
    assert name in refused.stderr
    assert value in refused.stderr if isinstance(value, str) else True


def test_another_base_is_refused(bases: Bases, tmp_path: Path) -> None:
    write(EXACT["pissa"], bases["llama"], tmp_path / "lora")
    refused = run(
        "convert", tmp_path / "lora", "--to", "lora", "--base", bases["gpt2"], "-o", tmp_path / "x"
    )
    assert refused.status == 2
    assert "is not in the base" in refused.stderr


@pytest.mark.parametrize("name", EXACT)
def test_outlines_have_the_shapes_of_updates(name: str, bases: Bases, tmp_path: Path) -> None:
    row = EXACT[name]
    write(row, bases[row.name], tmp_path / "lora")
    adapter = gc.Adapter.open(tmp_path / "lora")
    source = Source.of(adapter, bases[row.name])
    for module in adapter.modules:
        outline, delta = source.outline(module), source.delta(module)
        assert type(outline) is type(delta)
        assert (outline.out_features, outline.in_features) == adapter.shape(module)
        assert (delta.out_features, delta.in_features) == adapter.shape(module)
        if isinstance(outline, gc.Lora) and isinstance(delta, gc.Lora):
            assert outline.r == delta.r


def test_a_pissa_of_a_bfloat16_base_survives_bfloat16(tmp_path: Path) -> None:
    """B A and B0 A0 are large and nearly the same: their difference is factored anew."""
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base", torch.bfloat16)
    write(EXACT["pissa"], base, tmp_path / "lora")
    source = Source.of(gc.Adapter.open(tmp_path / "lora"), base)
    plan = gc.convert(tmp_path / "lora", to="lora", base=base, dtype="bfloat16")
    plan.write(tmp_path / "new")
    tensors = load_file(tmp_path / "new/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    result = gc.Adapter.open(tmp_path / "new")
    for module in result.modules:
        wanted = gc.dense(source.delta(module), torch.float64)
        found = gc.dense(result.delta(module), torch.float64)
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("name", ["mica", "velora", "monteclora", "bdlora"])
def test_what_peft_trains_in_another_way_is_not_trained(
    name: str, bases: Bases, tmp_path: Path
) -> None:
    expected = write(EXACT[name], bases["llama"], tmp_path / "lora")
    model = load(bases["llama"], "AutoModelForCausalLM")
    with pytest.raises(UnsupportedError, match="trains in another way"):
        gc.attach(model, tmp_path / "lora", trainable=True)
    with gc.attach(model, tmp_path / "lora"):
        assert close(outputs(model), expected) <= 1e-5
