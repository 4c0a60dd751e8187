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
from pathlib import Path
from typing import Any, TextIO

import click

from gralora_convert.cli.spelling import spelled, spelled_json
from gralora_convert.errors import Finding

SEVERITIES = {"error": "red", "warning": "yellow", "note": "cyan"}
_FINDING = re.compile(r"(?P<severity>error|warning|note)(?P<code>\[[\w-]+\])?: ")
_FIELD = re.compile(r"  (?P<name>\S[^ ]*(?: [^ ]+)*)  +|(?P<none> {2,})")
_QUIET = "gralora_convert.quiet"


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


def show(text: str, *, err: bool = False) -> None:
    """Prints lines, `spelled`; on a terminal in colours, and wrapped at its width."""
    text, stream = spelled(text), sys.stderr if err else sys.stdout
    if not _is_terminal(stream):
        click.echo(text, err=err, color=False)
        return
    width = max(40, shutil.get_terminal_size().columns)
    lines = [wrapped for line in text.split("\n") for wrapped in _wrapped(line, width)]
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    shown = lines if plain else [_coloured(line) for line in lines]
    click.echo("\n".join(shown), err=err, color=not plain)


def show_json(value: object, *, as_written: bool = False) -> None:
    """One JSON document on stdout, its sentences `spelled` unless it is a file that was written."""
    from gralora_convert.disk import dump_json

    click.echo(dump_json(value if as_written else spelled_json(value)))


def show_notes(lines: Iterable[str | Finding]) -> None:
    """Notes on stderr, unless `--quiet`."""
    if not is_quiet():
        for line in lines:
            show(f"note: {line}", err=True)


def is_quiet() -> bool:
    """Whether the command runs with `--quiet`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def _set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[_QUIET] = value


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_quiet,
    help="No notes, no progress; the result stays.  [default: off]",
)  # fmt: skip


class Choice(click.Choice[str]):
    """One of a few words; a misspelt one is told the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        import difflib

        close = difflib.get_close_matches(str(value), [str(c) for c in self.choices], 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{super().get_invalid_choice_message(value, ctx)}{hint}"


@contextmanager
def bar(total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with rate and time left, advanced by numbers of bytes.

    None for `progress`: on a terminal, unless `--quiet`.
    """
    if progress is None:
        progress = _is_terminal(sys.stderr) and not is_quiet()
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as shown:
        yield lambda count: shown.update(count) and None


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _coloured(line: str) -> str:
    """Severities in colour, their codes dim; the names of fields dim; commands to type bold."""
    found = _FINDING.search(line)
    if found is not None:
        severity, code = found["severity"], found["code"] or ""
        styled = click.style(severity, fg=SEVERITIES[severity], bold=True)
        head, tail = line[: found.start()], line[found.end() :]
        return f"{head}{styled}{click.style(code, dim=True)}: {tail}"
    head, command, arguments = line.partition("gralora-convert ")
    if command and not head.strip().removeprefix("next"):
        return click.style(head, dim=True) + click.style(command + arguments, bold=True)
    field = _FIELD.match(line)
    if field is not None and field["name"]:
        return click.style(field[0], dim=True) + line[field.end() :]
    return line


def _wrapped(line: str, width: int) -> Sequence[str]:
    """The line in pieces; those after the first are set in. Commands stay whole, to be copied."""
    field = _FIELD.match(line)
    start = len(field[0]) if field else 2
    if len(line) <= width or "gralora-convert " in line[: start + 16] or start > width // 2:
        return [line]
    return textwrap.wrap(
        line, width, subsequent_indent=" " * start, break_long_words=False, break_on_hyphens=False,
        drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip


EXIT_NO, EXIT_REFUSED, EXIT_BUG, EXIT_INTERRUPTED = 1, 2, 70, 130
