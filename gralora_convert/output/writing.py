"""The bytes of planned files: made by several threads in order, flushed while more are made.

Neighbouring copies are joined and passed through the kernel; what is computed comes in tiles. The
caller's thread flushes what the workers have written and keeps the journal, so that a run which
breaks off can go on from there.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Self

from gralora_convert.disk import file_stamp, open_regular, pread_exact, reading, require_stamp
from gralora_convert.errors import OutputError
from gralora_convert.output.journal import Journal, joined
from gralora_convert.output.parts import OutputFile, Piece
from gralora_convert.output.workers import Task, begun, carry_out, one_arithmetic_thread
from gralora_convert.system import ONE_CALL, copy_in_kernel, flush

FLUSH_BYTES = 64 * 1024 * 1024  # flushed at a time, so that the disk writes while tiles are made
MANY = 16  # files that are begun while nothing can be computed


def begin_files(folder: Path, files: Iterable[OutputFile]) -> None:
    """Makes new files of their size in `folder`, with their headers, and flushes them."""
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
    prepare: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Makes pieces of files begun in `folder`, and flushes them; others may make the rest.

    `progress` is called with every number of bytes just written; in the caller's thread `meanwhile`
    once, while the workers are at it, and `tick` now and then; in a thread of its own `prepare`,
    before anything is computed: they may raise, and then all stops.

    Raises:
        OutputError: a file cannot be written.
        UnreadableError, ChangedInputError: an input failed.
    """
    with contextlib.ExitStack() as stack:
        targets = _Targets(folder, journal)
        stack.callback(targets.close)

        @cache
        def source(path: Path) -> int:
            """An input file, opened when first copied from."""
            return stack.enter_context(open_regular(path)).fileno()

        def tasks() -> Iterator[Task]:
            """In order; but what must be computed is put off until `prepare` has ended."""
            prepared, put_off = begun(prepare), list[Task]()
            for file, parts in work:
                target = targets.open(file, parts)
                for piece in parts:
                    if prepared.done() or targets.are_many:
                        prepared.result()
                        yield from put_off
                        put_off.clear()
                    task = partial(target.make, piece, source)
                    if piece.copied is None and not prepared.done():
                        put_off.append(task)
                    else:
                        yield task
            prepared.result()
            yield from put_off

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


# files being written ------------------------------------------------------------------------------


class _File:
    """A file of a size known from the start, written at any place from any thread."""

    def __init__(self, path: Path, nbytes: int, *, is_new: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        # not for reading: an NFS client then sends the bytes written, never what it took for the
        # rest of their page, which another rank may write (Linux, fs/nfs/file.c, write_begin)
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with _writing(path), contextlib.ExitStack() as undo:
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                flags |= os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(path, flags, 0o666)
            undo.callback(self.close)
            if is_new:
                os.ftruncate(self._descriptor, nbytes)
            undo.pop_all()

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
        self.file, self.path = file, folder / file.name
        self._left = len(todo)  # pieces that are not written
        self._written: list[Piece] = []  # and not on the disk
        self._lock = threading.Lock()
        self._file: _File | None = _File(self.path, file.nbytes, is_new=False)

    def make(self, piece: Piece, source: Callable[[Path], int]) -> int:
        """Makes one piece, and says how many bytes that were."""
        assert self._file is not None
        if piece.made is not None:
            with one_arithmetic_thread():
                data = memoryview(piece.made()).cast("B")
            assert len(data) == piece.nbytes, (self.path, piece)
            self._file.write(data, piece.start)
        elif piece.copied is not None:
            path, offset = piece.copied
            self._file.copy_from(source(path), offset, piece.start, piece.nbytes, path)
        with self._lock:
            self._written.append(piece)
            self._left -= 1
            is_full = not self._left
        if is_full:
            self.close()
        return piece.nbytes

    def is_due(self) -> bool:
        """Whether a flush is worth its while."""
        with self._lock:
            return not self._left or sum(p.nbytes for p in self._written) >= FLUSH_BYTES

    def flush(self) -> Sequence[Piece]:
        """Puts what is written on the disk, by a descriptor of its own: the file may be closed.
        The pieces that are there since."""
        with self._lock:
            flushed, self._written = self._written, []
        with _writing(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                flush(descriptor)
            finally:
                os.close(descriptor)
        return flushed

    @property
    def is_safe(self) -> bool:
        """Whether all of it is on the disk, after a flush."""
        with self._lock:
            return not self._left and not self._written

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

    @property
    def are_many(self) -> bool:
        """Whether more of them should not be begun before some are whole."""
        return len(self._open) >= MANY

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
        ranges = joined((piece.start, piece.stop) for piece in flushed)
        states, stop = {}, len(file.header)
        for part in file.parts:
            start, stop = stop, stop + part.nbytes
            if part.account is not None and any(a < stop and start < b for a, b in ranges):
                states[part.name] = part.account.save()
        self._journal.record(file.name, ranges, states)

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
    """A new file with the bytes of `source`, flushed."""
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
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "; free space or choose another output." if is_full else "."
        what, hint = f"cannot be written: {error.strerror}", f"Nothing was published{way_out}"
        raise OutputError(what, where=path.name, hint=hint) from error
