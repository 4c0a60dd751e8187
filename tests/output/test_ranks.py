"""Several processes under a launcher: the bytes of one, whoever is killed, and never a hang.

`RANKS=10 pytest tests/output/test_ranks.py` kills at more moments; with `NAMESPACES=1` (root, and
`ip`) the ranks also run on two hosts, which are network namespaces.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import inputs as inputs_of_benchmarks
from benchmarks.planning import make_hollow
from gralora_convert.adapters.config import GraloraConfig
from gralora_convert.adapters.keys import key_of
from gralora_convert.errors import MisuseError
from gralora_convert.output import ranks as ranks_module
from gralora_convert.output.journal import Done
from gralora_convert.output.ranks import Ranks
from gralora_convert.verbs.conversion import convert
from gralora_convert.verbs.merging import merge
from tests.builders import SHAPES, write_base
from tests.command import run, run_ok
from tests.faults import tree


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **here, "RANK": str(rank), "WORLD_SIZE": str(size)}


def start(
    arguments: list[str], rank: int, size: int, port: int, *program: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "gralora_convert")), *arguments],
        env=launched(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_the_bytes_of_one_process(
    size: int, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "far/out"), "--json"]
    port = free_port()
    processes = [start(arguments, rank, size, port) for rank in reversed(range(size))]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, said
    assert [out for out, _ in said[:-1]] == [""] * (size - 1)  # rank 0 alone speaks
    assert json.loads(said[-1][0])["command"] == "merge"
    assert [err for _, err in said[:-1]] == [""] * (size - 1)
    assert tree(tmp_path / "far/out") == whole
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["out"]


# Tiles of a few rows, each flushed and slow, so that much can happen between any two.
SMALL = """
import os, sys, time
from pathlib import Path
from gralora_convert.cli.entry import run
from gralora_convert.output import parts, tiles, writing
folder, seconds = Path(sys.argv.pop(1)), float(sys.argv.pop(1))
tiles.TILE_BYTES, parts.COPY_CHUNK, writing.FLUSH_BYTES = 512, 300, 1
produce = tiles.MergedTensor.produce
def slow(*arguments):
    time.sleep(seconds)
    return produce(*arguments)
tiles.MergedTensor.produce = slow
if __name__ == "__main__":
    if "RANK" in os.environ:
        (folder / str(os.getpid())).touch()
    run()
"""


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """A program that merges in many small steps, and where it says who runs."""
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "running").mkdir()
    return [str(tmp_path / "small.py"), str(tmp_path / "running")]


@pytest.fixture
def single(
    small: list[str], inputs: list[str], tmp_path: Path
) -> tuple[list[str], dict[str, bytes | None]]:
    """A merge into one file, as arguments, and what one process writes."""
    arguments = inputs[: inputs.index("--shard-size")]
    alone = [sys.executable, *small, "0", *arguments, "-o", str(tmp_path / "single")]
    subprocess.run(alone, check=True, capture_output=True)
    return arguments, tree(tmp_path / "single")


@pytest.mark.parametrize("size", [3, 4])
def test_ranks_share_one_file(
    size: int, small: list[str], single: tuple[list[str], dict[str, bytes | None]], tmp_path: Path
) -> None:
    arguments, port = [*small, "0", *single[0], "-o", str(tmp_path / "out")], free_port()
    processes = [start(arguments[1:], rank, size, port, arguments[0]) for rank in range(size)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, said
    assert tree(tmp_path / "out") == single[1]


def test_eight_ranks_share_one_file_evenly(tmp_path: Path) -> None:
    """A Llama of 1.1 B parameters in one file, whose data are holes, with all linear layers
    adapted: the shares of 8 ranks, by the time that they take."""
    names, modules = inputs_of_benchmarks.tensors_of(22), inputs_of_benchmarks.llama_modules(22)
    base: list[tuple[str, str, tuple[int, ...], int]]
    base = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in names.items()]
    (tmp_path / "base").mkdir()
    make_hollow(tmp_path / "base/model.safetensors", base)
    factors: list[tuple[str, str, tuple[int, ...], int]] = []
    for module, (rows, columns) in modules.items():
        a, b = (4, columns // 4, 64), (4, 64, rows // 4)
        factors.append((key_of(module, "A"), "F32", a, 4 * math.prod(a)))
        factors.append((key_of(module, "B"), "F32", b, 4 * math.prod(b)))
    targets = sorted({module.rpartition(".")[2] for module in modules})
    GraloraConfig(r=64, gralora_k=4, target_modules=targets).save_pretrained(tmp_path / "adapter")
    make_hollow(tmp_path / "adapter/adapter_model.safetensors", factors)
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", fan_in_fan_out={"*": False})
    assert len(plan.files) == 1
    shares = [
        [piece for _, pieces in plan.share(Done(), Ranks(rank, 8)) for piece in pieces]
        for rank in range(8)
    ]
    costs = [sum(piece.cost for piece in share) for share in shares]
    assert max(costs) < 1.05 * sum(costs) / 8, costs
    assert min(costs) > 0.95 * sum(costs) / 8, costs
    places = [(piece.start, piece.stop) for share in shares for piece in share]
    assert places[0][0] == len(plan.files[0].header)
    assert places[-1][1] == plan.files[0].nbytes
    assert all(one[1] == next_[0] for one, next_ in pairwise(places))


def torchrun(size: int, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size),
        "--monitor-interval", "0.1", "--master-port", str(free_port()), *options,
    ]  # fmt: skip


@pytest.mark.parametrize("moment", range(int(os.environ.get("RANKS", "1"))))
@pytest.mark.parametrize("restarts", [0, 3])
def test_a_worker_killed_at_a_random_moment(
    restarts: int, moment: int, small: list[str], tmp_path: Path,
    single: tuple[list[str], dict[str, bytes | None]],
) -> None:  # fmt: skip
    """Nothing is published, or it is healed; and nobody waits for the dead."""
    random = Random(moment)
    process = subprocess.Popen(
        [*torchrun(4, "--max-restarts", str(restarts)), *small, "0.3", *single[0], "--resume",
         "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(found := sorted((tmp_path / "running").iterdir())) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(random.uniform(0, 8))
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.kill(int(random.choice(found).name), signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    if (tmp_path / "out").exists():
        assert tree(tmp_path / "out") == single[1]
    assert (tmp_path / "out").exists() or not restarts, err
    if restarts:
        assert process.returncode == 0, err
    # without a restart, a worker killed at its exit fails its launcher although all is published
    assert process.returncode != 0 or (tmp_path / "out").exists(), err


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces that see each other and nothing else."""
    names = [f"gralora-{os.getpid()}-{number}" for number in (1, 2)]
    ip = partial(subprocess.run, check=True, capture_output=True)
    try:
        for name in names:
            ip(["ip", "netns", "add", name])
        ip(["ip", "-n", names[0], "link", "add", "one", "type", "veth", "peer", "one",
            "netns", names[1]])  # fmt: skip
        for number, name in enumerate(names, 1):
            for command in (f"addr add 10.213.0.{number}/24 dev one", "link set one up",
                            "link set lo up"):  # fmt: skip
                ip(["ip", "-n", name, *command.split()])
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.skipif("NAMESPACES" not in os.environ, reason="by hand: needs root")
@pytest.mark.parametrize("is_killed", [False, True])
def test_ranks_on_two_hosts(
    is_killed: bool, hosts: list[str], small: list[str], tmp_path: Path,
    single: tuple[list[str], dict[str, bytes | None]],
) -> None:  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.213.0.1:29500", "--rdzv-id", "1",
                "--max-restarts", "3", "--monitor-interval", "0.1"]  # fmt: skip
    processes = []
    for number, host in enumerate(hosts, 1):
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, *launcher, "--local-addr",
             f"10.213.0.{number}", "--rdzv-conf", f"is_host={2 - number}", *small, "0.3",
             *single[0], "--resume", "-o", tmp_path / "out"],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "one"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    while is_killed and len(list(tmp_path.glob(".out.partial/.progress-*"))) < 4:
        time.sleep(0.05)
    if is_killed:  # one of the four that write
        os.kill(max(int(path.name) for path in (tmp_path / "running").iterdir()), signal.SIGKILL)
    said = [process.communicate(timeout=170) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert tree(tmp_path / "out") == single[1]


def test_torchrun_starts_them(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    outcome = subprocess.run(
        [*torchrun(2), "-m", "gralora_convert", *inputs, "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("merged") == 1
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("place", ["an address", "a file"])
def test_processes_of_mpirun_meet_at(
    place: str, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "far/out")]
    meets = {"PMIX_NAMESPACE": "prterun-host-4711@1"}
    if place == "an address":
        meets |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(2):
        launcher = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "gralora_convert", *arguments],
            env={**os.environ, **launcher, **meets},
        ))  # fmt: skip
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert tree(tmp_path / "far/out") == whole
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_says_where_to_meet_it_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    outcome = run(*inputs, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert "nothing says where they meet" in outcome.stderr
    assert not (tmp_path / "out").exists()


DYING = """
import os, signal, sys, time
from gralora_convert.cli.entry import run
from gralora_convert.output import plan
write_files, attempt = plan.write_files, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
lost, when = sys.argv[1:3]
def dying(*arguments, **options):
    if os.environ["RANK"] == lost and attempt == "0" and when != "published":
        if when == "late":
            write_files(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return write_files(*arguments, **options)
def dying_published(staging):
    publish(staging)
    if attempt == "0" and when == "published":
        os.kill(os.getpid(), signal.SIGKILL)
publish, plan.Staging.publish = plan.Staging.publish, dying_published
plan.write_files = dying
sys.argv[1:] = sys.argv[3:]
run()
"""


@pytest.mark.parametrize("when", ["early", "late"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_leaves_nothing_published_and_is_made_up_for(
    lost: int, when: str, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments, port = [*inputs, "-o", str(tmp_path / "out")], free_port()
    program = ("-c", DYING, str(lost), when)
    processes = [start(arguments, rank, 2, port, *program) for rank in range(2)]
    said = [process.communicate(timeout=120) for process in processes]
    assert processes[lost].returncode == -signal.SIGKILL
    assert processes[1 - lost].returncode == 2, said
    out, err = said[1 - lost]
    assert out == ""
    assert "another rank is lost" in err
    assert "--resume" in err
    assert err.count("\n") <= 2
    assert not (tmp_path / "out").exists()
    outcome = run_ok(*arguments, "--resume")  # alone, this time
    assert tree(tmp_path / "out") == whole
    assert "merged" in outcome.stdout


@pytest.mark.parametrize(("lost", "when"), [(0, "published")])
def test_torchrun_heals_a_killed_worker(
    lost: int, when: str, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    outcome = subprocess.run(
        [*torchrun(2, "--max-restarts", "3"), str(tmp_path / "dying.py"), str(lost), when, *inputs,
         "--resume", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("merged") == 1
    assert tree(tmp_path / "out") == whole


def test_ranks_of_one_launch_meet_again(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    """The launcher's store outlives a meeting, and what was said there."""
    (tmp_path / "twice.py").write_text(
        "import sys; from gralora_convert.output import Ranks; from gralora_convert import merge\n"
        "for name in 'ab':\n"
        "    plan = merge(sys.argv[1], base=sys.argv[2], shard_size='3KB')\n"
        "    plan.write(f'{sys.argv[3]}/{name}', ranks=Ranks.from_environment())"
    )
    arguments = [*torchrun(2), str(tmp_path / "twice.py"), inputs[1], inputs[3], str(tmp_path)]
    subprocess.run(arguments, check=True, timeout=120, capture_output=True)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == whole


def test_a_rank_that_refuses_is_heard(inputs: list[str], tmp_path: Path) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "out")]
    other = [*arguments, "--weight", "2"]
    port = free_port()
    processes = [start(arguments, 0, 2, port), start(other, 1, 2, port)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 1 would do something else than rank 0" in said[0]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "who"), [(0, "rank 1 of 2 did not come"), (1, "another rank cannot be met")]
)
def test_a_rank_alone_gives_up(
    rank: int, who: str, inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "JOIN_SECONDS", 0.2)
    monkeypatch.setattr(ranks_module, "HEARD_SECONDS", 0.2)
    for name, value in launched(rank, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    outcome = run(*inputs, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert who in outcome.stderr
    assert "RANK and WORLD_SIZE" in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_one_process_starts_nothing(inputs: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from gralora_convert.output.plan import Plan; write = Plan.write\n"
        "def watched(*arguments, **options):\n"
        "    receipt = write(*arguments, **options)\n"
        "    import torch; assert not torch.distributed.is_initialized()\n"
        "    return receipt\n"
        "Plan.write = watched\n"
        "from gralora_convert.cli.entry import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *inputs, "-o", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Ranks(2, 8, 4)),
        ({"RANK": "0"}, Ranks()),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, Ranks(3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Ranks()),  # a batch script, outside of srun
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Ranks(1, 2, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Ranks(1, 2)),
        # mpirun on several hosts of a job starts its helpers with srun, one on each
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_RANK": "1",
          "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Ranks(1, 4, 2)),
    ],
)  # fmt: skip
def test_launchers(environment: dict[str, str], expected: Ranks) -> None:
    assert Ranks.from_environment(environment) == expected


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "")])
def test_numbers_of_a_launcher_that_are_none(rank: str, size: str) -> None:
    with pytest.raises(MisuseError, match="Unset"):
        Ranks.from_environment({"RANK": rank, "WORLD_SIZE": size})


@given(st.lists(st.integers(1, 50)), st.integers(1, 9))
def test_runs_of_ranks_are_all_and_even(costs: list[int], size: int) -> None:
    def share(rank: int) -> list[tuple[int, int]]:
        items = list(enumerate(costs))
        return list(Ranks(rank, size).share(lambda: items, lambda item: item[1]))

    shares = [share(rank) for rank in range(size)]
    assert [item for held in shares for item in held] == list(enumerate(costs))
    for held in shares:
        assert abs(sum(cost for _, cost in held) - sum(costs) / size) <= max(costs, default=0)


def test_an_output_that_exists_is_refused_by_every_rank_at_once(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert "exists and is not empty" in run(*inputs, "-o", tmp_path / "out").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


FAILING = """
import sys
from gralora_convert.errors import OutputError
from gralora_convert.cli.entry import run
from gralora_convert.output.staging import Staging
def refuse(self, *arguments):
    raise {failure}
Staging._require_space = refuse
run()
"""


@pytest.mark.parametrize(
    ("failure", "status", "heard"),
    [
        ('OutputError("no space")', 2, "rank 0 failed: no space"),
        ("KeyboardInterrupt", 130, "rank 0 failed: it was interrupted"),
    ],
)
def test_a_failure_of_rank_0_is_heard(
    failure: str, status: int, heard: str, inputs: list[str], tmp_path: Path
) -> None:
    arguments, port = [*inputs, "-o", str(tmp_path / "out")], free_port()
    program = ("-c", FAILING.replace("{failure}", failure))
    processes = [start(arguments, rank, 2, port, *program) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [status, 2], said
    assert heard in said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# convert and extract ------------------------------------------------------------------------------


def adapters_from(folder: Path, verb: str) -> list[str]:
    """A command that makes an adapter, without the output. (torchrun takes `--r` for an option of
    its own, wherever it stands, unless `--` goes before.)"""
    if verb == "convert":
        return ["convert", str(folder / "adapter"), "--to", "hybrid", "--hybrid-r", "2", "--r", "4",
                "--allow-inexact"]  # fmt: skip
    shapes = {**SHAPES, "layers.1.wide": (48, 40)}
    write_base(folder / "before", shapes)
    write_base(folder / "after", shapes, seed=1)
    return ["extract", "--base", str(folder / "before"), "--tuned", str(folder / "after"),
            "--to", "gralora", "--r", "4", "--linear", "*"]  # fmt: skip


@pytest.mark.parametrize(("verb", "size"), [("convert", 2), ("extract", 4)])
def test_ranks_make_the_adapter_of_one_process(
    verb: str, size: int, inputs: list[str], tmp_path: Path
) -> None:
    del inputs
    arguments = adapters_from(tmp_path, verb)
    run_ok(*arguments, "-o", tmp_path / "one")
    outcome = subprocess.run(
        [*torchrun(size), "-m", "--", "gralora_convert", *arguments, "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "one")  # the receipt's errors included


@pytest.mark.parametrize(("verb", "restarts"), [("extract", 3)])
def test_a_worker_that_makes_an_adapter_is_killed(
    verb: str, restarts: int, inputs: list[str], tmp_path: Path
) -> None:
    del inputs
    arguments = adapters_from(tmp_path, verb)
    run_ok(*arguments, "-o", tmp_path / "one")
    (tmp_path / "dying.py").write_text(DYING)
    outcome = subprocess.run(
        [*torchrun(2, "--max-restarts", str(restarts)), "--", str(tmp_path / "dying.py"), "1",
         "late", *arguments, "--resume", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (outcome.returncode == 0) == (restarts > 0), outcome.stderr
    assert (tmp_path / "out").exists() == (restarts > 0)
    if not restarts:  # what both have made is kept
        assert "are there already" in run_ok(*arguments, "--resume", "-o", tmp_path / "out").stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_a_module_is_made_by_one_rank(inputs: list[str], tmp_path: Path) -> None:
    """Its factors belong together: the SVDs of two machines may differ in signs."""
    del inputs
    plan = convert(tmp_path / "adapter", to="hybrid", hybrid_r=2, r=4, allow_inexact=True)
    starts = {part.name: part.nbytes for part in plan.files[0].parts}
    assert len(starts) == 4 * len(SHAPES)
    for size in range(2, 6):
        shares = [list(plan.share(Done(), Ranks(rank, size))) for rank in range(size)]
        made = [piece for share in shares for _, pieces in share for piece in pieces]
        assert len(made) == len(SHAPES)


# verify -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_right", [True, False])
def test_ranks_verify_as_one_process(
    is_right: bool, single: tuple[list[str], dict[str, bytes | None]], tmp_path: Path
) -> None:
    if not is_right:  # one weight, of which one rank knows
        path = tmp_path / "single/model.safetensors"
        path.write_bytes(path.read_bytes()[:-2] + b"\x00\x41")
    arguments = ["verify", *single[0][1:], "--merged", str(tmp_path / "single"), "--json",
                 "--level", "weights"]  # fmt: skip
    alone, port = run(*arguments), free_port()
    processes = [start(arguments, rank, 3, port) for rank in range(3)]
    said = [process.communicate(timeout=120) for process in processes]
    assert alone.status == (0 if is_right else 1)
    assert [process.returncode for process in processes] == [alone.status, 0, 0], said
    assert json.loads(said[0][0]) == alone.json
    assert said[1:] == [("", "")] * 2


def test_ranks_that_verify_hear_of_a_failure(
    single: tuple[list[str], dict[str, bytes | None]], tmp_path: Path
) -> None:
    program = (
        "from gralora_convert.errors import UnreadableError\n"
        "from gralora_convert.verbs.verification import verdict\n"
        "def audited(*_, ranks, **__):\n"
        "    if ranks.rank == 1: raise UnreadableError('the disk fails')\n"
        "    return iter(())\n"
        "verdict.audited = audited\n"
        "from gralora_convert.cli.entry import run; run()"
    )
    arguments = ["verify", *single[0][1:], "--merged", str(tmp_path / "single")]
    port = free_port()
    processes = [start(arguments, rank, 2, port, "-c", program) for rank in range(2)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "rank 1 failed: the disk fails" in said[0][1]
