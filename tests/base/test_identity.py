"""Whether a base is the one that an adapter names, by what both say of themselves."""

import json
import shutil
from pathlib import Path

import pytest

import gralora_convert as gc
from gralora_convert.disk import Checkpoint
from tests.builders import random_delta, write_adapter

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
LLAMA = FIXTURES / "bases/llama"


def base_called(folder: Path, **config: object) -> Path:
    shutil.copytree(LLAMA, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def codes(adapter: Path, base: Path) -> set[str]:
    found = {finding.code for finding in gc.validate(adapter, base).findings}
    return {code for code in found if code.startswith("base-")}


def adapter_of(folder: Path, base: str) -> Path:
    shutil.copytree(FIXTURES / "peft-0.21.2/llama-hybrid", folder)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("named", "folder", "own", "expected"),
    [
        ("org/tiny", "tiny", None, set()),
        ("org/Tiny", "tiny", None, set()),
        ("/mnt/models/tiny/", "tiny", None, set()),
        # all-MiniLM-L6-v2 names the model that it was trained from
        ("sentence-transformers/tiny", "tiny", "nreimers/parent", set()),
        ("org/tiny", "hub/models--org--tiny/snapshots/0123", None, set()),
        ("org/tiny", "x", "org/tiny", set()),
        ("org/tiny", "x", "org/other", {"base-name-mismatch"}),
        ("org/tiny", "x", None, {"base-other-name"}),
        ("/runs/sft", "x", None, {"base-other-name"}),
    ],
)
def test_names(
    named: str, folder: str, own: str | None, expected: set[str], tmp_path: Path
) -> None:
    adapter = adapter_of(tmp_path / "adapter", named)
    config = {} if own is None else {"_name_or_path": own}
    base = base_called(tmp_path / "models" / folder, **config)
    assert codes(adapter, base) == expected


def test_another_type_of_model_is_said(tmp_path: Path) -> None:
    """A Qwen 2 without biases has the shapes of a Llama."""
    trained_on = base_called(tmp_path / "trained/on")
    given = base_called(tmp_path / "given/on", model_type="mistral", architectures=[])
    adapter = adapter_of(tmp_path / "adapter", str(trained_on))
    assert codes(adapter, given) == {"base-type-mismatch"}
    shutil.copyfile(trained_on / "config.json", adapter / "config.json")
    beside = adapter_of(tmp_path / "moved", "/gone/on")
    shutil.copyfile(trained_on / "config.json", beside / "config.json")
    assert codes(beside, given) == {"base-type-mismatch"}
    assert codes(beside, base_called(tmp_path / "same/on")) == set()


def test_a_broken_config_of_another_model_holds_nobody_up(tmp_path: Path) -> None:
    broken = base_called(tmp_path / "broken/llama")
    (broken / "config.json").write_text("{")
    adapter = adapter_of(tmp_path / "adapter", str(broken))
    assert gc.validate(adapter, Checkpoint.open(LLAMA)).ok


def test_the_card_says_what_the_base_s_says(tmp_path: Path) -> None:
    base = base_called(tmp_path / "base", _name_or_path="nreimers/parent")
    (base / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: sentence-transformers\n"
        "pipeline_tag: sentence-similarity\ntags:\n- bert\n- 'en'\n---\n# It\n"
    )
    delta = random_delta(16, 16)
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": delta})
    plan = gc.merge(adapter, base=base)
    plan.write(tmp_path / "out")
    front = (tmp_path / "out/README.md").read_text().split("---")[1]
    for line in (
        'library_name: "sentence-transformers"',
        '- "bert"',
        '- "en"',
        '- "gralora"',
        'pipeline_tag: "sentence-similarity"',
        'license: "apache-2.0"',
    ):
        assert line in front
    assert "base_model" not in front  # its parent is not what was merged into


def test_layers_beyond_those_of_the_base_are_said(tmp_path: Path) -> None:
    adapter = shutil.copytree(FIXTURES / "peft-0.21.2/llama-layers", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    layers = values["layers_to_transform"]
    assert not [f for f in gc.validate(adapter, LLAMA).findings if f.code == "layers-unmatched"]
    path.write_text(json.dumps(values | {"layers_to_transform": [*layers, 7]}))
    found = [f for f in gc.validate(adapter, LLAMA).findings if f.code == "layers-unmatched"]
    assert len(found) == 1
    assert "names 7:" in found[0].message
