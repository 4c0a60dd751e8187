"""The bytes of planned files: made by several threads in order, flushed while more are made.

Neighbouring copies are joined and passed through the kernel; what is computed comes in tiles. The
caller's thread flushes what the workers have written and keeps the journal, so that a run which
breaks off can go on from there.
"""

import bisect
import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from gralora_convert.disk import (
    TensorSpec,
    encode_header,
    file_stamp,
    open_regular,
    pread_exact,
    read_bytes,
    reading,
    require_stamp,
)
from gralora_convert.errors import OutputError
from gralora_convert.output.journal import Done, Journal
from gralora_convert.output.workers import Task, carry_out
from gralora_convert.system import ONE_CALL, copy_in_kernel, flush

COPY_CHUNK = 32 * 1024 * 1024  # bytes per task: small enough for two workers to share one tensor
FLUSH_BYTES = 64 * 1024 * 1024  # flushed at a time, so that the disk writes while tiles are made


class Account(Protocol):
    """What making a tensor finds out (its check, its error), as JSON: kept in the journal."""

    def save(self) -> Mapping[str, object]:
        """What is known now that all tiles are made."""
        ...

    def restore(self, saved: Mapping[str, object]) -> None:
        """Takes over what another run has saved in place of making the tiles."""
        ...


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
    account: Account | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the output: what it is (now) and where its bytes come from (later)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Copied | Computed

    @property
    def account(self) -> Account | None:
        return self.source.account if isinstance(self.source, Computed) else None


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
        return len(self.header) + self.data_nbytes

    @property
    def data_nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(part.nbytes for part in self.parts)


def write_files(
    folder: Path,
    files: Sequence[OutputFile],
    *,
    jobs: int,
    progress: Callable[[int], None],
    journal: Journal | None = None,
    done: Done | None = None,
    tick: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Makes `files` in `folder` and flushes them; what `done` says is there is not made again.

    `progress` is called with every number of bytes just written; in the caller's thread `meanwhile`
    once, while the workers are at it, and `tick` now and then: they may raise, and then all stops.

    Raises:
        OutputError: a file cannot be written.
        UnreadableError, ChangedInputError: an input failed.
    """
    known = done or Done()
    with contextlib.ExitStack() as stack:
        sources = stack.enter_context(_Sources())
        targets = _Targets(folder, journal)
        stack.callback(targets.close)

        def tasks() -> Iterator[Task]:
            for file in files:
                first = _first_part(folder, file, known)
                if first == 0 and file.name in known.parts:
                    (folder / file.name).unlink(missing_ok=True)  # not what was begun
                progress(sum(part.nbytes for part in file.parts[:first]))
                target = targets.open(file, first)
                yield from _tasks(target, first, sources)

        def beside() -> None:
            if todo:
                todo.pop()()
            targets.flush()
            tick()

        todo = [meanwhile]
        carry_out(tasks(), jobs, progress, beside)
        targets.flush()
        targets.require_safe()


def _first_part(folder: Path, file: OutputFile, done: Done) -> int:
    """How many parts of `file` are in `folder`; their accounts are restored."""
    count = min(done.parts.get(file.name, 0), len(file.parts))
    if not count or not _begins_as(folder / file.name, file):
        return 0
    for place, part in enumerate(file.parts[:count]):
        if part.account is not None:
            state = done.states.get(part.name)
            if state is None:
                return place
            part.account.restore(state)
    return count


def _begins_as(path: Path, file: OutputFile) -> bool:
    """Whether `path` has the size and the header of `file`."""
    if not path.is_file() or path.is_symlink():
        return False
    with open_regular(path) as opened, reading(path):
        header = file.header
        is_whole = os.fstat(opened.fileno()).st_size == file.nbytes
        return is_whole and opened.read(len(header)) == header


# tasks --------------------------------------------------------------------------------------------


def _tasks(target: "_Target", first: int, sources: "_Sources") -> Iterator[Task]:
    """The work of one file from part `first` on, in the order of its bytes; neighbouring copies
    are joined."""
    position = target.starts[first]
    run: tuple[Path, int, int, int] | None = None  # file, offset in it, offset here, length
    for part in target.file.parts[first:]:
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
) -> Iterator[Task]:
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
) -> Iterator[Task]:
    """The work of one tensor that is computed, or whose elements are out of order in its file."""
    size = source.tile_bytes if isinstance(source, Computed) else COPY_CHUNK
    for tile, start in enumerate(range(0, part.nbytes, max(size, 1))):

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


# files being written ------------------------------------------------------------------------------


class _File:
    """A file of a size known from the start, written at any place from any thread."""

    def __init__(self, path: Path, nbytes: int, *, is_new: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags |= os.O_CREAT | os.O_EXCL if is_new else 0
            self._descriptor = os.open(path, flags, 0o666)
        try:
            with _writing(path):
                os.ftruncate(self._descriptor, nbytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: memoryview, position: int) -> None:
        # the kernel lets one writer into a file at a time and lets the others spin for it
        with _writing(self.path), self._lock:
            while len(data):
                count = os.pwrite(self._descriptor, data[:ONE_CALL], position)
                data, position = data[count:], position + count

    def copy_from(self, source: int, start: int, to: int, count: int, path: Path) -> None:
        """Copies in the kernel where the file systems allow it (a reflink where they can), else
        through memory, which also finds out which side has failed."""
        while count:
            with self._lock:
                done = copy_in_kernel(source, start, self._descriptor, to, count)
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
            flush(self._descriptor)

    def close(self) -> None:
        with _writing(self.path):
            os.close(self._descriptor)


class _Target:
    """One planned file, filled in pieces without gaps or overlaps; closed when it is full."""

    def __init__(self, folder: Path, file: OutputFile, first: int) -> None:
        self.file, self.path = file, folder / file.name
        header = file.header
        ends = itertools.accumulate((part.nbytes for part in file.parts), initial=len(header))
        self.starts = list(ends)  # of each part, and the end of the last
        self.recorded = first  # parts that the journal has
        self._mark = self._flushed = self.starts[first]  # all before: written; on the disk
        self._beyond: dict[int, int] = {}  # pieces written beyond the mark: start -> stop
        self._lock = threading.Lock()
        self._file: _File | None = _File(self.path, self.starts[-1], is_new=first == 0)
        try:
            if first == 0:
                self._file.write(memoryview(header), 0)
            self._count(self._mark, self._mark)
        except BaseException:
            self.close()
            raise

    def write(self, data: memoryview, position: int) -> None:
        assert self._file is not None
        self._file.write(data, position)
        self._count(position, position + len(data))

    def copy_from(self, source: int, start: int, to: int, count: int, path: Path) -> None:
        assert self._file is not None
        self._file.copy_from(source, start, to, count, path)
        self._count(to, to + count)

    def _count(self, start: int, stop: int) -> None:
        with self._lock:
            self._beyond[start] = stop
            while self._mark in self._beyond:
                self._mark = max(self._mark, self._beyond.pop(self._mark))
            is_full = self._mark == self.starts[-1]
        if is_full:
            self.close()

    def is_due(self) -> bool:
        """Whether a flush is worth its while."""
        return self._mark == self.starts[-1] or self._mark - self._flushed >= FLUSH_BYTES

    def flush(self) -> None:
        """Puts what is written on the disk, by a descriptor of its own: the file may be closed."""
        mark = self._mark
        with _writing(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                flush(descriptor)
            finally:
                os.close(descriptor)
        self._flushed = mark

    @property
    def is_safe(self) -> bool:
        """Whether all of it is on the disk."""
        return self._flushed == self.starts[-1]

    @property
    def safe_parts(self) -> int:
        """How many parts, from the first one on, are on the disk."""
        return bisect.bisect_right(self.starts, self._flushed) - 1

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


class _Targets:
    """The files that are being written, until they are on the disk."""

    def __init__(self, folder: Path, journal: Journal | None) -> None:
        self._folder, self._journal = folder, journal
        self._open: list[_Target] = []

    def open(self, file: OutputFile, first: int) -> _Target:
        self._open.append(target := _Target(self._folder, file, first))
        return target

    def flush(self) -> None:
        """Flushes what is worth it, and tells the journal."""
        for target in list(self._open):
            if target.is_due():
                target.flush()
                self._record(target)
            if target.is_safe:
                self._open.remove(target)

    def _record(self, target: _Target) -> None:
        parts = target.safe_parts
        if self._journal is None or parts == target.recorded:
            return
        states = {
            part.name: part.account.save()
            for part in target.file.parts[target.recorded : parts]
            if part.account is not None
        }
        self._journal.record(target.file.name, parts, states)
        target.recorded = parts

    def require_safe(self) -> None:
        assert not self._open, [target.path for target in self._open]

    def close(self) -> None:
        for target in self._open:
            target.close()


def write_text(path: Path, text: bytes) -> None:
    """A new small file, flushed."""
    with _File(path, len(text)) as file:
        file.write(memoryview(text), 0)
        file.sync()


def copy_file(source: Path, to: Path) -> None:
    """A new file with the bytes of `source`, flushed.

    Raises:
        UnreadableError, ChangedInputError: `source` failed, or changed meanwhile.
        OutputError: `to` cannot be written.
    """
    with open_regular(source) as file, reading(source):
        before = file_stamp(os.fstat(file.fileno()))
        size = before[1]
        with _File(to, size) as target:
            target.copy_from(file.fileno(), 0, 0, size, source)
            target.sync()
        require_stamp(source, before)


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
