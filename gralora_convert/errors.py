"""One family of refusals: every reason for which the library stops on its own account.

A message reads *where: what was found, what was needed. What to do.* Programming mistakes stay
`TypeError`, `ValueError` and `AssertionError`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

_NO_ROOM = ("can't allocate memory", "MPS backend out of memory")
_NOT_LOADED = (
    "failed to map segment", "annot allocate memory", "cannot map zero-fill pages",
    "cannot create shared object descriptor",
)  # fmt: skip
MOST_COMPARED = 2000  # names, for one that is not there
LONGEST = 1000  # characters of one part of a message: a hostile file may hold names of megabytes


def printable(text: object) -> str:
    """`text` on one line: control characters of a hostile file become escapes, and the middle of
    what is absurdly long is left out.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    shown = str(text)
    if len(shown) > LONGEST:
        head, tail = shown[: LONGEST * 3 // 4], shown[-LONGEST // 4 :]
        shown = f"{head}[... {len(shown) - LONGEST} characters ...]{tail}"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (a bool is neither).

    >>> is_number(2), is_number(float("nan")), is_number("2"), is_number(True)
    (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def sentences(*parts: str) -> str:
    """The parts, each closed by a full stop unless it ends a sentence itself."""
    return " ".join(p if p.endswith((".", "?", "!", ":")) else f"{p}." for p in parts if p)


def nearest(name: str, names: Sequence[str], count: int = 1, least: float = 0.6) -> list[str]:
    """The names most like `name`, for a message, if any is at least so like it. Of thousands, which
    would take seconds, only those with its last word are compared.

    >>> nearest("q_prj", ["q_proj", "down_proj"])
    ['q_proj']
    """
    import difflib

    if len(names) > MOST_COMPARED:
        leaf = name.rpartition(".")[2]
        names = [n for n in names if n.rpartition(".")[2] == leaf][:MOST_COMPARED]
    return difflib.get_close_matches(name, names, count, least)


class ConvertError(Exception):
    """A refusal: `message` says what was found and needed, `hint` what to do, `where` the place."""

    kind: ClassVar[str] = "refused"

    def __init__(self, message: str, *, where: object = "", hint: str = "") -> None:
        self.where, self.message, self.hint = printable(where), printable(message), printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        found = f"{self.where}: {self.message}" if self.where else self.message
        return sentences(found, self.hint)


class UnreadableError(ConvertError):
    """A file is missing, or is not what it claims to be; `reason` is one word for why."""

    kind = "unreadable"

    def __init__(
        self, message: str, *, where: object = "", hint: str = "", reason: str = "unreadable"
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.reason = reason


class UnsupportedError(ConvertError):
    """Well formed, but something that this library does not handle."""

    kind = "unsupported"


class MisuseError(ConvertError):
    """Arguments that do not go together."""

    kind = "misuse"


class InvalidAdapterError(ConvertError):
    """An adapter's parts disagree, or it does not fit the base. Carries all `findings`."""

    kind = "invalid-adapter"

    def __init__(
        self,
        message: str,
        *,
        where: object = "",
        hint: str = "",
        findings: Sequence["Finding"] = (),
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.findings = tuple(findings)


class InexactError(ConvertError):
    """An exact conversion was asked for and the shape asked for cannot hold it.

    Carries `exact_rank`, the smallest rank that could, and `error`, the relative Frobenius
    error at the rank asked for.
    """

    kind = "inexact"

    def __init__(
        self, message: str, *, where: object = "", hint: str = "", exact_rank: int, error: float
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.exact_rank, self.error = exact_rank, error


class OutputError(ConvertError):
    """The output exists, cannot be written, or does not fit on the disk."""

    kind = "output"


class ChangedInputError(ConvertError):
    """An input file changed while it was read."""

    kind = "input-changed"


class CheckFailedError(ConvertError):
    """What was written failed its own check and was not published."""

    kind = "check-failed"


class OutOfMemoryError(ConvertError):
    """The system, or the device, has no memory left."""

    kind = "memory"

    def __init__(
        self,
        message: str = "there is not enough memory",
        *,
        where: object = "",
        hint: str = "Nothing was published. Free some, or ask for fewer `jobs`.",
    ) -> None:
        super().__init__(message, where=where, hint=hint)

    @staticmethod
    def is_meant_by(error: BaseException) -> bool:
        """Whether `error` is how Python or torch says so (torch 2.13, c10/core/impl/alloc_cpu.cpp:
        a plain RuntimeError), or the loader of torch's libraries (glibc 2.36, elf/dl-load.c)."""
        if isinstance(error, ImportError):
            return any(words in str(error) for words in _NOT_LOADED)
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError)
            and (
                any(words in str(error) for words in _NO_ROOM)
                or type(error).__name__ == "OutOfMemoryError"
            )
        )


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

    @property
    def text(self) -> str:
        """Where, what, and what to do."""
        place = f"{self.where}: " if self.where else ""
        return sentences(f"{place}{self.message}", self.hint)

    def __str__(self) -> str:
        return f"{self.severity}[{self.code}]: {self.text}"

    def as_json(self) -> dict[str, str]:
        return asdict(self)


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
        more = f" (and {others} more; `validate` lists all)" if others else ""
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

    def as_annotations(self, file_of: Callable[[Finding], str] = lambda finding: "") -> str:
        """GitHub workflow commands, one per finding (`::error file=...,title=code::message`);
        `file_of` names the file that a finding is about, "" when there is none."""
        return "\n".join(_annotation(finding, file_of(finding)) for finding in self.findings)


def _annotation(finding: Finding, file: str) -> str:
    def escape(text: str, also: str = "") -> str:
        for character in "%\r\n" + also:
            text = text.replace(character, f"%{ord(character):02X}")
        return text

    title = escape(finding.code, ":,")
    named = f"file={escape(printable(file), ':,')}," if file else ""
    return f"::{_ANNOTATION[finding.severity]} {named}title={title}::{escape(finding.text)}"
