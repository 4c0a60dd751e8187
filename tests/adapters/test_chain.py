"""An adapter whose base is an adapter: followed to its end, or refused; never alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import gralora_convert as gc
from gralora_convert.adapters.chain import below
from gralora_convert.errors import MisuseError, UnsupportedError
from tests.command import run, run_ok
from tests.zoo import load

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
BASE = FIXTURES / "bases/llama"


def based_on(folder: Path, fixture: str, base: Path) -> Path:
    """A golden adapter that says it was trained on `base`."""
    shutil.copytree(FIXTURES / "peft-0.21.2" / fixture, folder)
    path = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    return based_on(tmp_path / "sft", "llama-hybrid", BASE)


@pytest.fixture
def dpo(sft: Path, tmp_path: Path) -> Path:
    return based_on(tmp_path / "dpo", "llama-k4", sft)


def test_a_chain_is_followed_to_its_model(sft: Path, dpo: Path, tmp_path: Path) -> None:
    told = run_ok("merge", dpo, "-o", tmp_path / "merged")
    assert f"was trained on the adapter {sft}: both are merged" in told.stderr
    model = load(BASE, "AutoModelForCausalLM", dtype=torch.float32)
    for adapter in (sft, dpo):  # as it was trained
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    run_ok("merge", dpo, "-o", tmp_path / "insisting", "--again")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "insisting"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    right, found = model.state_dict(), load_file(tmp_path / "merged/model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=1e-6)
    told = run_ok("verify", dpo, "--merged", tmp_path / "merged")
    assert "same function" in told.stdout


def test_it_is_never_merged_alone_onto_the_bottom(sft: Path, dpo: Path, tmp_path: Path) -> None:
    for command in (["merge", dpo, "-o", tmp_path / "out"], ["verify", dpo, "--merged", BASE]):
        refused = run(*command, "--base", BASE)
        assert refused.status == 2
        assert f"was trained on the adapter {sft}, which is neither named" in refused.stderr
    assert not (tmp_path / "out").exists()
    run_ok("merge", sft, dpo, "--base", BASE, "-o", tmp_path / "both")
    run_ok("merge", dpo, "-o", tmp_path / "followed")
    both, followed = (load_file(tmp_path / f / "model.safetensors") for f in ("both", "followed"))
    assert all(torch.equal(both[name], followed[name]) for name in both)


def test_a_base_that_holds_the_first_is_enough(sft: Path, dpo: Path, tmp_path: Path) -> None:
    run_ok("merge", sft, "-o", tmp_path / "first")
    run_ok("merge", dpo, "--base", tmp_path / "first", "-o", tmp_path / "second")
    run_ok("verify", dpo, "--base", tmp_path / "first", "--merged", tmp_path / "second")
    shutil.copytree(tmp_path / "first", tmp_path / "foreign")
    (tmp_path / "foreign/gralora_convert.json").unlink()  # as another tool leaves it
    with pytest.raises(MisuseError, match="insist with `again=True`"):
        gc.merge(dpo, base=tmp_path / "foreign")
    run_ok("merge", dpo, "--base", tmp_path / "foreign", "-o", tmp_path / "third", "--again")


def test_all_that_is_missing_of_a_longer_chain_is_named(
    sft: Path, dpo: Path, tmp_path: Path
) -> None:
    last = based_on(tmp_path / "last", "llama-gralora", dpo)
    refused = run("merge", last, "--base", BASE, "-o", tmp_path / "out")
    assert f"Name it before: {sft} {dpo} {last}" in refused.stderr
    run_ok("merge", sft, dpo, last, "--base", BASE, "-o", tmp_path / "out")


def test_what_to_do_next_follows_the_chain(sft: Path, dpo: Path) -> None:
    told = run_ok("inspect", dpo).stdout
    assert f"merge {dpo} -o OUT" in told
    assert "--base" not in told
    assert f"merge {sft} --base {BASE} -o OUT" in run_ok("inspect", sft).stdout


@pytest.mark.parametrize("command", ["validate", "inspect"])
def test_it_is_told(command: str, sft: Path, dpo: Path) -> None:
    told = run_ok(command, dpo).stdout
    assert "base-is-adapter" in told
    assert str(sft) in told
    assert "base-is-adapter" not in run_ok(command, sft).stdout


def test_a_chain_that_leads_back_to_itself_ends(sft: Path, dpo: Path) -> None:
    path = sft / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(dpo)}))
    with pytest.raises(UnsupportedError, match="leads back to itself"):
        below(gc.Adapter.open(dpo))


@pytest.mark.parametrize("command", ["validate", "inspect"])
def test_a_chain_in_a_circle_is_shown(command: str, sft: Path, dpo: Path) -> None:
    path = sft / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(dpo)}))
    told = run(command, dpo)
    assert "leads back to itself" in told.stdout
    assert "q_proj" in run("inspect", dpo).stdout


@pytest.mark.parametrize("name", ["/elsewhere/runs/sft", "runs/sft", "sft"])
@pytest.mark.parametrize("given", [True, False])
def test_a_first_adapter_that_was_moved_is_not_left_out(
    name: str, given: bool, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    sft = based_on(runs / "sft", "llama-hybrid", BASE)
    dpo = based_on(runs / "dpo", "llama-k4", Path(name))
    base = ["--base", BASE] if given else []
    refused = run("merge", dpo, *base, "-o", tmp_path / "out")
    assert refused.status == 2
    assert f"Name it before: {sft} {dpo}" in refused.stderr
    run_ok("merge", sft, dpo, *base, "-o", tmp_path / "out")
    run_ok("merge", sft, "-o", tmp_path / "first")
    run_ok("merge", dpo, "--base", tmp_path / "first", "-o", tmp_path / "second")


def test_a_run_that_is_called_after_its_model_is_no_chain(tmp_path: Path) -> None:
    based_on(tmp_path / "llama", "llama-hybrid", Path("/models/llama"))
    other = based_on(tmp_path / "v2", "llama-k4", Path("/models/llama"))
    run_ok("merge", other, "--base", BASE, "-o", tmp_path / "out")


def test_converting_says_that_it_stands_on_another(dpo: Path, sft: Path, tmp_path: Path) -> None:
    told = run_ok("convert", dpo, "--to", "lora", "-o", tmp_path / "lora").stderr
    assert f"was trained on top of the adapter {sft}" in told


def test_a_negative_weight_takes_away_what_the_base_holds(sft: Path, tmp_path: Path) -> None:
    run_ok("merge", sft, "-o", tmp_path / "held")
    arguments = [sft, "--base", tmp_path / "held"]
    assert "already holds" in run("merge", *arguments, "-o", tmp_path / "twice").stderr
    receipt = run_ok("merge", *arguments, "--weight", "-1", "-o", tmp_path / "back", "--json").json
    assert receipt["merged_adapters"] == []
    before, after = (load_file(f / "model.safetensors") for f in (BASE, tmp_path / "back"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    run_ok("merge", sft, "--base", tmp_path / "back", "-o", tmp_path / "again")


def test_a_weight_is_for_the_adapter_that_was_named(dpo: Path, tmp_path: Path) -> None:
    run_ok("merge", dpo, "--weight", "0.5", "-o", tmp_path / "merged")
    arguments = ["verify", dpo, "--merged", tmp_path / "merged"]
    assert "same function" in run_ok(*arguments, "--weight", "0.5").stdout
    assert "same function" in run_ok(*arguments).stdout  # by the receipt
    assert run(*arguments, "--weight", "1").status == 1


@pytest.mark.parametrize("command", ["merge", "verify"])
def test_adapters_that_name_different_bases_have_none(
    command: str, sft: Path, tmp_path: Path
) -> None:
    other = based_on(tmp_path / "other", "llama-k4", FIXTURES / "bases/llama-tied")
    rest = ["-o", tmp_path / "out"] if command == "merge" else ["--merged", BASE]
    refused = run(command, sft, other, *rest)
    assert refused.status == 2
    assert "different base models" in refused.stderr


def test_an_adapter_is_not_hashed_before_the_work(
    sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one takes a second: it is done while tensors are made."""
    monkeypatch.setattr(gc.Adapter, "sha256", pytest.fail)
    gc.merge(sft, base=BASE)
    gc.verify(sft, base=BASE, merged=BASE, level="weights")
