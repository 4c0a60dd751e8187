"""Every line to serve by of README and docs, carried out against the engine that it names.

    python -m benchmarks.engine_pages FOLDER --vllm PYTHON --llama-cpp SOURCE
        --llama-server PROGRAM --sglang PROGRAM

The commands of a page are run first, in FOLDER, with a model that engines take and a Hybrid GraLoRA
of the fixture's shape in the fixtures' places. They have to print the lines of the page, letter by
letter; then each of those runs as benchmarks.engines runs lines, and its tokens are compared with
those of PEFT: of the trained adapter, or of the LoRA where that is an approximation.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft import PeftModel
from transformers import LlamaForCausalLM

from benchmarks.engine_models import Case, greedy, llama, make
from benchmarks.engine_processes import Engines, RefusedError, Run
from benchmarks.engines import compared

ROOT = Path(__file__).parents[1]
# most of the update in three ranks, as the approximation on a page wants it
MODEL = Case(
    "the pages' own", llama, blocks=0.2,
    adapter={"r": 4, "gralora_k": 2, "hybrid_r": 3, "target_modules": ["q_proj", "down_proj"]},
)  # fmt: skip
FIXTURES = {"fixtures/peft-0.21.2/llama-hybrid": "adapter", "fixtures/bases/llama": "model"}
_BLOCK = re.compile(r"```(bash|text|sh)\n(.*?)```", re.DOTALL)
_LINE = re.compile(r"(?:to serve: |      or: |    then: )?(\S.*)")
_MAKES = re.compile(
    rf"gralora-convert (?:convert|merge) {next(iter(FIXTURES))} [^&]*-o (\w+)[^&]*$"
)
_PROGRAMS = ("vllm", "sglang", "llama-server", "python convert_")


def lines_of(text: str) -> list[str]:
    found = [_LINE.fullmatch(line) for line in text.splitlines()]
    return [m[1] for m in found if m and m[1].startswith(_PROGRAMS)]


def typed(page: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """The lines of a page, each with the name of the model or adapter that it serves.

    Raises:
        RefusedError: a command prints other lines than the page.
    """
    printed, out = "", ""
    for kind, text in _BLOCK.findall(page.read_text()):
        for line in text.splitlines() if kind == "bash" else ():
            if made := _MAKES.match(line):
                out, printed = made[1], _ran(line, folder)
        wanted = lines_of(text)
        if kind == "text" and not set(wanted) <= set(lines_of(printed)):
            raise RefusedError(f"{page.name} has other lines than {printed}")
        yield from ((line, out) for line in wanted)


def _ran(line: str, folder: Path) -> str:
    for fixture, own in FIXTURES.items():
        line = line.replace(fixture, own)
    words = dict.fromkeys([*shlex.split(line)[1:], "--overwrite"])
    command = [sys.executable, "-m", "gralora_convert", *words]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=paths)
    return ran.stdout


def served(out: str, lines: Sequence[str], engines: Engines, folder: Path, wanted: Run) -> None:
    """Carries out the lines of one model or adapter, and says what came of each."""
    before: list[str] = []
    for line in lines:
        here = re.sub(rf"(?<![\w-])(\./)?{out}\b", str(folder / out), line)
        try:
            if line.startswith("vllm"):
                more = "" if "NAME" in line else " --served-model-name it"
                run = engines.by_vllm_server(here + more, folder)
            elif line.startswith("sglang"):
                run = engines.by_sglang(here, folder)
            else:
                before.append(here)
                if not line.startswith("llama-server"):
                    if line != lines[-1]:
                        continue
                    before.append(f"llama-server --model {folder / out}.gguf")
                run, before = engines.by_llama_cpp(before, folder), []
            same, worst = compared(run, wanted)
            print(f"{same}, {worst:.0e}: {line}", flush=True)
        except RefusedError as problem:
            print(f"{problem}: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("vllm", "llama-cpp", "llama-server", "sglang"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    engines = Engines(options.vllm, options.llama_cpp, options.llama_server, options.sglang)
    wanted, bare = make(MODEL, folder)
    print(f"{compared(bare, wanted)[0]}: without adapter")
    by_out: dict[str, dict[str, None]] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line, out in typed(page, folder):
            by_out.setdefault(out, {})[line] = None
    for out, lines in by_out.items():
        expected = wanted
        if out in ("small", "own"):  # what is lost there is the LoRA's
            model = LlamaForCausalLM.from_pretrained(folder / "model")
            expected = greedy(PeftModel.from_pretrained(model, str(folder / out)).eval())
        served(out, list(lines), engines, folder, expected)


if __name__ == "__main__":
    main()
