"""Runs that break off and go on: the bytes are those of one run."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gralora_convert.errors import MisuseError, OutputError
from gralora_convert.output import writing
from gralora_convert.output.journal import Journal
from gralora_convert.output.parts import Computed, Part
from gralora_convert.output.plan import Plan
from gralora_convert.output.ranks import Ranks
from gralora_convert.verbs.merging import merge
from tests.builders import SHAPES, random_delta, write_adapter, write_base
from tests.command import run, run_ok
from tests.faults import tree


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


def test_a_tensor_that_was_half_made_is_not_made_anew(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del inputs
    monkeypatch.setattr("gralora_convert.output.tiles.TILE_BYTES", 512)
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    plan.write(tmp_path / "whole")
    plan = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    first = breaking(plan, tmp_path / "out", 2, monkeypatch)
    again = merge(tmp_path / "adapter", base=tmp_path / "base", shard_size="3KB")
    made: list[str] = []
    _watched(again, made).write(tmp_path / "out", resume=True, jobs=1)
    tiles = Counter(
        part.name
        for file in plan.files
        for part in file.parts
        if isinstance(part.source, Computed)
        for _ in range(0, part.nbytes, part.source.tile_bytes)
    )
    assert set(first) & set(made), "none was half made"
    assert Counter(made) < tiles
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")  # also what is said of rounding


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
    assert "would be kept" not in outcome.stderr


def test_an_interrupted_merge_names_what_would_have_kept_its_work(
    inputs: list[str], tmp_path: Path
) -> None:
    interrupting = KILLED.replace("SIGKILL", "SIGTERM")
    outcome = subprocess.run(
        [sys.executable, "-c", interrupting, "1", *inputs, "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 130
    assert "With --resume what is done would be kept" in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


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


def test_what_is_published_is_not_made_again(inputs: list[str], tmp_path: Path) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "out"), "--resume"]
    first = run_ok(*arguments)
    before = (tmp_path / "out").stat()
    (tmp_path / "out/README.md").write_text("a model card is there to be edited")
    (tmp_path / ".out.partial").mkdir()  # as a run that is killed while it tidies leaves the old
    (tmp_path / ".out.partial/model.safetensors").touch()
    for more in ([], ["--overwrite"]):
        assert run_ok(*arguments, *more).stdout == first.stdout
        assert os.path.samestat((tmp_path / "out").stat(), before)
        assert not (tmp_path / ".out.partial").exists()
    assert "exists and is not empty" in run(*inputs, "-o", tmp_path / "out").stderr


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "model-00001-of-00004.safetensors"]
)
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_what_was_altered_since_is_not_taken_for_published(
    name: str, change: str, inputs: list[str], whole: dict[str, bytes | None], tmp_path: Path
) -> None:
    arguments = [*inputs, "-o", str(tmp_path / "whole"), "--resume"]
    path = tmp_path / "whole" / name
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    outcome = run(*arguments)
    assert outcome.status == 2
    assert f"is complete, but {name} was altered since" in outcome.stderr
    run_ok(*arguments, "--overwrite")
    assert tree(tmp_path / "whole") == whole


@pytest.mark.parametrize("other", ["weight", "sidecar", "base", "digests", "receipt"])
def test_what_another_run_has_published_is_refused(
    other: str, inputs: list[str], tmp_path: Path
) -> None:
    (tmp_path / "base/generation_config.json").write_text("[]")
    arguments = [*inputs, "-o", str(tmp_path / "out"), "--resume"]
    run_ok(*arguments)
    if other == "weight":
        arguments += ["--weight", "2"]
    elif other == "sidecar":
        (tmp_path / "base/generation_config.json").write_text("{}")  # of the same size
    elif other == "base":  # of other values, and all that a listing of it shows is the same
        shutil.copytree(tmp_path / "base", tmp_path / "like")
        arguments[arguments.index(str(tmp_path / "base"))] = str(tmp_path / "like")
    elif other == "digests":
        arguments += ["--no-digests"]
    else:
        (tmp_path / "out/gralora_convert.json").write_text("[")
    before = tree(tmp_path / "out")
    outcome = run(*arguments)
    assert outcome.status == 2
    assert "exists and is not empty" in outcome.stderr
    assert tree(tmp_path / "out") == before


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
