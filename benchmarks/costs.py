"""What `verify`, `extract` and a small merge cost, as ratios, beside another build of this package.

Commands of both builds run in turn, several times; a ratio is one of medians. CPU seconds are those
of all threads; where other work runs on the machine, wall seconds say little.
"""

import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.conversions import make_tuned
from benchmarks.inputs import llama_modules, make_adapter, make_base
from benchmarks.measurement import Run, measure

Medians = Mapping[str, Run]
TORCH = "import torch"
LLAMA = "import torch; from transformers import LlamaForCausalLM"
EXTRACTED = ("lora", "hybrid")


def print_costs(folder: Path, against: Path | None, *, layers: int, runs: int) -> None:
    """The table, of a Llama with `layers` of the 22 layers of 1.1 B parameters."""
    folder = folder.resolve()
    builds = {"ours": Path(__file__).parents[1]} | ({"other": against} if against else {})
    commands = _commands(folder, {name: path.resolve() for name, path in builds.items()}, layers)
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for run in range(runs + 1):  # the first reads the files, and is not counted
        for name, command in commands.items():
            if "merge" in name:
                shutil.rmtree(folder / name.replace(" ", "-"), ignore_errors=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            measured = measure(command)
            found[name] += [measured] if run else []
    medians = {
        name: Run(
            *(statistics.median(getattr(r, f) for r in of) for f in ("wall", "cpu", "anonymous"))
        )
        for name, of in found.items()
    }
    print(f"| command ({layers} layers, medians of {runs}) | wall s | CPU s | anonymous MB |")
    print("|---|---:|---:|---:|")
    for name, median in medians.items():
        print(f"| {name} | {median.wall:.2f} | {median.cpu:.2f} | {median.anonymous:.0f} |")
    print("\n| ratio | wall | CPU | wanted |\n|---|---:|---:|---:|")
    for words, one, other, start, wanted in _ratios(against is not None):
        row = [_ratio(medians, one, other, start, field) for field in ("wall", "cpu")]
        print(f"| {words} | {row[0]:.2f} | {row[1]:.2f} | {wanted} |")


def _commands(folder: Path, builds: Mapping[str, Path], layers: int) -> dict[str, Sequence[str]]:
    base = make_base(folder / f"base-{layers}", layers)
    modules = llama_modules(layers)
    few = {name: size for name, size in modules.items() if name.endswith(("q_proj", "v_proj"))}
    adapter = make_adapter(folder / f"all-{layers}", modules, r=64, k=4, hybrid_r=8)
    small = make_adapter(folder / f"few-{layers}", few, r=32, k=2)
    one = make_base(folder / "base-1", 1)
    tuned = make_tuned(folder / "tuned-1", one)
    pair = ("extract", "--base", one, "--tuned", tuned, "--r", 32, "-o", folder / "out")
    found: dict[str, Sequence[str]] = {
        "start torch": [sys.executable, "-c", TORCH],
        "start transformers": [sys.executable, "-c", LLAMA],
    }
    for build, path in builds.items():

        def tool(*arguments: object, path: Path = path) -> list[str]:
            python = ["env", "-C", str(folder), f"PYTHONPATH={path}", sys.executable]
            return [*python, "-m", "gralora_convert", *map(str, arguments), "--no-progress"]

        def merge(
            name: str, which: Path, *more: str, tool: Callable[..., list[str]] = tool
        ) -> None:
            out = folder / name.replace(" ", "-")
            found[name] = tool("merge", which, "--base", base, "-o", out, *more)

        merge(f"{build}: merge", adapter, "--no-verify")
        merged = folder / f"{build}: merge".replace(" ", "-")
        audit = ("verify", adapter, "--base", base, "--merged", merged, "--level")
        for level in ("weights", "modules"):
            found[f"{build}: verify {level}"] = tool(*audit, level)
        for to in EXTRACTED:
            found[f"{build}: extract {to}"] = tool(*pair, "--to", to)
        merge(f"{build}: merge of q and v", small)
    return found


def _ratios(both: bool) -> list[tuple[str, str, str, str, str]]:
    """Words, the two commands, what is taken from both, and the largest ratio that is wanted."""
    found = [
        ("verify weights / merge", "ours: verify weights", "ours: merge", "", "1.3"),
        ("verify modules / merge", "ours: verify modules", "ours: merge", "", "1.8"),
        ("extract to hybrid / to lora", "ours: extract hybrid", "ours: extract lora", "", "2"),
    ]
    start, torch = "start transformers", "start torch"
    for to in EXTRACTED if both else ():
        name = f"extract to {to}, ours / other"
        one, other = f"ours: extract {to}", f"other: extract {to}"
        found.append((f"{name}, above importing transformers", one, other, start, "0.33"))
        found.append((f"{name}, above importing torch", one, other, torch, "0.33"))
    for what, wanted in (("merge of q and v", "0.9"), ("verify weights", ""), ("merge", "")):
        if both:
            found.append((f"{what}, ours / other", f"ours: {what}", f"other: {what}", "", wanted))
    return found


def _ratio(medians: Medians, one: str, other: str, start: str, field: str) -> float:
    least: float = getattr(medians[start], field) if start else 0.0
    above = [getattr(medians[name], field) - least for name in (one, other)]
    return float(above[0] / above[1])
