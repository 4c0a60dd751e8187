"""What of a plan is on the disk already, so that a broken run can be continued.

Each process that writes has a file in the output's hidden folder, one JSON object a line: which
plan it is, then which bytes of a file are made and flushed, with what making them has found out. A
line that a crash has cut, and a journal of another plan, count for nothing.
"""

import bisect
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gralora_convert.disk import open_regular, parse_json, reading
from gralora_convert.errors import ConvertError, OutputError

_START = ".progress-"
_LONGEST = 32_000_000  # bytes of a line; longer is nothing that this program wrote


Ranges = list[tuple[int, int]]  # bytes [start, stop) of a file, in order and apart


@dataclass(slots=True)
class Done:
    """Bytes that are there by file, and what is known about the parts, by who made them."""

    ranges: dict[str, Ranges] = field(default_factory=dict)
    states: dict[tuple[str, str], Mapping[str, object]] = field(default_factory=dict)

    def add(self, line: Mapping[str, object], who: str) -> None:
        file, ranges, states = line.get("file"), line.get("ranges"), line.get("states")
        if isinstance(file, str) and isinstance(ranges, list) and isinstance(states, Mapping):
            found = [(start, stop) for start, stop in ranges]
            self.ranges[file] = joined([*self.ranges.get(file, []), *found])
            self.states |= {(who, name): state for name, state in states.items()}

    def has(self, file: str, start: int, stop: int) -> bool:
        ranges = self.ranges.get(file, [])
        place = bisect.bisect_right(ranges, start, key=lambda found: found[0]) - 1
        return place >= 0 and stop <= ranges[place][1] and start < stop

    @property
    def nbytes(self) -> int:
        return sum(stop - start for ranges in self.ranges.values() for start, stop in ranges)


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same bytes in the fewest ranges.

    >>> joined([(5, 7), (0, 2), (2, 4), (6, 9)])
    [(0, 4), (5, 9)]
    """
    found: Ranges = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


class Journal:
    """The journal that one process writes: a new file, since an older one may end in a cut line."""

    def __init__(self, folder: Path, plan: str) -> None:
        self._path = folder / f"{_START}{uuid.uuid4().hex}.jsonl"
        self._append({"plan": plan})

    def record(self, file: str, ranges: Ranges, states: Mapping[str, Mapping[str, object]]) -> None:
        """Says that these bytes of `file` are on the disk, and what is known about its parts."""
        self._append({"file": file, "ranges": joined(ranges), "states": states})

    def _append(self, line: Mapping[str, object]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from error


def read_journals(folder: Path, plan: str) -> Done:
    """What all journals in `folder` say about the plan of this fingerprint."""
    done = Done()
    for path in _journals(folder):
        for line in _lines(path, plan):
            done.add(line, path.name)
    return done


def journal_names(folder: Path, plan: str) -> list[str]:
    """The journals in `folder` that are of this plan."""
    return [path.name for path in _journals(folder) if any(True for _ in _lines(path, plan))]


def clear_journals(folder: Path) -> None:
    """Removes all journals from `folder`: it is complete."""
    for path in _journals(folder):
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"cannot be removed: {error.strerror}", where=path) from error


def _journals(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(folder.glob(f"{_START}*.jsonl")) if folder.is_dir() else []


def _lines(path: Path, plan: str) -> Iterator[Mapping[str, object]]:
    """The lines of a journal, none when it is of another plan."""
    try:
        with open_regular(path) as file, reading(path):
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b"")):
                parsed = parse_json(line, where=path, allow_non_finite=True)
                if number == 0 and parsed.get("plan") != plan:
                    return
                yield parsed
    except ConvertError:
        return  # not there, or cut by a crash: what came before it counts
