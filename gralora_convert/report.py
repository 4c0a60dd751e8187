"""What a check has to say: findings in a report, as text, JSON or workflow annotations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gralora_convert.errors import InvalidAdapterError, printable, sentences

__all__ = ["Finding", "Report", "Severity"]

Severity = Literal["error", "warning", "note"]
_ANNOTATION: Mapping[Severity, str] = {"error": "error", "warning": "warning", "note": "notice"}
_RANK: Mapping[Severity, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about an adapter, with a stable kebab-case `code` and what to do about it.

    `where`, `message` and `hint` quote untrusted files: each is made one printable line of bounded
    length, wherever it is shown.
    """

    code: str
    severity: Severity
    where: str
    message: str
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("where", "message", "hint"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{self.severity}[{self.code}]: {sentences(f'{place}{self.message}', self.hint)}"

    def as_json(self) -> dict[str, str]:
        return {
            "code": self.code,
            "severity": self.severity,
            "where": self.where,
            "message": self.message,
            "hint": self.hint,
        }


def error(code: str, where: object, message: str, hint: str = "") -> Finding:
    """The adapter is broken, cannot be placed, or its meaning is in doubt."""
    return Finding(code, "error", str(where), message, hint)


def warning(code: str, where: object, message: str, hint: str = "") -> Finding:
    """Usable, but probably not what was meant."""
    return Finding(code, "warning", str(where), message, hint)


def note(code: str, where: object, message: str, hint: str = "") -> Finding:
    """A fact; nothing needs to be done."""
    return Finding(code, "note", str(where), message, hint)


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of one validation; `ok` is false iff there is an error.

    >>> Report.of([Finding("alpha-zero", "warning", "adapter_config.json", "alpha is 0")]).ok
    True
    """

    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> "Report":
        """Errors first, then warnings, then notes; the order within each is the order found."""
        unique = dict.fromkeys(findings)
        return cls(tuple(sorted(unique, key=lambda finding: _RANK[finding.severity])))

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def require_ok(self, where: object) -> None:
        """Does nothing when `ok`.

        Raises:
            InvalidAdapterError: the first error, the number of the others, and all findings.
        """
        if not self.errors:
            return
        first, others = self.errors[0], len(self.errors) - 1
        more = f" (and {others} more; `gralora-convert validate` lists all)" if others else ""
        place = first.where if str(where) in first.where else f"{where}: {first.where}"
        raise InvalidAdapterError(
            f"[{first.code}] {first.message}{more}",
            where=place.rstrip(": "),
            hint=first.hint,
            findings=self.findings,
        )

    def as_json(self) -> dict[str, object]:
        return {"ok": self.ok, "findings": [finding.as_json() for finding in self.findings]}

    def as_text(self) -> str:
        """One finding per line."""
        return "\n".join(str(finding) for finding in self.findings)

    def as_annotations(self) -> str:
        """GitHub workflow commands, one per finding (`::error title=code::message`)."""
        return "\n".join(_annotation(finding) for finding in self.findings)


def _annotation(finding: Finding) -> str:
    def escape(text: str, also: str = "") -> str:
        for character in "%\r\n" + also:
            text = text.replace(character, f"%{ord(character):02X}")
        return text

    title = escape(finding.code, ":,")
    place = f"{finding.where}: " if finding.where else ""
    message = sentences(f"{place}{finding.message}", finding.hint)
    return f"::{_ANNOTATION[finding.severity]} title={title}::{escape(message)}"
