"""How the command line looks: colours on a terminal, lines as wide as it, the progress bar.

Whatever is piped or redirected is plain text with one fact per line. `NO_COLOR` (no-color.org)
and `TERM=dumb` mean no colours on a terminal either.
"""

import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from gralora_convert.cli.spelling import spelled, spelled_json
from gralora_convert.errors import Finding, nearest

COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
_QUIET = "gralora_convert.quiet"
_FINDING = re.compile(rf"({'|'.join(COLOURS)})(\[[\w-]+\]): ")


def open_streams() -> None:
    """Gives streams that the shell has closed (`>&-`) to nobody: else Python has none, and the
    next file opened, one of the output, would get the number that libraries print to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")
    sys.stderr = sys.stderr or Path(os.devnull).open("w")
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text in any encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class Line:
    """A line, and what is known of it: the label before its text, the severity and code of a
    finding, whether it is a command to type."""

    text: str
    label: str = ""
    severity: str = ""
    code: str = ""
    is_command: bool = False

    @classmethod
    def of(cls, finding: Finding) -> "Line":
        return cls(finding.text, severity=finding.severity, code=f"[{finding.code}]")

    @classmethod
    def of_note(cls, note: str | Finding) -> "Line":
        """A note, which may be a finding, also one as text that says so itself."""
        found = _FINDING.match(text := str(note))
        if found is None:
            return cls(text, severity="note")
        return cls(text[found.end() :], severity=found[1], code=found[2])

    def __str__(self) -> str:
        colon = ": " if self.severity else ""
        return f"{self.label}{self.severity}{self.code}{colon}{self.text}"

    def on_terminal(self, width: int, *, plain: bool) -> list[str]:
        """In pieces of this width, those after the first set in, and in colours: severities, their
        codes and labels dim; commands, which stay whole to be copied, bold."""
        line = str(self)
        start = len(line) - len(line.removeprefix(self.label).lstrip())
        pieces = [line]
        if len(line) > width and not self.is_command and start <= width // 2:
            pieces = textwrap.wrap(
                line, width, subsequent_indent=" " * (start or 2), break_long_words=False,
                break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
            )  # fmt: skip
        if plain:
            return pieces
        first = pieces[0]
        if self.severity:
            severity = click.style(self.severity, fg=COLOURS[self.severity], bold=True)
            rest = first[len(self.label + self.severity + self.code) :]
            first = f"{self.label}{severity}{click.style(self.code, dim=True)}{rest}"
        elif self.is_command:
            first = click.style(self.label, dim=True) + click.style(self.text, bold=True)
        elif self.label.strip():
            first = click.style(first[:start], dim=True) + first[start:]
        return [first, *pieces[1:]]


def show(*lines: str | Line, err: bool = False) -> None:
    """Prints lines, `spelled`; on a terminal in colours, and wrapped at its width."""
    stream = sys.stderr if err else sys.stdout
    held = [line if isinstance(line, Line) else Line(line) for line in lines]
    held = [replace(line, text=spelled(line.text)) for line in held]
    if not stream.isatty():
        click.echo("\n".join(map(str, held)), err=err, color=False)
        return
    width = max(40, shutil.get_terminal_size().columns)
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    shown = [piece for line in held for piece in line.on_terminal(width, plain=plain)]
    click.echo("\n".join(shown), err=err, color=not plain)


def show_json(value: object, *, as_written: bool = False) -> None:
    """One JSON document on stdout, its sentences `spelled` unless it is a file that was written."""
    from gralora_convert.disk import dump_json

    click.echo(dump_json(value if as_written else spelled_json(value)))


def show_notes(lines: Iterable[str | Finding], *, err: bool = True) -> None:
    """Notes, on stderr where they are not the result, unless `--quiet`."""
    if not is_quiet():
        for line in lines:
            show(Line.of_note(line), err=err)


def is_quiet() -> bool:
    """Whether the command runs with `--quiet`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def _set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[_QUIET] = value


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_quiet,
    help="No notes, no progress, the total of a plan; the result stays.  [default: off]",
)  # fmt: skip


class Choice(click.Choice[str]):
    """One of a few words; a misspelt one is told the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        close = nearest(str(value), [str(choice) for choice in self.choices])
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{super().get_invalid_choice_message(value, ctx)}{hint}"


@contextmanager
def bar(total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and time left, advanced by numbers of bytes.

    None for `progress`: on a terminal, unless `--quiet`.
    """
    if progress is None:
        progress = sys.stderr.isatty() and not is_quiet()
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as shown:
        yield lambda count: shown.update(count) and None


EXIT_NO, EXIT_REFUSED, EXIT_BUG, EXIT_INTERRUPTED = 1, 2, 70, 130
LONGEST = 40  # lines of one list on a page


def shortened(lines: Sequence[str | Line]) -> Sequence[str | Line]:
    more = len(lines) - LONGEST
    return lines if more <= 1 else [*lines[:LONGEST], f"... and {more} more"]
