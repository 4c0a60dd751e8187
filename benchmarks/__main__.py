"""How fast, how much memory, against whom:

    python -m benchmarks FOLDER [--quick]

Builds its inputs in FOLDER (about 15 GB; kept for the next run), runs every command several times
in turn, and prints a table of medians: wall and CPU seconds, peak anonymous memory of the process.
Ratios are of medians of the same run. PEFT is measured as its users run it: load the model, load
the adapter, `merge_and_unload`, `save_pretrained`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.inputs import llama_modules, make_adapter, make_base, make_large_tensor

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
import os; os.sync()
"""


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


def table(title: str, commands: dict[str, list[str]], output: Path, runs: int) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="one run each, no PEFT")
    options = parser.parse_args()
    folder: Path = options.folder
    runs = 1 if options.quick else 3
    out = folder / "out"
    tool = [sys.executable, "-m", "gralora_convert", "merge"]

    def merge(adapter: Path, base: Path, *more: str) -> list[str]:
        return [*tool, str(adapter), "--base", str(base), "-o", str(out), *more]

    adapters = {
        "r=64 k=4 hybrid 8": make_adapter(
            folder / "adapter-64", llama_modules(22), r=64, k=4, hybrid_r=8
        ),
        "r=32 k=2": make_adapter(folder / "adapter-32", llama_modules(22), r=32, k=2),
    }
    deep = make_adapter(folder / "adapter-deep", llama_modules(44), r=64, k=4, hybrid_r=8)
    one = make_base(folder / "one", 22)
    for label, adapter in adapters.items():
        for name, base in (
            ("one file", one),
            ("4 shards", make_base(folder / "four", 22, shards=4)),
        ):
            copy = f"cp -r {base} {out} && sync"
            commands = {
                "cp -r, sync": ["sh", "-c", copy],
                "merge": merge(adapter, base),
                "merge --no-verify": merge(adapter, base, "--no-verify"),
            }
            if not options.quick and name == "one file":
                commands["PEFT"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)]
            table(f"1.1 B parameters bf16, {label}, {name}", commands, out, runs)
    commands = {
        "22 layers": merge(adapters["r=64 k=4 hybrid 8"], one),
        "44 layers": merge(deep, make_base(folder / "deep", 44)),
    }
    table("memory by depth", commands, out, 1)
    shapes = {"0.5 GB": 65536, "4 GB": 524288}
    commands = {}
    for name, rows in shapes.items():
        adapter = make_adapter(
            folder / f"adapter-{rows}", {"big": (rows, 4096)}, r=64, k=4, hybrid_r=8
        )
        commands[name] = merge(adapter, make_large_tensor(folder / f"large-{rows}", rows))
    table("memory by the largest tensor", commands, out, 1)
    one_adapter = adapters["r=64 k=4 hybrid 8"]
    commands = {
        f"--jobs {jobs}": merge(one_adapter, one, "--jobs", str(jobs)) for jobs in (1, 2, 4)
    }
    table("threads", commands, out, runs)
    start = {
        "--help": [sys.executable, "-m", "gralora_convert", "--help"],
        "validate, 154 modules": [
            sys.executable, "-m", "gralora_convert", "validate", str(one_adapter),
        ],
    }  # fmt: skip
    table("start-up", start, out, runs)


if __name__ == "__main__":
    main()
