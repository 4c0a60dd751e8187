"""Runs that break off and go on, and runs of several processes: the bytes are those of one run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gralora_convert.errors import MisuseError, OutputError
from gralora_convert.output import heartbeat as signs
from gralora_convert.output import ranks as ranks_module
from gralora_convert.output import writing
from gralora_convert.output.journal import Journal
from gralora_convert.output.plan import Plan
from gralora_convert.output.ranks import Follower, Leader, Ranks
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
        with pytest.raises(OutputError, match=r"run again with --resume, or delete it"):
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


def start(arguments: list[str], rank: int, size: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)}
    return subprocess.Popen(
        [sys.executable, "-m", "gralora_convert", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_write_the_bytes_of_one_process(
    size: int, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "far/out"), "--json"]
    processes = [start(arguments, rank, size) for rank in reversed(range(size))]
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


LOST = """
import os, signal, sys
from gralora_convert.output import writing
from gralora_convert.cli.entry import main
writing.write_files = None
from gralora_convert.output import plan
def dying(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
plan.write_files = dying
main(sys.argv[1:])
"""


def test_a_lost_rank_leaves_nothing_published_and_is_made_up_for(
    inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "out")]
    leader = start(arguments, 0, 2)
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    lost = subprocess.run(
        [sys.executable, "-c", LOST, *arguments], env=environment, capture_output=True, check=False
    )
    assert lost.returncode == -signal.SIGKILL
    out, err = leader.communicate(timeout=120)
    assert leader.returncode == 2
    assert out == ""
    assert "rank 1 of 2 is lost" in err
    assert "--resume" in err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.rank-*"))
    outcome = run_ok(*arguments, "--resume")  # alone, this time
    assert "goes on" in outcome.stderr
    assert tree(tmp_path / "out") == whole


def test_a_rank_that_refuses_is_heard(inputs: list[str], tmp_path: Path) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "out")]
    other = [*arguments, "--weight", "2"]
    processes = [start(arguments, 0, 2), start(other, 1, 2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 1 would write something else than rank 0" in said[0]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


def test_a_rank_alone_gives_up(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "JOIN_SECONDS", 0.2)
    for rank, who in ((0, "rank 1"), (1, "rank 0")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        outcome = run(*inputs, "-o", tmp_path / "out")
        assert outcome.status == 2
        assert f"{who} of 2 did not come" in outcome.stderr
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out.rank-*"))


def test_a_rank_that_shows_no_life_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine nobody can be asked whether the process runs."""
    monkeypatch.setattr(signs, "LOST_SECONDS", 0.3)
    path = tmp_path / ".out.rank-1"
    path.write_text('{"pid": 1, "machine": "elsewhere"}')
    watch = signs.Watch(path)
    assert not watch.is_lost
    path.write_text('{"pid": 1, "machine": "elsewhere", "beats": 2}')
    assert not watch.is_lost
    time.sleep(0.4)
    assert watch.is_lost


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


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_file_has_one_rank(size: int) -> None:
    sizes = [5, 900, 3, 3, 40, 40, 40, 1]
    shares = [Ranks(rank, size).share(sizes) for rank in range(size)]
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))


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
        monkeypatch.setattr(ranks_module, "HEARD_SECONDS", 0.0)
        assert "exists and is not empty" in run(*inputs, "-o", tmp_path / "out").stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def follower(output: Path, note: signs.Note = lambda sentence: None) -> Follower:
    return Follower(output, Ranks(1, 2), "plan", note)


def leader(output: Path) -> Leader:
    return Leader(output, Ranks(0, 2), "plan", lambda sentence: None)


def test_a_refusal_of_rank_0_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "HEARD_SECONDS", 0.5)

    def refuse() -> None:
        with contextlib.suppress(OutputError), leader(tmp_path / "out").heard():
            raise OutputError("no space")

    thread = threading.Thread(target=refuse)
    thread.start()
    with (
        pytest.raises(OutputError, match="rank 0 refused: no space"),
        follower(tmp_path / "out").join(),
    ):
        pass
    thread.join()
    assert not list(tmp_path.iterdir())


def test_an_interrupt_before_the_work_is_heard(tmp_path: Path) -> None:
    def interrupted() -> None:
        with contextlib.suppress(KeyboardInterrupt), follower(tmp_path / "out").join():
            raise KeyboardInterrupt

    thread = threading.Thread(target=interrupted)
    thread.start()
    zero = leader(tmp_path / "out")
    with pytest.raises(OutputError, match="rank 1 failed: interrupted"), zero.gather():
        zero.wait()
    thread.join()
    assert not list(tmp_path.iterdir())


def test_ranks_of_two_launches_do_not_share_a_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "BUSY_SECONDS", 0.2)
    lock = tmp_path / ".out.rank-1.lock"
    with signs.only_one(lock, tmp_path / "out"):
        with (
            pytest.raises(OutputError, match="another run is writing this output"),
            follower(tmp_path / "out").join(),
        ):
            pass
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_a_launch_that_has_its_ranks_takes_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "BUSY_SECONDS", 0.2)
    first = signs.Sign(tmp_path / ".out.rank-0", token="t", plan="plan", closed=True)
    with (
        pytest.raises(OutputError, match="another run is writing this output"),
        follower(tmp_path / "out").join(),
    ):
        pass
    first.stop()


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not signs._is_running(process.pid)
    assert signs._is_running(os.getpid())


def test_one_that_was_seen_and_died_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "BUSY_SECONDS", 0.1)
    here = {"machine": signs._machine(), "nonce": "n"}
    place = tmp_path / ".out.rank-1"
    place.write_text(json.dumps({**here, "pid": os.getpid()}))
    watch = signs.Watch(place)
    assert not watch.has_died
    place.write_text(json.dumps({**here, "pid": 2**22 + 1}))  # above every pid of Linux
    assert not watch.has_died
    time.sleep(0.2)
    assert watch.has_died
    stale = signs.Watch(place)
    assert not stale.has_died
    time.sleep(0.2)
    assert not stale.has_died


def test_hostile_signs_lead_nowhere(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    names = (".out.rank-1", f".out.rank-1.{os.getpid()}", ".out.rank-1.lock", ".out.rank-0")
    for name in names:
        (folder / name).symlink_to(precious)
    (folder / ".out.rank-1.partial").mkdir()  # of an output that is called so
    zero, one = leader(folder / "out"), follower(folder / "out")

    def join() -> None:
        with one.join():
            pass

    thread = threading.Thread(target=join)
    thread.start()
    with zero.gather():
        zero.wait()
    thread.join()
    assert precious.read_text() == "x"
    assert [path.name for path in folder.iterdir()] == [".out.rank-1.partial"]


def test_who_waits_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "NOTE_SECONDS", 0.1)
    monkeypatch.setattr(signs, "JOIN_SECONDS", 0.3)
    said: list[str] = []
    with (
        pytest.raises(OutputError, match="rank 0 of 2 did not come"),
        follower(tmp_path / "out", said.append).join(),
    ):
        pass
    assert len(said) == 1
    assert "waiting for rank 0 of 2" in said[0]
    assert "Unset RANK and WORLD_SIZE" in said[0]


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
