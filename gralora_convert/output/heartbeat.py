"""Small files by which processes see one another: who is there, how far, and whether it lives.

A sign is written anew every second; whoever stops doing so is lost.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gralora_convert.disk import load_json
from gralora_convert.errors import ConvertError, OutputError

__all__ = [
    "Fields",
    "Note",
    "Sign",
    "Wait",
    "Watch",
    "busy",
    "only_one",
]


BEAT_SECONDS = 1.0
LOST_SECONDS = 60.0  # without a beat; network file systems may show a file as it was for seconds
JOIN_SECONDS = 120.0  # from the first process to the last one of a launch
NOTE_SECONDS = 10.0  # until the user is told what is waited for
BUSY_SECONDS = 10.0  # in which a launch to the same output ends, and the next one begins
ALONE = "Unset RANK and WORLD_SIZE (or what your launcher sets) to run alone."

Fields = Mapping[str, object]
Note = Callable[[str], None]


class Sign:
    """A small file that says who a rank is and how far it is, written anew as a sign of life."""

    def __init__(self, path: Path, **fields: object) -> None:
        self.path = path
        self._fields: dict[str, object] = {**fields, "pid": os.getpid(), "machine": _machine()}
        self._beats = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self.say()
        self._thread.start()

    def say(self, **fields: object) -> None:
        """Adds to what the file says.

        Raises:
            OutputError: it cannot be written.
        """
        with self._lock:
            self._fields |= fields
            self._beats += 1
            text = json.dumps({**self._fields, "beats": self._beats})
            fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            try:
                fresh.unlink(missing_ok=True)  # of a dead process, or a trap
                with fresh.open("x") as file:
                    file.write(text)
                fresh.replace(self.path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    fresh.unlink(missing_ok=True)
                raise OutputError(
                    f"cannot be written: {error.strerror}", where=self.path
                ) from error

    def _live(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OutputError):  # if it lasts, the others say that this is lost
                self.say()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class Watch:
    """What another rank's file says, and whether that rank still lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: Fields = {}
        self._token: object = None
        self._since = time.monotonic()
        self._died: float | None = None
        self._was_alive = False

    def follow(self, token: object) -> None:
        """From now on heeds this launch only: what another one writes there counts for nothing."""
        self._token = token

    def look(self) -> Fields:
        """What the file says now; what it said last when it cannot be read."""
        with contextlib.suppress(ConvertError):
            now = load_json(self.path)
            if now != self.fields and self._token in (None, now.get("token")):
                self.fields, self._since = now, time.monotonic()
        return self.fields

    @property
    def is_lost(self) -> bool:
        """Whether its process is gone, or has not shown itself for long."""
        fields = self.look()
        if time.monotonic() - self._since > LOST_SECONDS:
            return True
        pid = fields.get("pid")
        return fields.get("machine") == _machine() and isinstance(pid, int) and not _is_running(pid)

    @property
    def has_died(self) -> bool:
        """Whether it was seen alive, and is gone for so long that no other has taken its place."""
        if not self.look() or not self.is_lost:
            self._was_alive, self._died = self._was_alive or bool(self.fields), None
            return False
        self._died = self._died or time.monotonic()
        return self._was_alive and time.monotonic() - self._died > BUSY_SECONDS


class Wait:
    """A wait with an end, of which the user is told when it takes long."""

    def __init__(self, output: Path, note: Note) -> None:
        self._output, self._note = output, note
        self._start = time.monotonic()
        self._is_told = False

    def a_moment(self, what: str) -> None:
        """Sleeps a little, waiting for `what`.

        Raises:
            OutputError: the time is up.
        """
        passed = time.monotonic() - self._start
        if passed > JOIN_SECONDS:
            raise OutputError(
                f"{what} did not come within {JOIN_SECONDS:.0f} s",
                where=self._output,
                hint=f"Does every process see this folder? {ALONE}",
            )
        if passed > NOTE_SECONDS and not self._is_told:
            self._is_told = True
            self._note(
                f"waiting for {what}, for at most {JOIN_SECONDS - passed:.0f} s more. {ALONE}"
            )
        time.sleep(0.05)


def _machine() -> str:
    """The same for processes that can see one another by number."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return uuid.uuid4().hex


def _is_running(pid: int) -> bool:
    """Whether there is such a process; one that is dead but not yet waited for is not running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    with contextlib.suppress(OSError):  # proc_pid_stat(5): the state follows the name in brackets
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return state[:1] not in ([b"Z"], [b"X"])
    return True


@contextlib.contextmanager
def only_one(path: Path, output: Path) -> Iterator[None]:
    """Keeps a second process of the same number from writing over the signs of the first.

    Raises:
        OutputError: there is one, and it does not end soon; the lock cannot be made.
    """
    until = time.monotonic() + BUSY_SECONDS
    try:
        while (lock := _locked(path)) is None:
            if time.monotonic() > until:
                raise busy(output)
            time.sleep(0.05)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(lock)


def _locked(path: Path) -> int | None:
    """A descriptor of the file, locked where the file system knows locks; None: another has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        path.unlink(missing_ok=True)  # not made by this program
    lock = os.open(path, flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat(follow_symlinks=False)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass  # held, or removed by who held it
    except OSError:
        return lock  # no locks here: two launches to one output would see one another
    os.close(lock)
    return None


def busy(output: Path) -> OutputError:
    """What is said to a run whose output another run is writing."""
    return OutputError(
        "another run is writing this output",
        where=output,
        hint="Wait for it, or choose another output.",
    )
