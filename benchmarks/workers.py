"""Processes that answer one question at a time: a crash or a hang costs one question only."""

import contextlib
import io
import json
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

BATCH = 40  # questions of one process


class WorkerDiedError(Exception):
    """The process of a question crashed, or took too long."""


class Asker(Protocol):
    def ask(self, question: Any) -> Any: ...
    def stop(self) -> None: ...


class Worker:
    """A process that runs `serve`; replaced after BATCH questions, a crash or a timeout."""

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self.command = list(command)
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None
        self.count = 0

    def ask(self, question: Any) -> Any:
        """The answer; both are JSON.

        Raises:
            WorkerDiedError: there is none.
        """
        if self.process is None or self.count >= BATCH:
            self._restart()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self.count += 1
        timer = threading.Timer(self.limit, process.kill)
        timer.start()
        began = time.monotonic()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        self.stop()
        if time.monotonic() - began >= self.limit:
            raise WorkerDiedError(f"takes more than {self.limit:.0f} s")
        raise WorkerDiedError("its process died")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _restart(self) -> None:
        self.stop()
        self.count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip


def serve(answer: Callable[[Any], Any]) -> None:
    """A worker's side: questions from stdin, answers to stdout, a JSON line each."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answers, sys.stdout = sys.stdout, io.StringIO()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def ask_all(
    questions: Sequence[Any], start: Callable[[], Asker], jobs: int, record: Path | None
) -> list[Any]:
    """The answer to each; those that `record` knows are taken from it, others added."""
    found = recorded(record)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for question in questions:
        if json.dumps(question) not in found:
            waiting.put(question)

    def run() -> None:
        asker = start()
        with contextlib.suppress(queue.Empty):
            while True:
                question = waiting.get_nowait()
                answer = found[json.dumps(question)] = asker.ask(question)
                if record is not None:
                    with record.open("a") as file:
                        file.write(json.dumps([question, answer]) + "\n")
        asker.stop()

    threads = [threading.Thread(target=run) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[json.dumps(question)] for question in questions]


def recorded(record: Path | None) -> dict[str, Any]:
    """The answers in a record, by their questions."""
    if record is None or not record.exists():
        return {}
    pairs = [json.loads(line) for line in record.read_text().splitlines()]
    return {json.dumps(question): answer for question, answer in pairs}
