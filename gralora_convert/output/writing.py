"""The bytes of planned files: made by several threads in order, flushed while more are made.

Neighbouring copies are joined and passed through the kernel; what is computed comes in tiles. The
caller's thread flushes what the workers have written and keeps the journal, so that a run which
breaks off can go on from there.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from gralora_convert.output.journal import Journal
from gralora_convert.output.workers import Task, carry_out
from gralora_convert.system import ONE_CALL, copy_in_kernel, flush

COPY_CHUNK = 32 * 1024 * 1024  # bytes per task: small enough for two workers to share one tensor
COMPUTING = 4  # a byte computed takes so many copied: 1.4 s of CPU a GB, 0.3 s
FLUSH_BYTES = 64 * 1024 * 1024  # flushed at a time, so that the disk writes while tiles are made


class Account(Protocol):
    """What making a tensor finds out (its check, its error), as JSON: kept in the journal."""

    def save(self) -> Mapping[str, object]:
        """What is known of the tiles that were made, at least."""
        ...

    def restore(self, saved: Mapping[str, object]) -> None:
        """Learns, besides, what another run or rank knows of some tiles, maybe of the same ones."""
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
    def how(self) -> str:
        return "compute" if isinstance(self.source, Computed) else "copy"

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


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `[start, stop)` of a file, made in one go: copied from a place in a file, or `made`."""

    start: int
    stop: int
    copied: tuple[Path, int] | None = None
    made: Callable[[], memoryview] | None = None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """What making it takes, in bytes copied."""
        return 1 + self.nbytes * (1 if self.copied else COMPUTING)


def pieces(file: OutputFile) -> Iterator[Piece]:
    """All of a file in the order of its bytes, each made by one worker; neighbouring copies are
    joined."""
    position = len(file.header)
    run: Piece | None = None
    for part in file.parts:
        stop = position + part.nbytes
        match part.source:
            case Copied(spec=TensorSpec(strides=None) as spec):
                if run and run.copied == (spec.file, spec.offset - run.nbytes):
                    run = replace(run, stop=stop)
                else:
                    yield from _chunks(run)
                    run = Piece(position, stop, copied=(spec.file, spec.offset))
            case source:
                yield from _chunks(run)
                run = None
                yield from _tiles(source, position, stop)
        position = stop
    yield from _chunks(run)


def _chunks(run: Piece | None) -> Iterator[Piece]:
    if run and run.copied:
        (path, offset), end = run.copied, run.stop
        for start in range(run.start, end, COPY_CHUNK):
            place = (path, offset + start - run.start)
            yield Piece(start, min(start + COPY_CHUNK, end), copied=place)


def _tiles(source: Copied | Computed, position: int, end: int) -> Iterator[Piece]:
    """A tensor that is computed, or whose elements are out of order in its file."""
    size = source.tile_bytes if isinstance(source, Computed) else COPY_CHUNK
    for tile, start in enumerate(range(position, end, max(size, 1))):
        stop = min(start + size, end)
        if isinstance(source, Computed):
            made = partial(source.produce, tile)
        else:
            made = partial(_in_order, source.spec, start - position, stop - position)
        yield Piece(start, stop, made=made)


def _in_order(spec: TensorSpec, start: int, stop: int) -> memoryview:
    return memoryview(read_bytes(spec, start, stop))


def begin_files(folder: Path, files: Iterable[OutputFile]) -> None:
    """Makes new files of their size in `folder`, with their headers, and flushes them.

    Raises:
        OutputError: one cannot be made, or is there.
    """
    for file in files:
        with _File(folder / file.name, file.nbytes) as begun:
            begun.write(memoryview(file.header), 0)
            begun.sync()


def write_files(
    folder: Path,
    work: Iterable[tuple[OutputFile, Sequence[Piece]]],
    *,
    jobs: int,
    progress: Callable[[int], None],
    journal: Journal | None = None,
    tick: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Makes pieces of files begun in `folder`, and flushes them; others may make the rest.

    `progress` is called with every number of bytes just written; in the caller's thread `meanwhile`
    once, while the workers are at it, and `tick` now and then: they may raise, and then all stops.

    Raises:
        OutputError: a file cannot be written.
        UnreadableError, ChangedInputError: an input failed.
    """
    with contextlib.ExitStack() as stack:
        sources = stack.enter_context(_Sources())
        targets = _Targets(folder, journal)
        stack.callback(targets.close)

        def tasks() -> Iterator[Task]:
            for file, parts in work:
                target = targets.open(file, parts)
                for number in range(len(parts)):
                    yield partial(target.make, number, sources)

        def beside() -> None:
            if todo:
                todo.pop()()
            targets.flush()
            tick()

        todo = [meanwhile]
        carry_out(tasks(), jobs, progress, beside)
        targets.flush()
        targets.require_safe()


def begins_as(path: Path, file: OutputFile) -> bool:
    """Whether `path` has the size and the header of `file`."""
    if not path.is_file() or path.is_symlink():
        return False
    with open_regular(path) as opened, reading(path):
        header = file.header
        is_whole = os.fstat(opened.fileno()).st_size == file.nbytes
        return is_whole and opened.read(len(header)) == header


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
        # not for reading: an NFS client then sends the bytes written, never what it took for the
        # rest of their page, which another rank may write (Linux, fs/nfs/file.c, write_begin)
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with _writing(path):
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                flags |= os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(path, flags, 0o666)
        try:
            with _writing(path):
                if is_new:
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
    """One planned file, of which some pieces are made here; closed when they are."""

    def __init__(self, folder: Path, file: OutputFile, todo: Sequence[Piece]) -> None:
        self.file, self.path, self._pieces = file, folder / file.name, todo
        self._made = self._flushed = 0  # pieces, from the first one on: written; on the disk
        self._beyond: set[int] = set()  # pieces that were made before one that comes first
        self._lock = threading.Lock()
        self._file: _File | None = _File(self.path, file.nbytes, is_new=False)

    def make(self, number: int, sources: _Sources) -> int:
        """Makes one piece, and says how many bytes that were."""
        piece = self._pieces[number]
        assert self._file is not None
        if piece.made is not None:
            data = piece.made().cast("B")
            assert len(data) == piece.nbytes, (self.path, piece)
            self._file.write(data, piece.start)
        elif piece.copied is not None:
            path, offset = piece.copied
            source = sources.descriptor(path)
            self._file.copy_from(source, offset, piece.start, piece.nbytes, path)
        with self._lock:
            self._beyond.add(number)
            while self._made in self._beyond:
                self._beyond.remove(self._made)
                self._made += 1
            is_full = self._made == len(self._pieces)
        if is_full:
            self.close()
        return piece.nbytes

    def is_due(self) -> bool:
        """Whether a flush is worth its while."""
        made, flushed = self._made, self._flushed
        if made == len(self._pieces):
            return True
        return self._pieces[made].start - self._pieces[flushed].start >= FLUSH_BYTES

    def flush(self) -> Sequence[Piece]:
        """Puts what is written on the disk, by a descriptor of its own: the file may be closed.
        The pieces that are there since."""
        first, self._flushed = self._flushed, self._made
        with _writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                flush(descriptor)
            finally:
                os.close(descriptor)
        return self._pieces[first : self._flushed]

    @property
    def is_safe(self) -> bool:
        """Whether all of it is on the disk."""
        return self._flushed == len(self._pieces)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


class _Targets:
    """The files that are being written, until they are on the disk."""

    def __init__(self, folder: Path, journal: Journal | None) -> None:
        self._folder, self._journal = folder, journal
        self._open: list[_Target] = []

    def open(self, file: OutputFile, todo: Sequence[Piece]) -> _Target:
        self._open.append(target := _Target(self._folder, file, todo))
        return target

    def flush(self) -> None:
        """Flushes what is worth it, and tells the journal."""
        for target in list(self._open):
            if target.is_due():
                self._record(target.file, target.flush())
            if target.is_safe:
                self._open.remove(target)

    def _record(self, file: OutputFile, flushed: Sequence[Piece]) -> None:
        if self._journal is None or not flushed:
            return
        states, stop = {}, len(file.header)
        for part in file.parts:
            start, stop = stop, stop + part.nbytes
            if part.account is not None and start < flushed[-1].stop and flushed[0].start < stop:
                states[part.name] = part.account.save()
        self._journal.record(file.name, [(piece.start, piece.stop) for piece in flushed], states)

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
