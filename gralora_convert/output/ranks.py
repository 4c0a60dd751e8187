"""The processes of a launcher that carry out one plan together, each a share of its cost.

torchrun, srun and mpirun start and supervise them; torch.distributed carries what they say (its
store) and sees who has gone without a word (gloo). All need to see the folder that they write.
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
from typing import Any, TypeVar

from gralora_convert.errors import ConvertError, MisuseError, OutputError

T = TypeVar("T")
# What launchers set: this process's number, how many there are, and how many on this machine. In
# the environment of an inner launcher there is that of an outer one: mpirun starts by srun.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH and its kin
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),  # srun; a batch script alone has no step
)
# What tells launches apart where no address is given, and then what goes with a step's number.
_LAUNCHES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "SLURM_STEP_ID")
_JOB = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
_MEETINGS = itertools.count()  # of this process: a launcher's store outlives them
JOIN_SECONDS, WORK_SECONDS = 120.0, 3600.0  # until all are there; that one may work longer
HEARD_SECONDS = 5.0  # that the store of rank 0 outlives its work, for the others to read
_ALONE = "Start all with the same address, or unset RANK and WORLD_SIZE to run alone."
_AGAIN = "Run all of them again, with `resume=True`: what is done is not done again."


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
        """What the launcher says, else one process alone. `MisuseError`: that are no numbers."""
        for names in _VARIABLES:
            if names[0] in environment and names[1] in environment:
                said = {name: environment.get(name, "1") for name in names if name}
                with contextlib.suppress(ValueError):
                    found = cls(*map(int, said.values()))
                    if 0 <= found.rank < found.size and found.local > 0:
                        return found
                told = ", ".join(map("=".join, said.items()))
                hint = f"Unset {names[0]} and {names[1]} to run alone."
                raise MisuseError(f"{told}: a number below another was needed", hint=hint)
        return cls()

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def share(self, items: Callable[[], Iterable[T]], cost: Callable[[T], int]) -> Iterator[T]:
        """This rank's run of all `items`, which come in order at each call: of even cost.

        >>> [list(Ranks(rank, 2).share(lambda: "abcde", ord)) for rank in range(2)]
        [['a', 'b', 'c'], ['d', 'e']]
        """
        total, before = sum(map(cost, items())), 0
        for item in items():
            before += 2 * cost(item)
            if (before - cost(item)) * self.size // (2 * total) == self.rank:
                yield item


@contextlib.contextmanager
def meeting(ranks: Ranks, output: Path, plan: str) -> Iterator["Meeting"]:
    """All ranks of one launch, met; one process alone imports and starts nothing for it.

    `OutputError`, also within: one did not come, has failed, or is lost. `MisuseError`: no place,
    or another plan.
    """
    met = Meeting(ranks, output)
    if ranks.size == 1:
        yield met
        return
    with met.losing():
        met.store = _store(ranks, output)
    try:
        met.join(plan)
        yield met
    except BaseException as error:  # told to the others, unless one of them was first
        why = str(error) if isinstance(error, ConvertError) else "it was interrupted"
        with contextlib.suppress(RuntimeError):
            met.store.compare_set("failed", "", f"rank {ranks.rank} failed: {why}")
        raise
    finally:
        met.groups.clear()
        with contextlib.suppress(RuntimeError, KeyboardInterrupt):  # others read rank 0's store
            met.store.set(f"gone-{ranks.rank}", "")
            everyone = [f"gone-{rank}" for rank in range(ranks.size if ranks.is_leader else 0)]
            met.store.wait(everyone, timedelta(seconds=HEARD_SECONDS))


def _store(ranks: Ranks, output: Path) -> Any:
    """Where the ranks meet: at the launcher's address, or in a file beside the output."""
    import torch.distributed as dist

    said, most = os.environ.get, timedelta(seconds=JOIN_SECONDS / 3)  # of each of 2.7 tries
    if (address := said("MASTER_ADDR")) and (port := said("MASTER_PORT")):
        # torchrun serves one itself, for all attempts (torch 2.13, distributed/rendezvous.py)
        serves = ranks.is_leader and said("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store: Any = dist.TCPStore(address, int(port), None, serves, most, wait_for_workers=False)
    elif any(map(said, _LAUNCHES)):
        launch = repr([str(output), *map(said, _LAUNCHES + _JOB)])
        folder = next(folder for folder in output.parents if folder.is_dir())
        name = f".gralora-convert-{hashlib.sha256(launch.encode()).hexdigest()[:16]}"
        store = dist.FileStore(str(folder / name), ranks.size)
    else:
        why = f"{ranks.size} processes were started, and nothing says where they meet"
        hint = "Set MASTER_ADDR (the host of rank 0) and MASTER_PORT for all, or use torchrun."
        raise MisuseError(why, hint=hint)
    name = f"gralora-convert/{said('TORCHELASTIC_RESTART_COUNT')}/{next(_MEETINGS)}"
    return dist.PrefixStore(name, store)


@dataclass
class Meeting:
    """One rank among the others; alone, all that is said is said to itself."""

    ranks: Ranks
    output: Path
    store: Any = None
    groups: list[Any] = field(default_factory=list)
    _steps: Iterator[int] = field(default_factory=itertools.count)

    def join(self, plan: str) -> None:
        """Waits for all, who must have come for the same `plan`."""
        import torch.distributed as dist

        size, until = self.ranks.size, time.monotonic() + JOIN_SECONDS
        with self.losing():
            self.store.set(f"plan-{self.ranks.rank}", plan)
            for rank in range(size):
                while not self.store.check([f"plan-{rank}"]):
                    if time.monotonic() > until:
                        raise RuntimeError(f"rank {rank} of {size} did not come")
                    time.sleep(0.02)
                if self.store.get(f"plan-{rank}").decode() != plan:
                    why = f"rank {rank} would do something else than rank {self.ranks.rank}"
                    hint = "Give all processes the same arguments, inputs and version of the tool."
                    raise MisuseError(why, where=self.output, hint=hint)
            for seconds in (JOIN_SECONDS, WORK_SECONDS):  # to meet soon, to work for long
                store, most = dist.PrefixStore(str(seconds), self.store), timedelta(seconds=seconds)
                self.groups.append(dist.ProcessGroupGloo(store, self.ranks.rank, size, most))

    def gather(self, value: Any = None) -> list[Any]:
        """What each rank says at this step, as JSON, when all have come this far."""
        if self.store is None:
            return [value]
        step = next(self._steps)
        with self.losing():
            self.store.set(f"{step}-{self.ranks.rank}", json.dumps(value))
            peers = self.groups[-1].barrier()
            while not peers.is_completed() and not self.store.check(["failed"]):
                time.sleep(0.02)
            self.require_others()  # who fails says so before going
            peers.wait()  # who has gone without a word
            return [json.loads(self.store.get(f"{step}-{rank}")) for rank in range(self.ranks.size)]

    def require_others(self) -> None:
        """Raises `OutputError` when another has failed; cheap, to be asked now and then."""
        with self.losing():
            if self.store is not None and self.store.check(["failed"]):
                why = self.store.get("failed").decode()
                raise OutputError(why, where=self.output, hint=_AGAIN)

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """torch.distributed says with a RuntimeError that a peer, or the store, is not there."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            said = str(error).partition("\n")[0].partition(". ")[0]
            what, hint = ("is lost", _AGAIN) if self.groups else ("cannot be met", _ALONE)
            why = f"another rank {what}: {said}"
            raise OutputError(why, where=self.output, hint=hint) from error
