"""Sizes now, bytes later: what a verb will write, and the only code that writes it.

A verb states its whole output as a `Plan`: every file, every tensor with dtype and shape, and for
each tensor either the place whose bytes it copies or the tiles that compute it. `Plan.write` makes
the bytes in a folder beside the output and publishes that folder with one rename, so the output
appears complete or not at all.
"""

import contextlib
import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gralora_convert.checkpoint import RECEIPT_NAME
from gralora_convert.errors import CheckFailedError, MisuseError, OutputError
from gralora_convert.files import file_stamp, open_regular, pread_exact, reading, require_stamp
from gralora_convert.staging import Staging
from gralora_convert.tensors import (
    TensorFile,
    TensorSpec,
    encode_header,
    read_bytes,
    read_safetensors,
)

__all__ = [
    "Computed",
    "Copied",
    "OutputFile",
    "Part",
    "Plan",
    "default_jobs",
    "index_json",
    "one_arithmetic_thread",
]

COPY_CHUNK = 32 * 1024 * 1024  # bytes per task: small enough for two workers to share one tensor
CONSTANT_MEMORY = 260 * 1024 * 1024  # interpreter, torch and its allocator, measured at import


@dataclass(frozen=True, slots=True)
class Copied:
    """The bytes of a tensor as they are; they are never decoded, so any dtype passes."""

    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor made tile by tile: `produce(i)` gives bytes `[i * tile_bytes, ...)` of it.

    The buffer that it returns may be used again after the worker's next call. `memory` is what
    the tiles of this tensor keep alive together beside one buffer, in bytes (its factors).
    """

    tile_bytes: int
    produce: Callable[[int], memoryview]
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the output: what it is (now) and where its bytes come from (later)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Copied | Computed


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output, its tensors in order."""

    name: str
    parts: tuple[Part, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def header(self) -> bytes:
        return encode_header(
            [(part.name, part.dtype, part.shape, part.nbytes) for part in self.parts], self.metadata
        )

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one command will write.

    `texts` are small files by name, `sidecars` files to copy; `inputs` must not change while the
    plan is carried out. `receipt` is called once, when all tensors are written: it may raise
    `CheckFailedError`, and what it returns is written into the output and returned by `write`.
    """

    command: str
    files: tuple[OutputFile, ...]
    receipt: Callable[[], dict[str, object]]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    inputs: tuple[TensorFile, ...] = ()
    protected: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the output; the receipt's few KiB are not counted."""
        return (
            sum(file.nbytes for file in self.files)
            + sum(len(text) for text in self.texts.values())
            + sum(_size(path) for path in self.sidecars.values())
        )

    def peak_memory(self, jobs: int | None = None) -> int:
        """An upper estimate of the anonymous memory of `write`, in bytes."""
        jobs = jobs or default_jobs()
        computed = [
            part.source
            for file in self.files
            for part in file.parts
            if isinstance(part.source, Computed)
        ]
        tile = max((source.tile_bytes for source in computed), default=0)
        factors = sorted((source.memory for source in computed), reverse=True)[: jobs + 1]
        # a tile lives as stored bytes, as float32 sums and, for the check, as float64 samples
        return CONSTANT_MEMORY + jobs * 6 * tile + 3 * sum(factors)

    def as_json(self, output: Path, jobs: int | None = None) -> dict[str, object]:
        """The plan as `--dry-run --json` prints it."""
        return {
            "command": self.command,
            "dry_run": True,
            "output": str(output),
            "files": [file.name for file in self.files] + sorted({*self.texts, *self.sidecars}),
            "tensors": sum(len(file.parts) for file in self.files),
            "computed": sum(
                isinstance(part.source, Computed) for file in self.files for part in file.parts
            ),
            "bytes": self.nbytes,
            "peak_memory": self.peak_memory(jobs),
            "free_disk": Staging.free_bytes(output),
            "notes": list(self.notes),
        }

    def write(
        self,
        output: str | Path,
        *,
        overwrite: bool = False,
        jobs: int | None = None,
        verify: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, object]:
        """Makes the output folder, complete or not at all, and returns its receipt.

        The bytes do not depend on `jobs` (worker threads; default: the CPUs this process may use).
        `progress` is called with the number of bytes just written, from any worker.

        Raises:
            OutputError: the output exists (and not `overwrite`), overlaps an input, cannot be
                written, or does not fit on the disk.
            UnreadableError, ChangedInputError: an input failed or changed on the way.
            CheckFailedError: with `verify`, when what was written is not what was planned.
        """
        jobs = default_jobs() if jobs is None else jobs
        if jobs < 1:
            raise MisuseError(f"{jobs} jobs were asked for, at least 1 is needed")
        staging = Staging(Path(output), overwrite=overwrite, protected=self._protected())
        with staging.open(self.nbytes) as folder:
            self._write_tensors(folder, jobs, progress or (lambda count: None))
            for name, path in self.sidecars.items():
                _copy_sidecar(path, folder / name)
            for name, text in self.texts.items():
                _write_text(folder / name, text)
            for file in self.inputs:
                file.require_unchanged()
            if verify:
                self._require_as_planned(folder)
            receipt = self.receipt()
            _write_text(folder / RECEIPT_NAME, (json.dumps(receipt, indent=2) + "\n").encode())
            staging.publish()
        return receipt

    def _protected(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.protected, *(file.path for file in self.inputs))))

    def _write_tensors(self, folder: Path, jobs: int, progress: Callable[[int], None]) -> None:
        with contextlib.ExitStack() as stack:
            targets = [
                stack.enter_context(_Target.create(folder / file.name, file.nbytes))
                for file in self.files
            ]
            for file, target in zip(self.files, targets, strict=True):
                target.write(memoryview(file.header), 0)
            sources = stack.enter_context(_Sources())
            tasks = (
                task
                for file, target in zip(self.files, targets, strict=True)
                for task in _tasks(file, target, sources)
            )
            written = _run(tasks, jobs, progress)
            assert written == sum(part.nbytes for file in self.files for part in file.parts)
            for target in targets:
                target.sync()

    def _require_as_planned(self, folder: Path) -> None:
        for file in self.files:
            found = read_safetensors(folder / file.name).tensors
            wanted = {part.name: (part.dtype, part.shape) for part in file.parts}
            if wanted != {name: (spec.dtype, spec.shape) for name, spec in found.items()}:
                raise CheckFailedError(
                    "the file written does not hold the tensors planned",
                    where=file.name,
                    hint="Nothing was published. Is the disk failing?",
                )


def default_jobs() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def index_json(files: Sequence[OutputFile]) -> bytes:
    """`model.safetensors.index.json` as transformers 5.23 writes it (modeling_utils.py,
    `save_pretrained`)."""
    parts = [(part, file.name) for file in files for part in file.parts]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(part.shape) for part, _ in parts),
            "total_size": sum(part.nbytes for part, _ in parts),
        },
        "weight_map": {part.name: name for part, name in parts},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


# A task writes some bytes of the output and says how many.
_Task = Callable[[], int]


def _tasks(file: OutputFile, target: "_Target", sources: "_Sources") -> Iterator[_Task]:
    """The work of one file in the order of its bytes; neighbouring copies are joined."""
    position = len(file.header)
    run: tuple[Path, int, int, int] | None = None  # file, offset in it, offset here, length
    for part in file.parts:
        match part.source:
            case Copied(spec=TensorSpec(strides=None) as spec):
                if run and run[0] == spec.file and run[1] + run[3] == spec.offset:
                    run = (*run[:3], run[3] + spec.nbytes)
                else:
                    yield from _copies(run, target, sources)
                    run = (spec.file, spec.offset, position, spec.nbytes)
            case source:
                yield from _copies(run, target, sources)
                run = None
                yield from _pieces(part, source, target, position)
        position += part.nbytes
    yield from _copies(run, target, sources)


def _copies(
    run: tuple[Path, int, int, int] | None, target: "_Target", sources: "_Sources"
) -> Iterator[_Task]:
    if run is None:
        return
    path, start, to, length = run
    for done in range(0, length, COPY_CHUNK):
        count = min(COPY_CHUNK, length - done)

        def copy(start: int = start + done, to: int = to + done, count: int = count) -> int:
            target.copy_from(sources.descriptor(path), start, to, count, path)
            return count

        yield copy


def _pieces(
    part: Part, source: Copied | Computed, target: "_Target", position: int
) -> Iterator[_Task]:
    """The work of one tensor that is computed, or whose elements are out of order in its file."""
    size = source.tile_bytes if isinstance(source, Computed) else COPY_CHUNK
    for tile, start in enumerate(range(0, part.nbytes, size)):

        def write(tile: int = tile, start: int = start) -> int:
            stop = min(start + size, part.nbytes)
            if isinstance(source, Computed):
                data = source.produce(tile)
            else:
                data = memoryview(read_bytes(source.spec, start, stop))
            assert data.nbytes == stop - start, (part.name, tile, data.nbytes, stop - start)
            target.write(data.cast("B"), position + start)
            return stop - start

        yield write


class _Sources:
    """Input files, each opened once, when first copied from."""

    def __init__(self) -> None:
        self._files = contextlib.ExitStack()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "_Sources":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                file = self._files.enter_context(open_regular(path))
                self._descriptors[path] = file.fileno()
            return self._descriptors[path]


class _Target:
    """One file being written, at any place from any thread."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._lock = threading.Lock()

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, nbytes: int) -> Iterator["_Target"]:
        """A new file of `nbytes` bytes, so far all zero."""
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o666)
        try:
            with _writing(path):
                os.ftruncate(descriptor, nbytes)
            yield cls(path, descriptor)
        finally:
            with _writing(path):
                os.close(descriptor)

    def write(self, data: memoryview, position: int) -> None:
        # the kernel lets one writer into a file at a time and lets the others spin for it
        with _writing(self.path), self._lock:
            while len(data):
                count = os.pwrite(self._descriptor, data, position)
                data, position = data[count:], position + count

    def copy_from(self, source: int, start: int, to: int, count: int, path: Path) -> None:
        """Copies in the kernel where the file systems allow it (a reflink where they can), else
        through memory, which also finds out which side has failed."""
        while count:
            try:
                done = os.copy_file_range(source, self._descriptor, count, start, to)
            except OSError:
                done = 0  # some file systems answer 0 instead of an error
            if done == 0:
                self._copy_through_memory(source, start, to, count, path)
                return
            start, to, count = start + done, to + done, count - done

    def _copy_through_memory(
        self, source: int, start: int, to: int, count: int, path: Path
    ) -> None:
        buffer = memoryview(bytearray(min(count, 1 << 20)))
        for done in range(0, count, len(buffer)):
            piece = buffer[: count - done]
            pread_exact(source, piece, start + done, path)
            self.write(piece, to + done)

    def sync(self) -> None:
        with _writing(self.path):
            os.fsync(self._descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_failed(path, error) from error


def _write_failed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot be written: {error.strerror}",
        where=path.name,
        hint="Nothing was published; free space or choose another output."
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "Nothing was published.",
    )


def _write_text(path: Path, text: bytes) -> None:
    with _Target.create(path, len(text)) as target:
        target.write(memoryview(text), 0)
        target.sync()


def _copy_sidecar(source: Path, to: Path) -> None:
    with open_regular(source) as file, reading(source):
        before = file_stamp(os.fstat(file.fileno()))
        size = before[1]
        with _Target.create(to, size) as target:
            target.copy_from(file.fileno(), 0, 0, size, source)
            target.sync()
        require_stamp(source, before)


def _run(tasks: Iterator[_Task], jobs: int, progress: Callable[[int], None]) -> int:
    """Carries out the tasks, taken in order by `jobs` threads, and returns the bytes written; the
    first failure stops all."""
    lock, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []
    counts: list[int] = []

    def work() -> None:
        try:
            with one_arithmetic_thread():
                while not stop.is_set():
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        return
                    counts.append(task())
                    progress(counts[-1])
        except BaseException as error:  # carried to the caller's thread, whatever it is
            failures.append(error)
            stop.set()

    workers: list[threading.Thread] = []
    try:
        while len(workers) < jobs:
            workers.append(threading.Thread(target=work, daemon=True))
            try:
                workers[-1].start()
            except RuntimeError:  # the system has no more threads: those that run do all the work
                workers.pop()
                if not workers:
                    raise
                break
        for worker in workers:
            worker.join()
    finally:
        stop.set()
        _join(workers)
    if failures:
        raise failures[0]
    return sum(counts)


def _join(workers: Sequence[threading.Thread]) -> None:
    """Waits for all, however often the user interrupts: a worker that outlives the files it writes
    to would write into whatever takes their descriptors."""
    for worker in workers:
        while worker.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                worker.join()


@contextlib.contextmanager
def one_arithmetic_thread() -> Iterator[None]:
    """One torch thread per worker: the workers are the parallelism, the bytes of a product do not
    depend on their number, and no idle thread of a pool spins."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
