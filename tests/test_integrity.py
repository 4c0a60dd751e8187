"""The 121 defects of tests/defects.py through the command line: every one gets its verdict."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.command import run
from tests.defects import (
    CONFIG,
    DEFECTS,
    Q0,
    TENSORS,
    WEIGHTS,
    Break,
    Parts,
    both,
    config,
    drop,
    intact,
)
from tests.zoo import Architecture, llama, save_base, train

NO_ADAPTER = (88, 89, 111)  # a file of the two is not there at all


def architecture(**sizes: int) -> Architecture:
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, **sizes}
    return Architecture(llama("LlamaForCausalLM", "LlamaConfig", **small), ["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the good base and those that rows are put beside."""
    folder = tmp_path_factory.mktemp("bases")
    save_base(architecture(), folder / "base")
    save_base(architecture(hidden_size=64, intermediate_size=96), folder / "wide")
    save_base(architecture(num_hidden_layers=3), folder / "deep")
    save_base(architecture(num_hidden_layers=1), folder / "shallow")
    shutil.copytree(folder / "base", folder / "named")
    path = folder / "named/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "this/model"}))
    return folder


def broken(folder: Path, how: Break) -> Parts:
    parts = Parts(folder, trained=True)
    how(parts)
    parts.write()
    return parts


def test_the_good_adapter_is_that_of_peft(bases: Path, tmp_path: Path) -> None:
    """Same config, same tensors, and as good in the eyes of `validate`."""
    peft, ours = tmp_path / "peft", broken(tmp_path / "ours", intact).folder
    train(bases / "base", architecture(), peft, hybrid_r=4)
    saved = json.loads((peft / "adapter_config.json").read_text())
    assert sorted(saved.pop("target_modules")) == sorted(CONFIG["target_modules"])
    names = {"target_modules", "base_model_name_or_path"}
    assert {k: v for k, v in saved.items() if k not in names} == {
        k: v for k, v in CONFIG.items() if k not in names
    }
    shapes = {key: ("F32", tuple(t.shape)) for key, t in load_file(peft / WEIGHTS).items()}
    assert shapes == TENSORS
    for folder in (peft, ours):
        outcome = run("validate", folder, "--base", bases / "base", "--json")
        assert (outcome.status, outcome.json["findings"]) == (0, [])


@pytest.mark.parametrize("row", DEFECTS)
def test_every_defect_gets_its_verdict(
    row: int, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how, code, severity = DEFECTS[row]
    parts = broken(tmp_path / "adapter", how)
    given = (parts.folder, "--base", bases / parts.base)
    outcome = run("validate", *given, "--json")
    findings = outcome.json["findings"]
    assert isinstance(findings, list)
    if code:
        assert (code, severity) in {(f["code"], f["severity"]) for f in findings}, findings
    is_error = severity == "error"
    assert outcome.json["ok"] is not is_error, findings
    assert outcome.status == (2 if row in NO_ADAPTER else int(is_error))
    merged = run("merge", *given, "-o", tmp_path / "out")
    refused = is_error or code == "alpha-zero"  # which would change nothing
    assert merged.status == (2 if refused else 0), merged
    assert (tmp_path / "out").exists() is not refused
    assert not (tmp_path / "executed").exists()


def test_annotations_and_text_carry_the_same_findings(tmp_path: Path) -> None:
    folder = broken(tmp_path / "adapter", both(config(r=16), drop(Q0 + "gralora_B"))).folder
    shown = run("validate", folder, "--format", "text")
    annotated = run("validate", folder, "--format", "github")
    assert shown.status == annotated.status == 1
    for code in ("rank-mismatch", "missing-tensor"):
        assert f"error[{code}]" in shown.stdout
        assert f",title={code}::" in annotated.stdout
    for line in annotated.stdout.splitlines():
        assert line.startswith((f"::error file={folder}/", f"::warning file={folder}/"))
