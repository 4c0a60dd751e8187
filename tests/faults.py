"""Disks of the tests: small ones, read-only ones, and what is on them."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """`folder` as a file system in memory; without the right to mount the test is skipped."""
    with _mount(folder, "-t", "tmpfs", "-o", ",".join(options) or "defaults", "tmpfs"):
        yield folder


@contextlib.contextmanager
def bound(source: Path, folder: Path) -> Iterator[Path]:
    """`folder` as another name of `source`; without the right to mount the test is skipped."""
    with _mount(folder, "--bind", str(source)):
        yield folder


@contextlib.contextmanager
def _mount(folder: Path, *arguments: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", *arguments, str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to mount a file system here ({error})")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`, hidden or not, by relative path; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
