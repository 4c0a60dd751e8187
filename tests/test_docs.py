"""The documents tell the truth: their commands run, and print what is shown; every command, option
and module is in them."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

import gralora_convert as gc
from gralora_convert.cli.commands import commands
from tests.command import run, run_ok
from tests.zoo import ARCHITECTURES, load, save_base, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- exit (\d) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fixtures, in which the commands write."""
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """Exit status, language and text of the fenced blocks of a page, in order."""
    for status, language, text in FENCE.findall(page.read_text()):
        yield int(status or 0), language, text


def commands_in(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("gralora-convert ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_and_print_what_is_shown(page: Path, copy: Path) -> None:
    printed: list[str] = []
    for status, language, text in blocks(page):
        if language == "bash":
            printed = []
            for arguments in commands_in(text):
                if "--plot" in arguments and find_spec("matplotlib") is None:
                    continue  # an extra; continuous integration has it
                outcome = run(*arguments)
                assert outcome.status == status, outcome.stdout + outcome.stderr
                printed += _plain(outcome.stdout + outcome.stderr).splitlines()
        elif language == "text" and not text.startswith("gralora-convert inspect  PATH"):
            _require_shown(_plain(text).splitlines(), printed)
        elif language == "python":
            exec(compile(text, str(page), "exec"), {})


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents call ./model, ./adapter, ./tuned, ./pissa and ./dora."""
    base = save_base(ARCHITECTURES["llama"], tmp_path / "model")
    train(base, ARCHITECTURES["llama"], tmp_path / "adapter")
    tuned = load(base, "AutoModelForCausalLM")
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    for name, options in (("pissa", {"init_lora_weights": "pissa"}), ("dora", {"use_dora": True})):
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        adapted = get_peft_model(load(base, "AutoModelForCausalLM"), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_users() -> list[str]:
    """Commands of ours in blocks that name the reader's own files, or start several processes;
    those that need another tool's output or several machines are left out."""
    lines = [
        line
        for page in PAGES
        for _, language, text in blocks(page)
        if language == "sh" and "mergekit" not in text and "HOST" not in text
        for line in text.replace("\\\n", " ").splitlines()
        if "gralora" in line and "_COMPLETE" not in line
    ]
    assert len(lines) >= 4
    return lines


@pytest.mark.parametrize("line", of_users())
@pytest.mark.usefixtures("inputs")
def test_commands_on_the_readers_own_files_run(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "gralora-convert":
        run_ok(*arguments)
        return
    assert program == "torchrun"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], check=True)


def _require_shown(shown: list[str], printed: list[str]) -> None:
    """The lines shown, in this order; `...` stands for any number of others."""
    place = 0
    skipping = False
    for line in shown:
        if line == "...":
            skipping = True
            continue
        assert line in printed[place:], f"not printed: {line}"
        found = printed.index(line, place)
        assert skipping or found == place or place == 0, f"lines left out before: {line}"
        place, skipping = found + 1, False


def _plain(text: str) -> str:
    """`text` without how far rounding went: the order of sums differs from processor to processor,
    and with it the last bits."""
    return re.sub(r"[\d.e+]+ x the rounding bound", "N x the rounding bound", text)


def test_enough_is_run() -> None:
    run_here = [c for page in PAGES for _, lang, t in blocks(page) if lang == "bash"
                for c in commands_in(t)]  # fmt: skip
    assert {arguments[0] for arguments in run_here} >= {
        "inspect", "validate", "merge", "convert", "verify",
    }  # fmt: skip
    assert sum(language == "python" for page in PAGES for _, language, _ in blocks(page)) >= 5


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_command_has_help_that_ends_with_an_example(name: str) -> None:
    shown = run_ok(name, "--help").stdout
    example = shown[shown.rindex("Example") :]
    assert "\n\n" not in example.rstrip()
    assert f"gralora-convert {name}" in example
    assert f"gralora-convert {name}" in README


def test_the_readme_lists_every_option_with_its_commands() -> None:
    table = README[README.index("| option | commands |") : README.index("`--help` of each command")]
    listed: dict[str, set[str]] = {}
    for options, of, _ in (line.strip("| ").split(" | ", 2) for line in table.splitlines()[2:]
                           if line):  # fmt: skip
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", options):
            assert option not in listed, f"{option} stands twice"
            listed[option] = set(commands.commands) if of == "all" else set(of.split())
    present: dict[str, set[str]] = {}
    for name, command in commands.commands.items():
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if isinstance(parameter, click.Option):
                    present.setdefault(option, set()).add(name)
    assert listed == present


@pytest.mark.parametrize("name", sorted(commands.commands))
def test_every_option_shows_its_default(name: str) -> None:
    command = commands.commands[name]
    context = click.Context(command, info_name=name)
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record and "--help" not in record[0]:
            assert re.search(r"\[(default: [^\]]+|required)\]", record[1]), record


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_guide_is_in_the_readme() -> None:
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in README or "performance" in page.name


def test_the_map_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = text[text.index("```\nerrors") : text.index("The five rules:")]
    rooms = {path.parent.name for path in (ROOT / "gralora_convert").glob("*/__init__.py")}
    assert set(re.findall(r"^(?:  \+-- )?(\w+) ", picture, re.M)) == rooms | {"errors", "system"}


def test_every_path_of_the_guide_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = "|".join(path.parent.name for path in (ROOT / "gralora_convert").glob("*/__init__.py"))
    named = re.findall(rf"`((?:{rooms})\.\w+(?:\.\w+)?)`", text)
    assert len(named) >= 6
    for dotted in named:
        value: object = import_module("gralora_convert")
        for name in dotted.split("."):
            value = getattr(value, name, None) or import_module(f"{value.__name__}.{name}")  # type: ignore[attr-defined]


def test_the_workflow_runs_a_command_that_exists(copy: Path) -> None:
    text = (ROOT / "docs/examples/validate-adapters.yml").read_text()
    assert text in (ROOT / "docs/ci.md").read_text()
    steps = yaml.safe_load(text)["jobs"]["validate"]["steps"]
    (command,) = [s["run"] for s in steps if s.get("run", "").startswith("gralora-convert")]
    adapters = [
        str(copy / "fixtures/peft-0.21.2/llama-k4"),
        str(copy / "fixtures/peft-0.21.2/lora"),
    ]
    found = run_ok(*command.replace("adapters/*/", shlex.join(adapters)).split()[1:])
    assert "::error" not in found.stdout


def test_the_hook_is_a_command_that_takes_files(copy: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    files = [p for p in sorted(copy.glob("fixtures/peft-0.2*/llama-k*/*"))
             if re.search(hook["files"], str(p.relative_to(copy)))]  # fmt: skip
    assert len(files) == 8
    outcome = run_ok(*hook["entry"].split()[1:], *files)
    assert outcome.stdout.count(": valid") == 4
    broken = copy / "fixtures/peft-0.19.1/gpt2-bias-all"
    (broken / "adapter_config.json").write_text("{")
    outcome = run(*hook["entry"].split()[1:], *files, *broken.iterdir())
    assert outcome.status == 1
    assert "config-not-json" in outcome.stdout


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
    assert f" {command} " in lines[-1]
    assert lines[-1].startswith(("    gralora-convert ", "    torchrun "))


def test_no_command_shows_the_help() -> None:
    outcome = run()
    assert (outcome.status, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("Usage:")
    assert len(outcome.stderr.splitlines()) > len(commands.commands)
