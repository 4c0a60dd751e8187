"""The processes of a launcher that carry out one plan together, each on files of its own.

torchrun, srun and mpirun say in the environment who is who; everything else passes through small
files beside the output, because a file system is all that the processes surely share. Rank 0 makes
the output's folder, invites the others and publishes; they write into it. Each shows that it lives
by writing its file anew every second, and who stops doing so is lost.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_convert.errors import ConvertError, MisuseError, OutputError
from gralora_convert.output.heartbeat import BUSY_SECONDS, Note, Sign, Wait, Watch, busy, only_one

__all__ = [
    "Follower",
    "Leader",
    "Ranks",
]


# What launchers set: this process's number, how many there are, and how many on this machine.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),  # srun; a batch script alone has no step
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH and its kin
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
HEARD_SECONDS = 5.0  # that a refusal of rank 0 stays for the others to read
_AGAIN = "Run all of them again; with --resume what is done is not done again."


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


class Leader:
    """Rank 0 among the others: `gather` them, work, `wait` for them.

    `plan` is the fingerprint of what is to be written, which all must agree on; `note` is told
    what is waited for when that takes long.
    """

    def __init__(self, output: Path, ranks: Ranks, plan: str, note: Note) -> None:
        self._output, self._ranks, self._plan, self._note = output, ranks, plan, note
        self._token = uuid.uuid4().hex
        self._others = {rank: Watch(_place(output, rank)) for rank in range(1, ranks.size)}
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
        theirs = Watch(_place(self._output, 0))
        of_another_launch = theirs.look() and not theirs.is_lost
        if self._has_gathered or not self._others or of_another_launch:
            return
        if not self._output.parent.is_dir():
            return
        sign = Sign(theirs.path, plan=self._plan, refused=str(error))
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
                sign = Sign(_place(self._output, 0), token=self._token, plan=self._plan)
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

    def _invite(self, sign: Sign) -> None:
        wait = Wait(self._output, self._note)
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
            for rank in absent:
                if self._others[rank].has_died:
                    raise self._lost(rank)
            wait.a_moment(f"rank {absent[0]} of {self._ranks.size}")

    def _require_agreement(self, said: Mapping[int, Mapping[str, object]]) -> None:
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

    def _is_done(self, rank: int, watch: Watch) -> bool:
        said = watch.look()
        if said.get("state") == "done":
            return True
        if said.get("state") == "failed":
            raise OutputError(f"rank {rank} failed: {said.get('message')}", where=self._output)
        if watch.is_lost:
            raise self._lost(rank)
        return False

    def _lost(self, rank: int) -> OutputError:
        return OutputError(
            f"rank {rank} of {self._ranks.size} is lost", where=self._output, hint=_AGAIN
        )


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
        self._leader = Watch(_place(output, 0))

    @contextlib.contextmanager
    def join(self) -> Iterator[None]:
        """Entered when rank 0 has made the folder to write into; rank 0 is told how it ended.

        Raises:
            OutputError: rank 0 does not come, or refuses; another launch writes this output.
        """
        self._until(self._output.parent.is_dir)
        place = _place(self._output, self._ranks.rank)
        with only_one(place.with_name(f"{place.name}.lock"), self._output):
            self._require_no_other_launch()
            sign = Sign(place, nonce=self._nonce, plan=self._plan)
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
                token = self._leader.fields.get("token")
                with contextlib.suppress(OutputError):
                    sign.say(state="failed", message=known, token=token)
                raise
            finally:
                sign.stop()
                if not self._is_read():
                    sign.path.unlink(missing_ok=True)

    def _is_read(self) -> bool:
        """Whether rank 0 is there to read the sign of this one, and to remove it."""
        has_token = self._leader.fields.get("token") is not None
        return has_token and self._leader.path.exists() and not self._leader.is_lost

    def _is_invited(self) -> bool:
        said = self._leader.look()
        if "refused" in said and said.get("plan") == self._plan and not self._leader.is_lost:
            raise OutputError(f"rank 0 refused: {said['refused']}")
        if self._leader.has_died:
            raise self._stopped()
        nonces = said.get("nonces")
        return isinstance(nonces, Mapping) and nonces.get(str(self._ranks.rank)) == self._nonce

    def _require_no_other_launch(self) -> None:
        """Raises `OutputError` when rank 0 of another launch has all its ranks already."""
        until = time.monotonic() + BUSY_SECONDS
        while self._leader.look().get("closed") and self._leader.path.exists():
            if self._leader.is_lost:
                return
            if time.monotonic() > until:
                raise busy(self._output)
            time.sleep(0.05)

    def _until(self, condition: Callable[[], bool]) -> None:
        wait = Wait(self._output, self._note)
        while not condition():
            wait.a_moment(f"rank 0 of {self._ranks.size}")

    def require_leader(self) -> None:
        """Raises `OutputError` when rank 0 has gone: then nothing will be published."""
        if not self._leader.path.exists() or self._leader.is_lost:
            raise self._stopped()

    def _stopped(self) -> OutputError:
        return OutputError("rank 0 has stopped", where=self._output, hint=_AGAIN)
