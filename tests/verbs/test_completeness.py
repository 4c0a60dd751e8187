"""Every verb gives the same verdict on whether an adapter holds all that it must."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from gralora_convert.adapters import suspicions
from gralora_convert.delta import Kind
from gralora_convert.errors import CheckFailedError, InvalidAdapterError
from tests.zoo import load

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
AUTO = {
    "llama": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
}  # fmt: skip
OPTIONS: dict[str, dict[str, int]] = {"bert": {"num_labels": 3}}

# adapter of PEFT 0.21.2, its base, a piece of the keys that are lost, and the code (None: sound)
CASES: dict[str, tuple[str, str, str, str | None]] = {
    "whole": ("llama-hybrid", "llama", "nothing", None),
    "whole-head": ("llama-saved-head", "llama", "nothing", None),
    "whole-classifier": ("bert-classifier", "bert", "nothing", None),
    "whole-biases": ("gpt2-bias-all", "gpt2", "nothing", None),
    "layers": ("llama-layers", "llama", "nothing", None),
    "lora": ("lora", "llama", "nothing", None),
    "module": ("llama-hybrid", "llama", "layers.1.self_attn.q_proj", "target-without-tensors"),
    "layer": ("llama-gralora", "llama", "layers.1.", "target-without-tensors"),
    "regex": ("llama-regex", "llama", "layers.1.self_attn.k_proj", "target-without-tensors"),
    "lora-module": ("lora", "llama", "layers.0.mlp", "target-without-tensors"),
    "head": ("llama-saved-head", "llama", "lm_head", "modules-to-save-missing"),
    "biases": ("gpt2-bias-all", "gpt2", ".bias", "bias-missing"),
    "own-biases": ("gpt2-bias-gralora-only", "gpt2", ".bias", "bias-missing"),
    "some-biases": ("gpt2-bias-gralora-only", "gpt2", "h.0.attn.c_attn.base", "bias-missing"),
}  # fmt: skip


def verdict(work: Callable[[], object]) -> str | None:
    """The code of the first error; None when there is none."""
    try:
        found = work()
    except InvalidAdapterError as refusal:
        return refusal.findings[0].code
    if isinstance(found, gc.Report):
        return found.errors[0].code if found.errors else None
    return None


def broken(tmp_path: Path, fixture: str, lost: str) -> Path:
    folder = shutil.copytree(FIXTURES / "peft-0.21.2" / fixture, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if lost not in key}
    assert (len(kept) < len(tensors)) == (lost != "nothing")
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_verb_gives_the_same_verdict(case: str, tmp_path: Path) -> None:
    fixture, base_name, lost, expected = CASES[case]
    base, adapter = FIXTURES / "bases" / base_name, broken(tmp_path, fixture, lost)
    model = load(base, AUTO[base_name], **OPTIONS.get(base_name, {}))
    to: Kind = "lora" if gc.Adapter.open(adapter).kind != "lora" else "gralora"
    verbs: dict[str, Callable[[], object]] = {
        "validate": lambda: gc.validate(adapter, base),
        "validate alone": lambda: gc.validate(adapter),  # the base that it names is here
        "merge": lambda: gc.merge(adapter, base=base),
        "verify": lambda: gc.verify(adapter, base=base, merged=base, level="weights"),
        "convert": lambda: gc.convert(adapter, to=to, base=base),
        "convert alone": lambda: gc.convert(adapter, to=to),
        "attach": lambda: gc.attach(model, adapter).detach(),
    }
    assert {name: verdict(work) for name, work in verbs.items()} == dict.fromkeys(verbs, expected)


def test_a_saved_module_is_whole_or_refused(tmp_path: Path) -> None:
    """The bias of a classifier without its weight, in the base or not."""
    adapter = broken(tmp_path, "bert-classifier", "classifier.weight")
    base = FIXTURES / "bases/bert"
    model = load(base, AUTO["bert"], **OPTIONS["bert"])
    assert verdict(lambda: gc.validate(adapter, base)) == "modules-to-save-missing"
    assert verdict(lambda: gc.attach(model, adapter)) == "modules-to-save-missing"
    model.save_pretrained(tmp_path / "with-head")
    found = gc.validate(adapter, tmp_path / "with-head").errors
    assert [finding.where for finding in found] == ["classifier.weight"]


def test_without_any_base_what_looks_lost_is_said(tmp_path: Path) -> None:
    adapter = broken(tmp_path, "gpt2-bias-all", ".bias")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "gone"}))
    assert gc.validate(adapter).ok
    assert any("bias-missing" in note for note in gc.convert(adapter, to="lora").notes)


def test_a_target_that_is_saved_whole_is_not_missed() -> None:
    """PEFT takes a module of both lists as saved."""
    adapter = gc.Adapter.open(FIXTURES / "peft-0.21.2/llama-saved-head")
    config = adapter.config.to_dict() | {"target_modules": ["q_proj", "down_proj", "lm_head"]}
    both = replace(adapter, config=type(adapter.config).from_dict(config))
    assert not [f for f in suspicions(both) if f.code == "target-without-tensors"]


def test_an_adapter_that_we_would_not_read_is_not_published(tmp_path: Path) -> None:
    plan = gc.convert(FIXTURES / "peft-0.21.2/llama-layers", to="lora")
    config = json.loads(plan.texts["adapter_config.json"])
    config["layers_to_transform"] = [5]
    bad = replace(plan, texts={**plan.texts, "adapter_config.json": json.dumps(config).encode()})
    with pytest.raises(CheckFailedError, match="is not sound"):
        bad.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
