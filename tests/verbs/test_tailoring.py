"""LoRAs made for one engine: the same update in the engine's layout, or a refusal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gralora_convert as gc
from gralora_convert.adapters import key_of
from gralora_convert.errors import ConvertError, InexactError, MisuseError, UnsupportedError
from gralora_convert.output.adapter_files import New, adapter_plan
from tests.command import run, run_ok

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTERS = FIXTURES / "peft-0.21.2"


def made(name: str, server: str, out: Path) -> dict[str, torch.Tensor]:
    gc.convert(ADAPTERS / name, to="lora", server=server).write(out)
    tensors: dict[str, torch.Tensor] = load_file(out / "adapter_model.safetensors")
    return tensors


def factors(tensors: dict[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[key_of(module, "A", "lora")], tensors[key_of(module, "B", "lora")]


def test_sglang_gets_zeros_where_it_stacks(tmp_path: Path) -> None:
    tensors = made("llama-hybrid", "sglang", tmp_path / "out")
    plain = made("llama-hybrid", "peft", tmp_path / "plain")
    added = tensors.keys() - plain.keys()
    assert {key.split(".")[-3] for key in added} == {"v_proj"}
    for layer in (0, 1):
        a, b = factors(tensors, f"model.layers.{layer}.self_attn.v_proj")
        held, _ = factors(tensors, f"model.layers.{layer}.self_attn.q_proj")
        assert not a.any()
        assert not b.any()
        assert a.shape == held.shape
        assert b.shape == (8, 11)  # of the base: fewer heads than q_proj
    assert all(torch.equal(tensors[key], plain[key]) for key in plain)
    report = gc.validate(tmp_path / "out", server="sglang")
    assert report.ok
    assert {finding.code for finding in report.findings} == {"zero-factor"}
    again = gc.convert(tmp_path / "out", to="gralora", k=2)  # PEFT and we read it as any LoRA
    again.write(tmp_path / "again")


def test_a_shape_is_taken_from_the_base_or_asked_for(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    gc.convert(ADAPTERS / "llama-hybrid", to="lora").write(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MisuseError, match=r"v_proj beside q_proj.* does not show"):
        gc.convert(adapter, to="lora", server="sglang")
    gc.convert(adapter, to="lora", server="sglang", base=FIXTURES / "bases/llama")


def test_targets_of_a_pattern_are_listed_for_sglang(tmp_path: Path) -> None:
    made("llama-regex", "sglang", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    adapter = gc.Adapter.open(tmp_path / "out")
    assert sorted(config["target_modules"]) == sorted(adapter.modules)


def test_llama_cpp_gets_conv1d_factors_in_the_other_order(tmp_path: Path) -> None:
    tensors = made("gpt2-gralora", "llama.cpp", tmp_path / "out")
    plain = made("gpt2-gralora", "peft", tmp_path / "plain")
    assert tensors.keys() == plain.keys()
    for module in gc.Adapter.open(tmp_path / "plain").modules:
        (a, b), (a2, b2) = factors(plain, module), factors(tensors, module)
        assert torch.equal(b2 @ a2, (b @ a).T)
    assert gc.validate(tmp_path / "out", server="llama.cpp").ok is (
        gc.validate(tmp_path / "out").ok
    )
    assert not gc.validate(tmp_path / "out", server="peft").ok
    with pytest.raises(ConvertError, match="transposed_for"):
        gc.merge(tmp_path / "out", base=FIXTURES / "bases/gpt2")


@pytest.mark.parametrize(
    ("name", "server", "message"),
    [
        ("gpt2-gralora", "vllm", "no LoRA for GPT2LMHeadModel: merge it"),
        ("gpt2-gralora", "sglang", "no LoRA for layers of these names"),
        ("llama-saved-head", "vllm", "saved modules"),
        ("gpt2-bias-all", "llama.cpp", "does not load biases"),
        ("llama-tied-head", "llama.cpp", "head that is tied"),
    ],
)
def test_what_no_layout_serves_is_refused(name: str, server: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        gc.convert(ADAPTERS / name, to="lora", server=server)


@pytest.mark.parametrize("server", ["ollama", ""])
def test_an_engine_that_is_not_known(server: str) -> None:
    with pytest.raises(MisuseError, match="none of vllm, sglang"):
        gc.convert(ADAPTERS / "llama-hybrid", to="lora", server=server)
    with pytest.raises(MisuseError, match="none of vllm, sglang"):
        gc.validate(ADAPTERS / "llama-hybrid", server=server)


def test_an_engine_is_for_loras() -> None:
    with pytest.raises(MisuseError, match='goes with `to="lora"`'):
        gc.convert(ADAPTERS / "llama-hybrid", to="hybrid", server="vllm")


def wide(folder: Path, *, rank: int) -> Path:
    """A LoRA of rank 600 on paper, of this rank in truth."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator) for size in ((rank, 640), (640, rank)))
    mix = torch.randn(600, rank, generator=generator)
    left = torch.linalg.lstsq(mix.T, b.T, driver="gelsd").solution.T
    config = gc.LoraConfig(r=600, lora_alpha=600, target_modules=["q_proj"])
    lora = gc.Lora(mix @ a, left, 1.0)
    adapter_plan("test", {"layers.0.q_proj": New(lora)}, {}, config, dict).write(folder)
    return folder


def test_a_rank_above_the_servers_is_cut_where_that_loses_nothing(tmp_path: Path) -> None:
    plan = gc.convert(wide(tmp_path / "low", rank=20), to="lora", server="vllm")
    assert plan.files[0].parts[0].shape == (512, 640)
    high = wide(tmp_path / "high", rank=600)
    with pytest.raises(InexactError, match=r"vLLM takes ranks up to 512: r=512 cannot") as refused:
        gc.convert(high, to="lora", server="vllm")
    assert 0 < refused.value.error < 1
    assert "`r=512` and `allow_inexact=True`" in refused.value.hint
    gc.convert(high, to="lora", server="vllm", r=512, allow_inexact=True)
    with pytest.raises(UnsupportedError, match="takes ranks up to 512"):
        gc.convert(high, to="lora", server="vllm", r=600)
    assert gc.convert(high, to="lora", server="llama.cpp").files[0].parts[0].shape[0] == 600


def test_validate_is_a_gate_for_an_engine(tmp_path: Path) -> None:
    adapter = ADAPTERS / "llama-hybrid"
    outcome = run("validate", adapter, "--for", "vllm")
    assert outcome.status == 1
    assert "error[server-refuses]" in outcome.stdout
    assert "`convert` it with --to lora and --for vllm" in outcome.stdout
    run_ok("validate", adapter, "--for", "peft")
    run_ok("convert", adapter, "--to", "lora", "--for", "vllm", "-o", tmp_path / "out")
    run_ok("validate", tmp_path / "out", "--for", "vllm")
    outcome = run("validate", tmp_path / "out", "--for", "sglang")
    assert outcome.status == 1
    assert "SGLang 0.5.23 needs v_proj where q_proj is adapted (--for sglang" in outcome.stdout
