"""docs/findings.md, the table of finding codes: complete, without rows that nothing emits."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from gralora_convert import errors
from gralora_convert.errors import ConvertError

PACKAGE = Path(__file__).parent.parent / "gralora_convert"
MAKERS = {"error", "warning", "note", "Finding"}
CODE = re.compile(r"[a-z]+(-[a-z]+)+")
PAGE = (PACKAGE.parent / "docs" / "findings.md").read_text()


class Row(NamedTuple):
    severity: str
    meaning: str
    remedy: str


def rows(head: str) -> dict[str, list[str]]:
    """The tables of the page with this head, by their first cell, which is in no other row."""
    found: dict[str, list[str]] = {}
    for table in re.split(r"\n\n+", PAGE):
        title, *lines = table.splitlines()
        if title != f"| {head} |":
            continue
        for line in lines[1:]:
            first, *others = line.strip("| ").split(" | ")
            assert first.strip("`") not in found, f"two rows of {first}"
            found[first.strip("`")] = others
    assert found, head
    return found


CODES = {c: Row(*cells) for c, cells in rows("code | severity | meaning | what to do").items()}
EXIT_STATUS = {int(status): meaning for status, [meaning] in rows("status | meaning").items()}
REFUSALS = {kind: meaning for kind, [meaning] in rows("kind | meaning").items()}


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
    from gralora_convert.adapters.folder import _REASONS

    assert set(_REASONS.values()) | {"weights-unreadable"} <= CODES.keys()
    for reason in ("bom", "not-json", "duplicate-key", "non-finite", "not-object", "unreadable"):
        assert f"config-{reason}" in CODES
    computed = {module for module, node in calls() if not isinstance(node.args[0], ast.Constant)}
    chosen = {w for w in words_of(computed - {"config"}) if w.startswith(("base-", "modules-to"))}
    assert chosen <= CODES.keys()


def test_the_page_holds_nothing_but_tables_that_are_read() -> None:
    read = len(CODES) + len(EXIT_STATUS) + len(REFUSALS)
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    heads = [line for line in lines if set(line) <= set("|- ")]
    assert len(lines) == read + 2 * len(heads)


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
    assert EXIT_STATUS.keys() == used | {0}
