"""How reports are shown: as text, as JSON, as annotations of a workflow on GitHub."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from gralora_convert.adapters import CONFIG_NAME, WEIGHTS, together
from gralora_convert.cli.spelling import spelled
from gralora_convert.cli.terminal import EXIT_NO, EXIT_REFUSED, Line, show, show_json
from gralora_convert.disk import is_file
from gralora_convert.errors import Finding, Report, printable


def show_reports(reports: Mapping[str, Report], style: str) -> None:
    """`reports` by the name of the adapter; `style` is text, json or github."""
    if style == "json":
        documents = [report.as_json() | refusal(report) for report in reports.values()]
        adapters = dict(zip(reports, documents, strict=True))
        everything = {"ok": all(r.ok for r in reports.values()), "adapters": adapters}
        show_json(everything if len(documents) > 1 else documents[0])
        return
    for adapter, every in reports.items():
        report = Report(tuple(together(every.findings)))  # JSON has all of them one by one
        if style == "github":
            if report.findings:
                click.echo(spelled(report.as_annotations(partial(_file_of, Path(adapter)))))
            continue
        errors = len(report.errors)
        verdict = f"{errors} error(s)" if errors else "valid"
        show(*map(Line.of, report.findings), f"{printable(adapter)}: {verdict}")


def status_of(report: Report) -> int:
    """The exit status that a report alone makes."""
    return EXIT_REFUSED if refusal(report) else 0 if report.ok else EXIT_NO


def refusal(report: Report) -> dict[str, object]:
    """The `error` of a document about a folder in which there is no adapter to read; or nothing."""
    missing = ("config-missing", "weights-missing")
    found = next((finding for finding in report.errors if finding.code in missing), None)
    if found is None:
        return {}
    fields = {"message": found.message, "where": found.where, "hint": found.hint}
    return {"error": {"kind": "unreadable", **fields}}


def folders(names: Sequence[str]) -> list[str]:
    """Each adapter once, where several were given by their files (as pre-commit does)."""
    if len(names) == 1:
        return list(names)
    return list(dict.fromkeys(str(Path(n).parent) if is_file(n) else n for n in names))


def _file_of(adapter: Path, finding: Finding) -> str:
    """The file that a finding is about: the one that it names, the config, or the weights."""
    if not adapter.is_dir():
        return ""
    named = finding.where.rpartition("/")[2]
    held = [name for name in (named, *WEIGHTS, CONFIG_NAME) if name and (adapter / name).is_file()]
    return str(adapter / held[0]) if held else str(adapter)
