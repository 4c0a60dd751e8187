"""A Python without what only Linux has; imported at its start where this folder is on PYTHONPATH.

`PORTABLE=1 python -m pytest` puts it there (tests/conftest.py), for all processes of the tests.
"""

import ctypes
import os
import pathlib
from typing import Any

for name in ("sched_getaffinity", "copy_file_range"):
    vars(os).pop(name, None)


class _Library(ctypes.CDLL):
    def __getattr__(self, name: str) -> Any:
        if name == "renameat2":
            raise AttributeError(name)
        return super().__getattr__(name)


_read_text = pathlib.Path.read_text


def _reading(path: pathlib.Path, *arguments: Any, **options: Any) -> str:
    if path.parts[:2] in (("/", "proc"), ("/", "sys")):
        raise FileNotFoundError(2, "hidden", str(path))
    return _read_text(path, *arguments, **options)


setattr(ctypes, "CDLL", _Library)  # noqa: B010 - a class, which mypy lets nobody assign
setattr(pathlib.Path, "read_text", _reading)  # noqa: B010
