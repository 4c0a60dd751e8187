"""Plans carried out: the bytes, how many threads make them, and everything that can go wrong."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gralora_convert.disk.specs import TensorFile, TensorSpec
from gralora_convert.disk.tensors import encode_header, read_tensor_file
from gralora_convert.errors import (
    ChangedInputError,
    CheckFailedError,
    ConvertError,
    MisuseError,
    OutputError,
    UnreadableError,
)
from gralora_convert.output.parts import Computed, Copied, OutputFile, Part
from gralora_convert.output.plan import Plan
from gralora_convert.output.shards import index_json
from gralora_convert.output.staging import Staging
from gralora_convert.output.writing import begins_as
from tests.builders import SHAPES, random_delta, write_adapter, write_base

MiB = 1024 * 1024


def copied(spec: TensorSpec) -> Part:
    return Part(spec.name, spec.dtype, spec.shape, spec.nbytes, Copied(spec))


def computed(
    name: str, nbytes: int, tile_bytes: int, before: Callable[[int], object] = lambda tile: None
) -> Part:
    """A tensor of bytes `i * 7 % 251`; `before` is called with the number of each tile."""

    def produce(tile: int) -> memoryview:
        before(tile)
        start = tile * tile_bytes
        stop = min(start + tile_bytes, nbytes)
        return memoryview(bytes(i * 7 % 251 for i in range(start, stop)))

    return Part(name, "U8", (nbytes,), nbytes, Computed(tile_bytes, produce))


def plan_of(*files: OutputFile, inputs: tuple[TensorFile, ...] = ()) -> Plan:
    return Plan("test", files, lambda: {"made_by": "a test"}, inputs=inputs)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def source(tmp_path: Path) -> TensorFile:
    """A safetensors file with tensors of many sizes and dtypes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(300, 40, generator=generator), "b": torch.arange(7, dtype=torch.int8),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "c": torch.randn(1000, generator=generator).half(), "d": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors")
    return read_tensor_file(tmp_path / "in/model.safetensors")


# the bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [MiB, 1000, 7])
@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_the_bytes_do_not_depend_on_the_number_of_jobs(
    jobs: int, chunk: int, source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gralora_convert.output.parts.COPY_CHUNK", chunk)
    specs = source.tensors
    first = OutputFile("one.safetensors", (
        copied(specs["c"]), computed("x", 1000, 64), copied(specs["a"]), copied(specs["b"]),
        computed("y", 10, 10),
    ))  # fmt: skip
    second = OutputFile("sub/two.safetensors", (
        computed("z", 129, 64), *(copied(specs[name]) for name in ("empty", "scalar", "d")),
    ), {})  # fmt: skip
    lock, counted = threading.Lock(), [0]

    def progress(count: int) -> None:
        with lock:
            counted[0] += count

    plan = replace(
        plan_of(first, second, inputs=(source,)), texts={"config.json": b"{}", "a/b.txt": b"x"},
        sidecars={"copy/source": source.path},
    )  # fmt: skip
    receipt = plan.write(tmp_path / "out", jobs=jobs, progress=progress)
    outputs, made_from = receipt.pop("outputs"), receipt.pop("plan")
    assert receipt == {"made_by": "a test"} | plan.contents()
    found = load_file(tmp_path / "out/one.safetensors") | load_file(
        tmp_path / "out/sub/two.safetensors"
    )
    original = load_file(source.path)
    for name, tensor in original.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    for name, nbytes in (("x", 1000), ("y", 10), ("z", 129)):
        assert found[name].tolist() == [i * 7 % 251 for i in range(nbytes)]
    written = tree(tmp_path / "out")
    text = written.pop("gralora_convert.json")
    assert text is not None
    assert json.loads(text) == {**receipt, "outputs": outputs, "plan": made_from}
    assert outputs == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in written.items()
        if data is not None
    }
    assert plan.nbytes == sum(len(data) for data in written.values() if data is not None)
    assert written["copy/source"] == source.path.read_bytes()
    assert written["a/b.txt"] == b"x"
    assert counted[0] == sum(part.nbytes for file in plan.files for part in file.parts)
    summary = plan.as_json(tmp_path / "out2")
    assert summary["tensors"] == 9
    assert summary["computed"] == 3
    assert summary["total_bytes"] == plan.nbytes
    assert summary["bytes"] == sum(file.nbytes for file in plan.files)


def test_tensors_of_a_pickle_in_any_order_and_place(tmp_path: Path) -> None:
    """Contiguous neighbours are copied in one piece, but not across one that must be gathered."""
    base = torch.arange(200.0)
    square = base[100:].view(10, 10)
    held = {"head": base[:100], "turned": square.T, "tail": square, "again": base[50:150],
            "rows": square[::3], "one": base[7]}  # fmt: skip
    (tmp_path / "in").mkdir()
    torch.save(held, tmp_path / "in/pytorch_model.bin")
    file = read_tensor_file(tmp_path / "in/pytorch_model.bin")
    for jobs in (1, 3):
        parts = tuple(copied(file.tensors[name]) for name in held)
        plan = plan_of(OutputFile("model.safetensors", parts), inputs=(file,))
        plan.write(tmp_path / f"out{jobs}", jobs=jobs)
        found = load_file(tmp_path / f"out{jobs}/model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in held.items())


class Kernel:
    """A `copy_file_range` that fails, answers 0, or copies less than it was asked to."""

    def __init__(self, outcomes: list[int]) -> None:
        self.outcomes, self.calls = outcomes, 0
        self.real = getattr(os, "copy_file_range", lambda *_: 0)

    def __call__(self, source: int, to: int, count: int, start: int, position: int) -> int:
        outcome = self.outcomes[self.calls % len(self.outcomes)]
        self.calls += 1
        if outcome < 0:
            raise OSError(-outcome, os.strerror(-outcome))
        return self.real(source, to, min(count, outcome), start, position) if outcome else 0


@pytest.mark.parametrize(
    "outcomes",
    [[-errno.EXDEV], [-errno.EOPNOTSUPP], [-errno.EINVAL], [-errno.ENOSYS], [0], [1, 1000],
     [100, -errno.EXDEV], [5, 0]],
)  # fmt: skip
def test_copying_does_not_depend_on_what_the_kernel_offers(
    outcomes: list[int], source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(outcomes)
    monkeypatch.setattr(os, "copy_file_range", kernel, raising=False)
    parts = tuple(copied(spec) for spec in source.tensors.values())
    plan_of(OutputFile("model.safetensors", parts), inputs=(source,)).write(tmp_path / "out")
    assert kernel.calls
    found, original = load_file(tmp_path / "out/model.safetensors"), load_file(source.path)
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_writes_that_stop_half_way_are_continued(
    source: TensorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:13], at))
    monkeypatch.setattr(os, "copy_file_range", Kernel([0]), raising=False)
    parts = (computed("x", 1000, 300), copied(source.tensors["c"]))
    plan_of(OutputFile("model.safetensors", parts)).write(tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found["x"].tolist() == [i * 7 % 251 for i in range(1000)]
    assert torch.equal(found["c"], load_file(source.path)["c"])


@pytest.mark.parametrize("tied", [False, True])
def test_the_index_is_that_of_transformers(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    files = [
        OutputFile(path.name, tuple(copied(s) for s in read_tensor_file(path).tensors.values()))
        for path in shards
    ]
    assert index_json(files) == (tmp_path / "model.safetensors.index.json").read_bytes()


def test_a_plan_without_tensors(tmp_path: Path) -> None:
    plan_of(OutputFile("model.safetensors", ())).write(tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors") == {}


@pytest.mark.parametrize("jobs", [0, -1])
def test_fewer_than_one_job_is_refused(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="jobs"):
        plan_of().write(tmp_path / "out", jobs=jobs)
    assert tree(tmp_path) == {}


# what goes wrong ----------------------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An output that does not exist, or holds an older model; see `require_untouched`."""
    folder = tmp_path / "somewhere/out"
    if request.param:
        replace(plan_of(OutputFile("model.safetensors", (computed("old", 9, 9),))), texts={
            "config.json": b"{}"
        }).write(folder)  # fmt: skip
    return folder


def refused(
    plan: Plan, output: Path, error: type[BaseException], jobs: int = 2, verify: bool = True
) -> BaseException:
    """The exception that `write` raises, leaving everything outside as it was."""
    before = tree(output.parent)
    with pytest.raises(error) as caught:
        plan.write(output, overwrite=True, jobs=jobs, verify=verify)
    assert tree(output.parent) == before
    return caught.value


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError, SystemExit])
@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_a_producer_that_raises_leaves_nothing(
    jobs: int, error: type[BaseException], output: Path
) -> None:
    def fail(tile: int) -> None:
        if tile == 3:
            raise error

    threads = threading.active_count()
    parts = (computed("a", 1000, 10), computed("b", 1000, 10, fail), computed("c", 1000, 10))
    refused(plan_of(OutputFile("model.safetensors", parts)), output, error, jobs)
    assert threading.active_count() == threads


def test_after_the_first_failure_no_work_is_begun(output: Path) -> None:
    tiles: list[int] = []

    def fail(tile: int) -> None:
        tiles.append(tile)
        raise Stop

    plan = plan_of(OutputFile("model.safetensors", (computed("a", 1000, 1, fail),)))
    refused(plan, output, Stop, jobs=3)
    assert len(tiles) <= 3


def test_a_failing_receipt_or_progress_leaves_nothing(output: Path) -> None:
    def fail(*_: object) -> Any:
        raise CheckFailedError("is not what was planned", where="model.safetensors")

    plan = plan_of(OutputFile("model.safetensors", (computed("a", 10, 10),)))
    refused(replace(plan, receipt=fail), output, CheckFailedError)
    before = tree(output.parent)
    with pytest.raises(CheckFailedError, match="is not what was planned"):
        plan.write(output, overwrite=True, progress=fail)
    assert tree(output.parent) == before


def test_two_tensors_of_one_name_are_not_published(output: Path) -> None:
    plan = plan_of(OutputFile("model.safetensors", (computed("a", 8, 8), computed("a", 8, 8))))
    refused(plan, output, AssertionError)


def test_two_files_of_one_name_are_not_published(output: Path) -> None:
    file = OutputFile("model.safetensors", (computed("a", 8, 8),))
    assert "exists" in str(refused(plan_of(file, file), output, OutputError))
    plan = replace(plan_of(file), texts={"model.safetensors": b""})
    assert "exists" in str(refused(plan, output, OutputError))


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_input_that_is_truncated_meanwhile(jobs: int, source: TensorFile, output: Path) -> None:
    def truncate(tile: int) -> None:
        os.truncate(source.path, source.path.stat().st_size // 2)

    parts = (computed("x", 8, 8, truncate), *(copied(s) for s in source.tensors.values()))
    plan = plan_of(OutputFile("model.safetensors", parts), inputs=(source,))
    error = refused(plan, output, ChangedInputError, jobs)
    assert str(source.path) in str(error)


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_an_input_that_changes_meanwhile(how: str, source: TensorFile, output: Path) -> None:
    def change(tile: int) -> None:
        match how:
            case "written":
                with source.path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(b"\1")
            case "replaced":
                other = source.path.with_name("other")
                other.write_bytes(source.path.read_bytes())
                other.rename(source.path)
            case "removed":
                source.path.unlink()

    parts = (*(copied(s) for s in source.tensors.values()), computed("x", 8, 8, change))
    plan = plan_of(OutputFile("model.safetensors", parts), inputs=(source,))
    refused(plan, output, ChangedInputError, jobs=1)


def test_a_sidecar_that_disappears_meanwhile(output: Path, tmp_path: Path) -> None:
    sidecar = tmp_path / "tokenizer.json"
    sidecar.write_text("{}")
    file = OutputFile("m.safetensors", (computed("x", 8, 8, lambda tile: sidecar.unlink()),))
    error = refused(replace(plan_of(file), sidecars={"t": sidecar}), output, UnreadableError)
    assert str(sidecar) in str(error)


@pytest.mark.parametrize("place", ["in", "in/out", "in/a/out", "."])
def test_an_output_that_touches_an_input(place: str, source: TensorFile, tmp_path: Path) -> None:
    """The folder of a model is protected as a whole, a lone file as itself."""
    before = tree(tmp_path)
    parts = tuple(copied(spec) for spec in source.tensors.values())
    plan = plan_of(OutputFile("model.safetensors", parts), inputs=(source,))
    with pytest.raises(MisuseError, match="input"):
        replace(plan, protected=(source.path.parent,)).write(tmp_path / place, overwrite=True)
    if place in ("in", "."):
        with pytest.raises(MisuseError, match="input"):
            plan.write(tmp_path / place, overwrite=True)
    assert tree(tmp_path) == before


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system in memory of `nbytes`, if it may be mounted."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["computed", "copied", "sidecar"])
def test_a_disk_that_fills_up_meanwhile(kind: str, source: TensorFile, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 * MiB) as disk:

        def fill(tile: int) -> None:
            with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as file:
                while file.write(bytes(4096)):
                    pass

        parts = [computed("x", 8, 8, fill)]
        sidecars = {}
        big = tmp_path / "big.safetensors"
        save_file({"t": torch.ones(MiB // 4)}, big)
        match kind:
            case "computed":
                parts.append(computed("y", 70_000, 70_000))
            case "copied":
                parts.append(copied(read_tensor_file(big).tensors["t"]))
            case "sidecar":
                sidecars = {"big": big}
        plan = plan_of(OutputFile("model.safetensors", tuple(parts)))
        with pytest.raises(OutputError, match=r"No space left.*free space") as caught:
            replace(plan, sidecars=sidecars).write(disk / "out", jobs=1)
        assert "Nothing was published" in str(caught.value)
        assert list(tree(disk)) == ["filler"]


def test_a_disk_that_is_too_small_is_told_before(source: TensorFile, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", MiB) as disk:
        parts = tuple(copied(spec) for spec in source.tensors.values())
        plan = plan_of(OutputFile("model.safetensors", parts))
        with pytest.raises(OutputError, match=r"needs [\d,]+ bytes"):
            plan.write(disk / "a/out")
        assert tree(disk) == {}


def test_a_file_that_may_not_grow(source: TensorFile, output: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    parts = tuple(copied(spec) for spec in source.tensors.values())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        error = refused(plan_of(OutputFile("model.safetensors", parts)), output, OutputError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "File too large" in str(error)


def test_a_failing_disk(source: TensorFile, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether reading or writing fails is said, wherever the kernel finds out."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    parts = tuple(copied(spec) for spec in source.tensors.values())
    plan = plan_of(OutputFile("model.safetensors", parts))
    monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        assert str(source.path) in str(refused(plan, output, UnreadableError))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        assert "cannot be written" in str(refused(plan, output, OutputError))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert "cannot be written" in str(refused(plan, output, OutputError))


def test_a_disk_that_loses_what_was_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(len(data)), at))
    plan = plan_of(OutputFile("model.safetensors", (computed("a", 100, 10),)))
    refused(plan, output, ConvertError)


def test_fewer_threads_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    plan = plan_of(OutputFile("model.safetensors", (computed("a", 1000, 10),)))
    plan.write(tmp_path / "out", jobs=5)
    assert load_file(tmp_path / "out/model.safetensors")["a"].shape == (1000,)


# processes ----------------------------------------------------------------------------------------

SLOW_MERGE = """
import sys
from gralora_convert.output import writing
from gralora_convert.cli.entry import main
real, writes = writing._File.write, []
def slow(self, data, position):
    writes.append(position)
    if len(writes) == 3:  # the first of a worker, or the second
        print("writing", flush=True)
        sys.stdin.readline()
    real(self, data, position)
writing._File.write = slow
main(sys.argv[1:])
"""


@pytest.fixture
def merge(tmp_path: Path) -> list[str]:
    """The arguments of a merge into `out`."""
    write_base(tmp_path / "base")
    deltas = {name: random_delta(*shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    return ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--jobs", "2",
            "-o", str(tmp_path / "out")]  # fmt: skip


@contextlib.contextmanager
def in_the_middle(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A run that waits in the middle of writing for a line to go on."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_MERGE, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n", process.communicate()
        yield process
        process.kill()


@pytest.mark.parametrize(("name", "exists"), [("SIGINT", True), ("SIGTERM", False)])
def test_an_interrupted_run_leaves_nothing(
    name: str, exists: bool, merge: list[str], tmp_path: Path
) -> None:
    if exists:
        merge.append("--overwrite")
        old = OutputFile("model.safetensors", (computed("old", 9, 9),))
        replace(plan_of(old), texts={"config.json": b"{}"}).write(tmp_path / "out")
    before = tree(tmp_path)
    with in_the_middle(merge) as process:
        process.send_signal(getattr(signal, name))
        time.sleep(1)
        _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert tree(tmp_path) == before


def test_a_killed_run_is_cleaned_up_by_the_next_and_refuses_others_before(
    merge: list[str], tmp_path: Path
) -> None:
    from tests.command import run, run_ok

    before = tree(tmp_path)
    with in_the_middle(merge) as process:
        second = run(*merge)
        assert second.status == 2
        assert "another run is writing this output" in second.stderr
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
        assert (tmp_path / ".out.partial").exists()
    run_ok(*merge)
    assert not (tmp_path / ".out.partial").exists()
    load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/gralora_convert.json").read_text())
    for name in tree(tmp_path / "out"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out").rmdir()
    assert tree(tmp_path) == before


def test_memory_does_not_grow_with_the_output(tmp_path: Path) -> None:
    """Copies pass through the kernel; computed tiles are written and forgotten."""
    big = tmp_path / "big.safetensors"
    header = encode_header([("t", "U8", (150 * MiB,), 150 * MiB)], {})
    with big.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 150 * MiB)
    tile = memoryview(bytes(MiB))
    zeros = Part("z", "U8", (100 * MiB,), 100 * MiB, Computed(MiB, lambda _: tile))
    spec = read_tensor_file(big).tensors["t"]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if Staging.free_bytes(tmp_path / "out") < 500 * MiB:
        pytest.skip("the disk is too full")
    plan_of(OutputFile("model.safetensors", (zeros, copied(spec)))).write(tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_copied_does_not_wait_for_what_computing_needs(
    jobs: int, source: TensorFile, tmp_path: Path
) -> None:
    specs = list(source.tensors.values())
    copies, ready, tiles = threading.Event(), threading.Event(), list[bool]()
    first = computed("first", 5000, 700, lambda tile: tiles.append(ready.is_set()))
    file = OutputFile("model.safetensors", (first, *map(copied, specs)))
    total = sum(spec.nbytes for spec in specs)
    done = [0]

    def progress(count: int) -> None:
        done[0] += count
        if done[0] == total:
            copies.set()

    def prepare() -> None:
        assert copies.wait(30)
        ready.set()

    replace(plan_of(file), prepare=prepare).write(tmp_path / "out", jobs=jobs, progress=progress)
    assert tiles == [True] * 8


def test_what_computing_needs_fails(source: TensorFile, tmp_path: Path) -> None:
    def prepare() -> None:
        raise OSError("libtorch is missing")

    file = OutputFile("model.safetensors", (copied(source.tensors["a"]), computed("x", 9, 9)))
    with pytest.raises(OSError, match="libtorch"):
        replace(plan_of(file), prepare=prepare).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_is_no_part_of_a_stopped_run(tmp_path: Path) -> None:
    """It would be written through, into a file of somebody else."""
    file = OutputFile("model.safetensors", ())
    plan_of(file).write(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out/model.safetensors")
    assert begins_as(tmp_path / "out/model.safetensors", file)
    assert not begins_as(tmp_path / "link", file)
