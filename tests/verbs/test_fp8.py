"""Bases in fp8, by the real writers: merged, loaded by transformers, verified, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gralora_convert.base import scales_of
from gralora_convert.disk import Checkpoint, read_torch
from tests import quantised
from tests.command import run, run_ok
from tests.quantised import FORMATS, Tensors, adapt, edit, plain_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TARGETS = ["q_proj", "down_proj"]
PULLED = {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}  # o_proj: the same input width


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base in one format, an adapter on it, and the logits of both together, unmerged."""
    folder = tmp_path_factory.mktemp("fp8")
    plain = quantised.write(folder / "base", request.param)
    model = plain_model(folder / "base", plain)
    base_logits = model(IDS).logits.detach()
    adapted = adapt(model, folder / "adapter", TARGETS)
    return folder, plain, base_logits, adapted(IDS).logits.detach()


def merged(folder: Path, name: str, *options: str) -> tuple[Tensors, dict[str, Any], str]:
    out = folder / name
    if not out.exists():
        (folder / f"{name}.txt").write_text(
            run_ok("merge", folder / "adapter", "--base", folder / "base", "-o", out, *options)
            .stderr
        )  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    return load_file(out / "model.safetensors"), config, (folder / f"{name}.txt").read_text()


def test_touched_and_fused_become_plain_and_all_else_keeps_its_bytes(made: Any) -> None:
    folder, plain, _, _ = made
    tensors, config, _ = merged(folder, "mixed")
    before = load_file(folder / "base" / "model.safetensors")
    for name, value in before.items():
        module, leaf = name.rsplit(".", 1)
        is_code = f"{module}.weight" in plain
        if is_code and module.rpartition(".")[2] in PULLED:
            assert (name in tensors) == (leaf == "weight"), name
        else:
            assert torch.equal(_bytes(tensors[name]), _bytes(value)), name
    for name, exact in plain.items():
        leaf = name.split(".")[-2]
        if leaf in PULLED and leaf not in TARGETS:
            assert torch.equal(tensors[name], exact.bfloat16()), name
    quantisation = config["quantization_config"]
    listed = quantisation.get("ignore") or quantisation["modules_to_not_convert"]
    assert "lm_head" in listed
    for name in plain:
        module = name.removesuffix(".weight")
        assert (module in listed) == (module.rpartition(".")[2] in PULLED), module


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float32"])
def test_the_merge_computes_what_the_unmerged_model_does(made: Any, dtype: str) -> None:
    folder, plain, base_logits, wanted = made
    tensors, config, _ = merged(folder, f"out-{dtype}", "--dtype", dtype)
    if dtype != "keep":
        assert "quantization_config" not in config
        assert not [name for name in tensors if "scale" in name]
    model = plain_model(folder / "base", plain)
    state = model.state_dict()
    held = {n: plain[n] if v.dtype == torch.float8_e4m3fn else v for n, v in tensors.items()}
    model.load_state_dict({name: held[name].float() for name in state})
    found = model(IDS).logits
    moved = float((wanted - base_logits).abs().max())
    assert float((found - wanted).abs().max()) < moved * (1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("name", ["mixed", "out-bfloat16"])
def test_transformers_loads_it_without_a_word(made: Any, name: str) -> None:
    folder, plain, _, _ = made
    dtype = "bfloat16" if "-" in name else "keep"
    tensors, _, _ = merged(folder, name, "--dtype", dtype)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder / name, dtype="auto", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    state = model.state_dict()
    for key, value in tensors.items():
        if value.dtype == torch.bfloat16 and key in state and "scale" not in key:
            assert torch.equal(state[key], value), key
    assert plain.keys() <= {key.replace("_packed", "") for key in state}


@pytest.mark.parametrize("name", ["mixed", "out-bfloat16"])
@pytest.mark.parametrize("level", ["weights", "modules", "model"])
def test_verify_says_yes(made: Any, name: str, level: str) -> None:
    folder = made[0]
    merged(folder, name, "--dtype", "bfloat16" if "-" in name else "keep")
    run_ok(
        "verify", folder / "adapter", "--base", folder / "base", "--merged", folder / name,
        "--level", level,
    )  # fmt: skip


def test_verify_says_yes_to_a_merge_in_memory_of_the_dequantised_model(made: Any) -> None:
    """What PEFT makes of a base that was rounded to bfloat16 when it was dequantised."""
    from peft import PeftModel

    folder, plain, _, _ = made
    rounded = {name: value.bfloat16() for name, value in plain.items()}
    model = plain_model(folder / "base", rounded, torch.bfloat16)
    other = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    other.save_pretrained(folder / "peft")
    run_ok(
        "verify", folder / "adapter", "--base", folder / "base", "--merged", folder / "peft",
        "--level", "modules",
    )  # fmt: skip


def _without_entry(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for key in ("ignore", "modules_to_not_convert"):
        if config.get(key):
            config[key] = [
                one for one in config[key] if not one.endswith("layers.0.self_attn.q_proj")
            ]
    edit(folder, quantization_config=config)
    return "loaders take it for codes"


def _companion_left(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    base = load_file(folder.parent / "base" / "model.safetensors")
    name = next(n for n in base if "layers.0.self_attn.q_proj.weight_scale" in n)
    _save(folder, {**tensors, name: base[name]})
    return "was left beside a weight that is plain now"


def _scale_lost(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "layers.0.mlp.up_proj.weight_scale" in n)
    _save(folder, {n: v for n, v in tensors.items() if n != name})
    return "is missing"


def _no_config(folder: Path) -> str:
    edit(folder, quantization_config=None)
    return "no quantization_config says how they are read"


def _codes_again(folder: Path) -> str:
    """The adapted weight on the base's own grid."""
    tensors = load_file(folder / "model.safetensors")
    base = load_file(folder.parent / "base" / "model.safetensors")
    wanted = "layers.0.self_attn.q_proj."
    kept = {n: v for n, v in tensors.items() if wanted not in n}
    _save(folder, kept | {n: v for n, v in base.items() if wanted in n})
    return "F8_E4M3"


def _head_unlisted(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "fp8":
        return _without_entry(folder)
    config["modules_to_not_convert"].remove("lm_head")
    edit(folder, quantization_config=config)
    return "lm_head.weight: is plain, but no list of the quantization_config has it"


def _scales_cast(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "layers.0.mlp.up_proj.weight_scale" in n)
    other = torch.float16 if tensors[name].dtype == torch.bfloat16 else torch.bfloat16
    tensors[name] = tensors[name].to(other)
    _save(folder, tensors)
    return "read otherwise than in the base"


def _pulled_changed(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] *= 1.02
    _save(folder, tensors)
    return "was changed, but no adapter touches it"


def _save(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        _without_entry,
        _companion_left,
        _scale_lost,
        _no_config,
        _codes_again,
        _pulled_changed,
        _head_unlisted,
        _scales_cast,
    ],
)
def test_verify_says_no(made: Any, damage: Any) -> None:
    folder = made[0]
    merged(folder, "mixed")
    wrong = folder / damage.__name__
    shutil.copytree(folder / "mixed", wrong)
    word = damage(wrong)
    outcome = run(
        "verify", folder / "adapter", "--base", folder / "base", "--merged", wrong,
        "--level", "weights",
    )  # fmt: skip
    assert outcome.status == 1, outcome.stdout + outcome.stderr
    assert word in outcome.stdout


def _bytes(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1).view(torch.uint8)


def test_verify_says_no_to_what_transformers_saves_of_a_dequantised_model(tmp_path: Path) -> None:
    """Codes again, under plain names, without a quantization_config (transformers 5.23)."""
    from peft import PeftModel

    plain = quantised.write(tmp_path / "base", "fp8 blocks")
    adapt(plain_model(tmp_path / "base", plain), tmp_path / "adapter", TARGETS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merge = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    merge.save_pretrained(tmp_path / "out")
    outcome = run(
        "verify", tmp_path / "adapter", "--base", tmp_path / "base", "--merged", tmp_path / "out"
    )
    assert outcome.status == 1
    assert "no quantization_config says how they are read" in outcome.stdout


GOLDEN = Path(__file__).parents[2] / "fixtures" / "llmcompressor-0.14.0.1"


@pytest.mark.parametrize("name", ["channel", "block"])
def test_golden_bases_of_llm_compressor(name: str, tmp_path: Path) -> None:
    """Decoded as compressed-tensors does, difference 0; merged, the recorded logits."""
    folder = GOLDEN / name
    wanted = load_file(folder / "outputs.safetensors")
    specs = scales_of(Checkpoint.open(folder / "base")).specs
    assert len(specs) == 7
    for tensor, spec in specs.items():
        assert torch.equal(read_torch(spec), wanted[tensor]), tensor
    arguments = [folder / "adapter", "--base", folder / "base"]
    run_ok("merge", *arguments, "-o", tmp_path / "out", "--dtype", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(IDS).logits, wanted["adapted"], rtol=0, atol=1e-4)
    assert float((wanted["adapted"] - wanted["base"]).abs().max()) > 0.01
    run_ok("merge", *arguments, "-o", tmp_path / "mixed")
    run_ok("verify", *arguments, "--merged", tmp_path / "mixed", "--level", "model")
