"""How often `verify` is wrong: many random right and wrong merges, a table.

    python -m benchmarks.audits --rounds 200
    python -m benchmarks.audits --by peft --rounds 200
    python -m benchmarks.audits FOLDER --against ../worktree-of-another-revision

With a FOLDER (for the inputs; kept for the next run) the table is of costs, see `costs`.

Right merges are made by torch alone (one rounding to the stored dtype, or to another one), by this
program, and with the update rounded to the adapter's 16 bits first, as PEFT does. Wrong ones are
all mistakes of `tests.merges`. Small matrices, the level `weights`.

With `--by peft` PEFT merges tiny models of transformers, and the level is `model`: right merges,
and each of them once more with one of the mistakes that a whole model may hide.
"""

import argparse
import math
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gralora_convert as gc
from benchmarks.costs import print_costs
from benchmarks.peft_merges import audit_peft
from gralora_convert.delta.products import dense
from tests.merges import WRONG, Setting, Tensors, applies, setting, wrong_modules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Tally:
    """What became of the merges of one kind."""

    made: int = 0
    alarms: int = 0
    named: int = 0
    worst: float = 0.0
    least: float = math.inf
    other: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audits")
    parser.add_argument("--rounds", type=int, default=100, help="settings of each dtype")
    parser.add_argument("--wrong", type=int, default=10, help="settings with all mistakes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by", choices=["torch", "peft"], default="torch", help="who merges")
    parser.add_argument("folder", type=Path, nargs="?", help="print what audits cost instead")
    parser.add_argument("--against", type=Path, help="a worktree of another revision")
    parser.add_argument("--layers", type=int, default=22, help="of the model whose costs are taken")
    parser.add_argument("--runs", type=int, default=3, help="of each command")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        print_costs(options.folder, options.against, layers=options.layers, runs=options.runs)
        return 0
    random.seed(options.seed)
    if options.by == "peft":
        return audit_peft(options.rounds)
    print("| right merges | made | false alarms | largest difference / bound |")
    print("|---|---|---|---|")
    bad = sum(_right(name, options.rounds) for name in DTYPES)
    print("\n| wrong merges | made | missed | modules and words right | smallest / bound |")
    print("|---|---|---|---|---|")
    for name in DTYPES:
        bad += _wrong(name, options.wrong)
    return bad > 0


def _verdict(made: Setting, merged: Tensors | None, where: str = "merged") -> gc.Equivalence:
    if merged is not None:
        made.write(merged)
    return gc.verify(
        made.folder / "adapter", base=made.folder / "base", merged=made.folder / where,
        level="weights", fan_in_fan_out={"*": made.transposed},
    )  # fmt: skip


def _rho() -> float:
    return 10 ** random.uniform(-4, math.log10(0.3))


def _right(name: str, rounds: int) -> int:
    tallies = {kind: Tally() for kind in ("one rounding", "another dtype", "ours", "rounded twice")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            kind = random.choice(list(tallies))
            made = setting(
                Path(folder), dtype=DTYPES[name], rho=_rho(), k=random.choice([1, 2, 4, 8]),
                hybrid_r=random.choice([0, 4]), seed=random.randrange(10**6),
                transposed=random.random() < 0.3,
                written=random.choice(list(DTYPES.values())) if kind == "another dtype" else None,
                factors=random.choice([torch.bfloat16, torch.float16])
                if kind == "rounded twice" else torch.float32,
            )  # fmt: skip
            if kind == "ours":
                gc.merge(
                    made.folder / "adapter", base=made.folder / "base",
                    fan_in_fan_out={"*": made.transposed},
                ).write(made.folder / "merged")  # fmt: skip
                found = _verdict(made, None)
            elif kind == "rounded twice":
                found = _verdict(made, made.every(lambda d: dense(d).to(d.A.dtype).float()))
            else:
                found = _verdict(made, made.right())
            tally = tallies[kind]
            tally.made += 1
            tally.alarms += not found.ok
            tally.worst = max(tally.worst, *(row.worst for row in found.rows))
    for kind, tally in tallies.items():
        print(f"| {name}, {kind} | {tally.made} | {tally.alarms} | {tally.worst:.4f} |", flush=True)
    return sum(tally.alarms for tally in tallies.values())


def _wrong(name: str, rounds: int) -> int:
    tallies = {mistake: Tally() for mistake in WRONG}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            made = setting(
                Path(folder), dtype=DTYPES[name], rho=10 ** random.uniform(-3, math.log10(0.3)),
                k=random.choice([2, 4, 8]), hybrid_r=random.choice([0, 4]),
                seed=random.randrange(10**6), transposed=random.random() < 0.3,
            )  # fmt: skip
            for mistake, wrong in WRONG.items():
                if applies(wrong, made):
                    _count(tallies[mistake], mistake, _verdict(made, wrong.make(made)))
    for mistake, tally in tallies.items():
        missed = tally.made - tally.alarms
        least = "-" if tally.least > 1e300 else f"{tally.least:.3g}"
        print(f"| {name}, {mistake} | {tally.made} | {missed} | {tally.named} | {least} |")
        for words, count in tally.other.most_common(3):
            print(f"  {count} x {words}", file=sys.stderr)
    return sum(tally.made - tally.alarms for tally in tallies.values())


def _count(tally: Tally, mistake: str, found: gc.Equivalence) -> None:
    wrong = WRONG[mistake]
    modules = wrong_modules(wrong)
    tally.made += 1
    tally.alarms += not found.ok
    place = modules is None or {row.module for row in found.wrong} == modules
    unnamed = [r.what for r in found.wrong if not all(words in r.what for words in wrong.words)]
    tally.named += place and not unnamed and not found.ok
    tally.other.update(unnamed[:1])
    if found.wrong:
        tally.least = min(tally.least, found.wrong[0].worst)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
