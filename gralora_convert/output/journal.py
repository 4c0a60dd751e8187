"""What of a plan is on the disk already, so that a broken run can be continued.

Each process that writes has a file in the output's hidden folder, one JSON object a line: which
plan it is, then how many parts of a file are complete and flushed, with what making them has found
out. A line that a crash has cut, and a journal of another plan, count for nothing.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gralora_convert.disk import open_regular, parse_json, reading
from gralora_convert.errors import ConvertError, OutputError

_START = ".progress-"
_LONGEST = 32_000_000  # bytes of a line; longer is nothing that this program wrote


@dataclass(slots=True)
class Done:
    """Parts complete by file, and what is known about the parts."""

    parts: dict[str, int] = field(default_factory=dict)
    states: dict[str, Mapping[str, object]] = field(default_factory=dict)

    def add(self, line: Mapping[str, object]) -> None:
        file, count, states = line.get("file"), line.get("parts"), line.get("states")
        if not isinstance(file, str) or type(count) is not int or not isinstance(states, Mapping):
            return
        self.parts[file] = max(count, self.parts.get(file, 0))
        self.states |= {name: s for name, s in states.items() if isinstance(s, Mapping)}


class Journal:
    """The journal that one process writes: a new file, since an older one may end in a cut line."""

    def __init__(self, folder: Path, plan: str) -> None:
        self._path = folder / f"{_START}{uuid.uuid4().hex}.jsonl"
        self._append({"plan": plan})

    def record(self, file: str, parts: int, states: Mapping[str, Mapping[str, object]]) -> None:
        """Says that the first `parts` of `file` are on the disk."""
        self._append({"file": file, "parts": parts, "states": states})

    def _append(self, line: Mapping[str, object]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from error


def read_journals(folder: Path, plan: str) -> Done:
    """What all journals in `folder` say about the plan of this fingerprint.

    Raises:
        UnreadableError: the disk fails.
    """
    done = Done()
    for path in _journals(folder):
        for line in _lines(path, plan):
            done.add(line)
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
