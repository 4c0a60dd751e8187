"""The writing commands, killed and interrupted at random moments, and with failing disks.

`KILLS=200 pytest tests/output/test_kills.py` tries more moments. Each run is a fork of a server
that has imported everything, so that a moment is one of the work, not of Python's start.
"""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random

import pytest

from gralora_convert.cli.entry import main
from gralora_convert.verbs import conversion, extraction, merging
from tests.command import run, run_ok
from tests.faults import mounted, tree

KILLS = int(os.environ.get("KILLS", "4"))
FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
OLD = {"model.safetensors": b"old", "config.json": b"{}"}
COMMANDS = tuple(verb.__name__ for verb in (merging.merge, conversion.convert, extraction.extract))


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.output.test_kills", "transformers.models.llama.modeling_llama"]
)


def carry_out(arguments: list[str], change: str, value: int) -> None:
    """One command, silently, after one change of the process that it runs in."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    match change:
        case "user":
            os.setuid(value)
        case "file size":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (value, value))
    try:
        main(arguments)
    except KeyboardInterrupt:  # before the command line could catch it
        sys.exit(130)


class Work:
    """Inputs of their own, one output, and what a run that nobody disturbs makes of them."""

    def __init__(self, folder: Path, command: str) -> None:
        self.output = folder / "made/out"
        self.inputs = folder / "inputs"
        if not self.inputs.exists():
            shutil.copytree(FIXTURES / "peft-0.21.2/llama-hybrid", self.inputs / "adapter")
            shutil.copytree(FIXTURES / "bases/llama-sharded", self.inputs / "base")
            made = self.inputs / "tuned"
            run_ok("merge", self.inputs / "adapter", "--base", self.inputs / "base", "-o", made)
        base = ["--base", self.inputs / "base"]
        options: dict[str, list[object]] = {
            "merge": [self.inputs / "adapter", *base],
            "convert": [self.inputs / "adapter", "--to", "lora"],
            "extract": [*base, "--tuned", self.inputs / "tuned", "--to", "gralora", "--r", 4],
        }
        self.arguments = [command, *options[command]]
        self.before = tree(self.inputs)
        self.reset(old=False)
        started = time.monotonic()
        run_ok(*self.arguments, "-o", self.output)
        self.seconds = time.monotonic() - started
        self.new = tree(self.output)

    def reset(self, *, old: bool) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir()
        if old:
            self.output.mkdir()
            for name, text in OLD.items():
                (self.output / name).write_bytes(text)

    def start(self, change: str = "", value: int = 0) -> ForkServerProcess:
        """The command in a process of its own."""
        given = [*map(str, self.arguments), "-o", str(self.output), "--overwrite"]
        process = SERVER.Process(target=carry_out, args=(given, change, value))
        process.start()
        return process

    def require_whole(self, *, old: bool) -> None:
        """The output is the old one or the new one; the inputs are as they were."""
        assert tree(self.output) in (self.new, OLD if old else {}), tree(self.output.parent)
        assert tree(self.inputs) == self.before


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def work(place: Path, request: pytest.FixtureRequest) -> Work:
    return Work(place, request.param)


def status_of(process: ForkServerProcess) -> int:
    process.join(60)
    if process.exitcode is None:
        process.kill()
        pytest.fail("hangs")
    return process.exitcode


every_command = pytest.mark.parametrize("work", COMMANDS, indirect=True)


@every_command
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_random_moments(work: Work, number: signal.Signals) -> None:
    random = Random(number)
    for kill in range(KILLS):
        old = kill % 2 == 1
        work.reset(old=old)
        child = work.start()
        time.sleep(random.uniform(0, 1.2) * work.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid or 0, number)
        status = status_of(child)
        # 1 is Python's own, for a signal before the command line runs or after it
        assert status in ((-number, 0) if number == signal.SIGKILL else (130, 0, 1, -number))
        work.require_whole(old=old)
        assert status != 0 or tree(work.output) == work.new
    assert status_of(work.start()) == 0  # the next run goes through, and leaves nothing else
    assert tree(work.output) == work.new
    assert [path.name for path in work.output.parent.iterdir()] == ["out"]


@every_command
def test_a_disk_that_is_too_small(work: Work, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=8k") as folder:
        outcome = run(*work.arguments, "-o", folder / "out")
        assert outcome.status == 2
        assert "bytes" in outcome.stderr
        assert tree(folder) == {}


@every_command
@pytest.mark.parametrize("limit", [0, 1000, 3000])
def test_files_that_cannot_grow(work: Work, limit: int) -> None:
    """Writes fail in the middle, after all that was checked before: a quota does the same."""
    work.reset(old=False)
    assert status_of(work.start("file size", limit)) == 2
    assert tree(work.output.parent) == {}


@every_command
def test_a_disk_that_fails_while_it_is_read(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    work.reset(old=False)
    calls = 0

    def failing(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    outcome = run(*work.arguments, "-o", work.output)
    assert calls
    assert (outcome.status, outcome.stderr.count("\n")) == (2, 1)
    assert "cannot be read" in outcome.stderr
    assert tree(work.output.parent) == {}


@every_command
def test_a_disk_that_reads_a_few_bytes_at_a_time(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:1009]], offset)

    monkeypatch.setattr(os, "preadv", short)
    work.reset(old=False)
    run_ok(*work.arguments, "-o", work.output)
    assert tree(work.output) == work.new


@every_command
def test_an_input_that_changes_while_it_is_read(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, written again: who knows what was read in between?"""
    changed = [*work.inputs.glob("adapter/*.safetensors"), *work.inputs.glob("*/model-*")]
    real = os.preadv

    def changing(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        for path in changed:
            os.utime(path)
        return real(descriptor, list(buffers), offset)

    work.reset(old=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", changing)
        outcome = run(*work.arguments, "-o", work.output)
    assert outcome.status == 2
    assert "changed while it was read" in outcome.stderr
    assert tree(work.output.parent) == {}


@every_command
def test_outputs_that_are_inputs_are_refused(work: Work, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(work.inputs / "base")
    inputs = [path for path in work.inputs.iterdir() if str(path) in map(str, work.arguments)]
    for place in [*inputs, inputs[0] / "below", work.inputs]:
        for options in ([], ["--overwrite"]):
            outcome = run(*work.arguments, "-o", place, *options)
            assert (outcome.status, outcome.stderr.count("\n")) == (2, 1), place
    assert tree(work.inputs) == work.before


@every_command
def test_two_runs_to_one_output(work: Work) -> None:
    work.reset(old=False)
    children = [work.start() for _ in range(3)]
    statuses = [status_of(child) for child in children]
    assert set(statuses) <= {0, 2}
    assert 0 in statuses
    assert tree(work.output) == work.new
    assert [path.name for path in work.output.parent.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_files_of_another_user_are_a_refusal(place: Path) -> None:
    """Root reads everything: the runs are those of `nobody`."""
    parents = {*Path(sys.prefix).parents, Path(sys.prefix), *Path(__file__).parents}
    if not all(parent.stat().st_mode & 0o005 == 0o005 for parent in parents):
        pytest.skip("other users may not read this environment")
    work = Work(place, "merge")
    with contextlib.ExitStack() as stack:
        place.chmod(0o755)
        stack.callback(place.chmod, 0o700)
        closed = work.inputs / "adapter/adapter_model.safetensors"
        stack.callback(closed.chmod, closed.stat().st_mode)
        closed.chmod(0)
        work.reset(old=False)
        work.output.parent.chmod(0o777)
        assert status_of(work.start("user", 65534)) == 2
        closed.chmod(0o644)
        work.output.parent.chmod(0o555)
        assert status_of(work.start("user", 65534)) == 2
        work.output.parent.chmod(0o777)
        assert status_of(work.start("user", 65534)) == 0
    assert tree(work.output) == work.new
