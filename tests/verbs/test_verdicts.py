"""A law: whatever an adapter has lost, every verb that reads one says the same of it."""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import gralora_convert as gc
from gralora_convert.adapters import INCOMPLETE
from gralora_convert.adapters.adapter import Adapter
from gralora_convert.errors import InvalidAdapterError
from gralora_convert.models import fitting
from tests.zoo import load

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
MANIFEST: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
FOLDERS = sorted(name for name in MANIFEST if name.startswith(("peft-", "mergekit-")))
BORN_BROKEN = {  # PEFT 0.19 and 0.20 did not save trained biases
    name for name in FOLDERS
    if "bias" in MANIFEST[name]["config"] and not name.startswith("peft-0.21")
}  # fmt: skip

LACKS = INCOMPLETE | {"missing-tensor", "hybrid-rank-mismatch"}
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
FACTORS = ".gralora_", ".lora_"


def factors(tensors: Tensors) -> list[str]:
    return sorted(key for key in tensors if any(mark in key for mark in FACTORS))


def others(tensors: Tensors, end: str) -> list[str]:
    return sorted(key for key in tensors if key.endswith(end) and key not in factors(tensors))


def module_of(key: str) -> str:
    return key.partition(".gralora_")[0].partition(".lora_")[0] + "."


def without(tensors: Tensors, lost: Callable[[str], bool]) -> None:
    for key in [key for key in tensors if lost(key)]:
        del tensors[key]


def one_factor(tensors: Tensors, config: Config) -> None:
    del tensors[factors(tensors)[0]]


def first_module(tensors: Tensors, config: Config) -> None:
    module = module_of(factors(tensors)[0])
    without(tensors, lambda key: key.startswith(module))


def last_module(tensors: Tensors, config: Config) -> None:
    module = module_of(factors(tensors)[-1])
    without(tensors, lambda key: key.startswith(module))


def layer(tensors: Tensors, config: Config) -> None:
    if any(".0." in key for key in tensors):  # else nothing of this layer is selected
        without(tensors, lambda key: ".1." in key)


def general(tensors: Tensors, config: Config) -> None:
    without(tensors, lambda key: "_general" in key)


def saved(tensors: Tensors, config: Config) -> None:
    if config.get("modules_to_save"):
        heads = set(others(tensors, ".weight"))
        without(tensors, lambda key: key in heads)


def biases(tensors: Tensors, config: Config) -> None:
    lost = set(others(tensors, ".bias"))
    without(tensors, lambda key: key in lost)


def one_bias(tensors: Tensors, config: Config) -> None:
    lost = others(tensors, ".bias")[:1]
    without(tensors, lambda key: key in lost)


def target(tensors: Tensors, config: Config) -> None:
    """The config selects a kind of module more than the file holds."""
    targets = config.get("target_modules")
    for known, more in {"q_proj": "v_proj", "query": "key", "c_attn": "c_fc"}.items():
        if isinstance(targets, list) and known in targets and more not in targets:
            config["target_modules"] = [*targets, more]


LOSSES: Mapping[str, Callable[[Tensors, Config], None]] = {
    "nothing": lambda tensors, config: None, "one factor": one_factor,
    "first module": first_module, "last module": last_module, "layer": layer, "general": general,
    "saved": saved, "biases": biases, "one bias": one_bias, "target": target,
}  # fmt: skip


def copied(name: str, loss: str, to: Path) -> Path | None:
    """The fixture after the loss; None where it has nothing of the kind to lose."""
    entry = MANIFEST[name]
    own = entry["adapter_name"]
    folder = shutil.copytree(FIXTURES / name / ("" if own == "default" else own), to)
    config = json.loads((folder / "adapter_config.json").read_text())
    pickled = folder / "adapter_model.bin"
    path = folder / "adapter_model.safetensors"
    before = torch.load(pickled) if pickled.exists() else load_file(path)
    after, changed = dict(before), dict(config)
    LOSSES[loss](after, changed)
    if loss != "nothing" and (after.keys(), changed) == (before.keys(), config):
        return None
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    if pickled.exists():
        torch.save(after, pickled)
    else:
        save_file(after, path, {"format": "pt"})
    return folder


@cache
def model_of(base: str, auto: str) -> PreTrainedModel:
    labels = {"num_labels": 3} if "Classification" in auto else {}
    return load(FIXTURES / base, auto, **labels)


def verdict(work: Callable[[], object]) -> str:
    """Whether the adapter is complete; other errors fail the test."""
    try:
        found = work()
    except InvalidAdapterError as refusal:
        found = gc.Report(refusal.findings)
    errors = found.errors if isinstance(found, gc.Report) else ()
    assert {finding.code for finding in errors} <= LACKS
    return "incomplete" if errors else "complete"


def ways(adapter: Path, base: Path, model: PreTrainedModel) -> dict[str, Callable[[], object]]:
    """Everything that reads an adapter beside a base or a model, by verb and way of asking."""

    def converted(**given: Any) -> object:
        one = Adapter.open(adapter)
        return gc.convert(one, to="gralora" if one.kind == "lora" else "lora", **given)

    return {
        "validate": lambda: gc.validate(adapter, base),
        "validate alone": lambda: gc.validate(adapter),  # the base that it names is here
        "merge": lambda: gc.merge(adapter, base=base),
        "merge an opened one": lambda: gc.merge(Adapter.open(adapter), base=base),
        "merge alone": lambda: gc.merge(adapter),
        "verify": lambda: gc.verify(adapter, base=base, merged=base, level="weights"),
        "verify modules": lambda: gc.verify(
            adapter, base=base, merged=base, weights=[1.0], level="modules"
        ),
        "convert": lambda: converted(base=base),
        "convert alone": converted,
        "attach": lambda: gc.attach(model, adapter).detach(),
        "attach to train": lambda: gc.attach(model, Adapter.open(adapter), trainable=True).detach(),
    }


def verdicts(name: str, adapter: Path) -> dict[str, str]:
    entry = MANIFEST[name]
    base, model = FIXTURES / entry["base"], model_of(entry["base"], entry["auto_class"])
    return {way: verdict(work) for way, work in ways(adapter, base, model).items()}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_verb_gives_the_same_verdict(name: str, loss: str, tmp_path: Path) -> None:
    adapter = copied(name, loss, tmp_path / "adapter")
    if adapter is None:
        return
    whole = loss == "nothing" and name not in BORN_BROKEN
    found = verdicts(name, adapter)
    assert found == dict.fromkeys(found, "complete" if whole else "incomplete")


def test_every_kind_of_loss_befalls_some_fixture(tmp_path: Path) -> None:
    for loss in LOSSES:
        befallen = [copied(name, loss, tmp_path / loss / name) for name in FOLDERS]
        assert any(befallen), loss


def test_every_verb_that_takes_an_adapter_is_asked() -> None:
    takers = {
        name for name in gc.__all__
        if inspect.isfunction(getattr(gc, name))
        and not {"adapter", "adapters"}.isdisjoint(inspect.signature(getattr(gc, name)).parameters)
    }  # fmt: skip
    asked = {way.partition(" ")[0] for way in ways(Path(), Path(), model_of(*BERT))}
    assert takers - asked <= {"inspect", "spectra"}  # they say what is there, and judge nothing
    assert asked <= takers


BERT = "bases/bert", "AutoModelForSequenceClassification"


@pytest.mark.parametrize("check", ["target_findings", "saved_findings", "bias_finding"])
def test_a_verb_that_looks_away_is_noticed(
    check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attach without one of its checks no longer says what the others say."""
    name, loss = {
        "target_findings": ("peft-0.21.2/llama-gralora", "layer"),
        "saved_findings": ("peft-0.21.2/llama-saved-head", "saved"),
        "bias_finding": ("peft-0.21.2/gpt2-bias-all", "biases"),
    }[check]
    adapter = copied(name, loss, tmp_path / "adapter")
    assert adapter is not None
    nothing = (lambda *_: None) if check == "bias_finding" else (lambda *_: iter(()))
    monkeypatch.setattr(fitting, check, nothing)
    assert len(set(verdicts(name, adapter).values())) == 2


@pytest.mark.parametrize("to", ["lora", "gralora", "hybrid"])
def test_what_extract_writes_is_complete(to: str, tmp_path: Path) -> None:
    """By every verb, as an adapter of the model that it was extracted from."""
    name = "peft-0.21.2/llama-gralora"
    base = FIXTURES / MANIFEST[name]["base"]
    gc.merge(FIXTURES / name, base=base).write(tmp_path / "tuned")
    kind: Any = to
    hybrid = 2 if to == "hybrid" else None
    gc.extract(base=base, tuned=tmp_path / "tuned", to=kind, r=12, hybrid_r=hybrid).write(
        tmp_path / "adapter"
    )
    assert set(verdicts(name, tmp_path / "adapter").values()) == {"complete"}
