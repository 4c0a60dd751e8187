"""The golden files: as other programs wrote them, and merged to the logits recorded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import gralora_convert as gc
from gralora_convert.adapters.adapter import Adapter
from gralora_convert.verbs.validation import validate
from tests.command import run, run_ok
from tests.zoo import close, load, outputs

FIXTURES = Path(__file__).parent.parent / "fixtures"
MANIFEST: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
ADAPTERS = sorted(name for name in MANIFEST if name.startswith(("peft-", "mergekit-")))
# 0.19 and 0.20 trained these biases and did not save them: the adapters are broken
LOST = {
    name
    for name in ADAPTERS
    if "bias" in MANIFEST[name]["config"] and not name.startswith("peft-0.21")
}


def folder_of(name: str) -> Path:
    adapter = MANIFEST[name]["adapter_name"]
    return FIXTURES / name / ("" if adapter == "default" else adapter)


def test_every_file_is_the_one_recorded() -> None:
    recorded = {
        f"{name}/{file}": digest
        for name, entry in MANIFEST.items()
        for file, digest in entry["files"].items()
    }
    present = {
        str(path.relative_to(FIXTURES)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in FIXTURES.iterdir()
        if folder.is_dir() and folder.name != "__pycache__"
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert present == recorded
    assert all((FIXTURES / name).stat().st_size <= 40 * 1024 for name in present)


@pytest.mark.parametrize("name", [n for n in ADAPTERS if n not in LOST])
def test_merged_golden_adapters_give_the_recorded_logits(name: str, tmp_path: Path) -> None:
    entry = MANIFEST[name]
    base = FIXTURES / entry["base"]
    run_ok("validate", folder_of(name), "--base", base)
    run_ok("merge", folder_of(name), "--base", base, "-o", tmp_path / "merged")
    inputs = {"input_ids": torch.tensor(entry["input_ids"])}
    merged = load(tmp_path / "merged", entry["auto_class"], dtype=torch.float32)
    found = outputs(merged, inputs)
    expected = torch.tensor(entry["logits"])
    tolerance = 0.05 if "bf16" in name else 1e-5  # logits of a bfloat16 model carry 8 bits
    assert close(found.reshape(expected.shape), expected) <= tolerance


@pytest.mark.parametrize("name", sorted(LOST))
def test_lost_biases_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    base = FIXTURES / MANIFEST[name]["base"]
    for command in (["validate"], ["merge", "-o", tmp_path / "merged"]):
        outcome = run(*command, FIXTURES / name, "--base", base)
        assert outcome.status in (1, 2)
        assert "bias-missing" in outcome.stdout + outcome.stderr
        assert "does not save them" in outcome.stdout + outcome.stderr
        assert outcome.stderr.count("\n") == (1 if command[0] == "merge" else 0)


def test_what_mergekit_extracts_replaces_norms_embeddings_and_head(tmp_path: Path) -> None:
    """Its config names neither a bias mode nor a release of PEFT: read with notes alone."""
    folder = FIXTURES / "mergekit-0.1.5/llama"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"bias", "peft_version"}.isdisjoint(config)
    report = validate(folder, base=FIXTURES / "bases/llama")
    assert report.ok
    assert {(f.severity, f.code) for f in report.findings} == {("note", "peft-version-missing")}
    run_ok("merge", folder, "--base", FIXTURES / "bases/llama", "-o", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for key, saved in load_file(folder / "adapter_model.safetensors").items():
        if ".lora_" not in key:
            assert torch.equal(merged[key.removeprefix("base_model.model.")], saved), key


def test_lora_fixtures_are_read_as_lora() -> None:
    assert Adapter.open(FIXTURES / "peft-0.21.2/lora-patterns").kind == "lora"
    assert LOST


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [n for n in ADAPTERS if n not in LOST and "0.21" in n])
def test_a_right_merge_in_a_narrower_dtype_is_not_condemned(
    name: str, dtype: str, tmp_path: Path
) -> None:
    base = FIXTURES / MANIFEST[name]["base"]
    gc.merge(folder_of(name), base=base, dtype=dtype).write(tmp_path / "merged")
    found = gc.verify(folder_of(name), base=base, merged=tmp_path / "merged")
    assert found.ok, found.as_text()
    assert found.model is not None, found.notes


@pytest.mark.parametrize("name", ["llama-hybrid", "llama-saved-head", "gpt2-bias-all"])
def test_a_merge_of_peft_cast_afterwards_is_not_condemned(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / "peft-0.21.2" / name
    entry = MANIFEST[f"peft-0.21.2/{name}"]
    model = load(FIXTURES / entry["base"], entry["auto_class"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    found = gc.verify(folder, base=FIXTURES / entry["base"], merged=tmp_path / "merged")
    assert found.ok, found.as_text()
    assert found.model is not None, found.notes
