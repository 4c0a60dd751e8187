"""A gate in CI needs no torch: without it adapters are judged alike, or it says what it lacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import run

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises ModuleNotFoundError
from gralora_convert.cli import run
run()
"""


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)], text=True, capture_output=True
    )


@pytest.mark.parametrize("version", ["peft-0.19.1", "peft-0.20.0", "peft-0.21.2"])
def test_adapters_are_judged_alike_without_torch(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the bases that they name are not
    adapters = sorted(path for path in (FIXTURES / version).iterdir() if path.is_dir())
    found = without_torch("validate", *adapters, "--json")
    expected = run("validate", *adapters, "--json")
    assert found.stdout == expected.stdout
    assert found.returncode == expected.status
    assert len(json.loads(found.stdout)["adapters"]) == len(adapters)


def test_an_adapter_is_held_against_its_base_without_torch() -> None:
    hybrid, base = FIXTURES / "peft-0.21.2/llama-hybrid", FIXTURES / "bases"
    assert without_torch("validate", hybrid, "--base", base / "llama").returncode == 0
    wrong = without_torch("validate", hybrid, "--base", base / "gpt2", "--json")
    assert wrong.returncode == 1
    assert "module-not-in-base" in wrong.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("validate", "peft-0.21.2/bert-classifier", "--base", "bases/bert"),  # where the head goes
        ("merge", "peft-0.21.2/llama-hybrid", "--base", "bases/llama", "--output"),
    ],
    ids=["a head", "merge"],
)
def test_what_needs_torch_says_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    given = [str(FIXTURES / a) if "/" in a else a for a in arguments]
    extra = [str(tmp_path / "out")] if given[-1] == "--output" else []
    found = without_torch(*given, *extra)
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        "error: this needs torch, which is not installed. Run: pip install torch."
    ]
    assert not list(tmp_path.iterdir())
