"""One family of refusals: every reason for which the library stops on its own account.

A message reads *where: what was found, what was needed. What to do.* Programming mistakes stay
`TypeError`, `ValueError` and `AssertionError`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from gralora_convert.report import Finding

__all__ = [
    "ChangedInputError",
    "CheckFailedError",
    "ConvertError",
    "InexactError",
    "InvalidAdapterError",
    "MisuseError",
    "OutOfMemoryError",
    "OutputError",
    "UnreadableError",
    "UnsupportedError",
]


_NOT_LOADED = (
    "failed to map segment", "annot allocate memory", "cannot map zero-fill pages",
    "cannot create shared object descriptor",
)  # fmt: skip
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
    """A file is missing, or is not what it claims to be."""

    kind = "unreadable"


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
        hint: str = "Nothing was published. Free some, or ask for fewer --jobs.",
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
                "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
            )
        )
