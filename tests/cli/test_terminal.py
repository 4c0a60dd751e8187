"""Terminal manners: colours, widths, quiet, suggestions, completion. A pseudo-terminal stands in
for the real one."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors import safe_open

from gralora_convert.cli.terminal import Line
from gralora_convert.errors import error
from tests.command import run, run_ok
from tests.zoo import Architecture, llama, save_base, train

ROOT = Path(__file__).parent.parent.parent
BROKEN = "fixtures/peft-0.19.1/gpt2-bias-all"
LLAMA, BASE = "fixtures/peft-0.21.2/llama-hybrid", "fixtures/bases/llama"


def on_terminal(
    *arguments: object, width: int = 80, settings: Mapping[str, str] | None = None
) -> str:
    """What `gralora-convert ARGUMENTS` shows on a terminal, both streams."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "gralora_convert", *map(str, arguments)],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
        env=environment | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | dict(settings or {}),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_findings_are_coloured_and_wrapped_on_a_terminal() -> None:
    shown = on_terminal("validate", BROKEN, width=60)
    assert re.search(r"\x1b\[31m\x1b\[1merror\x1b\[0m\x1b\[2m\[bias-missing\]", shown)
    assert max(map(len, plain(shown).splitlines())) <= 60
    warning = on_terminal("validate", LLAMA, "--base", BASE, "--key-map", "nothing=x")
    assert "\x1b[33m\x1b[1mwarning" in warning
    error = on_terminal("merge", LLAMA, "--base", "nowhere/at-all", "-o", "x")
    assert "\x1b[31m\x1b[1merror" in error


def test_a_severity_is_coloured_also_where_a_long_name_begins_the_next_line() -> None:
    first, *_ = Line.of(error("module-not-in-base", "x" * 70, "m")).on_terminal(60, plain=False)
    assert first == "\x1b[31m\x1b[1merror\x1b[0m\x1b[2m[module-not-in-base]\x1b[0m:"


@pytest.mark.parametrize("settings", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_no_colours_where_none_are_wanted(settings: dict[str, str]) -> None:
    for arguments in (["validate", BROKEN], ["inspect", LLAMA], ["merge", LLAMA]):
        assert "\x1b" not in on_terminal(*arguments, settings=settings)


def test_a_page_keeps_its_commands_whole() -> None:
    shown = on_terminal("inspect", LLAMA, width=50)
    assert "\x1b[" in shown
    lines = plain(shown).splitlines()
    assert any(line.endswith(f"merge {LLAMA} --base {BASE} -o OUT") for line in lines)
    others = [line for line in lines if "gralora-convert " not in line]
    assert max(map(len, others)) <= 50
    joined = re.sub(r"\n +", " ", plain(shown))
    assert "blocks of rank 2 beside a LoRA of rank 3" in joined


def test_piped_output_is_plain_and_one_fact_per_line() -> None:
    outcome = run("validate", BROKEN)
    assert "\x1b" not in outcome.stdout + outcome.stderr
    assert len(outcome.stdout.splitlines()) == 2
    assert outcome.stdout.splitlines()[0].startswith("error[bias-missing]: ")


def test_a_bar_with_rate_and_time_left(tmp_path: Path) -> None:
    shown = on_terminal("merge", LLAMA, "--base", BASE, "-o", tmp_path / "a", width=100)
    assert re.search(r"100%\|.*B/s", shown)
    quiet = on_terminal("merge", LLAMA, "--base", BASE, "-o", tmp_path / "b", "-q")
    assert "B/s" not in quiet
    assert "merged 4 modules" in quiet
    asked = run_ok("merge", LLAMA, "--base", BASE, "-o", tmp_path / "c", "--progress")
    assert "B/s" in asked.stderr
    assert "B/s" not in run_ok("merge", LLAMA, "--base", BASE, "-o", tmp_path / "d").stderr


def test_quiet_leaves_the_result(tmp_path: Path) -> None:
    arguments = ("verify", LLAMA, "--base", BASE, "--merged", f"{BASE}/model.safetensors")
    loud, quiet = run(*arguments), run(*arguments, "-q")
    assert "note: " in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout
    assert run_ok("inspect", LLAMA, "-q").stdout == run_ok("inspect", LLAMA).stdout


def test_a_note_that_is_a_finding_is_called_so_once(tmp_path: Path) -> None:
    arguments = "merge", LLAMA, "--base", BASE, "--key-map", "nothing=x", "-o", tmp_path / "out"
    planned, plan = run_ok(*arguments, "--dry-run"), run_ok(*arguments, "--dry-run", "-q")
    done = run_ok(*arguments)
    for told in (planned.stdout, done.stderr):
        assert re.findall(r"^(.*)warning", told, re.M) == [""]
        assert "warning[key-map-unmatched]: nothing: is named by --key-map" in told
    assert "warning" not in plan.stdout + run_ok(*arguments, "-q", "--overwrite").stderr


def test_a_plan_fits_a_screen(tmp_path: Path) -> None:
    """40 layers, which stand as 1, 10, 11, 2 in the file: a line for each kind of tensor."""
    build = llama("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=40)
    deep = Architecture(build, ["q_proj", "down_proj"])
    base = save_base(deep, tmp_path / "base")
    train(base, deep, tmp_path / "adapter")
    arguments = "merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out", "--dry-run"
    lines = run_ok(*arguments).stdout.splitlines()
    assert len(lines) < 24
    (computed,) = [line for line in lines if "q_proj" in line]
    assert computed.split() == [*"compute F32 40 16 x 16".split(), computed.split()[-1]]
    assert computed.endswith("  model.layers.{0-39}.self_attn.q_proj.weight")
    (total,) = run_ok(*arguments, "-q").stdout.splitlines()
    free = re.compile(r"[\d,]+ bytes free")  # others write meanwhile
    assert free.sub("", total) == free.sub("", lines[-1]) != total
    parts = run_ok(*arguments, "--json").json["parts"]
    assert isinstance(parts, list)
    with safe_open(base / "model.safetensors", "pt") as file:
        assert {part["name"] for part in parts} == set(file.keys())
    assert sum(part["how"] == "compute" for part in parts) == 80


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["mrege"], "merge"),
        (["convert", LLAMA, "-o", "x"], "gralora, hybrid, lora."),
        (["merge", "--bsae", "x"], "--base"),
        (["merge", LLAMA, "-o", "x", "--dtype", "bfloat"], "bfloat16"),
        (["extract", "--to", "gralroa"], "gralora"),
        (["extract", "--base", BASE, "--tuned", "fixtures/bases/llama", "--to", "lora", "-o", "x",
          "--include", "*.q_prj"], "q_proj"),
    ],
)  # fmt: skip
def test_what_is_misspelt_is_told_the_nearest(arguments: list[str], nearest: str) -> None:
    outcome = run(*arguments)
    assert outcome.status == 2
    (line,) = outcome.stderr.splitlines()
    assert nearest in line


def test_a_renaming_that_renames_nothing_is_told(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_prj"
    outcome = run_ok("validate", LLAMA, "--base", BASE, "--key-map", f"{name}=x")
    assert "warning[key-map-unmatched]" in outcome.stdout
    assert "model.layers.0.mlp.down_proj" in outcome.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    def completed(**settings: str) -> str:
        program = "from gralora_convert.cli.entry import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | settings,
        )  # fmt: skip
        return result.stdout

    source = completed(_GRALORA_CONVERT_COMPLETE=f"{shell}_source")
    assert "_GRALORA_CONVERT_COMPLETE" in source
    words = {"COMP_WORDS": "gralora-convert me", "COMP_CWORD": "me" if shell == "fish" else "1"}
    assert "merge" in completed(_GRALORA_CONVERT_COMPLETE=f"{shell}_complete", **words)
    last = "g" if shell == "fish" else "3"
    words = {"COMP_WORDS": "gralora-convert convert --to g", "COMP_CWORD": last}
    assert "gralora" in completed(_GRALORA_CONVERT_COMPLETE=f"{shell}_complete", **words)


def test_the_version() -> None:
    from gralora_convert.version import __version__

    assert run_ok("--version").stdout.strip().endswith(__version__)


@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 2), ("2>/dev/full", 0), ("| true", 2)],
)
@pytest.mark.parametrize("style", ["text", "json"])
def test_streams_that_are_closed_or_full(redirection: str, status: int, style: str) -> None:
    """Whoever reads the status learns the truth: 1 would mean that the adapter has errors."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    waits = "import time; time.sleep(0.2); " if "true" in redirection else ""
    code = f"{waits}from gralora_convert.cli import run; run()"
    line = f"'{sys.executable}' -c '{code}' validate {LLAMA} --base {BASE} --format {style}"
    outcome = subprocess.run(
        ["bash", "-c", f"{line} {redirection}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == status
    assert "Traceback" not in outcome.stderr


def test_names_that_are_no_text(tmp_path: Path) -> None:
    adapter = shutil.copytree(ROOT / LLAMA, tmp_path / os.fsdecode(b"a\xff"))
    outcome = subprocess.run(
        [sys.executable, "-m", "gralora_convert", "merge", adapter, "--base", ROOT / BASE,
         "-o", os.fsencode(tmp_path) + b"/o\xff\n"],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, capture_output=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert b"o\\udcff\\n (" in outcome.stdout
    merged = next(path for path in tmp_path.iterdir() if path.name.startswith("o"))
    assert run_ok("validate", merged).stdout.endswith("valid\n")


def test_no_memory_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `ulimit -v`: no bug, nothing to report."""

    def fail(path: str) -> None:
        raise MemoryError

    monkeypatch.setattr("gralora_convert.verbs.inspection.inspect", fail)
    outcome = run("inspect", ROOT / LLAMA, "--json")
    assert outcome.status == 2
    assert outcome.json["error"]["kind"] == "memory"  # type: ignore[index]


def test_no_memory_for_torch_is_a_refusal(tmp_path: Path) -> None:
    outcome = subprocess.run(
        ["bash", "-c", f"ulimit -v 150000; exec {sys.executable} -m gralora_convert merge {LLAMA} "
         f"--base {BASE} -o {tmp_path}/out"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (outcome.returncode, outcome.stderr.count("\n")) == (2, 1), outcome.stderr
    assert "not enough memory" in outcome.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_output_that_is_there_is_not_called_what_it_was(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Nobody reads what is printed, and then the run is interrupted."""
    ours, theirs = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # else it is as small as the system makes it
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "gralora_convert", "merge", "--json",
         "fixtures/peft-0.21.2/llama-all-linear", "--base", BASE, "-o", tmp_path / "out"],
        cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    while process.poll() is None and not (tmp_path / "out").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert (tmp_path / "out/model.safetensors").exists()
    assert (process.returncode, errors.count("\n")) == (2, 1), errors
    assert "is complete, but" in errors


TWICE = """
import os, signal, sys
from gralora_convert.cli import entry
from gralora_convert.verbs import merging

def merge(*adapters, **options):
    raise KeyboardInterrupt

def show(text, *, err=False):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print(text, file=sys.stderr)

merging.merge, entry.show = merge, show
sys.argv = ["gralora-convert", "merge", "adapter", "-o", "out"]
entry.run()
"""


def test_a_second_interrupt_is_no_other_end() -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 130
    assert outcome.stderr == "\ninterrupted: the output is what it was before\n"


def test_one_fault_of_many_modules_is_one_line(tmp_path: Path) -> None:
    """An edited r; the JSON has every module."""
    shutil.copytree("fixtures/peft-0.21.2/llama-all-linear", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    every = run("validate", tmp_path / "adapter", "--json").json["findings"]
    assert isinstance(every, list)
    told = run("validate", tmp_path / "adapter").stdout.splitlines()
    assert len(every) > 13
    assert len(told) == len(every) / 2 + 1  # two layers, and the verdict
    assert any("model.layers.{0-1}.self_attn.q_proj (2): " in line for line in told)
    annotated = run("validate", tmp_path / "adapter", "fixtures/peft-0.21.2/llama-k4", "--format",
                    "github").stdout  # fmt: skip
    lines = [line for line in annotated.splitlines() if line.startswith("::error")]
    assert lines
    weights = tmp_path / "adapter/adapter_model.safetensors"
    assert all(line.startswith(f"::error file={weights},title=") for line in lines)
