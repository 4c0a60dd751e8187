"""How fast, how much memory, against whom:

    python -m benchmarks FOLDER [--quick]

Builds its inputs in FOLDER (about 15 GB; kept for the next run), runs every command several times
in turn, and prints a table of medians: wall and CPU seconds, peak anonymous memory of the process.
Ratios are of medians of the same run. PEFT is measured as its users run it: load the model, load
the adapter, `merge_and_unload`, `save_pretrained`.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.inputs import llama_modules, make_adapter, make_base, make_large_tensor
from benchmarks.measurement import table

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
import os; os.sync()
"""


TOOL = [sys.executable, "-m", "gralora_convert"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="one run each, no PEFT")
    options = parser.parse_args()
    folder: Path = options.folder
    runs = 1 if options.quick else 3
    out = folder / "out"

    def merge(adapter: Path, base: Path, *more: str) -> list[str]:
        return [*TOOL, "merge", str(adapter), "--base", str(base), "-o", str(out), *more]

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
                "start Python and torch": [sys.executable, "-c", "import torch"],
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
        "--help": [*TOOL, "--help"],
        "inspect, 154 modules": [*TOOL, "inspect", str(one_adapter)],
        "validate, 154 modules": [*TOOL, "validate", str(one_adapter)],
    }
    table("start-up", start, out, runs)


if __name__ == "__main__":
    main()
