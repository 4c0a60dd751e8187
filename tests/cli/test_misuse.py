"""Wrong arguments: the library refuses them with one family of errors, at once and by name."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gralora_convert as gc
from tests.command import run

ADAPTER = "fixtures/peft-0.21.2/llama-hybrid"
BASE = "fixtures/bases/llama"
Call = Callable[..., object]


def merge(**arguments: Any) -> object:
    return gc.merge(arguments.pop("adapter", ADAPTER), **{"base": BASE, **arguments})


def convert(**arguments: Any) -> object:
    return gc.convert(arguments.pop("adapter", ADAPTER), **{"to": "gralora", **arguments})


def extract(**arguments: Any) -> object:
    return gc.extract(**{"base": BASE, "tuned": BASE, "to": "gralora", **arguments})


def verify(**arguments: Any) -> object:
    given = {"base": BASE, "merged": BASE, "level": "weights", **arguments}
    return gc.verify(given.pop("adapter", ADAPTER), **given)


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("call", "name", "value", "found"),
    [
        *((call, "dtype", value, "dtype") for call in (merge, convert, extract)
          for value in ("x", None, 5, torch.int8)),
        *((call, "device", value, "device") for call in (merge, convert, extract, verify)
          for value in ("warp", "", None, "meta", torch.device("cpu"))),
        *((call, "to", value, "result") for call in (convert, extract)
          for value in ("junk", None, 5, "LORA")),
        *((call, name, value, name) for call in (convert, extract)
          for name, value in (("k", 0), ("k", -1), ("k", 1.5), ("k", "2"), ("k", True), ("r", 0),
                              ("r", 2.0), ("r", "2"), ("hybrid_r", -1), ("hybrid_r", "2"),
                              ("alpha", math.nan), ("alpha", math.inf), ("alpha", "8"),
                              ("alpha", 10**400))),
        *((call, "max_error", value, "max_error") for call in (convert, extract)
          for value in (0, 1, -0.5, math.nan, "0.5")),
        *((merge, "shard_size", value, "shard_size") for value in (5, None, "5", "-5GB", "5XB")),
        *((merge, "weights", value, "weight") for value in
          ([], [1, 2], [0], [math.nan], ["a"], [None], [True])),
        *((verify, "slack", value, "slack") for value in (0, -1, math.nan, math.inf, "1", None)),
        *((verify, "level", value, "level") for value in ("x", 3)),
        (extract, "svd", "x", "svd"),
        *((call, name, value, word)
          for call, name in ((merge, "base"), (verify, "base"), (verify, "merged"))
          for value, word in ((LONG, "too long"), ("", "empty name"), ("a\0b", "no such file"))),
        *((call, "adapter", value, word) for call in (merge, convert, verify)
          for value, word in ((LONG, "Name a local folder"), ("", "empty name"),
                              ("a\0b", "is not a folder"), (BASE, "config-missing"))),
        (extract, "tuned", "", "empty"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(call: Call, name: str, value: object, found: str) -> None:
    with pytest.raises(gc.ConvertError, match=found) as refusal:
        call(**{name: value})
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 2500


def test_several_options_that_exclude_one_another() -> None:
    with pytest.raises(gc.ConvertError, match="excludes `r`"):
        convert(max_error=0.1, r=4)
    with pytest.raises(gc.ConvertError, match="not of a Hybrid"):
        convert(max_error=0.1, to="hybrid")


def test_patterns_and_maps_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="not one text"):
        extract(include="*.q_proj")
    with pytest.raises(TypeError, match="mapping"):
        merge(key_map=["a=b"])


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_jobs_is_a_whole_number(value: Any, tmp_path: Path) -> None:
    with pytest.raises(gc.ConvertError, match="jobs"):
        gc.merge(ADAPTER, base=BASE).write(tmp_path / "out", jobs=value)


def test_an_output_has_a_name() -> None:
    with pytest.raises(gc.ConvertError, match="empty name"):
        gc.merge(ADAPTER, base=BASE).write("")


def test_an_adapter_knows_its_modules() -> None:
    with pytest.raises(gc.ConvertError, match="adapts no module 'alien'"):
        gc.Adapter.open(ADAPTER).delta("alien")


class Model(nn.Module):
    """The adapted layers of the fixture, by their names."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Module(), nn.Module()]
        for layer in layers:
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            layer.self_attn.q_proj = nn.Linear(16, 16)
            layer.mlp.down_proj = nn.Linear(24, 16)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(layers)


def test_attach_takes_a_folder() -> None:
    model = Model()
    with (
        gc.attach(model, ADAPTER) as attached,
        gc.attach(other := Model(), gc.Adapter.open(ADAPTER)) as same,
    ):
        assert list(attached.layers) == list(same.layers)
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(layer, gc.GraloraLinear)
        assert type(other.get_submodule("model.layers.0.self_attn.q_proj")) is type(layer)


def test_what_cannot_be_attached() -> None:
    with pytest.raises(gc.ConvertError, match="is not a folder"):
        gc.attach(nn.Linear(2, 2), "nowhere/at/all")
    with pytest.raises(TypeError, match="neither an adapter"):
        gc.attach(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        gc.attach("model", ADAPTER)  # type: ignore[arg-type]


def test_adapter_and_base_in_each_others_place() -> None:
    outcome = run("merge", BASE, "--base", ADAPTER, "-o", "never")
    assert outcome.status == 2
    assert "are adapter and base in each other's place?" in outcome.stderr


@pytest.mark.parametrize("command", ["merge", "convert", "extract"])
def test_every_receipt_states_its_weight_files(command: str, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    gc.merge(ADAPTER, base=BASE).write(merged)
    plan = {
        "merge": lambda: gc.merge(ADAPTER, base=BASE),
        "convert": lambda: gc.convert(ADAPTER, to="lora"),
        "extract": lambda: gc.extract(base=BASE, tuned=merged, to="lora", r=4),
    }[command]()
    receipt = plan.write(tmp_path / "out")
    assert isinstance(receipt["files"], list)
    sizes = [(tmp_path / "out" / name).stat().st_size for name in receipt["files"]]
    assert receipt["bytes"] == sum(sizes) == plan.as_json(tmp_path)["bytes"]
    assert receipt["tensors"] == sum(len(file.parts) for file in plan.files)
    assert receipt["dtype"] == ("float32" if command == "extract" else "keep")


def test_base_and_merged_in_each_others_place(tmp_path: Path) -> None:
    gc.merge(ADAPTER, base=BASE).write(tmp_path / "merged")
    outcome = run("verify", ADAPTER, "--base", tmp_path / "merged", "--merged", BASE,
                  "--level", "weights")  # fmt: skip
    assert outcome.status == 1
    assert "are --base and --merged in each other's place?" in outcome.stderr


@pytest.mark.parametrize("asked", [["--json"], ["--format", "json"], ["--format=json"]])
def test_a_refusal_is_a_document_however_json_is_asked_for(asked: list[str]) -> None:
    outcome = run("validate", "nowhere/at/all", *asked)
    assert (outcome.status, outcome.stderr) == (2, "")
    assert isinstance(outcome.json["error"], dict)
    assert set(outcome.json["error"]) == {"kind", "message", "where", "hint"}
