"""The README tells the truth: its commands run and print what it shows; every command is in it."""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

import gralora_convert as gc
from gralora_convert.cli import commands
from tests.command import run, run_ok

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fixtures, in which the README's commands write."""
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def lines_of_commands() -> list[list[str]]:
    text = " ".join(blocks("bash")).replace("&&", "\n").replace("\\\n", " ")
    found = re.findall(r"gralora-convert [^\n]+", text)
    return [shlex.split(line)[1:] for line in found]


def test_the_commands_print_what_is_shown(copy: Path) -> None:
    printed = ""
    for arguments in lines_of_commands():
        printed += run_ok(*arguments).stdout
    shown = next(block for block in blocks("text") if block.startswith("merged"))
    lines = _without_rounding(printed).splitlines()
    for line in _without_rounding(shown).splitlines():
        assert line == "..." or line in lines
    assert len(lines_of_commands()) >= 6


def _without_rounding(text: str) -> str:
    """`text` without how far rounding went: the order of sums differs from processor to processor,
    and with it the last bits."""
    return re.sub(r"[\d.]+ x the rounding bound", "N x the rounding bound", text)


def test_the_python_example_runs(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "bytes will be written" in capsys.readouterr().out
    assert (copy / "merged/model.safetensors").exists()


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_has_help_with_an_example_and_is_in_the_readme(name: str) -> None:
    command = commands.commands[name]
    shown = command.get_help(click.Context(command, info_name=f"gralora-convert {name}"))
    assert "Example" in shown
    assert f"gralora-convert {name}" in shown
    assert f"gralora-convert {name}" in README


@pytest.mark.parametrize("name", gc.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    if name in ("__version__", "Delta"):
        return
    documentation = getattr(gc, name).__doc__
    assert documentation
    assert not documentation.startswith(f"{name}(")  # dataclass writes such a line by itself


def test_the_public_page_lists_its_names() -> None:
    assert set(gc.__all__) <= set(dir(gc))


@pytest.mark.parametrize("command", commands.commands)
def test_help_ends_with_an_example(command: str) -> None:
    lines = run_ok(command, "--help").stdout.splitlines()
    assert lines[-1].startswith(f"    gralora-convert {command} ")


def test_no_command_shows_the_help() -> None:
    outcome = run()
    assert (outcome.status, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("Usage:")
