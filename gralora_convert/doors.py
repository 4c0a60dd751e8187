"""Doors that open when something behind them is first used, so that start-up loads no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module


def opened(room: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of package `room`, whose names live in modules below it: `homes` has
    the names of each, with spaces between (PEP 562).

    >>> opened("gralora_convert", {"version": "__version__"})("__version__").count(".")
    2
    """
    home_of = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{home_of[name]}"), name)

    return get
