"""Ways from names of parameters in memory to those on disk, by headers alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gralora_convert.disk import Checkpoint


@dataclass(frozen=True, slots=True)
class Way:
    """A way from names in memory to names on disk, what it does, and the prefix that it changes."""

    rename: Callable[[str], str]
    note: str
    strips: str = ""
    adds: str = ""


def most(ways: Sequence[Way], count: Callable[[Way], int]) -> list[Way]:
    most = max(map(count, ways))
    return [way for way in ways if count(way) == most]


def stripper(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(f"{prefix}.")


def adder(prefix: str, base: Checkpoint) -> Callable[[str], str]:
    """Adds the prefix, except to what stands beside the base model (a head)."""
    return lambda name: name if name in base.tensors else f"{prefix}.{name}"
