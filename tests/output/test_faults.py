"""One small run, killed, interrupted and failed at every step: nothing half-made is ever found.

Steps are the lines of the two modules that write, and the calls they make of the system.
`FAULT_STRIDE=1` tries every step; by default every seventh, other ones for each kind of fault.
"""

import errno
import fcntl
import linecache
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from gralora_convert import system as system_module
from gralora_convert.disk.tensors import encode_header, read_safetensors
from gralora_convert.errors import ConvertError
from gralora_convert.output import journal as journal_module
from gralora_convert.output import plan as plan_module
from gralora_convert.output import staging as staging_module
from gralora_convert.output import writing as writing_module
from gralora_convert.output.parts import Computed, Copied, OutputFile, Part
from gralora_convert.output.plan import Plan
from tests.faults import tree

STRIDE = int(os.environ.get("FAULT_STRIDE", "7"))
MODULES = {
    module.__file__
    for module in (journal_module, plan_module, staging_module, system_module, writing_module)
}
OLD = {"config.json": b"{}", "model.safetensors": b"old", "sub": None, "sub/file": b"x"}
Tree = dict[str, bytes | None]


@dataclass
class Stage:
    """A place with an input, and room for an output (that may exist)."""

    root: Path
    plan: Plan
    existing: bool
    new: Tree

    @property
    def output(self) -> Path:
        return self.root / "made/out"

    def reset(self) -> None:
        shutil.rmtree(self.root / "made", ignore_errors=True)
        if self.existing:
            self.output.mkdir(parents=True)
            (self.output / "sub").mkdir()
            for name, text in OLD.items():
                if text is not None:
                    (self.output / name).write_bytes(text)

    def run(self) -> None:
        self.plan.write(self.output, overwrite=True, jobs=1)

    def is_old(self) -> bool:
        return tree(self.output) == (OLD if self.existing else {})

    def is_new(self) -> bool:
        return tree(self.output) == self.new

    def check(self, *, may_be_gone: bool) -> None:
        """The output is whole, old or new, now; and after the next run there is nothing else."""
        aside = self.output.with_name(".out.replaced")
        if may_be_gone and self.existing and not self.output.exists():
            assert tree(aside) == OLD
        else:
            assert self.is_old() or self.is_new(), tree(self.root)
        self.run()
        assert self.is_new()
        assert [path.name for path in self.output.parent.iterdir()] == ["out"]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where flushing takes no time; where there is none, on the disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def stage(request: pytest.FixtureRequest, memory: Path) -> Stage:
    data = bytes(range(200))
    source = memory / "in/model.safetensors"
    source.parent.mkdir()
    source.write_bytes(encode_header([("a", "U8", (80,), 80), ("b", "U8", (120,), 120)], {}) + data)
    (memory / "in/tokenizer.json").write_bytes(b"tokens")
    file = read_safetensors(source)
    parts = [Part(s.name, s.dtype, s.shape, s.nbytes, Copied(s)) for s in file.tensors.values()]
    tiles = Computed(7, lambda tile: memoryview(data[7 * tile : min(7 * tile + 7, 20)]))
    parts.insert(1, Part("c", "U8", (20,), 20, tiles))
    plan = Plan(
        "test", (OutputFile("model.safetensors", tuple(parts)),), lambda: {"made_by": "a test"},
        {"config.json": b"{}"}, {"sub/tokenizer.json": memory / "in/tokenizer.json"},
        (file,), (source.parent,),
    )  # fmt: skip
    stage = Stage(memory, plan, request.param, {})
    stage.reset()
    stage.run()
    stage.new = tree(stage.output)
    assert len(stage.new) == 5
    return stage


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, memory: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system swaps two folders in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(system_module, "exchange", lambda one, other: False)
    elif not system_module.exchange(memory, memory):
        pytest.skip("the system does not")
    return bool(request.param == "exchange")


def at_line(number: int, action: Callable[[], None]) -> tuple[Any, Callable[[], int]]:
    """A trace function that acts before the line of this number, and how many lines it has seen.

    The end of a `with` block is not counted: between it and `__exit__` Python looks for no signal.
    """
    seen = 0
    visited: set[tuple[FrameType, int]] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in MODULES:
            return None
        if event == "line":
            place = frame, frame.f_lineno
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            is_end = place in visited and line.lstrip().startswith("with ")
            visited.add(place)
            seen += not is_end
            if seen == number and not is_end:
                action()
        return trace

    return trace, lambda: seen


def traced(run: Callable[[], None], trace: Any, *, threads: bool) -> None:
    before = sys.gettrace()
    if threads:
        threading.settrace(trace)
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
        threading.settrace(before)


def steps(offset: int) -> Iterator[int]:
    return iter(range(1 + offset % STRIDE, 100_000, STRIDE))


def test_a_run_killed_at_any_line(stage: Stage, exchange: bool) -> None:
    killed = 0
    for number in steps(0):
        stage.reset()
        child = os.fork()
        if child == 0:
            trace, _ = at_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                traced(stage.run, trace, threads=True)
            finally:
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        killed += 1
        stage.check(may_be_gone=not exchange)
    assert killed > 150 / STRIDE
    assert stage.is_new()


def test_a_run_interrupted_at_any_line(stage: Stage, exchange: bool) -> None:
    """Who reads 'interrupted: the output is what it was before' can rely on it."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    interrupted, threads, late = 0, threading.active_count(), []
    for number in steps(1):
        stage.reset()
        trace, seen = at_line(number, interrupt)
        said = ""
        try:
            traced(stage.run, trace, threads=False)
        except KeyboardInterrupt:
            interrupted += 1
            if not stage.is_old():
                late.append(number)
        except ConvertError as error:
            said = str(error)
        else:
            assert stage.is_new()
        assert not said or ("is complete, but" in said and stage.is_new())
        assert threading.active_count() == threads
        if seen() < number:
            break
        stage.check(may_be_gone=False)
    assert interrupted > 100 / STRIDE
    assert len(late) <= 2  # when `write` is about to return, no line of it could say so


CALLS = {
    os: ["open", "close", "stat", "lstat", "fstat", "mkdir", "listdir", "scandir", "rename",
         "unlink", "rmdir", "fsync", "ftruncate", "pwrite", "preadv", "copy_file_range", "getcwd",
         "statvfs"],
    fcntl: ["flock"],
}  # fmt: skip


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ENOENT])
def test_a_run_in_which_any_call_of_the_system_fails(
    stage: Stage, exchange: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, at each call in turn: the run succeeds nevertheless, or refuses and changes nothing."""
    calls: list[str] = []
    number, fstat = 0, os.fstat

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "close" and stat.S_ISDIR(fstat(arguments[0]).st_mode):
                return real(*arguments)  # folders have nothing to lose when they are closed
            calls.append(name)
            if len(calls) == number:
                if name == "close":
                    real(*arguments)
                raise OSError(code, os.strerror(code), "somewhere")
            return real(*arguments, **options)

        return call

    failed = 0
    for number in steps(code):
        stage.reset()
        calls.clear()
        with monkeypatch.context() as patch:
            for module, names in CALLS.items():
                for name in filter(vars(module).__contains__, names):
                    patch.setattr(module, name, failing(name, getattr(module, name)))
            try:
                stage.run()
                said = ""
            except ConvertError as error:
                said = str(error)
        assert said.isprintable()
        if not said or "is complete, but" in said:
            assert stage.is_new(), (number, calls[number - 1 : number], said)
        else:
            assert stage.is_old(), (number, calls[number - 1], said)
            failed += 1
        if len(calls) < number:
            break
        stage.check(may_be_gone=False)
    assert failed > 40 / STRIDE
