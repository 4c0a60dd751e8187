"""A merge of several shards, as arguments, and what one run makes of it."""

from pathlib import Path

import pytest

from tests.builders import SHAPES, random_delta, write_adapter, write_base
from tests.command import run_ok
from tests.faults import tree

SHARDED = ["--shard-size", "3KB"]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """The arguments of a merge of several shards, without the output."""
    write_base(tmp_path / "base")
    deltas = {name: random_delta(*shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    return ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), *SHARDED]


@pytest.fixture
def whole(inputs: list[str], tmp_path: Path) -> dict[str, bytes | None]:
    """What one run writes."""
    run_ok(*inputs, "-o", tmp_path / "whole")
    found = tree(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in found) >= 3
    return found


class Broken(Exception):  # noqa: N818
    pass
