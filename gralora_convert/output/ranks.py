"""The processes of a launcher that carry out one plan together, each a share of its bytes.

torchrun, srun and mpirun start and supervise them; torch.distributed (its store, and gloo, which
sees a peer that has gone) carries what they say to one another. Rank 0 makes the output's folder
and publishes it; all write into it, so they need to see one file system.
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gralora_convert.errors import ConvertError, MisuseError, OutputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")
# What launchers set: this process's number, how many there are, and how many on this machine.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),  # srun; a batch script alone has no step
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH and its kin
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
# What tells one launch from the next, where no address for the processes to meet at is given.
_LAUNCHES = ("SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
_JOBS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")  # whose steps are counted from 0
_MEETINGS = itertools.count()  # of this process: a launcher's store outlives them
JOIN_SECONDS = 120.0  # until all are there
WORK_SECONDS = 3600.0  # that one may write longer than another
HEARD_SECONDS = 5.0  # that the store of rank 0 outlives its work, for the others to read
_AGAIN = "Run all of them again, a merge with `resume=True`: what is done is not done again."


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

    def share(self, items: Callable[[], Iterable[T]], cost: Callable[[T], int]) -> Iterator[T]:
        """This rank's run of all `items`, which come in order at each call: the runs of all ranks
        have the same cost, as far as the items allow.

        >>> [list(Ranks(rank, 2).share(lambda: "abcde", ord)) for rank in range(2)]
        [['a', 'b', 'c'], ['d', 'e']]
        """
        total, before = sum(map(cost, items())), 0
        for item in items():
            middle = 2 * before + cost(item)
            before += cost(item)
            if middle * self.size // (2 * total) == self.rank:
                yield item


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal() or len(text) > 9:
        raise MisuseError(
            f"{name}={text!r} is set in the environment, a number was needed",
            hint="Unset it to run alone.",
        )
    return int(text)


@contextlib.contextmanager
def meeting(ranks: Ranks, output: Path) -> Iterator["Meeting"]:
    """All ranks of one launch, met; a failure within is told to the others. One process alone
    imports and starts nothing for it.

    Raises:
        OutputError: one did not come, or has failed or gone before the end.
        MisuseError: the launcher names no place to meet at.
    """
    if ranks.size == 1:
        yield Meeting(ranks, output)
        return
    import torch.distributed as dist

    met = Meeting(ranks, output, _store(ranks, output))
    try:
        met.gather("here")
        with _lost(output):
            dist.init_process_group(
                "gloo", store=met.store, rank=ranks.rank, world_size=ranks.size,
                timeout=timedelta(seconds=JOIN_SECONDS),
            )  # fmt: skip
            met.group = dist.new_group(timeout=timedelta(seconds=WORK_SECONDS))
        yield met
    except BaseException as error:
        met.tell(error)
        raise
    finally:
        met.leave()
        if met.group is not None:  # ours, not one that the caller has
            dist.destroy_process_group()


def _store(ranks: Ranks, output: Path) -> "Store":
    """Where the ranks meet: the launcher's address, or a file beside the output."""
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        launch = [value for name in _LAUNCHES if (value := os.environ.get(name))]
        if not launch:
            raise MisuseError(
                f"{ranks.size} processes were started, and nothing says where they meet",
                hint="Set MASTER_ADDR and MASTER_PORT alike for all of them, or use torchrun.",
            )
        launch += [os.environ.get(name, "") for name in _JOBS]
        job = hashlib.sha256(repr([str(output), *launch]).encode()).hexdigest()[:16]
        folder = next(folder for folder in output.parents if folder.is_dir())
        return dist.FileStore(str(folder / f".gralora-convert-{job}"), ranks.size)
    # torchrun serves a store itself (torch 2.13, distributed/rendezvous.py), the same one for all
    # attempts of a launch; else rank 0 does
    is_master = ranks.is_leader and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            address, int(port), None, is_master, timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise OutputError(
            f"the processes cannot meet at {address}:{port}: {str(error).splitlines()[0]}",
            where=output, hint="Unset RANK and WORLD_SIZE to run alone.",
        ) from error  # fmt: skip
    return dist.PrefixStore(f"gralora-convert/{attempt}/{next(_MEETINGS)}", store)


@contextlib.contextmanager
def _lost(output: Path) -> Iterator[None]:
    """torch.distributed says with a RuntimeError that a peer, or the store, is not there."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutputError(f"another rank is lost ({reason})", where=output, hint=_AGAIN) from error


@dataclass
class Meeting:
    """One rank among the others; alone, all that is said is said to itself."""

    ranks: Ranks
    output: Path
    store: "Store | None" = None
    group: "ProcessGroup | None" = None
    _steps: Iterator[int] = field(default_factory=itertools.count)

    def gather(self, value: Any) -> list[Any]:
        """What each rank says at this step, as JSON, when all have come this far.

        Raises:
            OutputError: one did not come, has failed, or is lost.
        """
        if self.store is None:
            return [value]
        step = next(self._steps)
        names = [f"{step}-{rank}" for rank in range(self.ranks.size)]
        with _lost(self.output):
            self.store.set(names[self.ranks.rank], json.dumps(value))
            self._come(names) if self.group is None else self._meet(self.group)
            return [json.loads(self.store.get(name)) for name in names]

    def _come(self, names: list[str]) -> None:
        assert self.store is not None
        until = time.monotonic() + JOIN_SECONDS
        while not self.store.check(names):
            self.require_others()
            if time.monotonic() > until:
                absent = next(r for r, name in enumerate(names) if not self.store.check([name]))
                raise OutputError(
                    f"rank {absent} of {self.ranks.size} did not come", where=self.output,
                    hint="Start all of them, or unset RANK and WORLD_SIZE to run alone.",
                )  # fmt: skip
            time.sleep(0.02)

    def _meet(self, group: "ProcessGroup") -> None:
        """A barrier of gloo, which sees who has gone without a word."""
        import torch.distributed as dist

        barrier = dist.barrier(group, async_op=True)
        assert barrier is not None
        while not barrier.is_completed():
            self.require_others()
            time.sleep(0.02)
        barrier.wait()

    def agree(self, plan: str, known: Any) -> Any:
        """What rank 0 knows, when all have come this far with the same plan.

        Raises:
            MisuseError: one has another.
            OutputError: as `gather`.
        """
        said = self.gather([plan, known])
        for rank, (other, _) in enumerate(said):
            if other != plan:
                raise MisuseError(
                    f"rank {max(rank, self.ranks.rank)} would do something else than rank "
                    f"{min(rank, self.ranks.rank)}",
                    where=self.output,
                    hint="Give all processes the same arguments, inputs and version of the tool.",
                )
        return said[0][1]

    def require_others(self) -> None:
        """Raises `OutputError` when another has failed; cheap, to be asked now and then."""
        if self.store is None:
            return
        with _lost(self.output):
            failed = self.store.get("failed").decode() if self.store.check(["failed"]) else ""
        if failed:
            raise OutputError(failed, where=self.output, hint=_AGAIN)

    def hear(self) -> None:
        """Rank 0 says that all is done; the others wait until it does."""
        if self.store is None:
            return
        with _lost(self.output):
            if self.ranks.is_leader:
                self.store.set("done", "")
            while not self.store.check(["done"]):
                self.require_others()
                time.sleep(0.05)

    def tell(self, error: BaseException) -> None:
        """Tells the others why they will wait in vain, unless one of them was first."""
        assert self.store is not None
        known = str(error) if isinstance(error, ConvertError) else "it was interrupted"
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it who would read it
            if not self.store.check(["failed"]):
                self.store.set("failed", f"rank {self.ranks.rank} failed: {known}")

    def leave(self) -> None:
        """Goes; rank 0, whose store the others read, when they have, or soon after."""
        assert self.store is not None
        names = [f"gone-{rank}" for rank in range(self.ranks.size)]
        with contextlib.suppress(RuntimeError):  # the store has gone before
            self.store.set(names[self.ranks.rank], "")
            until = time.monotonic() + HEARD_SECONDS
            while self.ranks.is_leader and time.monotonic() < until and not self.store.check(names):
                time.sleep(0.02)
