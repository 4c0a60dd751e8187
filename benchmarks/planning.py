"""What a merge of 700 GB costs before its first byte:

    python -m benchmarks.planning FOLDER

Makes a Llama-shaped bf16 checkpoint of 350 billion parameters in shards of 5 GB whose data are
holes (it takes no space), and an adapter with factors for all of its linear layers, then times a
dry run: headers, placement, plan. Prints wall and CPU seconds and the peak anonymous memory.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measurement import measure
from gralora_convert.adapters.config import GraloraConfig
from gralora_convert.adapters.keys import key_of
from gralora_convert.disk.tensors import encode_header

LAYERS, HIDDEN, INTERMEDIATE, KV, VOCABULARY = 110, 16384, 53248, 1024, 128256
SHARD = 5_000_000_000
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in LINEAR.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make_base(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for name, shape in tensors():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and sum(held[2] for held in shards[-1]) + nbytes > SHARD:
            shards.append([])
        shards[-1].append((name, shape, nbytes))
    weight_map: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        make_hollow(folder / file, [(name, "BF16", shape, n) for name, shape, n in held])
        weight_map |= {name: file for name, _, _ in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 128,
        "num_key_value_heads": 8, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path, *, r: int = 64, k: int = 4) -> Path:
    targets = sorted({name.rpartition(".")[2] for name in LINEAR})
    GraloraConfig(r=r, gralora_k=k, alpha=2 * r, target_modules=targets).save_pretrained(folder)
    held: list[tuple[str, str, tuple[int, ...], int]] = []
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEAR.items():
            module = f"model.layers.{layer}.{name}"
            a, b = (k, columns // k, r), (k, r, rows // k)
            held.append((key_of(module, "A"), "F32", a, 4 * math.prod(a)))
            held.append((key_of(module, "B"), "F32", b, 4 * math.prod(b)))
    make_hollow(folder / "adapter_model.safetensors", held)
    return folder


def make_hollow(path: Path, held: list[tuple[str, str, tuple[int, ...], int]]) -> None:
    """A safetensors file of which only the header takes space."""
    with path.open("wb") as file:
        file.write(encode_header(held, {"format": "pt"}))
        file.truncate(file.tell() + sum(nbytes for *_, nbytes in held))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    tool = [sys.executable, "-m", "gralora_convert"]
    place = ["--base", str(base)]
    commands = {
        "merge --dry-run": [*tool, "merge", str(adapter), *place, "-o", str(folder / "out"),
                            "--dry-run", "--json"],
        "inspect": [*tool, "inspect", str(base)],
    }  # fmt: skip
    total = sum(2 * math.prod(shape) for _, shape in tensors())
    print(f"{total / 1e9:.0f} GB in {len(list(base.glob('*.safetensors')))} shards")
    for name, command in commands.items():
        run = measure(command)
        print(f"{name}: {run.wall:.2f} s, CPU {run.cpu:.2f} s, {run.anonymous:.0f} MB")


if __name__ == "__main__":
    main()
