"""Output folders appear complete or not at all, and nothing else is touched."""

import ctypes
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gralora_convert import system
from gralora_convert.errors import ConvertError, MisuseError, OutputError, UnreadableError
from gralora_convert.output import staging as module
from gralora_convert.output.staging import Staging
from tests.faults import bound, mounted


def make(
    output: Path,
    files: dict[str, str],
    *,
    overwrite: bool = False,
    protected: tuple[Path, ...] = (),
) -> None:
    """One whole run."""
    staging = Staging(output, overwrite=overwrite, protected=protected)
    with staging.open(0) as folder:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        staging.publish()


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below `folder`, hidden files too: relative name -> text, None for a folder."""
    return {
        str(p.relative_to(folder)): None if p.is_dir() else p.read_text()
        for p in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


MODEL = {"config.json": "{}", "model.safetensors": "old"}
NEW = {"config.json": "{}", "model.safetensors": "new", "sub/tokenizer.json": "x"}


@pytest.fixture(params=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a file system that swaps folders in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(system, "exchange", lambda one, other: False)


def test_an_output_is_made_with_its_parents(tmp_path: Path) -> None:
    make(tmp_path / "a/b/out", NEW)
    assert tree(tmp_path / "a/b/out") == {**NEW, "sub": None}
    assert names(tmp_path / "a/b") == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", NEW)
    assert tree(tmp_path) == {"out": None, "out/sub": None} | {
        f"out/{name}": text for name, text in NEW.items()
    }


@pytest.mark.usefixtures("exchange")
def test_an_older_output_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "out", {**MODEL, "only-old.txt": "x", "deep/er/file": "y"})
    make(tmp_path / "out", NEW, overwrite=True)
    assert tree(tmp_path / "out") == {**NEW, "sub": None}
    assert names(tmp_path) == ["out"]


def test_the_file_system_here_swaps_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/x").touch()
    if not system.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no RENAME_EXCHANGE here")
    assert tree(tmp_path) == {"a": None, "b": None, "b/x": ""}
    assert not system.exchange(tmp_path / "a", tmp_path / "missing")


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, UnreadableError("broken")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_nothing(
    exists: bool, error: BaseException | type[BaseException], tmp_path: Path
) -> None:
    output = tmp_path / "x/y/out"
    if exists:
        make(output, MODEL)
    before = tree(tmp_path)
    staging = Staging(output, overwrite=True)
    wanted = error if isinstance(error, type) else type(error)

    def run() -> None:
        with staging.open(0) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(wanted):
        run()
    assert tree(tmp_path) == before


def test_without_publishing_nothing_is_left(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", overwrite=False).open(0) as folder:
        (folder / "half").write_text("x")
    assert tree(tmp_path) == {}


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_failing_publication_leaves_the_older_output(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", MODEL)
    before = tree(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr(system, "exchange", lambda one, other: False)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot be published.*what it was before"):
        make(tmp_path / "out", NEW, overwrite=True)
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_the_second_of_two_renames_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", MODEL)
    before, rename = tree(tmp_path), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == ".out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(system, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="cannot be published"):
        make(tmp_path / "out", NEW, overwrite=True)
    assert tree(tmp_path) == before


# what is refused ----------------------------------------------------------------------------------


def refusal(output: Path, **options: bool | tuple[Path, ...]) -> ConvertError:
    root = output.parent
    before = names(root) if root.is_dir() else None
    with pytest.raises((OutputError, MisuseError)) as caught:
        make(output, NEW, **options)  # type: ignore[arg-type]
    assert (names(root) if root.is_dir() else None) == before
    assert str(caught.value).isprintable()
    return caught.value


def test_what_exists_is_kept_unless_told(tmp_path: Path) -> None:
    make(tmp_path / "out", MODEL)
    assert "`overwrite=True`" in str(refusal(tmp_path / "out"))
    assert tree(tmp_path / "out") == MODEL


@pytest.mark.parametrize(
    "files", [["thesis.tex"], ["config.json", "main.py"], ["model.safetensors"], [".git"]]
)
def test_a_folder_that_holds_no_model_is_never_replaced(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / "out" / name).write_text("precious")
    assert "holds no model" in str(refusal(tmp_path / "out", overwrite=True))
    assert names(tmp_path / "out") == sorted(files)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_no_folder_is_kept(overwrite: bool, tmp_path: Path) -> None:
    file, fifo, dangling = tmp_path / "file", tmp_path / "fifo", tmp_path / "link"
    file.write_text("precious")
    os.mkfifo(fifo)
    dangling.symlink_to(file)
    for path in (file, fifo, dangling):
        assert "not a folder" in str(refusal(path, overwrite=overwrite))
    assert "Not a directory" in str(refusal(file / "out", overwrite=overwrite))
    assert file.read_text() == "precious"
    assert dangling.is_symlink()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "disk/model", MODEL)
    (tmp_path / "out").symlink_to(tmp_path / "disk/model")
    assert "exists" in str(refusal(tmp_path / "out"))
    make(tmp_path / "out", NEW, overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk/model") == {**NEW, "sub": None}


def test_a_dangling_link_leads_to_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk/model")
    make(tmp_path / "out", NEW)
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "disk/model") == {**NEW, "sub": None}


@pytest.mark.parametrize("name", ["base", "base/out", "base/a/b", ".", "link", "link/out"])
def test_an_output_must_not_touch_an_input(name: str, tmp_path: Path) -> None:
    base = tmp_path / "models/base"
    make(base, MODEL)
    (tmp_path / "models/link").symlink_to(base)
    before = tree(tmp_path)
    for protected in (base, base / "model.safetensors"):
        if protected == base or name in ("base", ".", "link"):
            output = tmp_path / "models" / name
            error = refusal(output, overwrite=True, protected=(protected,))
            assert isinstance(error, MisuseError)
    assert tree(tmp_path) == before


def test_an_input_behind_a_link_is_protected(tmp_path: Path) -> None:
    make(tmp_path / "blobs", MODEL)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs/model.safetensors")
    protected = (snapshot, snapshot / "model.safetensors")
    assert "input" in str(refusal(tmp_path / "blobs", overwrite=True, protected=protected))


@pytest.mark.parametrize("name", ["base", "base/out", "base/a/b", ""])
def test_an_input_that_a_mount_shows_elsewhere_is_protected(name: str, tmp_path: Path) -> None:
    make(tmp_path / "models/base", MODEL)
    before = tree(tmp_path / "models")
    with bound(tmp_path / "models", tmp_path / "elsewhere") as elsewhere:
        for protected in ("base", "base/model.safetensors"):
            if protected == "base" or name in ("base", ""):
                paths = (tmp_path / "models" / protected,)
                error = refusal(elsewhere / name, overwrite=True, protected=paths)
                assert isinstance(error, MisuseError)
        make(elsewhere / "other", NEW, protected=(tmp_path / "models/base",))
        shutil.rmtree(elsewhere / "other")
    assert tree(tmp_path / "models") == before


def test_an_output_beside_an_input_of_a_similar_name_is_fine(tmp_path: Path) -> None:
    make(tmp_path / "model", MODEL)
    make(tmp_path / "model-merged", NEW, protected=(tmp_path / "model",))
    make(tmp_path / "mod", NEW, protected=(tmp_path / "model",))


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", MODEL | {"sub/x": ""})
    for folder in ("out", "out/sub"):
        monkeypatch.chdir(tmp_path / folder)
        for output in (Path(), Path(".."), tmp_path / "out"):
            if (tmp_path / "out").resolve() == output.resolve():
                assert "current folder" in str(refusal(output, overwrite=True))
    make(Path("new"), NEW)
    assert (tmp_path / "out/sub/new/model.safetensors").exists()


@pytest.mark.parametrize("name", ["/", "a\0b", "x" * 300, "\ud800"])
def test_an_impossible_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((OutputError, MisuseError)) as caught:
        make(tmp_path / name, NEW)
    assert str(caught.value).isprintable()
    assert tree(tmp_path) == {}


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    staging = Staging(tmp_path / "a/out", overwrite=False)
    with (
        pytest.raises(OutputError, match=r"needs [\d,]+ bytes, [\d,]+ are free"),
        staging.open(free * 2),
    ):
        pass
    assert tree(tmp_path) == {}
    assert abs(Staging.free_bytes(tmp_path / "not/yet/there") - free) < 2**30


# other runs ---------------------------------------------------------------------------------------


def test_two_runs_to_one_output(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", overwrite=False).open(0) as folder:
        (folder / "mine").write_text("x")
        with pytest.raises(OutputError, match="another run"):
            make(tmp_path / "out", NEW)
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(OutputError, match="another run"):
            make(tmp_path / "link/out", NEW)
        make(tmp_path / "other", NEW)
        assert (folder / "mine").read_text() == "x"
    make(tmp_path / "out", NEW)


HOLDER = """
import sys, time
from pathlib import Path
from gralora_convert.output.staging import Staging
staging = Staging(Path(sys.argv[1]), overwrite=True)
with staging.open(0) as folder:
    (folder / "half").mkdir()
    (folder / "half" / "file").write_text("x")
    (folder / "link").symlink_to(sys.argv[2])
    print("here", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `out`; it has linked to `precious`."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path / "out"), str(tmp_path / "precious")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("exchange")
def test_after_a_killed_run_the_next_one_succeeds(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="another run"):
        make(tmp_path / "out", NEW)
    holder.kill()
    holder.wait()
    assert names(tmp_path) == [".out.partial", "precious"]
    make(tmp_path / "out", NEW)
    assert names(tmp_path) == ["out", "precious"]
    assert tree(tmp_path / "out") == {**NEW, "sub": None}
    assert tree(tmp_path / "precious") == {"file": "x"}


@pytest.mark.parametrize("has_output", [False, True])
def test_a_run_killed_between_two_renames_is_undone(has_output: bool, tmp_path: Path) -> None:
    if has_output:
        make(tmp_path / "out", MODEL | {"model.safetensors": "newer"})
    make(tmp_path / ".out.replaced", MODEL)
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(OutputError, match="not empty"):
        make(tmp_path / "out", NEW)
    make(tmp_path / "out", NEW, overwrite=True)
    assert names(tmp_path) == ["out"]
    assert tree(tmp_path / "out") == {**NEW, "sub": None}


def test_a_hidden_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="Not a directory"):
        make(tmp_path / "out", NEW)
    assert tree(tmp_path / "precious") == {"file": "x"}


@pytest.mark.usefixtures("exchange")
def test_many_runs_at_once_publish_whole_folders(tmp_path: Path) -> None:
    """Every run succeeds or is refused; whoever looks sees one whole output."""
    make(tmp_path / "out", {**MODEL, "model.safetensors": "0", "other": "0"})
    end, outcomes = time.monotonic() + 1.5, []
    (tmp_path / "a").mkdir()
    can_exchange = system.exchange(tmp_path / "a", tmp_path / "a")
    (tmp_path / "a").rmdir()

    def write(number: int) -> None:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            text = f"{number}-{turn}"
            try:
                files = {**MODEL, "model.safetensors": text, "other": text}
                make(tmp_path / "out", files, overwrite=True)
                outcomes.append("done")
            except OutputError as error:
                outcomes.append(error.message)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while can_exchange and time.monotonic() < end:
        assert (tmp_path / "out/config.json").exists()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["out"]
    found = tree(tmp_path / "out")
    assert found["model.safetensors"] == found["other"]
    assert sorted(found) == ["config.json", "model.safetensors", "other"]
    assert "done" in outcomes
    assert set(outcomes) <= {"done", "another run is writing this output"}


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def stopped() -> None:
        with Staging(tmp_path / "new", overwrite=False).open(0):
            raise UnreadableError("broken", hint="Mend it.")

    make(tmp_path / "out", MODEL)
    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(OutputError, match=r"is complete, but.*Delete .*\.(partial|replaced)"):
        make(tmp_path / "out", NEW, overwrite=True)
    with pytest.raises(UnreadableError) as caught:
        stopped()
    assert caught.value.hint.startswith("Mend it. Delete ")
    assert tree(tmp_path / "out") == {**NEW, "sub": None}


def test_a_run_that_ends_does_not_remove_what_the_next_one_has_begun(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", overwrite=False)
    second = Staging(tmp_path / "out", overwrite=True)
    with first.open(0) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("first")
        first.publish()
        begun = second.open(0)
        (begun.__enter__() / "model.safetensors").write_text("second")
    second.publish()
    begun.__exit__(None, None, None)
    assert tree(tmp_path / "out") == {"model.safetensors": "second"}
    assert names(tmp_path) == ["out"]


def test_while_the_older_output_is_removed_nobody_takes_its_hidden_folder(tmp_path: Path) -> None:
    make(tmp_path / "out", MODEL)
    staging = Staging(tmp_path / "out", overwrite=True)
    with staging.open(0) as folder:
        (folder / "gralora_convert.json").write_text("{}")
        staging.publish()
        with pytest.raises(OutputError, match="another run"):
            make(tmp_path / "out", NEW, overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_came_to_the_output_during_the_run_is_kept(overwrite: bool, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", overwrite=overwrite)

    def run() -> None:
        with staging.open(0) as folder:
            (folder / "config.json").write_text("{}")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/thesis.tex").write_text("precious")
            staging.publish()

    with pytest.raises(OutputError, match="exists"):
        run()
    assert tree(tmp_path) == {"out": None, "out/thesis.tex": "precious"}


def test_leftovers_of_another_user_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/file").write_text("x")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "another user" in str(refusal(tmp_path / "out"))
    assert tree(tmp_path / ".out.partial") == {"file": "x"}


# places -------------------------------------------------------------------------------------------


def test_a_place_where_a_disk_is_mounted_is_refused_at_once(tmp_path: Path) -> None:
    with mounted(tmp_path / "volume") as volume:
        error = refusal(volume)
        assert "a disk is mounted" in error.message
        assert "a folder inside it" in error.hint
        make(volume / "out", NEW)
        assert tree(volume / "out") == {**NEW, "sub": None}


def test_a_read_only_place_is_refused_at_once(tmp_path: Path) -> None:
    with mounted(tmp_path / "volume", "ro") as volume:
        error = refusal(volume / "a/out")
    assert "cannot be made: Read-only file system" in error.message
    assert error.hint == "Nothing was written."


def failing(code: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_system_without_locks_serves_unless_something_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EOPNOTSUPP))
    make(tmp_path / "out", MODEL)
    make(tmp_path / "out", NEW, overwrite=True)
    assert names(tmp_path) == ["out"]
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial/file").write_text("x")
    error = refusal(tmp_path / "new")
    assert f"was killed and left {tmp_path}/.new.partial" in error.message
    assert tree(tmp_path / ".new.partial") == {"file": "x"}


def test_a_file_system_that_cannot_flush_folders_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    make(tmp_path / "out", NEW)
    assert names(tmp_path) == ["out"]


def test_a_disk_that_fails_after_the_rename_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, parent = os.fsync, tmp_path.stat().st_ino

    def sometimes(descriptor: int) -> None:
        failing(errno.EIO)() if os.fstat(descriptor).st_ino == parent else flush(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes)
    with pytest.raises(OutputError, match="is complete, but the disk did not confirm it") as caught:
        make(tmp_path / "out", NEW)
    assert "what it was" not in str(caught.value)
    assert tree(tmp_path / "out") == {**NEW, "sub": None}


def test_a_c_library_without_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", MODEL)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    make(tmp_path / "out", NEW, overwrite=True)
    assert names(tmp_path) == ["out"]


# what stays ---------------------------------------------------------------------------------------


def test_an_interruption_after_publishing_is_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads 'the output is what it was before' must be able to rely on it."""
    make(tmp_path / "out", MODEL)

    def interrupt(folder: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_removed", interrupt)
    with pytest.raises(OutputError, match="is complete, but"):
        make(tmp_path / "out", NEW, overwrite=True)
    assert tree(tmp_path / "out") == {**NEW, "sub": None}


@pytest.mark.parametrize(
    "files",
    [["adapter_config.json"], ["gralora_convert.json"], ["config.json", "pytorch_model.bin"],
     ["config.json", "model.safetensors.index.json"]],
    ids=lambda files: files[-1],
)  # fmt: skip
def test_what_counts_as_a_model(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / "out" / name).touch()
    make(tmp_path / "out", NEW, overwrite=True)
    assert tree(tmp_path / "out") == {**NEW, "sub": None}
