"""The second ways of what systems do differently. `PORTABLE=1 python -m pytest` runs every test on
them; here are the main promises, always."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gralora_convert import system

PROMISES = (
    "tests/output/test_staging.py",
    "tests/output/test_plan.py::test_copying_does_not_depend_on_what_the_kernel_offers",
    "tests/output/test_plan.py::test_a_killed_run_is_cleaned_up_by_the_next_and_refuses_others_before",
)  # fmt: skip


@pytest.mark.skipif("PORTABLE" in os.environ, reason="all tests run so")
def test_outputs_are_whole_without_what_only_linux_has() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *PROMISES],
        cwd=Path(__file__).parent.parent, env={**os.environ, "PORTABLE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-3000:]


@pytest.mark.skipif("PORTABLE" not in os.environ, reason="of this mode")
def test_no_process_has_what_only_linux_has() -> None:
    program = (
        "import os, ctypes; from pathlib import Path\n"
        "assert not hasattr(os, 'copy_file_range') and not hasattr(os, 'sched_getaffinity')\n"
        "assert not hasattr(ctypes.CDLL(None), 'renameat2')\n"
        "try: Path('/proc/meminfo').read_text()\n"
        "except FileNotFoundError: print('hidden')"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert said == b"hidden\n"
    exec(program)


def test_cpus_and_memory_are_known_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus, memory = system.usable_cpus(), system.available_memory()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: path.parent.joinpath("no").open())
    assert 1 <= cpus <= system.usable_cpus()
    assert 1 << 20 < memory <= system.available_memory()


def test_what_the_kernel_does_not_copy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    with (tmp_path / "a").open("rb") as one, (tmp_path / "b").open("wb") as other:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        assert system.copy_in_kernel(one.fileno(), 0, other.fileno(), 0, 5) == 0


class Apple:
    """The C library of macOS, as far as it matters here."""

    def __init__(self, status: int) -> None:
        self.status, self.calls = status, list[tuple[object, ...]]()

    def renamex_np(self, *arguments: object) -> int:
        self.calls.append(arguments)
        return self.status


@pytest.mark.parametrize("status", [0, -1])
def test_macos_swaps_by_another_name(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Apple(status)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert system.exchange(tmp_path / "a", tmp_path / "b") == (status == 0)
    assert library.calls == [(bytes(tmp_path / "a"), bytes(tmp_path / "b"), 2)]


@pytest.mark.parametrize("is_offered", [True, False])
def test_macos_flushes_the_drive_where_the_file_system_can(
    is_offered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def control(descriptor: int, command: int) -> int:
        if not is_offered:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        done.append(f"fcntl {command}")
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("fsync"))
    system.flush(0)
    assert done == ["fcntl 51" if is_offered else "fsync"]
