"""A failure that passes is no answer: whatever stops transformers for a moment, wherever it does, a
run writes what it would have written, or nothing."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_convert.disk import Checkpoint
from gralora_convert.errors import ConvertError, OutOfMemoryError, UnreadableError
from gralora_convert.models import Blueprint
from gralora_convert.models.foreign import ForeignError, foreign, twice
from tests.zoo import ARCHITECTURES, save_base

PASSING: dict[str, Callable[[], BaseException]] = {
    "memory": MemoryError,
    "torch's memory": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
    ),
    "interrupt": KeyboardInterrupt,
    "torch's interrupt": lambda: RuntimeError(
        "KeyboardInterrupt: <EMPTY MESSAGE>\n\nAt:\n  a.py(1)"
    ),
    "system call": lambda: RuntimeError("the call was interrupted"),
    "too many files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "once only": lambda: RuntimeError("something passing"),
}
RAISED = {
    "memory": OutOfMemoryError,
    "torch's memory": OutOfMemoryError,
    "interrupt": KeyboardInterrupt,
    "torch's interrupt": KeyboardInterrupt,
    "system call": KeyboardInterrupt,
    "too many files": UnreadableError,
}
POINTS = 12


@pytest.mark.parametrize("name", RAISED)
def test_what_passes_is_told_from_an_answer(name: str) -> None:
    with pytest.raises(RAISED[name]), foreign():
        raise PASSING[name]()
    wrapped = ModuleNotFoundError("Could not import module 'LlamaModel'")
    wrapped.__cause__ = PASSING[name]()  # as transformers imports its modules
    with pytest.raises(RAISED[name]), foreign():
        raise wrapped


def test_an_answer_is_one_that_comes_again() -> None:
    with pytest.raises(ForeignError, match="'hidden_size'"):
        twice(lambda: dict[str, int]()["hidden_size"])
    errors = iter([ValueError("once")])

    def call() -> str:
        for error in errors:
            raise error
        return "built"

    assert twice(call) == "built"


def _names(base: Path) -> list[str] | None:
    """The names in memory of a base, by the class that its config names."""
    opened = Checkpoint.open(base)
    model = Blueprint.build(opened, opened.architectures, ())
    return None if model is None else [*model.linear(head=False), *sorted(model.origins)]


class Fault:
    """Raises an error at one of the calls of functions of transformers and torch, counted."""

    def __init__(self, at: int, make: Callable[[], BaseException]) -> None:
        self.at, self.make, self.count = at, make, 0

    def __call__(self, frame: Any, event: str, argument: object) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not ("/transformers/" in path or "/torch/nn/" in path):
            return
        if frame.f_code.co_name in ("__exit__", "__del__"):  # what cleans up must not be broken
            return
        self.count += 1
        if self.count == self.at:
            raise self.make()

    def run(self, base: Path) -> list[str] | None:
        sys.setprofile(self)
        try:
            return _names(base)
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize("name", PASSING)
def test_a_failure_at_any_call_never_names_another_class(name: str, tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    right = _names(base)
    assert right is not None
    assert right[0].startswith("model.layers.0.")
    counted = Fault(0, KeyboardInterrupt)
    assert counted.run(base) == right
    for point in range(POINTS):
        at = 1 + (counted.count - 1) * point // POINTS
        try:
            found = Fault(at, PASSING[name]).run(base)
        except (ConvertError, KeyboardInterrupt, MemoryError, RuntimeError, OSError):
            continue
        assert found == right, f"at call {at} of {counted.count}"
    assert torch.empty(0).device.type == "cpu"  # nothing is left behind


@pytest.mark.parametrize("make", [MemoryError, PASSING["torch's interrupt"], PASSING["once only"]])
def test_a_class_that_fails_once_is_not_passed_over(
    make: Callable[[], BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    right, init, errors = _names(base), transformers.LlamaForCausalLM.__init__, [make()]

    def failing(self: Any, config: Any) -> None:
        if errors:
            raise errors.pop()
        init(self, config)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", failing)
    try:
        assert _names(base) == right
    except (OutOfMemoryError, KeyboardInterrupt):
        assert make is not PASSING["once only"]
