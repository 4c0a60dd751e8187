"""`inspect`: what a folder is, from headers; broken ones as far as they can be read."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gralora_convert.adapters.groups import group, ranges, split
from gralora_convert.cli.pages import inspection_page
from gralora_convert.verbs.inspection import Inspection, inspect
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "fixtures"
ADAPTER_KEYS = {
    "kind", "dialect", "r", "k", "hybrid_r", "alpha", "scaling", "bias", "modules", "parameters",
    "dtype", "exact_lora_rank", "base_model", "peft_version",
}  # fmt: skip
DENSE_KEYS = {
    "kind", "tensors", "parameters", "bytes", "dtype", "files", "architectures", "provenance",
}  # fmt: skip


def deep(folder: Path, layers: int = 22, **shape: int) -> Path:
    """An adapter of seven modules per layer."""
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("up", "down", "gate")
    ]
    modules = [f"model.layers.{i}.{name}" for i in range(layers) for name in names]
    return write_adapter(folder, {m: random_delta(32, 24, **shape) for m in modules})


def page_of(found: Inspection) -> str:
    return "\n".join(map(str, inspection_page(found)))


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_large_adapter_is_a_short_page(tmp_path: Path) -> None:
    folder = deep(tmp_path / "a", r=8, k=2, hybrid_r=3)
    text = run_ok("inspect", folder).stdout
    assert len(text.splitlines()) < 25
    assert "22  32 x 24  model.layers.{0-21}.mlp.up_proj" in text
    assert "r=8 k=2 hybrid_r=3" in text
    assert "rank 19; vLLM serves it with --max-lora-rank 32" in text
    assert "154 modules" in text


def test_it_takes_less_than_half_a_second_and_no_torch(tmp_path: Path) -> None:
    folder = deep(tmp_path / "a")
    program = (
        "import sys; from gralora_convert.verbs import inspect; inspect(sys.argv[1]); "
        "assert 'torch' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor: the wall depends on what else the machine does
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("peft-*/*/adapter_config.json")), ids=str)
def test_every_fixture_has_the_promised_keys(path: Path) -> None:
    document = inspect(path.parent).document
    assert document.keys() >= ADAPTER_KEYS
    config = json.loads(path.read_text())
    assert document["r"] == config["r"]
    assert document["alpha"] == config.get("alpha", config.get("lora_alpha"))


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("bases/*")), ids=lambda path: path.name)
def test_every_base_has_the_promised_keys(path: Path) -> None:
    document = run_ok("inspect", path, "--json").json
    assert document.keys() >= DENSE_KEYS
    assert document["kind"] == "dense"
    assert document["tied"] is (path.name in ("llama-tied", "gpt2", "bert"))


def test_the_commands_that_it_names_run(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    shown = run_ok("inspect", FIXTURES / "peft-0.21.2/llama-hybrid").stdout
    lines = [line.strip().removeprefix("next").split() for line in shown.splitlines()
             if "  gralora-convert " in line]  # fmt: skip
    assert len(lines) == 3
    for i, (_, *arguments) in enumerate(lines):
        run_ok(*(str(tmp_path / str(i)) if a == "OUT" else a for a in arguments))


def test_a_merged_model_names_its_origin_and_its_audit(tmp_path: Path) -> None:
    adapter, base = FIXTURES / "peft-0.21.2/llama-k4", FIXTURES / "bases/llama"
    run_ok("merge", adapter, "--base", base, "-o", tmp_path / "merged")
    text = run_ok("inspect", tmp_path / "merged").stdout
    assert f"merge: {base} + {adapter}; 4 modules" in text
    assert f"gralora-convert verify {adapter} --base {base} --merged {tmp_path / 'merged'}" in text
    run_ok("convert", adapter, "--to", "lora", "-o", tmp_path / "lora")
    assert f"convert: {adapter}; 4 modules, exact" in run_ok("inspect", tmp_path / "lora").stdout


def test_a_file_of_an_adapter_means_its_folder() -> None:
    folder = FIXTURES / "peft-0.21.2/llama-k4"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert inspect(folder / name).document == inspect(folder).document


def test_the_authors_dialect_and_a_rank_that_no_server_takes(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a", {"layers.0.up": random_delta(128, 128, r=64, k=8, hybrid_r=16)}
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("alpha", "peft_version", "init_weights"):
        config.pop(name)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"gralora_alpha": 16, "r": 80}))
    found = inspect(folder)
    assert found.document["dialect"] == "authors"
    assert (found.document["r"], found.document["exact_lora_rank"]) == (64, 528)
    assert "the original authors' code" in page_of(found)
    assert "above vLLM's largest (512)" in page_of(found)
    assert found.document["max_lora_rank"] is None


def cut(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter_model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a tensor is missing": (cut, 1, "missing-tensor"),
    "another rank": (lambda f: edit(f, r=16), 1, "rank-mismatch"),
    "text for a number": (lambda f: edit(f, r="8"), 1, "config-value-type"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), 1, "config-not-json"),
    "another method": (lambda f: edit(f, peft_type="IA3"), 1, "peft-type-unsupported"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), 2, "config-missing"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), 2, "weights-missing"),
    "no tensor file": (lambda f: (f / "adapter_model.safetensors").write_text("x"), 1,
                       "weights-unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_can_be_said_is_said_then_the_findings(name: str, tmp_path: Path) -> None:
    break_it, status, code = BROKEN[name]
    folder = deep(tmp_path / "a", 2)
    break_it(folder)
    outcome = run("inspect", folder)
    assert outcome.status == status
    assert f"error[{code}]" in outcome.stdout
    assert str(folder) in outcome.stdout.splitlines()[0]
    document = run("inspect", folder, "--json").json
    assert document.keys() >= ADAPTER_KEYS
    assert document["valid"] is False
    assert ("error" in document) == (status == 2)


def test_an_untrained_adapter_is_noticed(tmp_path: Path) -> None:
    delta = random_delta(32, 24, size=0.0)
    found = inspect(write_adapter(tmp_path / "a", {"layers.0.up": delta}))
    assert "warning[zero-factor]" in page_of(found)
    assert found.report.ok


def test_several_adapters_in_sub_folders(tmp_path: Path) -> None:
    for name, r in (("checkpoint-1", 4), ("checkpoint-2", 8)):
        write_adapter(tmp_path / name, {"layers.0.up": random_delta(32, 24, r=r)})
    edit(tmp_path / "checkpoint-2", r=6)
    outcome = run_ok("inspect", tmp_path)
    assert "2 adapter(s) in sub-folders" in outcome.stdout
    assert "1 error(s)" in outcome.stdout
    document = run_ok("inspect", tmp_path, "--json").json
    assert document["kind"] == "adapters"
    assert isinstance(document["adapters"], dict)
    assert document["adapters"]["checkpoint-1"]["r"] == 4
    write_adapter(tmp_path, {"layers.0.up": random_delta(32, 24)})
    assert "note[adapters-below]" in run_ok("inspect", tmp_path).stdout


def test_dense_checkpoints_of_many_kinds(tmp_path: Path) -> None:
    write_base(tmp_path / "plain")
    assert "unknown architecture (no config.json)" in run_ok("inspect", tmp_path / "plain").stdout
    experts = {
        f"layers.{i}.experts.{j}.up.weight": torch.zeros(4, 2) for i in (0, 1) for j in (0, 1, 2)
    }
    write_model(tmp_path / "moe", experts, quantization_config={"quant_method": "gptq"},
                text_config={"num_hidden_layers": 2, "vocab_size": 7})  # fmt: skip
    shown = run_ok("inspect", tmp_path / "moe").stdout
    assert "6  4 x 2  layers.{0-1}.experts.{0-2}.up.weight" in shown
    assert "gptq" in shown
    assert "2 layers" in shown
    (tmp_path / "nothing").mkdir()
    assert run("inspect", tmp_path / "nothing").status == 2


def test_hostile_names_stay_on_their_line(tmp_path: Path) -> None:
    name = "layers.0.a\n::error::b\x1b[31m"
    folder = write_adapter(tmp_path / "a", {name: random_delta(32, 24)})
    edit(folder, base_model_name_or_path="x\ny" * 2000)
    page = page_of(inspect(folder))
    assert "\x1b" not in page
    assert not any(line.startswith(("::error", "y")) for line in page.splitlines())


def test_groups() -> None:
    shapes: dict[str, tuple[int, ...]] = {name: shape for name, shape in SHAPES.items()}
    assert [(g.name, g.count) for g in group(shapes)] == [
        ("layers.{0-1}.up", 2), ("layers.0.down", 1),
    ]  # fmt: skip
    assert sum(g.count for g in group(shapes)) == len(shapes)
    assert ranges([3, 1, 2, 2, 9]) == "1-3,9"
    assert split("lm_head") == ("lm_head", None)
    assert split("h.10.attn.0") == ("h.attn.0", 10)
