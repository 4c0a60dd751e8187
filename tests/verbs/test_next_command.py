"""Refusals that name an option: the command with that option, typed as it is printed, goes on."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks import tiny
from tests.base.test_parts import trained, values_of
from tests.command import run, run_ok


def told(text: str) -> list[list[str]]:
    """The ways to go on that a refusal names: the options of each, as a shell reads them."""
    advice = text.splitlines()[-1].partition("--")
    ways = re.split(r",? or (?=--)|, (?=--)", advice[1] + advice[2])
    return [re.findall(r"--\S+|(?<=[a-z] )\S+[=.]\S+", " ".join(shlex.split(way))) for way in ways]


def refused(code: str, *arguments: object) -> list[list[str]]:
    outcome = run(*arguments)
    assert outcome.status == 2
    assert f"[{code}]" in outcome.stderr
    return told(outcome.stderr)


def same(folder: Path, model: type[Any], wanted: Mapping[str, torch.Tensor]) -> bool:
    found = model.from_pretrained(folder).state_dict()
    return all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize(
    "saved", [None, ["language_model.norm"], ["language_model.norm", "language_model.embed_tokens"]]
)
def test_an_adapter_of_a_whole_on_its_text_model(saved: list[str] | None, tmp_path: Path) -> None:
    model = tiny.build("AutoModelForImageTextToText", "llava")
    text = model.model.language_model
    text.save_pretrained(tmp_path / "base")
    layers = [f"model.language_model.layers.{n}.mlp.down_proj" for n in (0, 1)]
    whole = trained(model, tmp_path / "adapter", saved, None, layers)
    wanted = {
        name.removeprefix("model.language_model."): value
        for name, value in values_of(whole.base_model.model).items()
        if name.startswith("model.language_model.")
    }
    merging = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    (way,) = refused("module-not-in-base", *merging)
    run_ok(*merging, *way)
    assert same(tmp_path / "out", type(text), wanted)


@pytest.mark.parametrize("saved", [None, ["block.1.layer.0.layer_norm"], ["embed_tokens"]])
def test_each_part_that_an_adapter_may_be_of(saved: list[str] | None, tmp_path: Path) -> None:
    """The encoder of T5 and its decoder are of one class, with layers of the same names."""
    model = tiny.build("AutoModelForSeq2SeqLM", "t5")
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    layers = [f"block.{n}.layer.0.SelfAttention.{name}" for n in (0, 1) for name in "qv"]
    trained(model.encoder, tmp_path / "adapter", saved, None, layers)
    wanted = values_of(model)
    merging = ["merge", tmp_path / "adapter", "--base", tmp_path / "base"]
    ways = refused("part-ambiguous", *merging, "-o", tmp_path / "out")
    assert len(ways) == 2
    for number, way in enumerate(ways):
        run_ok(*merging, "-o", tmp_path / f"out{number}", *way)
    assert same(tmp_path / "out0", type(model), wanted)
    assert not same(tmp_path / "out1", type(model), wanted)


@pytest.mark.parametrize("choice", [0, 1])
def test_a_layer_whose_kind_is_not_known(choice: int, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    before = load_file(tmp_path / "base/model.safetensors")
    delta = trained(model, tmp_path / "adapter", None, None, ["0"])
    delta = delta.base_model.model[0].get_delta_weight("default")
    merging = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    way = refused("fan-in-fan-out-ambiguous", *merging)[choice]
    run_ok(*merging, *way[:1], "0")
    assert way[0] == ("--linear", "--fan-in-fan-out")[choice]
    merged = load_file(tmp_path / "out/model.safetensors")
    wanted = before["0.weight"] + (delta.T if choice else delta)
    torch.testing.assert_close(merged["0.weight"], wanted.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layers", "code"),
    [
        ("mamba", ["dt_proj", "in_proj"], "forward-ignores-adapter"),
        ("gpt2", ["c_attn", "c_fc"], None),
    ],
)
def test_what_is_told_to_be_removed(
    kind: str, layers: Sequence[str], code: str | None, tmp_path: Path
) -> None:
    model = tiny.build("AutoModelForCausalLM", kind)
    model.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    names = [n for n, _ in model.named_modules() if n.endswith(tuple(layers))]
    trained(model, adapter, None, "CAUSAL_LM", names)
    merging = ["merge", adapter, "--base", tmp_path / "base", "-o", tmp_path / "out"]
    if code is None:
        run_ok(*merging)
        return
    outcome = run(*merging)
    assert f"[{code}]" in outcome.stderr
    assert "Remove its tensors, and its name from target_modules" in outcome.stderr
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    kept = {key: value for key, value in load_file(file).items() if layers[0] not in key}
    save_file(kept, file, metadata={"format": "pt"})
    written = json.loads(config.read_text())
    written["target_modules"] = [n for n in written["target_modules"] if layers[0] not in n]
    config.write_text(json.dumps(written))
    run_ok(*merging)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = values_of(model)
    for name in wanted:
        torch.testing.assert_close(
            merged[name], model.state_dict()[f"{name.removesuffix('.weight')}.base_layer.weight"]
            if layers[0] in name and name.endswith("weight") else wanted[name],
            rtol=0, atol=1e-5,
        )  # fmt: skip
