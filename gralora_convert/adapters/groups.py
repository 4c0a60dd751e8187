"""Many modules told shortly: those that differ in their numbers only stand on one line."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gralora_convert.errors import Finding, Severity

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of one shape whose names are alike but for numbers: `layers.{0-21}.mlp.up_proj`."""

    name: str
    shape: Size
    count: int


def group(shapes: Mapping[str, Size]) -> list[Group]:
    """The groups of named shapes, in the order in which their first members come.

    >>> group({"layers.0.up": (4, 2), "layers.1.up": (4, 2), "head": (9, 2)})[0]
    Group(name='layers.{0-1}.up', shape=(4, 2), count=2)
    """
    members: dict[tuple[tuple[str, ...], Size], list[list[int]]] = defaultdict(list)
    for name, shape in shapes.items():
        words = name.split(".")
        numbers = [int(word) for word in words if _is_number(word)]
        members[tuple("#" if _is_number(w) else w for w in words), shape].append(numbers)
    return [
        Group(_label(words, numbers), shape, len(numbers))
        for (words, shape), numbers in members.items()
    ]


def together(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that say the same of many places, each group of places as one finding.

    >>> from gralora_convert.errors import error
    >>> [f.where for f in together([error("c", f"layers.{i}.up", "m") for i in range(3)])]
    ['layers.{0-2}.up (3)']
    """
    places: dict[tuple[str, Severity, str, str], list[str]] = defaultdict(list)
    for found in findings:
        places[found.code, found.severity, found.message, found.hint].append(found.where)
    return [
        Finding(code, severity, f"{g.name} ({g.count})" if g.count > 1 else g.name, message, hint)
        for (code, severity, message, hint), wheres in places.items()
        for g in group(dict.fromkeys(wheres, ()))
    ]


def split(module: str) -> tuple[str, int | None]:
    """The kind of a module and its layer, the first number of its name.

    >>> split("model.layers.3.mlp.up_proj")
    ('model.layers.mlp.up_proj', 3)
    """
    words = module.split(".")
    place = next((i for i, word in enumerate(words) if _is_number(word)), None)
    if place is None:
        return module, None
    return ".".join(words[:place] + words[place + 1 :]), int(words[place])


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges.

    >>> ranges([0, 1, 2, 7])
    '0-2,7'
    """
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _is_number(word: str) -> bool:
    return word.isdecimal() and word.isascii() and len(word) < 10


def _label(words: Sequence[str], numbers: Sequence[Sequence[int]]) -> str:
    columns = iter(zip(*numbers, strict=True))
    label = []
    for word in words:
        if word != "#":
            label.append(word)
            continue
        held = set(next(columns))
        label.append(f"{{{ranges(held)}}}" if len(held) > 1 else str(*held))
    return ".".join(label)
