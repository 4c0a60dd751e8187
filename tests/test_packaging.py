"""The source distribution holds what its tests need, and its page on an index stands alone."""

import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = "benchmarks", "docs", "findings", "fixtures", "gralora_convert", "tests"
BUILD = "from hatchling.build import build_sdist; build_sdist('dist')"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with its source distribution in `dist`."""
    left = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("packaging") / "copy", ignore=left)
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    return copy


def held(copy: Path) -> dict[str, bytes]:
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        return {one.name.partition("/")[2]: tar.extractfile(one).read() for one in members}  # type: ignore[union-attr]


def test_the_source_distribution_is_whole(copy: Path) -> None:
    wanted = {
        str(path.relative_to(copy)): path.read_bytes()
        for folder in FOLDERS for path in (copy / folder).rglob("*") if path.is_file()
    }  # fmt: skip
    files = held(copy)
    assert len(wanted) > 100
    assert wanted.items() <= files.items()
    beside = {"CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE", ".pre-commit-hooks.yaml"}
    assert beside <= files.keys()


def test_the_page_on_an_index_links_nothing_that_is_not_there(copy: Path) -> None:
    metadata = message_from_string(held(copy)["PKG-INFO"].decode())
    page, readme = str(metadata.get_payload()), (copy / "README.md").read_text()
    linked = re.compile(r"\]\((?!https:)([^)]*)\)")
    assert not linked.findall(page)
    pages = {path for path in linked.findall(readme) if path.endswith(".md")}
    assert len(pages) > 10
    assert all(path in page for path in pages)
    assert page.count("\n") > 0.95 * readme.count("\n")
