"""The source distribution holds what its tests need."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = "benchmarks", "docs", "findings", "fixtures", "gralora_convert", "tests"
BUILD = "from setuptools.build_meta import build_sdist; build_sdist('dist')"


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    left = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=left)
    wanted = {
        str(path.relative_to(copy))
        for folder in FOLDERS for path in (copy / folder).rglob("*") if path.is_file()
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert len(wanted) > 100
    beside = {"CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE", ".pre-commit-hooks.yaml"}
    assert not (wanted | beside) - names
