"""The process: parse, run one command, and end with its exit status, whatever happens."""

import contextlib
import gc
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from gralora_convert.cli.commands import commands
from gralora_convert.cli.terminal import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    Line,
    open_streams,
    show,
    show_json,
)
from gralora_convert.errors import (
    ConvertError,
    OutOfMemoryError,
    UnsupportedError,
    printable,
    sentences,
)
from gralora_convert.version import __version__


def run() -> None:
    """The console script: `main`, without the third of a second in which torch takes itself apart
    when Python ends; everything is written and flushed by then."""
    gc.set_threshold(100_000, 20, 20)  # what is imported stays: looking for cycles finds none
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what it warns of ends in one line here
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own, which would only spin
    open_streams()
    try:
        main()
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 0
    except KeyboardInterrupt:  # another one, at the end
        status = EXIT_INTERRUPTED
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody listens, or it is closed
            stream.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = commands.main(args=given, prog_name="gralora-convert", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except (click.Abort, KeyboardInterrupt) as interrupt:
        _tell_interrupted(interrupt.__cause__ or interrupt)
        status = EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):  # SystemExit: what click 8 makes of a broken pipe
        status = EXIT_REFUSED
    except (ConvertError, click.ClickException, OSError) as error:
        _refuse(error, as_json=_wants_json(given))
        status = EXIT_REFUSED
    except Exception as error:
        if (known := _known(error)) is not None:
            _refuse(known, as_json=_wants_json(given))
            sys.exit(EXIT_REFUSED)
        traceback.print_exc()
        click.echo(
            f"gralora-convert {__version__}: this is a bug. Please report it with the lines above.",
            err=True,
        )
        status = EXIT_BUG
    sys.exit(status if isinstance(status, int) else 0)


def _known(error: Exception) -> ConvertError | None:
    """What an error of others means: no memory, or an install without what only some commands need
    (docs/ci.md)."""
    if OutOfMemoryError.is_meant_by(error):
        return OutOfMemoryError()
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "gralora_convert"):
        return None
    what = f"this needs {package}, which is not installed"
    return UnsupportedError(what, hint=f"Run: pip install {package}.")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _tell_interrupted(interrupt: BaseException) -> None:
    """Says so, whatever comes meanwhile: `timeout` and launchers send their signal twice."""
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)]
    with contextlib.suppress(OSError), click.Context(commands):
        show("interrupted: the output is what it was before", err=True)
        for note in getattr(interrupt, "__notes__", ()):
            show(note, err=True)
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


def _wants_json(arguments: Sequence[str]) -> bool:
    named = {"--json", "--format=json"}.intersection(arguments)
    return bool(named) or ("--format", "json") in itertools.pairwise(arguments)


def _refuse(error: Exception, *, as_json: bool) -> None:
    if isinstance(error, ConvertError):
        kind, where, message, hint = error.kind, error.where, error.message, error.hint
        line = str(error)
    elif isinstance(error, click.ClickException):
        message = " ".join(error.format_message().split())  # click lists choices on lines
        kind, where, hint = "usage", "", ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"Try '{error.ctx.command_path} --help'."
        line = sentences(message, hint)
    else:
        kind, where, hint = "system", printable(getattr(error, "filename", "") or ""), ""
        message = printable(getattr(error, "strerror", "") or error)
        line = f"{where}: {message}" if where else message
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return
    fields = {"kind": kind, "message": message, "where": where, "hint": hint}
    # stdout may be what has failed; the command's context, which knows its options, has ended
    with contextlib.suppress(OSError), click.Context(commands):
        if as_json:
            show_json({"error": fields})
        else:
            show(Line(line, severity="error"), err=True)
