"""`python -m tests`: format, lint, types, tests, in this order; stops at the first that fails."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKS = (
    ["ruff", "format", "--check", "."],
    ["ruff", "check", "."],
    ["mypy"],
    ["mypy", "--platform", "darwin", "--cache-dir", ".mypy_cache/darwin"],
    [
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadgroup",
        "--doctest-modules",
        "gralora_convert",
        "tests",
        *sys.argv[1:],
    ],
)

if __name__ == "__main__":
    for check in CHECKS:
        print("$", " ".join(check), flush=True)
        status = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, check=False).returncode
        if status:
            sys.exit(status)
