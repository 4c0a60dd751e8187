"""Wall and CPU seconds and peak anonymous memory of commands, as tables of medians."""

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Run", "measure", "table"]


@dataclass
class Run:
    wall: float
    cpu: float
    anonymous: float  # MB, the largest that was seen every 10 ms


def measure(command: Sequence[str]) -> Run:
    """One run of a command; its children's CPU seconds are counted."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]) / 1e3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    done.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{message.decode()}")
    return Run(wall, usage.ru_utime + usage.ru_stime, peak[0])


def table(title: str, commands: Mapping[str, Sequence[str]], output: Path, runs: int) -> None:
    """Runs the commands in turn and prints their medians, with ratios to the first."""
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            found[name].append(measure(command))
    shutil.rmtree(output, ignore_errors=True)
    print(f"\n### {title} (medians of {runs})\n")
    print("| command | wall s | CPU s | peak anonymous MB | wall ratio | CPU ratio |")
    print("|---|---|---|---|---|---|")
    first = next(iter(found.values()))
    for name, of_command in found.items():
        wall, cpu = (statistics.median(getattr(r, f) for r in of_command) for f in ("wall", "cpu"))
        memory = max(r.anonymous for r in of_command)
        ratios = [
            value / statistics.median(getattr(r, f) for r in first)
            for value, f in ((wall, "wall"), (cpu, "cpu"))
        ]
        print(
            f"| {name} | {wall:.2f} | {cpu:.2f} | {memory:.0f} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} |",
            flush=True,
        )
