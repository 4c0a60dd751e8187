"""Runs that break off and go on, and runs of several processes: the bytes are those of one run."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gralora_convert.errors import MisuseError, OutputError
from gralora_convert.output import ranks as ranks_module
from gralora_convert.output import writing
from gralora_convert.output.journal import Journal
from gralora_convert.output.plan import Plan
from gralora_convert.output.ranks import Ranks
from gralora_convert.output.writing import Computed, Part
from gralora_convert.verbs.merging import merge
from tests.builders import SHAPES, random_delta, write_adapter, write_base
from tests.command import run, run_ok
from tests.faults import tree

SHARDED = ["--shard-size", "3KB"]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """The arguments of a merge of several shards, without the output."""
    write_base(tmp_path / "base")
    deltas = {name: random_delta(*shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    return ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), *SHARDED]


@pytest.fixture
def whole(inputs: list[str], tmp_path: Path) -> dict[str, bytes | None]:
    """What one run writes."""
    run_ok(*inputs, "-o", tmp_path / "whole")
    found = tree(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in found) >= 3
    return found


class Broken(Exception):  # noqa: N818
    pass


def breaking(plan: Plan, output: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Carries out the plan until `after` parts are on the disk; the tensors that were made."""
    made: list[str] = []
    recorded = 0
    record = Journal.record

    def failing(journal: object, file: str, parts: int, states: object) -> None:
        nonlocal recorded
        record(journal, file, parts, states)  # type: ignore[arg-type]
        recorded += 1
        if recorded == after:
            raise OutputError("the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", failing)
        patch.setattr(writing, "FLUSH_BYTES", 1)
        with pytest.raises(OutputError, match=r"run again with `resume=True`, or delete it"):
            _watched(plan, made).write(output, resume=True, jobs=1)
    return made


def _watched(plan: Plan, made: list[str]) -> Plan:
    """The plan, noting the names of the tensors of which a tile is made."""

    def watch(part: Part) -> Part:
        if not isinstance(part.source, Computed):
            return part
        produce = part.source.produce

        def noting(tile: int) -> memoryview:
            made.append(part.name)
            return produce(tile)

        return replace(part, source=replace(part.source, produce=noting))

    return replace(
        plan, files=tuple(replace(f, parts=tuple(map(watch, f.parts))) for f in plan.files)
    )


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_broken_merge_goes_on_and_gives_the_same_bytes(
    after: int, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    first = breaking(plan, tmp_path / "out", after, monkeypatch)
    assert not (tmp_path / "out").exists()
    again = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    left = again.resumable_bytes(tmp_path / "out")
    assert left > 0
    outcome = run_ok(*inputs, "-o", tmp_path / "out", "--resume")
    assert f"{left:,} bytes are there already" in outcome.stderr
    assert tree(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out", "whole"]
    assert first


def test_what_is_done_is_not_done_again(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    del inputs, whole
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    breaking(plan, tmp_path / "out", 2, monkeypatch)
    again = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    made: list[str] = []
    counted: list[int] = []
    _watched(again, made).write(tmp_path / "out", resume=True, progress=counted.append)
    computed = [p.name for f in plan.files for p in f.parts if isinstance(p.source, Computed)]
    assert set(made) < set(computed)
    assert sum(counted) == sum(part.nbytes for file in plan.files for part in file.parts)


@pytest.mark.parametrize("change", ["another weight", "another base", "damage", "a cut journal"])
def test_what_does_not_belong_to_the_merge_is_made_anew(
    change: str, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    breaking(plan, tmp_path / "out", 2, monkeypatch)
    partial = tmp_path / ".out.partial"
    match change:
        case "another weight":
            inputs += ["--weight", "2"]
            run_ok(*inputs, "-o", tmp_path / "whole", "--overwrite")
            whole = tree(tmp_path / "whole")
        case "another base":
            write_base(tmp_path / "base", seed=5)
            run_ok(*inputs, "-o", tmp_path / "whole", "--overwrite")
            whole = tree(tmp_path / "whole")
        case "damage":
            for path in partial.glob("*.safetensors"):
                path.write_bytes(b"short")
        case "a cut journal":
            for path in partial.glob(".progress-*"):
                path.write_bytes(path.read_bytes()[:-20])
    (partial / "stale").mkdir()
    (partial / "stale/file").write_text("x")
    run_ok(*inputs, "-o", tmp_path / "out", "--resume")
    assert tree(tmp_path / "out") == whole


def test_without_resume_what_was_left_is_made_anew(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    breaking(plan, tmp_path / "out", 1, monkeypatch)
    assert "goes on" not in run_ok(*inputs, "-o", tmp_path / "out").stderr
    assert tree(tmp_path / "out") == whole


def test_a_check_that_fails_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    deltas = {name: replace(random_delta(*shape), scaling=0.0) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    outcome = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o",
                  tmp_path / "out", "--resume")  # fmt: skip
    assert outcome.status == 2
    assert "would change nothing" in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_plan_without_accounts_is_made_in_one_go(tmp_path: Path) -> None:
    plan = Plan("test", (), lambda: {})
    with pytest.raises(MisuseError, match="in one process and in one go"):
        plan.write(tmp_path / "out", resume=True)
    with pytest.raises(MisuseError, match="in one process"):
        plan.write(tmp_path / "out", ranks=Ranks(0, 2))


KILLED = """
import os, signal, sys
from gralora_convert.output import writing
from gralora_convert.cli.entry import main
writing.FLUSH_BYTES = 1
record, left = writing.Journal.record, [int(sys.argv.pop(1))]
def killing(*arguments):
    record(*arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
writing.Journal.record = killing
main(sys.argv[1:])
"""


def test_a_killed_merge_goes_on(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "out")]
    for extra in ([], ["--resume"]):  # killed twice
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, "1", *arguments, *extra],
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    outcome = run_ok(*arguments, "--resume")
    assert "goes on" in outcome.stderr
    assert tree(tmp_path / "out") == whole


def test_an_interrupted_merge_says_how_to_go_on(inputs: list[str], tmp_path: Path) -> None:
    interrupting = KILLED.replace("SIGKILL", "SIGTERM")
    outcome = subprocess.run(
        [sys.executable, "-c", interrupting, "1", *inputs, "-o", str(tmp_path / "out"), "--resume"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 130
    assert "interrupted" in outcome.stderr
    assert "run again with --resume" in outcome.stderr
    assert (tmp_path / ".out.partial").is_dir()


# several processes --------------------------------------------------------------------------------


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


def test_torchrun_starts_them(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    outcome = subprocess.run(
        [*launcher, "-m", "gralora_convert", *inputs, "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("merged") == 1
    assert tree(tmp_path / "out") == whole


def test_processes_of_mpirun_meet_at_a_file(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "far/out")]
    processes = []
    for rank in range(2):
        launcher = {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}
        processes.append(subprocess.Popen(
            [sys.executable, "-m", "gralora_convert", *arguments],
            env={**os.environ, **launcher, "PMIX_NAMESPACE": "prterun-host-4711@1"},
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
    if os.environ["RANK"] == lost and attempt == "0":
        if when == "late":
            write_files(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return write_files(*arguments, **options)
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


def test_torchrun_heals_a_killed_worker(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--max-restarts", "3", "--monitor-interval", "0.1", "--master-port", str(free_port()),
    ]  # fmt: skip
    outcome = subprocess.run(
        [*torchrun, str(tmp_path / "dying.py"), "1", "late", *inputs, "--resume",
         "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert tree(tmp_path / "out") == whole


def test_a_rank_that_refuses_is_heard(inputs: list[str], tmp_path: Path) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "out")]
    other = [*arguments, "--weight", "2"]
    port = free_port()
    processes = [start(arguments, 0, 2, port), start(other, 1, 2, port)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 1 would write something else than rank 0" in said[0]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rank", "who"), [(0, "rank 1 of 2 did not come"), (1, "cannot meet")])
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
    ],
)  # fmt: skip
def test_launchers(environment: dict[str, str], expected: Ranks) -> None:
    assert Ranks.from_environment(environment) == expected


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "")])
def test_numbers_of_a_launcher_that_are_none(rank: str, size: str) -> None:
    with pytest.raises(MisuseError, match="Unset"):
        Ranks.from_environment({"RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30])
def test_every_place_has_one_rank_and_shares_are_even(size: int) -> None:
    shares = [sum(Ranks(rank, size).has(place, 20) for place in range(20)) for rank in range(size)]
    assert sum(shares) == 20
    assert max(shares) - min(shares) <= 1


def test_the_fingerprint_tells_plans_apart(inputs: list[str], tmp_path: Path) -> None:
    del inputs
    calls: list[Callable[[], Plan]] = [
        lambda: merge(tmp_path / "adapter", base=tmp_path / "base"),
        lambda: merge(tmp_path / "adapter", base=tmp_path / "base", weights=[2.0]),
        lambda: merge(tmp_path / "adapter", base=tmp_path / "base", dtype="float16"),
        lambda: merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB"),
        lambda: merge(tmp_path / "adapter", base=tmp_path / "base", verify=False),
    ]
    prints = [call().fingerprint() for call in calls]
    assert len(set(prints)) == len(prints)
    assert prints == [call().fingerprint() for call in calls]


def test_merging_again_has_to_be_asked_for(inputs: list[str], tmp_path: Path) -> None:
    run_ok(*inputs, "-o", tmp_path / "once")
    second = ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "once")]
    outcome = run(*second, "-o", tmp_path / "twice")
    assert outcome.status == 2
    assert "already holds this adapter" in outcome.stderr
    receipt = run_ok(*second, "-o", tmp_path / "twice", "--again", "--json").json
    merged = receipt["merged_adapters"]
    assert isinstance(merged, list)
    assert len(merged) == 2


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


def test_where_nothing_was_done_nothing_is_kept(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gralora_convert.output.staging.Staging.free_bytes", staticmethod(lambda output: 0)
    )
    outcome = run(*inputs, "-o", tmp_path / "out", "--resume")
    assert outcome.status == 2
    assert "is kept" not in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
