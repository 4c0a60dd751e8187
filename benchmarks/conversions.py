"""Conversions of an adapter of a 1.1 B-parameter model, beside PEFT's:

    python -m benchmarks.conversions FOLDER [--runs 3] [--whole]

Builds its inputs in FOLDER (about 2 GB; kept for the next run) and prints tables of medians as
`python -m benchmarks` does. The adapter has 154 modules, r = 64, k = 4. PEFT's `save_as_lora` takes
the SVD of every dense update; it is run on one of the 22 layers (7 of the 154 modules) from a model
in memory, beside ours on the same layer; with `--whole` on all of them, which takes minutes.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.inputs import LINEAR, llama_modules, make_adapter, make_base
from benchmarks.measurement import table

PEFT = """
import sys
from transformers import AutoModelForCausalLM
from peft import PeftModel, save_as_lora
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
save_as_lora(sys.argv[3], PeftModel.from_pretrained(model, sys.argv[2]), rank=int(sys.argv[4]))
"""
RANK, BLOCKS = 64, 4
TOOL = [sys.executable, "-m", "gralora_convert"]


def make_tuned(folder: Path, base: Path) -> Path:
    """The base with a change of rank 32 and some noise in every linear layer."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    tensors = {}
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            if any(f"{layer}.weight" in name for layer in LINEAR):
                rows, columns = tensor.shape
                change = torch.randn(rows, 32) @ torch.randn(32, columns) * 2e-4
                tensor = (tensor + change + 1e-4 * torch.randn(rows, columns)).to(tensor.dtype)
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="of each command on 154 modules")
    parser.add_argument("--whole", action="store_true", help="PEFT on all 154 modules")
    options = parser.parse_args()
    folder: Path = options.folder
    runs, out = options.runs, folder / "out"
    adapter = make_adapter(folder / "gralora-64", llama_modules(22), r=RANK, k=BLOCKS)
    truncated = ("--r", str(RANK), "--allow-inexact")
    commands = {
        "LoRA, exact (r = 256)": convert(adapter, "lora", out),
        "LoRA, r = 64": convert(adapter, "lora", out, *truncated),
        "LoRA, --max-error 0.5": convert(adapter, "lora", out, "--max-error", "0.5"),
        "GraLoRA k = 2, r = 64": convert(adapter, "gralora", out, "--k", "2", *truncated),
        "LoRA, exact, --jobs 1": convert(adapter, "lora", out, "--jobs", "1"),
        "LoRA, r = 64, --jobs 1": convert(adapter, "lora", out, *truncated, "--jobs", "1"),
    }
    table("154 modules, from GraLoRA r = 64 k = 4", commands, out, runs)
    if options.whole:
        base = make_base(folder / "one", 22)
        commands = {"ours": commands["LoRA, r = 64"], "PEFT": peft(base, adapter, out)}
        table("154 modules, to LoRA r = 64, against PEFT", commands, out, 1)
    one_layer(folder, out)


def one_layer(folder: Path, out: Path) -> None:
    """The tables of what takes PEFT long, or works on dense weights."""
    few = make_adapter(folder / "gralora-64-1-layer", llama_modules(1), r=RANK, k=BLOCKS)
    base = make_base(folder / "1-layer", 1)
    commands = {
        "LoRA, r = 64": convert(few, "lora", out, "--r", str(RANK), "--allow-inexact"),
        "PEFT save_as_lora, rank 64": peft(base, few, out),
    }
    table("1 of 22 layers, 7 modules, against PEFT", commands, out, 1)
    pair = ["--base", str(base), "--tuned", str(make_tuned(folder / "1-tuned", base))]
    commands = {
        to: [*TOOL, "extract", *pair, "--to", to, "--r", "32", "-o", str(out)]
        for to in ("lora", "gralora", "hybrid")
    }
    table("extract, 1 layer, 7 modules, r = 32", commands, out, 1)


def peft(base: Path, adapter: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", PEFT, str(base), str(adapter), str(out), str(RANK)]


def convert(adapter: Path, to: str, out: Path, *more: str) -> list[str]:
    return [*TOOL, "convert", str(adapter), "--to", to, "-o", str(out), *more]


if __name__ == "__main__":
    main()
