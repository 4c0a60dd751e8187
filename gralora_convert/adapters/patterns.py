"""Regular expressions of a config, as PEFT reads them, bounded in memory and time."""

import re
import time
from re import _parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING

from gralora_convert.errors import UnsupportedError

if TYPE_CHECKING:
    import regex

REGEX_SECONDS = 5.0  # for all names together; a pattern that needs more is an attack or a mistake
LONGEST_PATTERN = 20_000  # characters; a list of all modules as one alternation stays below
MOST_STEPS = 100_000  # of a pattern whose counted repetitions are written out; 1 KB of memory each


def require_pattern(pattern: str) -> None:
    """Raises `UnsupportedError` for what Python's `re`, by which PEFT reads it, takes for no
    pattern, and for one that would need much memory.

    It is parsed, not compiled: a stranger's pattern can make that take minutes.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise too_long(pattern)
    try:
        steps = _steps(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as problem:
        raise no_pattern(pattern, problem) from problem
    if steps > MOST_STEPS:
        raise too_long(pattern)


def _steps(node: object) -> int:
    """What a parsed pattern asks for, in tests of one character."""
    if isinstance(node, _parser.SubPattern):
        return sum(_steps(item) for item in node)
    match node:
        case (_, (int(least), int(most), _parser.SubPattern() as body)):  # a repetition
            times = least if most == _parser.MAXREPEAT else most
            return max(1, times) * (1 + _steps(body))
        case (_, (-1, _parser.SubPattern() as body)) if len(set(body.getwidth())) > 1:
            raise re.error("look-behind requires fixed-width pattern")
        case tuple() | list():
            return 1 + sum(_steps(item) for item in node)
    return 0


def too_long(pattern: str) -> UnsupportedError:
    return UnsupportedError(
        f"the pattern {pattern[:80]!r} takes too long on the modules' names",
        hint="Write the modules as a list.",
    )


def no_pattern(pattern: str, problem: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"{pattern[:80]!r} is no regular expression: {problem}", hint="Write the modules as a list."
    )


class Patterns:
    """Regular expressions of a config, with one time limit for all of them together.

    The module `regex` reads the same patterns as `re` does and can be stopped.

    >>> Patterns().match(r"(.*\\.)?(q_proj)$", "layers.0.q_proj") is not None
    True
    """

    def __init__(self) -> None:
        self._left = REGEX_SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def match(self, pattern: str, name: str, *, full: bool = False) -> "regex.Match[str] | None":
        import regex

        started = time.monotonic()
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                require_pattern(pattern)
                compiled = self._compiled[pattern] = regex.compile(pattern)
            matcher = compiled.fullmatch if full else compiled.match
            found = matcher(name, timeout=self._left)
        except TimeoutError:
            raise too_long(pattern) from None
        except (regex.error, RecursionError, OverflowError) as problem:
            raise no_pattern(pattern, problem) from problem
        self._left -= time.monotonic() - started
        if self._left <= 0:
            self._left = 1e-9  # the next one times out
        return found
