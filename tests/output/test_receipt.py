"""Receipts against the files beside them: what was changed since is found, whatever it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import run, run_ok

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTER = FIXTURES / "peft-0.21.2/llama-hybrid"
BASE = FIXTURES / "bases/llama-sharded"
RECEIPT = "gralora_convert.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of the writing commands makes."""
    folder = tmp_path_factory.mktemp("made")
    run_ok("merge", ADAPTER, "--base", BASE, "-o", folder / "merged")
    run_ok("convert", ADAPTER, "--to", "lora", "-o", folder / "converted")
    models = "--base", BASE, "--tuned", folder / "merged"
    run_ok("extract", *models, "--to", "gralora", "--r", 4, "-o", folder / "extracted")
    return folder


@pytest.fixture
def merged(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "merged", tmp_path / "merged")
    return tmp_path / "merged"


def _state(folder: Path, edit: Callable[[Path, dict[str, Any]], object]) -> None:
    """Edits the receipt."""
    receipt = json.loads((folder / RECEIPT).read_text())
    edit(folder, receipt)
    (folder / RECEIPT).write_text(json.dumps(receipt))


def findings(status: int, *arguments: object) -> list[tuple[str, str, str]]:
    """Code, severity and place of what `validate` finds, notes left out."""
    outcome = run("validate", *arguments, "--json")
    assert outcome.status == status, outcome
    found: Any = outcome.json["findings"]
    return [(f["code"], f["severity"], f["where"]) for f in found if f["severity"] != "note"]


def flip(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["merged", "converted", "extracted"])
def test_what_was_written_is_what_its_receipt_says(made: Path, name: str) -> None:
    assert findings(0, made / name) == []
    assert "valid" in run_ok("validate", made / name).stdout


def test_a_merge_is_checked_against_the_base_it_was_made_from(merged: Path) -> None:
    assert findings(0, merged, "--base", BASE) == []
    assert findings(0, merged, "--base", FIXTURES / "bases/llama") == []  # the same in one file
    other = findings(1, merged, "--base", FIXTURES / "bases/llama-bf16")
    assert other == [("receipt-base-mismatch", "error", RECEIPT)]
    assert run("validate", merged, "--base", merged / "nothing").status == 2


def test_one_changed_bit_of_the_weights_is_an_error(merged: Path) -> None:
    flip(merged / SHARD)
    assert findings(1, merged) == [("receipt-mismatch", "error", SHARD)]


def test_an_edited_file_beside_the_weights_is_a_warning(merged: Path) -> None:
    (merged / "generation_config.json").write_text("{}")
    (merged / "tokenizer_config.json").unlink()
    assert sorted(findings(0, merged)) == [
        ("receipt-mismatch", "warning", "generation_config.json"),
        ("receipt-mismatch", "warning", "tokenizer_config.json"),
    ]


def test_weights_that_are_missing_or_came_later_are_errors(merged: Path) -> None:
    shutil.copy(FIXTURES / "bases/llama/model.safetensors", merged / "model.safetensors")
    found = findings(1, merged)  # one file wins over the shards
    assert ("receipt-mismatch", "error", "model.safetensors") in found
    assert ("receipt-mismatch", "error", SHARD) in found
    (merged / "model.safetensors").unlink()
    (merged / SHARD).unlink()
    assert findings(1, merged) == [("weights-unreadable", "error", "model.safetensors.index.json")]


def test_without_digests_tensors_and_bytes_are_compared(merged: Path) -> None:
    _state(merged, lambda _, receipt: receipt.pop("outputs"))
    outcome = run_ok("validate", merged)
    assert "note[receipt-without-digests]" in outcome.stdout
    _state(merged, lambda _, receipt: receipt.update(tensors=20, bytes=7))
    assert findings(1, merged) == [("receipt-mismatch", "error", RECEIPT)] * 2


def test_tensors_that_were_merged_must_be_there(merged: Path) -> None:
    _state(merged, lambda _, receipt: receipt["modules"][0].update(tensor="gone.weight"))
    assert findings(1, merged) == [("receipt-mismatch", "error", "gone.weight")]


@pytest.mark.parametrize("name", ["converted", "extracted"])
def test_an_adapter_trained_on_is_a_warning(made: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(made / name, folder)
    flip(folder / "adapter_model.safetensors")
    assert findings(0, folder) == [("receipt-mismatch", "warning", "adapter_model.safetensors")]
    (folder / RECEIPT).write_text("[]")
    assert findings(0, folder) == [("receipt-unreadable", "warning", RECEIPT)]


def test_without_digests_an_adapter_of_other_modules_is_told(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(made / "converted", folder)
    shutil.copytree(FIXTURES / "peft-0.21.2/llama-all-linear", folder, dirs_exist_ok=True)
    _state(folder, lambda _, receipt: receipt.pop("outputs"))
    assert findings(0, folder) == [("receipt-mismatch", "warning", RECEIPT)]


HOSTILE = {
    "empty": "",
    "list": "[]",
    "another": "{}",
    "deep": '{"a":' * 5000 + "1" + "}" * 5000,
    "inputs": '{"inputs": [], "modules": []}',
    "base": '{"inputs": {"base": 7}, "modules": []}',
    "digest": '{"inputs": {"base": {"headers_sha256": {}}}, "modules": []}',
    "modules": '{"inputs": {}, "modules": {"tensor": 1}}',
    "row": '{"inputs": {}, "modules": [{"tensor": ["\\u001b[31m"]}]}',
    "count": '{"inputs": {}, "modules": [], "tensors": 1e400}',
    "outputs": '{"inputs": {}, "modules": [], "outputs": ["/etc/passwd"]}',
    "bytes": '{"inputs": {}, "modules": [], "outputs": {"a": {"bytes": true, "sha256": ""}}}',
    "sha": '{"inputs": {}, "modules": [], "outputs": {"a": {"bytes": 1, "sha256": 1}}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_receipt_is_said_so(merged: Path, kind: str) -> None:
    (merged / RECEIPT).write_text(HOSTILE[kind])
    assert findings(1, merged) == [("receipt-unreadable", "error", RECEIPT)]
    assert run("validate", merged).stdout.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a\n\x1b[31m", "."])
def test_a_receipt_names_no_file_outside_its_folder(merged: Path, name: str) -> None:
    stated = {name: {"bytes": 1, "sha256": "0"}}
    _state(merged, lambda _, receipt: receipt["outputs"].update(stated))
    outcome = run_ok("validate", merged, "--json")
    found: Any = outcome.json["findings"]
    assert [f["message"] for f in found] == ["was written and is not there any more"]


@pytest.mark.parametrize("kind", ["folder", "loop", "outside"])
def test_a_receipt_is_a_file_of_its_folder(merged: Path, kind: str) -> None:
    path = merged / RECEIPT
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    assert findings(1, merged) == [("receipt-unreadable", "error", RECEIPT)]


def test_an_adapter_that_the_base_holds_is_refused(merged: Path, tmp_path: Path) -> None:
    again = run("merge", ADAPTER, "--base", merged, "-o", tmp_path / "twice")
    assert again.status == 2
    assert "already holds this adapter" in again.stderr
    other = FIXTURES / "peft-0.21.2/llama-gralora"
    run_ok("merge", other, "--base", merged, "-o", tmp_path / "both")
    third = run("merge", ADAPTER, "--base", tmp_path / "both", "-o", tmp_path / "thrice")
    assert third.status == 2  # the receipt of the second merge lists both
