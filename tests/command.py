"""Runs the command line inside the test process and returns what a shell would see."""

import contextlib
import io
import json
from dataclasses import dataclass

from gralora_convert.cli.entry import main


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, object]:
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


def run(*arguments: object) -> Outcome:
    """`gralora-convert ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 0
    outcome = Outcome(status, out.getvalue(), err.getvalue())
    assert "Traceback" not in outcome.stderr, outcome.stderr
    return outcome


def run_ok(*arguments: object) -> Outcome:
    """Like `run`; anything but status 0 fails the test with what was printed."""
    outcome = run(*arguments)
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    return outcome
