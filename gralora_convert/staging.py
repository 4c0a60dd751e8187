"""An output folder that appears complete or not at all.

It is made beside the output under a hidden name, locked while it is written, and renamed when it is
whole. What a killed run has left is removed by the next run to the same output.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gralora_convert.errors import MisuseError, OutputError

__all__ = ["Staging"]

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_MARGIN = 4 * 1024 * 1024  # bytes left free for the receipt and directory blocks
# A folder with none of these was not written by a tool of this kind and is never replaced.
_MODEL_FILES = ("config.json", "adapter_config.json", "gralora_convert.json")


class Staging:
    """The way from nothing to a published folder; use `open`, fill the folder, `publish`."""

    def __init__(self, output: Path, *, overwrite: bool, protected: tuple[Path, ...] = ()) -> None:
        self.output = Path(os.path.realpath(output))
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        self._overwrite, self._protected = overwrite, protected
        self._lock: int | None = None
        self._made: list[Path] = []

    @contextlib.contextmanager
    def open(self, nbytes: int) -> Iterator[Path]:
        """The empty folder to fill with about `nbytes` bytes; removed again unless published.

        Raises:
            MisuseError: the output overlaps an input.
            OutputError: it exists, another run writes to it, it cannot be made, no space.
        """
        self.require_allowed()
        self._require_space(nbytes)
        try:
            self._make()
        except OSError as error:
            self._remove()
            raise OutputError(
                f"cannot be made: {error.strerror}", where=self.output, hint="Nothing was written."
            ) from error
        try:
            yield self.folder
        finally:
            self._remove()

    def require_allowed(self) -> None:
        """Raises when the output may not be written, before anything is computed."""
        if not self.output.name:
            raise MisuseError("is not a folder that can be replaced", where=self.output)
        for path in self._protected:
            real = Path(os.path.realpath(path))
            folder = real if real.is_dir() else real.parent
            if self.output == folder or self.output.is_relative_to(folder):
                raise MisuseError(
                    f"the output {self.output} lies in the input {folder}",
                    hint="Choose an output outside the input folders.",
                )
            if folder.is_relative_to(self.output):
                raise MisuseError(
                    f"the output {self.output} holds the input {folder}",
                    hint="Choose an output outside the input folders.",
                )
        if not os.path.lexists(self.output):
            return
        if not self.output.is_dir():
            raise OutputError("exists and is not a folder", where=self.output, hint=_CHOOSE)
        entries = {entry.name for entry in self.output.iterdir()}
        if entries and not self._overwrite:
            raise OutputError("exists and is not empty", where=self.output, hint=_CHOOSE)
        if entries and not entries.intersection(_MODEL_FILES):
            raise OutputError(
                "exists and holds no model, so --overwrite does not replace it",
                where=self.output,
                hint="Delete it yourself or choose another output.",
            )

    @staticmethod
    def free_bytes(output: Path) -> int:
        """Free bytes where `output` would be written."""
        place = Path(os.path.realpath(output)).parent
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def _require_space(self, nbytes: int) -> None:
        free = self.free_bytes(self.output)
        if free < nbytes + _MARGIN:
            raise OutputError(
                f"needs {nbytes:,} bytes, {free:,} are free",
                where=self.output,
                hint="Free space or choose an output on another disk.",
            )

    def _make(self) -> None:
        for parent in reversed(self.output.parents):
            if not parent.exists():
                parent.mkdir()
                self._made.append(parent)
        self.folder.mkdir(exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise OutputError(
                "another run is writing this output",
                where=self.output,
                hint="Wait for it, or choose another output.",
            ) from error
        self._lock = lock
        for entry in self.folder.iterdir():  # what a killed run has left
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def publish(self) -> None:
        """Makes the folder the output, in one rename, and durable.

        Raises:
            OutputError: the rename failed; the output is what it was.
        """
        try:
            for folder in (self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())):
                _sync_folder(folder)
            if self.output.is_dir() and any(self.output.iterdir()):
                self._exchange()
            else:
                self.folder.rename(self.output)
                self._made.clear()
            _sync_folder(self.output.parent)
        except OSError as error:
            raise OutputError(
                f"cannot be published: {error.strerror}",
                where=self.output,
                hint="It is what it was before.",
            ) from error

    def _exchange(self) -> None:
        """Swaps the new folder with the old one; the old one, now hidden, is then removed."""
        libc = ctypes.CDLL(None, use_errno=True)
        old, new = os.fsencode(self.folder), os.fsencode(self.output)
        if libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        aside = self.output.with_name(f".{self.output.name}.old")
        self.output.rename(aside)
        try:
            self.folder.rename(self.output)
        except OSError:
            aside.rename(self.output)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _remove(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()


_CHOOSE = "Choose another output, or replace it with --overwrite."


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
