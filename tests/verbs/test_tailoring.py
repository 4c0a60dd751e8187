"""LoRAs made for one engine: the same update in the engine's layout, or a refusal."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gralora_convert as gc
from gralora_convert.adapters import LoraConfig, key_of
from gralora_convert.delta import dense
from gralora_convert.errors import ConvertError, InexactError, MisuseError, UnsupportedError
from gralora_convert.output.adapter_files import New, adapter_plan
from gralora_convert.verbs.serving import Exported, reasons, served_rank
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


def uneven(folder: Path, *names: str, size: int = 64) -> Path:
    """A LoRA of rank 32 whose modules fall off at different speeds."""
    config = gc.LoraConfig(r=32, lora_alpha=64, target_modules=list(names))
    generator = torch.Generator().manual_seed(0)
    modules: dict[str, New[gc.Gralora | gc.Lora]] = {}
    for n, name in enumerate(names):
        falling = torch.exp(-torch.arange(32) / (1 + 3 * n))
        a, b = (torch.randn(s, generator=generator) for s in ((32, size), (size, 32)))
        modules[name] = New(gc.Lora(falling[:, None] * a, b, 2.0))
    adapter_plan("test", modules, {}, config, dict).write(folder)
    return folder


NAMES = [f"layers.{n}.self_attn.{leaf}" for n in (1, 11) for leaf in ("q_proj", "v_proj")]


@pytest.mark.parametrize("server", ["vllm", "llama.cpp", "peft"])
def test_an_error_gives_each_module_the_rank_that_it_needs(server: str, tmp_path: Path) -> None:
    adapter = uneven(tmp_path / "adapter", *NAMES)
    one, own = (
        gc.convert(adapter, to="lora", max_error=0.1, server=asked).write(tmp_path / name)
        for name, asked in (("one", None), ("own", server))
    )
    made, source = gc.Adapter.open(tmp_path / "own"), gc.Adapter.open(adapter)
    assert isinstance(made.config, LoraConfig)
    ranks = {module: made.config.rank(module) for module in made.modules}
    assert len(set(ranks.values())) == (3 if server == "vllm" else 4)
    assert own["ranks"] == {m: r for m, r in ranks.items() if r != own["r"]}
    assert isinstance(one["r"], int)
    if server == "vllm":  # which reserves the largest for all
        assert served_rank(max(ranks.values())) == served_rank(one["r"])
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("one", "own")]
    assert sizes[1] < 0.8 * sizes[0]
    lost = total = 0.0
    for module in NAMES:
        wanted = dense(source.delta(module))
        lost += float((dense(made.delta(module)) - wanted).square().sum())
        total += float(wanted.square().sum())
    assert 0.05 < (lost / total) ** 0.5 <= 0.1
    assert own["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_peft_computes_with_the_ranks_of_modules(tmp_path: Path) -> None:
    base, adapter = FIXTURES / "bases/llama", tmp_path / "own"
    options = ("--to", "lora", "--max-error", "0.3", "--for", "peft", "-o", adapter)
    outcome = run_ok("convert", ADAPTERS / "llama-hybrid", *options)
    assert "of ranks 1 to 2" in outcome.stdout
    assert "\n  r=1  model.layers.{0-1}.self_attn.q_proj\n" in outcome.stdout
    assert "not by SGLang, which reads one rank for all modules (--for sglang" in outcome.stdout
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(bare, adapter).eval()
    ours = gc.Adapter.open(adapter)
    for module in ours.modules:
        layer = adapted.base_model.model.get_submodule(module)
        assert torch.allclose(layer.get_delta_weight("default"), dense(ours.delta(module)))
    run_ok("merge", adapter, "--base", base, "-o", tmp_path / "merged")
    run_ok("verify", adapter, "--base", base, "--merged", tmp_path / "merged")


def test_sglang_and_experts_get_one_rank(tmp_path: Path) -> None:
    adapter = uneven(tmp_path / "adapter", *NAMES)
    config = gc.convert(adapter, to="lora", max_error=0.1, server="sglang").texts
    assert json.loads(config["adapter_config.json"])["rank_pattern"] == {}
    names = [f"layers.0.mlp.experts.{n}.{w}" for n in (0, 1) for w in ("w1", "w2", "w3")]
    experts = uneven(tmp_path / "experts", *names)
    config = gc.convert(experts, to="lora", max_error=0.1, server="vllm").texts
    assert json.loads(config["adapter_config.json"])["rank_pattern"] == {}


def test_experts_of_several_ranks_are_not_served() -> None:
    names = [f"layers.0.mlp.experts.{n}.{w}" for n in (0, 1) for w in ("w1", "w2", "w3")]
    config = gc.LoraConfig(r=8, target_modules=names, rank_pattern={"experts.1.w2": 4})
    for server in ("vllm", "llama.cpp"):
        assert "needs one rank for w2 of all experts" in reasons(server, Exported(config, names))[0]
    config = gc.LoraConfig(r=8, target_modules=names, rank_pattern={"w2": 4})
    assert not reasons("vllm", Exported(config, names))


def test_extract_makes_a_lora_for_an_engine(tmp_path: Path) -> None:
    base, merged = FIXTURES / "bases/llama", tmp_path / "merged"
    gc.merge(ADAPTERS / "llama-hybrid", base=base).write(merged)
    options = ("--base", base, "--tuned", merged, "--to", "lora", "--max-error", "0.3")
    run_ok("extract", *options, "--for", "vllm", "-o", tmp_path / "own")
    own = gc.Adapter.open(tmp_path / "own")
    assert isinstance(own.config, LoraConfig)
    assert {own.config.rank(module) for module in own.modules} == {1, 2}
    run_ok("extract", *options, "--for", "sglang", "-o", tmp_path / "stacked")
    assert gc.validate(tmp_path / "stacked", server="sglang").ok
    outcome = run("extract", *options[:-3], "hybrid", "--for", "vllm", "-o", tmp_path / "no")
    assert outcome.status == 2
    assert "goes with --to lora" in outcome.stderr


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
