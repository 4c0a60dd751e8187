"""Regular files, read whole or in part: nothing that blocks, and no short read that goes unseen."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gralora_convert.errors import ChangedInputError, UnreadableError, nearest
from gralora_convert.system import ONE_CALL

Stamp = tuple[int, int, int]
# Of names that a stranger may have written: these never raise, as those of Path do for long names.
is_there, is_folder, is_file = os.path.exists, os.path.isdir, os.path.isfile
_AGAIN = "Run again when nothing writes to it."


def file_stamp(status: os.stat_result) -> Stamp:
    """What differs when another file took the name, or when the file was written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def near_path(name: str | Path, least: float = 0.6) -> Path | None:
    """What is there under a name like one that is not: part by part the one most like it."""
    path = Path(name)
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not is_there(found / part):
            names: list[str] = []
            with contextlib.suppress(OSError, ValueError):
                names = sorted(os.listdir(found))  # noqa: PTH208 - names are wanted
            close = nearest(part, names, least=least)
            if not close:
                return None
            part = close[0]
        found /= part
    return found


def meant(name: str | Path, otherwise: str = "") -> str:
    """The hint for a name that is not there: what may have been meant, or else `otherwise`."""
    near = near_path(name)
    return f"Did you mean {near}?" if near else otherwise


def require_stamp(path: Path, stamp: Stamp) -> None:
    """Raises `ChangedInputError` when `path` is not the file that had `stamp`, or not as it was."""
    try:
        now = file_stamp(path.stat())
    except OSError as error:
        raise ChangedInputError(
            f"disappeared while it was read ({error.strerror})", where=path, hint=_AGAIN
        ) from error
    if now != stamp:
        raise ChangedInputError("changed while it was read", where=path, hint=_AGAIN)


def open_regular(path: Path) -> BinaryIO:
    """`path` opened for reading, if it is a regular file (a FIFO or device would block or lie).

    Raises:
        UnreadableError: missing, not a regular file, or not permitted.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise UnreadableError(f"cannot be opened: {error.strerror}", where=path) from error
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise UnreadableError(f"is not a file name: {error}", where=path) from error
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UnreadableError("is not a regular file", where=path)
    return os.fdopen(descriptor, "rb")


@dataclass(frozen=True, slots=True)
class Measure:
    """The size of a file in bytes and its sha256; None: not computed."""

    nbytes: int
    sha256: str | None = None

    def as_json(self) -> dict[str, object]:
        return {"bytes": self.nbytes} | ({"sha256": self.sha256} if self.sha256 else {})


def measured(path: Path, *, digest: bool = True) -> Measure:
    """The size of the regular file `path`, and its digest as `sha256sum` prints it.

    Raises:
        UnreadableError: missing, not a regular file, or not readable.
    """
    with open_regular(path) as file, reading(path):
        if not digest:
            return Measure(os.fstat(file.fileno()).st_size)
        sha256, nbytes = hashlib.sha256(), 0
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            nbytes += len(chunk)
    return Measure(nbytes, sha256.hexdigest())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns failures of the disk or the network behind `path` into `UnreadableError`."""
    try:
        yield
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}", where=path) from error


def pread_exact(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fills `buffer` from `offset` of the open file `path`; short reads are continued.

    Raises:
        UnreadableError: the disk fails.
        ChangedInputError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        with reading(path):
            count = os.preadv(descriptor, [buffer[done : done + ONE_CALL]], offset + done)
        if count == 0:
            raise ChangedInputError("became shorter while it was read", where=path, hint=_AGAIN)
        done += count


RECEIPT_NAME = "gralora_convert.json"
