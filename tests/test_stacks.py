"""Golden folders of an older stack (transformers 4.57, PEFT 0.19): merged here, loaded by the
installed transformers, they give the outputs that the unmerged model gave there."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.command import run_ok

FIXTURES = Path(__file__).parent.parent / "fixtures"
MANIFEST: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
STACKS = sorted(name for name in MANIFEST if name.startswith("transformers-"))


@pytest.mark.parametrize("name", STACKS)
def test_an_adapter_of_an_older_stack(name: str, tmp_path: Path) -> None:
    first_output = runpy.run_path(str(FIXTURES / "make_stacks.py"))["first_output"]
    entry, folder = MANIFEST[name], FIXTURES / name
    right = load_file(folder / "outputs.safetensors")
    cls = getattr(transformers, entry["class"])
    here = first_output(cls.from_pretrained(folder / "base"), entry["inputs"])
    torch.testing.assert_close(here, right["base"], rtol=0, atol=1e-5)  # the forward is the same
    run_ok("validate", folder / "adapter", "--base", folder / "base")
    run_ok("merge", folder / "adapter", "--base", folder / "base", "-o", tmp_path / "merged")
    merged = first_output(cls.from_pretrained(tmp_path / "merged"), entry["inputs"])
    torch.testing.assert_close(merged, right["adapted"], rtol=0, atol=1e-4)
    told = run_ok("verify", folder / "adapter", "--merged", tmp_path / "merged").stdout
    assert "same function" in told
    assert (merged - right["base"]).abs().max() > 0.01
