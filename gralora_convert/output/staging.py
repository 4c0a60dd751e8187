"""An output folder that appears complete or not at all.

It is made beside it under a hidden name, locked meanwhile, and renamed when it is whole. What a
killed run has left is removed by the next run to the same output.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from gralora_convert import system
from gralora_convert.errors import (
    ChangedInputError,
    CheckFailedError,
    ConvertError,
    MisuseError,
    OutputError,
    sentences,
)

_MARGIN = 4 * 1024 * 1024  # bytes left free for the receipt and directory blocks
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# What file systems say that know no locks, or no flushing of folders.
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
_BUSY = "another run is writing this output"
_WAIT = "Wait for it, or choose another output."
_ELSEWHERE = "Choose an output outside the input folders."
_CHOOSE = "Choose another output, or replace it with `overwrite=True`."
_DELETE = "Delete it yourself or choose another output."


class Staging:
    """The way from nothing to a published folder; use `open`, fill the folder, `publish`."""

    def __init__(
        self,
        output: Path,
        *,
        overwrite: bool = False,
        protected: tuple[Path, ...] = (),
        keep: bool = False,
    ) -> None:
        self.output = _resolved(output)
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        self._aside = self.output.with_name(f".{self.output.name}.replaced")
        self._overwrite, self._protected, self._keep = overwrite, protected, keep
        self._locks = contextlib.ExitStack()
        self._leftover: Path | None = None
        self._made: list[Path] = []
        self._own: os.stat_result | None = None

    @contextlib.contextmanager
    def open(
        self, nbytes: int, left: Callable[[Path], Collection[str]] | None = None
    ) -> Iterator[Path]:
        """The folder to fill with about `nbytes` more bytes; unless published it is removed again,
        or, with `keep`, left for a run that goes on from there.

        It is empty but for the files that `left` names of what a broken run has left.

        Raises:
            MisuseError: the output overlaps an input.
            OutputError: it exists, another run writes to it, it cannot be made, no space.
        """
        with self._locks:
            try:
                try:
                    with _failing(self.output, "cannot be made", "Nothing was written."):
                        self.require_allowed()
                        self._make(left)
                        self._require_space(nbytes)
                    yield self.folder
                except (CheckFailedError, ChangedInputError):
                    self._keep = False  # going on would lead to the same
                    raise
                finally:
                    self._remove()
            except KeyboardInterrupt as error:
                with contextlib.suppress(KeyboardInterrupt):
                    self._remove()  # again: it may be what was interrupted
                if not self._is_published():  # else it is too late to interrupt
                    if self._leftover:
                        error.add_note(self._remark(self._leftover))
                    raise
            except ConvertError as error:
                if self._leftover:
                    error.hint = sentences(error.hint, self._remark(self._leftover))
                raise
        if self._leftover:
            what = "is complete, but something was left beside it"
            raise self._refused(what, _removal(self._leftover))

    def tidy(self) -> None:
        """Removes what a killed run has left beside the output that it had published."""
        if any(map(os.path.lexists, (self.folder, self._aside))):
            self._overwrite = True
            with self.open(0):
                pass

    def require_allowed(self) -> None:
        """Raises when the output may not be written, before anything is computed."""
        for path in self._protected:
            self._require_apart(Path(os.path.realpath(path)))
        with contextlib.suppress(FileNotFoundError):  # of a working directory that was removed
            if Path.cwd().is_relative_to(self.output):
                hint = "Choose a folder inside it, or run from elsewhere."
                raise MisuseError("is the current folder or holds it", where=self.output, hint=hint)
        if not os.path.lexists(self.output):
            return
        try:
            entries = _names_in(self.output)
        except FileNotFoundError:
            return  # another run is about to replace it
        except NotADirectoryError as error:
            raise self._refused("exists and is not a folder", _DELETE) from error
        if os.path.ismount(self.output):
            what = "is where a disk is mounted, which no folder can replace in one step"
            raise self._refused(what, "Choose a folder inside it.")
        if entries and not self._overwrite:
            raise self._refused("exists and is not empty", _CHOOSE)
        if entries and not _holds_a_model(entries):
            what = "exists and holds no model, so `overwrite=True` does not replace it"
            raise self._refused(what, _DELETE)

    def _refused(self, what: str, hint: str) -> OutputError:
        return OutputError(what, where=self.output, hint=hint)

    def _require_apart(self, path: Path) -> None:
        """Refuses an output that is an input, lies in one or holds one."""
        for ours in (self.output, self.folder, self._aside):
            if _lies_in(path, ours):
                raise MisuseError(
                    f"would replace the input {path}", where=self.output, hint=_ELSEWHERE
                )
        if path.is_dir() and _lies_in(self.output, path):
            raise MisuseError(f"lies in the input {path}", where=self.output, hint=_ELSEWHERE)

    @staticmethod
    def free_bytes(output: Path) -> int:
        """Free bytes where `output` would be written."""
        place = _resolved(output).parent
        with _failing(output, "cannot be made", "Choose another output."):
            while not place.exists():
                place = place.parent
            return shutil.disk_usage(place).free

    def _require_space(self, nbytes: int) -> None:
        free = self.free_bytes(self.output)
        if free < nbytes + _MARGIN:
            what = f"needs {nbytes:,} bytes, {free:,} are free"
            raise self._refused(what, "Free space or choose an output on another disk.")

    def _make(self, left: Callable[[Path], Collection[str]] | None) -> None:
        for parent in reversed(self.output.parents):
            if not parent.exists():
                with contextlib.suppress(FileExistsError):  # a run beside this one was faster
                    parent.mkdir()
                    self._made.append(parent)
        self._make_locked()
        self._leftover = self.folder
        self._clear(left(self.folder) if left is not None else ())

    def _make_locked(self) -> None:
        """Makes the hidden folder, or takes over what a killed run has left; nobody else has it."""
        for _ in range(100):
            is_new = True
            try:
                self.folder.mkdir()
            except FileExistsError:
                is_new = False
            try:
                lock = self._locked(self.folder, required=not is_new)
                now = self.folder.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # the run that had it has just published or removed it
            if os.path.samestat(os.fstat(lock), now):
                if now.st_uid != os.geteuid():
                    hint = "Choose another output."
                    raise OutputError("belongs to another user", where=self.folder, hint=hint)
                self._own = now
                return
        raise self._refused(_BUSY, _WAIT)

    def _locked(self, folder: Path, *, required: bool) -> int:
        """A descriptor of `folder`, locked. Where the file system has no locks, only a folder that
        nobody else can be using will do."""
        lock = os.open(folder, _FOLDER)
        self._locks.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refused(_BUSY, _WAIT) from error
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
            if required:
                hint = "Without file locks here this cannot be told: wait for it or delete that."
                what = f"{_BUSY}, or was killed and left {folder}"
                raise self._refused(what, hint) from error
        return lock

    def _clear(self, left: Collection[str]) -> None:
        """Undoes what a killed run has left, but for the files `left`."""
        kept = {self.folder / name for name in left}
        kept |= {parent for path in kept for parent in path.parents}
        for entry in sorted(self.folder.rglob("*")) if kept else self.folder.iterdir():
            if entry in kept or not os.path.lexists(entry):
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        if not os.path.lexists(self._aside):
            return
        if os.path.lexists(self.output):
            with contextlib.suppress(FileNotFoundError):  # the run that replaced it was faster
                self._locked(self._aside, required=False)
                shutil.rmtree(self._aside)
        else:
            self._aside.rename(self.output)
            self.require_allowed()

    def publish(self) -> None:
        """Makes the folder the output, in one rename, and durable.

        Raises:
            OutputError: the rename failed; the output is what it was.
        """
        with _failing(self.output, "cannot be published", "It is what it was before."):
            for folder in (self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())):
                _sync_folder(folder)
            self.require_allowed()  # something may have come there since
            if self._overwrite and self.output.is_dir() and any(self.output.iterdir()):
                self._replace()
            else:
                self._rename()
        with _failing(
            self.output, "is complete, but the disk did not confirm it", "Check the disk."
        ):
            _sync_folder(self.output.parent)

    def _replace(self) -> None:
        """Swaps the new folder with the old one; the old one, now hidden, is removed later."""
        self._locked(self.output, required=False)  # or another run might take it over while hidden
        if system.exchange(self.folder, self.output):
            return
        try:
            self.output.rename(self._aside)
            self._rename()
        except BaseException:
            if not self._is_published() and os.path.lexists(self._aside):
                self._aside.rename(self.output)
            raise
        finally:
            if self._leftover is None:
                self._leftover = self._aside

    def _rename(self) -> None:
        """Gives our folder its name; what then has the hidden one is of another run."""
        try:
            self.folder.rename(self.output)
            self._leftover = None
        except BaseException:
            if self._is_published():
                self._leftover = None
            raise

    def _is_published(self) -> bool:
        """Whether our folder is the output, by what is on the disk: true at any moment."""
        try:
            return self._own is not None and os.path.samestat(self._own, self.output.stat())
        except OSError:
            return False

    @property
    def _is_kept(self) -> bool:
        """Whether the unfinished folder, if anything is in it, is left for a run that goes on."""
        if not self._keep or self._leftover != self.folder or self._is_published():
            return False
        with contextlib.suppress(OSError):
            return any(self.folder.iterdir())
        return False

    def _remark(self, leftover: Path) -> str:
        kept = f"What is done is kept in {leftover}: run again with `resume=True`, or delete it."
        return kept if self._is_kept else _removal(leftover)

    def _remove(self) -> None:
        """Removes what need not stay; afterwards `_leftover` is what stays."""
        if self._is_kept:
            return
        if self._leftover and _removed(self._leftover):
            self._leftover = None
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _failing(output: Path, what: str, hint: str) -> Iterator[None]:
    """Turns failures of the file system into `OutputError`."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise OutputError(f"{what}: {error.strerror}{place}", where=output, hint=hint) from error


def _resolved(output: Path) -> Path:
    try:
        resolved = Path(os.path.realpath(output))
    except ValueError as error:
        raise MisuseError(f"is not a file name: {error}", where=output) from error
    if not resolved.name:
        raise MisuseError("is not a folder that can be replaced", where=resolved)
    return resolved


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, also where a mount gives one of them another name."""
    if path.is_relative_to(folder):
        return True
    with contextlib.suppress(OSError):
        status = folder.stat()
        return any(_is_same(parent, status) for parent in (path, *path.parents))
    return False


def _is_same(path: Path, status: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), status)
    return False


def _names_in(folder: Path) -> set[str]:
    """What is in `folder`, all of it: never what is left of one that another run is replacing."""
    descriptor = os.open(folder, _FOLDER)
    try:
        names = set(os.listdir(descriptor))  # noqa: PTH208 - of this folder, whatever its name is now
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        return names
    finally:
        os.close(descriptor)


def _holds_a_model(names: set[str]) -> bool:
    """Whether a folder with these files was written by a tool of this kind."""
    if "adapter_config.json" in names or "gralora_convert.json" in names:
        return True
    return "config.json" in names and any(
        name.endswith((".safetensors", ".bin", ".index.json")) for name in names
    )


def _removed(folder: Path) -> bool:
    """Removes as much of `folder` as can be; whether that was all."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return True
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True  # what has this name now is of another run


def _removal(path: Path) -> str:
    return f"Delete {path}, which could not be removed."


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, _FOLDER)
    try:
        system.flush(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)
