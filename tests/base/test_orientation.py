"""A square weight whose layer nobody knows is asked about, in every verb, and can be answered."""

from pathlib import Path

import pytest
import torch
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import gralora_convert as gc
from gralora_convert.delta import dense
from gralora_convert.errors import InvalidAdapterError, UnsupportedError
from tests.command import run, run_ok

SQUARE = {"conv": True, "lin": False}


class Mixed(nn.Module):
    """A square Conv1D with Linear layers beside it, one of them square, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin, self.wide = Conv1D(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.wide(torch.tanh(self.lin(torch.tanh(self.conv(x)))))
        return out


X = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture
def trained(tmp_path: Path) -> torch.Tensor:
    """The outputs of PEFT's unmerged model, whose base and adapter are in `tmp_path`."""
    torch.manual_seed(0)
    model = Mixed()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors", {"format": "pt"})
    peft = get_peft_model(
        model, GraloraConfig(r=4, gralora_k=2, alpha=8, target_modules=["conv", "lin", "wide"])
    )
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.3
    peft.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        found: torch.Tensor = peft(X)
    return found


def outputs(weights: Path) -> torch.Tensor:
    model = Mixed()
    model.load_state_dict(load_file(weights))
    with torch.no_grad():
        found: torch.Tensor = model(X)
    return found


@pytest.mark.parametrize("verb", ["validate", "merge", "verify"])
def test_it_is_asked_for_each_layer(verb: str, trained: torch.Tensor, tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    rest = {"merge": ["-o", tmp_path / "out"], "verify": ["--merged", base]}.get(verb, [])
    told = run(verb, adapter, "--base", base, *rest)
    assert told.status == (1 if verb == "validate" else 2)
    assert "--linear conv" in told.stdout + told.stderr
    assert "--fan-in-fan-out conv" in told.stdout + told.stderr
    told = run(verb, adapter, "--base", base, *rest, "--fan-in-fan-out", "conv")
    assert "--linear lin " in told.stdout + told.stderr
    assert not (tmp_path / "out").exists()


def test_the_answer_makes_the_right_merge(trained: torch.Tensor, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    answers = ["--fan-in-fan-out", "conv", "--linear", "*"]
    arguments = [adapter, "--base", tmp_path / "base"]
    run_ok("merge", *arguments, "-o", merged, *answers)
    torch.testing.assert_close(outputs(merged / "model.safetensors"), trained, rtol=0, atol=1e-5)
    told = run_ok("verify", *arguments, "--merged", merged, "--level", "weights", *answers)
    assert "same function" in told.stdout
    wrong = run("verify", *arguments, "--merged", merged, "--level", "weights", "--linear", "*")
    assert wrong.status == 1
    gc.convert(adapter, to="lora", base=tmp_path / "base", fan_in_fan_out=SQUARE)


def test_extracting_asks_too(trained: torch.Tensor, tmp_path: Path) -> None:
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    answers = ["--fan-in-fan-out", "conv", "--linear", "*"]
    run_ok("merge", *arguments, "-o", tmp_path / "tuned", *answers)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    with pytest.raises(UnsupportedError, match="fan_in_fan_out=") as refusal:
        gc.extract(base=base, tuned=tuned, to="gralora", r=4)
    assert "config.json" in str(refusal.value)
    plan = gc.extract(base=base, tuned=tuned, to="gralora", r=4, fan_in_fan_out=SQUARE)
    plan.write(tmp_path / "again")
    run_ok(
        "merge", tmp_path / "again", "--base", tmp_path / "base", "-o", tmp_path / "out", *answers
    )
    found = outputs(tmp_path / "out/model.safetensors")
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-3)
    written = gc.Adapter.open(tmp_path / "again").delta("conv")
    kept = gc.Adapter.open(tmp_path / "adapter").delta("conv")
    assert torch.allclose(dense(written), dense(kept), atol=1e-4)


def test_an_answer_against_what_is_known_is_refused(trained: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError, match="fan-in-fan-out-contradicted"):
        gc.merge(tmp_path / "adapter", base=tmp_path / "base", fan_in_fan_out={"*": True})
    report = gc.validate(
        tmp_path / "adapter", tmp_path / "base", fan_in_fan_out=SQUARE | {"*.nothing": False}
    )
    assert [f.code for f in report.findings if f.severity == "warning"] == ["pattern-unmatched"]
