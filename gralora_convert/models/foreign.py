"""Code of transformers that runs on what an input says: which of its errors are answers.

That a class cannot be built from a config, or a folder not be loaded, is an answer, and decides
what comes next. That memory ran out, that a file cannot be opened now, that the user stopped the
run says nothing about the input: taken for an answer it would give a wrong one.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from gralora_convert.disk import config_errors
from gralora_convert.errors import OutOfMemoryError, UnreadableError, printable

# pybind11 2.13 (`error_already_set::what`) begins with the type of what torch raises again.
_INTERRUPTED = re.compile("KeyboardInterrupt|[Ii]nterrupted")
_OF_THE_INPUT = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL}


T = TypeVar("T")


class ForeignError(Exception):
    """Why transformers cannot read, build, convert or run what a folder or config describes."""


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Runs code of transformers, whatever it may stumble over.

    Raises:
        ForeignError: it cannot do this with this input.
        OutOfMemoryError: there is no memory for it now.
        UnreadableError: the system does not let it read now.
        KeyboardInterrupt: the run is to end, whatever torch has made of that.
    """
    try:
        yield
    except _errors() as error:
        for cause in _chain(error):
            _raise_passing(cause)
        raise ForeignError(_first_line(error)) from error


def twice(call: Callable[[], T]) -> T:
    """What `call` returns. Of an input every error comes again; one that does not come again is no
    answer, whatever it says.

    Raises:
        ForeignError: as `foreign`.
    """
    try:
        with foreign():
            return call()
    except ForeignError:
        with foreign():
            return call()


def _errors() -> tuple[type[Exception], ...]:
    return (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError,
        OSError, RuntimeError, TypeError, ValueError, *config_errors(),
    )  # fmt: skip


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was made of: transformers wraps what its imports raise."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _raise_passing(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt) or (
        isinstance(error, RuntimeError) and _INTERRUPTED.search(str(error))
    ):
        raise KeyboardInterrupt from error
    if isinstance(error, OutOfMemoryError) or OutOfMemoryError.is_meant_by(error):
        raise OutOfMemoryError from error
    if isinstance(error, OSError) and error.errno not in _OF_THE_INPUT:
        raise UnreadableError(
            f"cannot be read: {printable(error.strerror or error)}", where=error.filename or ""
        ) from error


def _first_line(error: BaseException) -> str:
    """What an error says, on one printable line."""
    name, line = type(error).__name__, next(iter(str(error).splitlines()), "")
    return printable(f"{name}: {line}" if isinstance(error, LookupError) else line or name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and warnings off stderr: what matters is said by whoever asks."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    enabled = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            logging.enable_progress_bar()
        if bars is None:
            os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
