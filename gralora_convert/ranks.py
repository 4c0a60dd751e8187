"""The processes of a launcher that carry out one plan together, each on files of its own.

torchrun, srun and mpirun say in the environment who is who; everything else passes through small
files beside the output, because a file system is all that the processes surely share. Rank 0 makes
the output's folder, invites the others and publishes; they write into it. Each shows that it lives
by writing its file anew every second, and who stops doing so is lost.
"""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_convert.errors import ConvertError, MisuseError, OutputError
from gralora_convert.strictjson import load_json

__all__ = ["Follower", "Leader", "Ranks"]

# What launchers set: this process's number, how many there are, and how many on this machine.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),  # srun; a batch script alone has no step
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH and its kin
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
BEAT_SECONDS = 1.0
LOST_SECONDS = 60.0  # without a beat; network file systems may show a file as it was for seconds
JOIN_SECONDS = 300.0  # from the first process to the last one of a launch
NOTE_SECONDS = 10.0  # until the user is told what is waited for
BUSY_SECONDS = 10.0  # for what another launch to the same output leaves behind while it ends
HEARD_SECONDS = 5.0  # that a refusal of rank 0 stays for the others to read
_AGAIN = "Run all of them again; with --resume what is done is not done again."
_ALONE = "Unset RANK and WORLD_SIZE (or what your launcher sets) to run alone."

Fields = Mapping[str, object]
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of `size` processes this is; `local` of them run on this machine.

    >>> Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "4"})
    Ranks(rank=1, size=4, local=1)
    """

    rank: int = 0
    size: int = 1
    local: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Ranks":
        """What the launcher says; one process alone without a launcher.

        Raises:
            MisuseError: numbers that are none.
        """
        for names in _VARIABLES:
            if names[0] in environment and names[1] in environment:
                rank, size = (_number(environment, name) for name in names[:2])
                local = _number(environment, names[2]) if names[2] in environment else 1
                if not 0 <= rank < size:
                    raise MisuseError(
                        f"{names[0]}={rank} is not below {names[1]}={size}",
                        hint="Unset both to run alone.",
                    )
                return cls(rank, size, max(1, local))
        return cls()

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The places in `sizes` (bytes of files) of the files that this rank writes: the largest
        first, each to whom has the least so far.

        >>> [Ranks(rank, 2).share([5, 4, 3, 3]) for rank in range(2)]
        [[0, 3], [1, 2]]
        """
        loads = [0] * self.size
        mine = []
        for place in sorted(range(len(sizes)), key=lambda p: -sizes[p]):
            least = loads.index(min(loads))
            loads[least] += sizes[place]
            if least == self.rank:
                mine.append(place)
        return sorted(mine)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal() or len(text) > 9:
        raise MisuseError(
            f"{name}={text!r} is set in the environment, a number was needed",
            hint="Unset it to run alone.",
        )
    return int(text)


def _place(output: Path, rank: int) -> Path:
    return output.with_name(f".{output.name}.rank-{rank}")


class _Sign:
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
                with open(fresh, "x") as file:
                    file.write(text)
                fresh.replace(self.path)
            except OSError as error:
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


class _Watch:
    """What another rank's file says, and whether that rank still lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: Fields = {}
        self._token: object = None
        self._since = time.monotonic()

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


class _Wait:
    """A wait with an end, of which the user is told when it takes long."""

    def __init__(self, what: str, output: Path, note: Note) -> None:
        self._what, self._output, self._note = what, output, note
        self._start = time.monotonic()
        self._is_told = False

    def a_moment(self) -> None:
        """Sleeps a little.

        Raises:
            OutputError: the time is up.
        """
        passed = time.monotonic() - self._start
        if passed > JOIN_SECONDS:
            raise OutputError(
                f"{self._what} did not come within {JOIN_SECONDS:.0f} s",
                where=self._output,
                hint=f"Does every process see this folder? {_ALONE}",
            )
        if passed > NOTE_SECONDS and not self._is_told:
            self._is_told = True
            self._note(
                f"waiting for {self._what}, for at most {JOIN_SECONDS - passed:.0f} s more. {_ALONE}"
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


class Leader:
    """Rank 0 among the others: `gather` them, work, `wait` for them.

    `plan` is the fingerprint of what is to be written, which all must agree on; `note` is told
    what is waited for when that takes long.
    """

    def __init__(self, output: Path, ranks: Ranks, plan: str, note: Note) -> None:
        self._output, self._ranks, self._plan, self._note = output, ranks, plan, note
        self._token = uuid.uuid4().hex
        self._others = {rank: _Watch(_place(output, rank)) for rank in range(1, ranks.size)}
        self._has_gathered = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """A refusal within is told to the others, who would wait for rank 0 in vain."""
        try:
            yield
        except ConvertError as error:
            with contextlib.suppress(OutputError):  # then they wait as for one that was killed
                self._decline(error)
            raise

    def _decline(self, error: ConvertError) -> None:
        theirs = _Watch(_place(self._output, 0))
        of_another_launch = theirs.look() and not theirs.is_lost
        if self._has_gathered or not self._others or of_another_launch:
            return
        if not self._output.parent.is_dir():
            return
        sign = _Sign(theirs.path, plan=self._plan, refused=str(error))
        try:
            time.sleep(HEARD_SECONDS)
        finally:
            sign.stop()
            sign.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        """Waits until all others are here; afterwards nothing is left of it.

        Raises:
            OutputError: one does not come, or has refused.
            MisuseError: one has another plan.
        """
        sign = None
        self._has_gathered = True
        try:
            if self._others:
                sign = _Sign(_place(self._output, 0), token=self._token, plan=self._plan)
                self._invite(sign)
                sign.say(closed=True)
            yield
        finally:
            if sign is not None:
                sign.stop()
            self._clear()

    def _clear(self) -> None:
        """Removes the signs of all ranks, also of those that are dead."""
        start = re.escape(_place(self._output, 0).name.removesuffix("0"))
        ours = re.compile(rf"{start}\d+(\.\d+|\.lock)?", re.DOTALL)
        with contextlib.suppress(OSError):  # they are small, and the next run removes them
            for path in self._output.parent.iterdir():
                if ours.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                    path.unlink(missing_ok=True)

    def _invite(self, sign: _Sign) -> None:
        wait = None
        invited: dict[str, object] = {}
        while True:
            said = {rank: watch.look() for rank, watch in self._others.items()}
            nonces = {str(rank): fields.get("nonce") for rank, fields in said.items()}
            if nonces != invited:
                invited = nonces
                sign.say(nonces=nonces)
            absent = [rank for rank, fields in said.items() if fields.get("token") != self._token]
            if not absent:
                return self._require_agreement(said)
            wait = wait or _Wait(f"rank {absent[0]} of {self._ranks.size}", self._output, self._note)
            wait.a_moment()

    def _require_agreement(self, said: Mapping[int, Fields]) -> None:
        for rank, fields in said.items():
            if fields.get("plan") != self._plan:
                raise _disagreement(rank, self._output)
            self._others[rank].follow(self._token)

    def wait(self) -> None:
        """Waits until all others have written their files.

        Raises:
            OutputError: one has failed, or is lost.
        """
        while not self.require_others():
            time.sleep(0.05)

    def require_others(self) -> bool:
        """Whether all others have written their files.

        Raises:
            OutputError: one has failed, or is lost.
        """
        return all([self._is_done(rank, watch) for rank, watch in self._others.items()])

    def _is_done(self, rank: int, watch: _Watch) -> bool:
        said = watch.look()
        if said.get("state") == "done":
            return True
        if said.get("state") == "failed":
            raise OutputError(f"rank {rank} failed: {said.get('message')}", where=self._output)
        if watch.is_lost:
            raise OutputError(
                f"rank {rank} of {self._ranks.size} is lost", where=self._output, hint=_AGAIN
            )
        return False


def _disagreement(rank: int, output: Path) -> MisuseError:
    """What is said when two processes do not write the same thing."""
    return MisuseError(
        f"rank {rank} would write something else than rank 0",
        where=output,
        hint="Give all processes the same arguments, inputs and version of the tool.",
    )


class Follower:
    """A rank other than 0: `join` rank 0, write."""

    def __init__(self, output: Path, ranks: Ranks, plan: str, note: Note) -> None:
        self._output, self._ranks, self._plan, self._note = output, ranks, plan, note
        self._nonce = uuid.uuid4().hex
        self._leader = _Watch(_place(output, 0))

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """Entered when rank 0 has made the folder to write into; rank 0 is told how it ended.

        Raises:
            OutputError: rank 0 does not come, or refuses; another launch writes this output.
        """
        self._until(self._output.parent.is_dir)
        place = _place(self._output, self._ranks.rank)
        with _only_one(place.with_name(f"{place.name}.lock"), self._output):
            self._require_no_other_launch()
            sign = _Sign(place, nonce=self._nonce, plan=self._plan)
            try:
                self._until(self._is_invited)
                self._leader.follow(self._leader.fields.get("token"))
                sign.say(token=self._leader.fields.get("token"))
                if self._leader.fields.get("plan") != self._plan:
                    raise _disagreement(self._ranks.rank, self._output)
                yield
                sign.say(state="done")
            except BaseException as error:
                known = str(error) if isinstance(error, ConvertError) else "interrupted"
                with contextlib.suppress(OutputError):
                    sign.say(state="failed", message=known)
                raise
            finally:
                sign.stop()
                if not self._leader.path.exists():  # else it reads and removes the sign
                    sign.path.unlink(missing_ok=True)

    def _is_invited(self) -> bool:
        said = self._leader.look()
        if "refused" in said and said.get("plan") == self._plan and not self._leader.is_lost:
            raise OutputError(f"rank 0 refused: {said['refused']}")
        nonces = said.get("nonces")
        return isinstance(nonces, Mapping) and nonces.get(str(self._ranks.rank)) == self._nonce

    def _require_no_other_launch(self) -> None:
        """Raises `OutputError` when rank 0 of another launch has all its ranks already."""
        until = time.monotonic() + BUSY_SECONDS
        while self._leader.look().get("closed") and self._leader.path.exists():
            if self._leader.is_lost:
                return
            if time.monotonic() > until:
                raise _busy(self._output)
            time.sleep(0.05)

    def _until(self, condition: Callable[[], bool]) -> None:
        wait = _Wait(f"rank 0 of {self._ranks.size}", self._output, self._note)
        while not condition():
            wait.a_moment()

    def require_leader(self) -> None:
        """Raises `OutputError` when rank 0 has gone: then nothing will be published."""
        if not self._leader.path.exists() or self._leader.is_lost:
            raise OutputError("rank 0 has stopped", where=self._output, hint=_AGAIN)


@contextlib.contextmanager
def _only_one(path: Path, output: Path) -> Iterator[None]:
    """Keeps a second process of the same number from writing over the signs of the first.

    Raises:
        OutputError: there is one, and it does not end soon; the lock cannot be made.
    """
    until = time.monotonic() + BUSY_SECONDS
    try:
        while (lock := _locked(path)) is None:
            if time.monotonic() > until:
                raise _busy(output)
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


def _busy(output: Path) -> OutputError:
    return OutputError(
        "another run is writing this output",
        where=output,
        hint="Wait for it, or choose another output.",
    )
