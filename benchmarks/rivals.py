"""What others do of this: mergekit's extraction beside `extract`, deltalint beside `verify`.

    python -m benchmarks.rivals FOLDER --mergekit PROGRAM --deltalint PYTHON [--runs 3]

PROGRAM is `mergekit-extract-lora`, PYTHON the interpreter of an environment with deltalint. The
extraction is of one layer of a Llama of 1.1 B parameters (7 matrices, rank 16); what a program
needs to start is measured by the same command on a model of nearly no size. The audits are of the
34 mistakes of `tests.merges` and of three more; deltalint, which does not read GraLoRA, gets the
exact LoRA.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from benchmarks.conversions import make_tuned
from benchmarks.inputs import make_base
from benchmarks.measurement import Run, measure
from gralora_convert.delta.products import dense
from tests.merges import BIASED, WRONG, Setting, Tensors, Wrong, setting

RANK = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MORE: Mapping[str, Wrong] = {
    f"{percent} % too much": Wrong(
        lambda s, size=1 + percent / 100: s.every(lambda d: dense(d) * size),
        (),  # type: ignore[misc]
    )
    for percent in (0.1, 2)
}
EPS = "`rms_norm_eps` of config.json"
# folders of base, adapter and merged, a line each; the exit statuses of deltalint come back
WORKER = """
import contextlib, io, sys
from deltalint.cli import main
for line in sys.stdin:
    base, adapter, merged = line.split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = main(["check", "--base", base, "--adapter", adapter, "--merged", merged])
    print(status, flush=True)
"""
SAID = {0: "passes", 1: "found", 2: "no answer", 3: "no answer"}


# extraction ---------------------------------------------------------------------------------------


def extraction(folder: Path, program: str, runs: int) -> None:
    """Both programs in turn; above start-up is above the same command on the tiny pair."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # mergekit asks the Hub about a base's name for its card
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for others would count as work
    base = make_base(folder / "base-1", 1)
    pairs = {"one layer": (base, make_tuned(folder / "tuned-1", base)), "start": _tiny(folder)}
    found: dict[tuple[str, str], list[Run]] = {}
    errors = {}
    for _ in range(runs):
        for size, (one, other) in pairs.items():
            for tool in ("mergekit", "extract"):
                out = folder / f"{tool}-{size.replace(' ', '-')}"
                shutil.rmtree(out, ignore_errors=True)
                command = _command(tool, program, one, other, out)
                found.setdefault((tool, size), []).append(measure(command))
                if size == "one layer":
                    errors[tool] = _error(*pairs[size], out)

    def median(tool: str, size: str, what: str) -> float:
        return statistics.median(getattr(run, what) for run in found[tool, size])

    print(f"| (medians of {runs}) | wall s | CPU s | CPU s to start | anonymous MB | error |")
    print("|---|---:|---:|---:|---:|---:|")
    for tool, error in errors.items():
        wall, cpu, memory = (median(tool, "one layer", w) for w in ("wall", "cpu", "anonymous"))
        start = median(tool, "start", "cpu")
        print(f"| {tool} | {wall:.1f} | {cpu:.1f} | {start:.1f} | {memory:.0f} | {error:.5f} |")
    above = {t: median(t, "one layer", "cpu") - median(t, "start", "cpu") for t in errors}
    walls, memories = (
        median("extract", "one layer", what) / median("mergekit", "one layer", what)
        for what in ("wall", "anonymous")
    )
    print(f"\nCPU above start-up, extract / mergekit: {above['extract'] / above['mergekit']:.3f} "
          f"(0.1 wanted); wall {walls:.2f}; memory {memories:.2f}\n")  # fmt: skip


def _command(tool: str, program: str, base: Path, tuned: Path, out: Path) -> list[str]:
    if tool == "mergekit":
        others = [word for name in ("embed_tokens", "lm_head", "norm") for word in ("-e", name)]
        pair = ["--model", str(tuned), "--base-model", str(base), "--out-path", str(out)]
        return ["env", "-u", "PYTHONPATH", program, *pair, "--max-rank", str(RANK), *others]
    pair = ["--base", str(base), "--tuned", str(tuned), "-o", str(out)]
    more = ["--to", "lora", "--r", str(RANK), "--no-progress"]
    return [sys.executable, "-m", "gralora_convert", "extract", *pair, *more]


def _tiny(folder: Path) -> tuple[Path, Path]:
    """A Llama whose every matrix has a side of 32, and one that differs from it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    for name in ("tiny", "tiny-tuned"):
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.add_(torch.randn_like(layer.weight) * 0.01)
    return folder / "tiny", folder / "tiny-tuned"


def _error(base: Path, tuned: Path, out: Path) -> float:
    """|B A - (tuned - base)| / |tuned - base| over all modules, in float64."""
    one, other = (load_file(path / "model.safetensors") for path in (base, tuned))
    factors = load_file(out / "adapter_model.safetensors")
    left = whole = 0.0
    for key, a in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            wanted = other[name].double() - one[name].double()
            made = factors[key.replace("lora_A", "lora_B")].double() @ a.double()
            left += float((made - wanted).square().sum())
            whole += float(wanted.square().sum())
    return (left / whole) ** 0.5


# audits -------------------------------------------------------------------------------------------


def audits(python: str) -> None:
    """Every mistake in both dtypes, before both programs."""
    judge = subprocess.Popen(
        [python, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    rows: dict[str, list[str]] = {}
    for dtype in DTYPES.values():
        with tempfile.TemporaryDirectory() as folder:
            made = setting(Path(folder), dtype=dtype)
            _as_lora(made)
            right = {"(a right merge)": Wrong(lambda s: s.right(), ())}
            for name, wrong in {**right, **WRONG, **MORE}.items():
                said = _both(judge, made, wrong.make(made), "bias" in name)
                rows.setdefault(name, []).extend(said)
    rows[EPS] = _changed_setting(judge) * 2
    columns = [f"{tool}, {dtype}" for dtype in DTYPES for tool in ("verify", "deltalint")]
    print(f"| mistake | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        if set(cells) != {"found"}:
            print(f"| {name} | {' | '.join(cells)} |")
    wrong_rows = [cells for name, cells in rows.items() if not name.startswith("(")]
    for i, column in enumerate(columns):
        tally = Counter(cells[i] for cells in wrong_rows)
        told = ", ".join(f"{count} {said}" for said, count in sorted(tally.items()))
        print(f"\n{column}: of {len(wrong_rows)} mistakes {told}", end="")
    print()


def _as_lora(made: Setting) -> None:
    """The exact LoRA in two folders: deltalint gives no answer at all where a bias is trained, so
    that the bias stands in the second one alone."""
    for name in ("lora", "lora-biased"):
        gc.convert(made.folder / "adapter", to="lora").write(made.folder / name)
    path = made.folder / "lora" / "adapter_model.safetensors"
    tensors = {k: t for k, t in load_file(path).items() if not k.endswith(".bias")}
    save_file(tensors, path, metadata={"format": "pt"})


def _both(
    judge: "subprocess.Popen[str]", made: Setting, merged: Tensors, biased: bool
) -> list[str]:
    made.write(merged)
    folder = made.folder
    found = gc.verify(
        folder / "adapter",
        base=folder / "base",
        merged=folder / "merged",
        level="weights",
        fan_in_fan_out={"*": False},
    )
    lora = folder / ("lora-biased" if biased else "lora")
    base = folder / "base"
    if not biased:  # its bias is the base's, for who does not know of the trained one
        tensors = load_file(folder / "merged" / "model.safetensors")
        name = f"{BIASED}.bias"
        if name in tensors:
            save_file(tensors | {name: made.base[name]}, folder / "merged" / "model.safetensors")
    return [_of(found), _asked(judge, base, lora, folder / "merged")]


def _changed_setting(judge: "subprocess.Popen[str]") -> list[str]:
    """A right merge whose config.json computes another model."""
    adapter, base = "fixtures/peft-0.21.2/llama-k4", Path("fixtures/bases/llama")
    with tempfile.TemporaryDirectory() as name:
        merged, lora = Path(name, "merged"), Path(name, "lora")
        gc.merge(adapter, base=base).write(merged)
        gc.convert(adapter, to="lora").write(lora)
        config = json.loads((merged / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
        found = gc.verify(adapter, base=base, merged=merged)
        return [_of(found), _asked(judge, base, lora, merged)]


def _of(found: gc.Equivalence) -> str:
    return "passes" if found.ok else "no answer" if found.ok is None else "found"


def _asked(judge: "subprocess.Popen[str]", base: Path, lora: Path, merged: Path) -> str:
    assert judge.stdin is not None
    assert judge.stdout is not None
    judge.stdin.write(f"{base.resolve()} {lora} {merged}\n")
    judge.stdin.flush()
    return SAID[int(judge.stdout.readline())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", help="its program mergekit-extract-lora")
    parser.add_argument("--deltalint", help="a Python with deltalint")
    parser.add_argument("--runs", type=int, default=3, help="of each extraction")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.mergekit:
        extraction(folder, options.mergekit, options.runs)
    if options.deltalint:
        audits(options.deltalint)


if __name__ == "__main__":
    main()
