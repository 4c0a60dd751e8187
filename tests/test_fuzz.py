"""A short slice of the fuzzer, the same on every run: folders through every command, and parsers.

The long runs are `python -m tests.fuzz`; docs/security.md has their numbers.
"""

import shutil
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.folders import FIXTURES, fuzz
from tests.fuzz.mutations import MUTATIONS
from tests.fuzz.parsers import PARSERS, seeds


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_mutated_folders_end_as_they_must(first: int) -> None:
    failures = [failure for seed in range(first, first + 10) for failure in fuzz(seed)[1]]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_bytes_are_read_or_refused(name: str) -> None:
    random = Random(name)
    for seed in seeds(name):
        PARSERS[name](seed)
    for _ in range(150):
        data = bytearray(random.choice(seeds(name)))
        for _ in range(random.randrange(1, 4)):
            at = random.randrange(len(data))
            match random.randrange(4):
                case 0:
                    data[at] = random.randrange(256)
                case 1:
                    data[at : at + random.randrange(1, 9)] = b""
                case 2:
                    data[at:at] = data[: random.randrange(9)]
                case _:
                    data[at : at + 4] = random.choice((b"null", b'"\\u0', b"[[{}", b"\xff\xfe\0\0"))
            data = data or bytearray(b"\0")
        PARSERS[name](bytes(data))


def test_every_mutation_changes_something(tmp_path: Path) -> None:
    """Or the fuzzer would prove nothing."""
    for number, mutation in enumerate(dict.fromkeys(MUTATIONS)):
        done = []
        for seed in range(4):
            folder = tmp_path / f"{number}-{seed}"
            shutil.copytree(FIXTURES / "peft-0.21.2/llama-hybrid", folder)
            done.append(mutation(Random(seed), folder))
        assert any(what != "nothing" for what in done), mutation


def test_the_same_seed_is_the_same_input(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(FIXTURES / "peft-0.21.2/llama-hybrid", tmp_path / name)
        MUTATIONS[0](Random(7), tmp_path / name)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
