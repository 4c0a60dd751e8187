"""Which names may be others for the same tensor."""

from collections import Counter
from collections.abc import Iterator, Sequence

from gralora_convert.errors import nearest

LEGACY = {"weight": "gamma", "bias": "beta"}  # norms of the first BERT checkpoints


def near_misses(name: str, names: Sequence[str]) -> str:
    """The names most like `name`, for a message; '' when none is."""
    found = nearest(name, names, 3)
    return f"Near misses: {', '.join(found)}." if found else ""


def spellings(name: str, prefixes: Sequence[str]) -> Iterator[str]:
    """The names that a tensor may have in another checkpoint of the model, its own first."""
    found = [name]
    for prefix in prefixes:
        found += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    for new, old in LEGACY.items():
        found += [f"{c.removesuffix(f'.{old}')}.{new}" for c in found if c.endswith(f".{old}")]
    yield from found


def starts(one: str, other: str) -> tuple[str, str]:
    """What is before the common end of two names, with as much of it as leaves neither empty."""
    first, second = one.split("."), other.split(".")
    while len(first) > 1 and len(second) > 1 and first[-1] == second[-1]:
        first.pop(), second.pop()
    return ".".join(first), ".".join(second)


def is_relevelled(one: str, other: str) -> bool:
    """Whether two names have the same words, but for some that one of them has more."""
    first, second = Counter(one.split(".")), Counter(other.split("."))
    numbered = any(word.isdecimal() for word in (*first, *second))
    return not numbered and (first <= second or second <= first)
