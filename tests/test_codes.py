"""docs/findings.md is the table of finding codes: complete, without rows that nothing emits."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from gralora_convert import errors
from gralora_convert.errors import ConvertError

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gralora_convert"


class Meaning(NamedTuple):
    """A row: the severities that a code may have, what it says, and what to do about it."""

    severity: str
    meaning: str
    remedy: str


def rows(width: int) -> dict[str, list[str]]:
    """The rows of the page's tables of so many columns, by their first cell."""
    lines = (ROOT / "docs/findings.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    held = [
        row
        for row in cells
        if len(row) == width and row[0] not in ("---", "status", "kind", "code")
    ]
    assert len({row[0] for row in held}) == len(held), "a row stands twice"
    return {row[0].strip("`"): row[1:] for row in held}


CODES = {code: Meaning(*row) for code, row in rows(4).items()}
EXIT_STATUS = {int(status) for status in rows(2) if status.isdecimal()}
REFUSALS = {kind for kind in rows(2) if not kind.isdecimal()}
MAKERS = {"error", "warning", "note", "Finding"}
CODE = re.compile(r"[a-z]+(-[a-z]+)+")


def calls() -> list[tuple[str, ast.Call]]:
    """Every call that makes a finding, with its module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                if node.func.id in MAKERS and path.stem != "errors":
                    found.append((path.stem, node))
    return found


def emitted() -> set[tuple[str, str]]:
    """Code and severity of every call that names both."""
    return {
        (str(node.args[0].value), node.func.id)
        for _, node in calls()
        if isinstance(node.args[0], ast.Constant) and isinstance(node.func, ast.Name)
    }


def words_of(modules: set[str]) -> set[str]:
    """Every string in these modules that looks like a code."""
    return {
        node.value
        for module in modules
        for node in ast.walk(ast.parse(next(PACKAGE.rglob(f"{module}.py")).read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CODE.fullmatch(node.value)
    }


def test_every_code_that_is_emitted_has_a_row_with_its_severity() -> None:
    assert len(emitted()) > 80
    for code, severity in emitted():
        assert severity in CODES[code].severity.split(", "), (code, severity)


def test_every_row_is_emitted() -> None:
    made_from_reasons = {f"config-{reason}" for reason in words_of({"strictjson"}) | {"bom"}}
    anywhere = words_of({path.stem for path in PACKAGE.rglob("*.py")})
    assert CODES.keys() <= anywhere | made_from_reasons | {"config-unreadable"}


def test_codes_that_are_computed_have_rows() -> None:
    """Reasons of JSON and of tensor files, and codes chosen between two."""
    from gralora_convert.adapters.adapter import _REASONS

    assert set(_REASONS.values()) | {"weights-unreadable"} <= CODES.keys()
    for reason in ("bom", "not-json", "duplicate-key", "non-finite", "not-object", "unreadable"):
        assert f"config-{reason}" in CODES
    computed = {module for module, node in calls() if not isinstance(node.args[0], ast.Constant)}
    chosen = {w for w in words_of(computed - {"config"}) if w.startswith(("base-", "modules-to"))}
    assert chosen <= CODES.keys()


def test_every_row_says_something() -> None:
    for code, row in CODES.items():
        assert CODE.fullmatch(code)
        assert set(row.severity.split(", ")) <= {"error", "warning", "note"}
        assert row.meaning.endswith(".")
        assert row.remedy.endswith((".", "?"))


@pytest.mark.parametrize("name", [c.__name__ for c in ConvertError.__subclasses__()])
def test_every_refusal_is_documented(name: str) -> None:
    assert getattr(errors, name).kind in REFUSALS


def test_the_statuses_are_those_of_the_command_line() -> None:
    from gralora_convert.cli import terminal as cli

    used = {cli.EXIT_NO, cli.EXIT_REFUSED, cli.EXIT_BUG, cli.EXIT_INTERRUPTED}
    assert EXIT_STATUS == used | {0}
