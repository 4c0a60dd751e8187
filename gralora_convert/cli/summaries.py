"""What is said of a plan, and of what was written."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gralora_convert.adapters import NAMES, group, natural
from gralora_convert.cli.pages import EXACT
from gralora_convert.cli.terminal import shortened
from gralora_convert.errors import printable
from gralora_convert.verbs import ENGINES, served_rank

if TYPE_CHECKING:
    from gralora_convert.output import Plan

Json = Mapping[str, object]
# how each engine is started, at the versions of `ENGINES`
_START: Mapping[str, Sequence[str]] = {
    "vllm": (
        "vllm serve MODEL --dtype {dtype} --enable-lora --max-lora-rank {served} --max-loras 1 "
        "--lora-modules NAME={output}",
    ),
    "sglang": (
        "sglang serve --model-path MODEL --dtype {dtype} --enable-lora --max-lora-rank {rank} "
        "--lora-paths NAME={output}",
    ),
    "llama.cpp": (
        "python convert_hf_to_gguf.py MODEL --outtype {outtype} --outfile MODEL.gguf",
        "python convert_lora_to_gguf.py {output} --base MODEL --outtype f32 "
        "--outfile {output}.gguf",
        "llama-server --model MODEL.gguf --lora {output}.gguf",
    ),
}
_OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def adapter_summary(receipt: Mapping[str, object], output: str) -> list[str]:
    """The closing lines: what was written, what was lost, how to serve a LoRA."""
    kind, r, error = receipt["to"], receipt["r"], receipt["error"]
    modules, k, h = receipt["modules"], receipt["k"], receipt["hybrid_r"]
    assert isinstance(modules, list)
    assert isinstance(error, float)
    assert isinstance(r, int)
    assert kind == "gralora" or kind == "hybrid" or kind == "lora"
    shape = f"r={r}" + ("" if kind == "lora" else f" k={k} hybrid_r={h}")
    lines = [f"wrote {len(modules)} modules as {NAMES[kind]} {shape} to {output}"]
    ranks = receipt.get("ranks")
    if isinstance(ranks, Mapping):
        lines[0] = lines[0].replace(shape, f"of ranks {min(ranks.values())} to {r}", 1)
        lines += _rank_lines({row["module"]: ranks.get(row["module"], r) for row in modules})
    if error <= EXACT:
        lines.append("exact: the update is the same, up to the rounding of stored factors")
    else:
        worst = max(modules, key=lambda row: row["error"])
        lines.append(
            f"approximate: relative error {error:.3g} (Frobenius), worst module "
            f"{worst['module']} {worst['error']:.3g}"
        )
    for key, what in (
        ("lora_error", "a LoRA of the same number of parameters would have relative error"),
        ("rounding_floor", "rounding of the tuned model alone accounts for"),
    ):
        value = receipt.get(key)
        if isinstance(value, float):
            lines.append(f"{what} {value:.3g}")
    serving = receipt.get("serving")
    if kind == "lora" and isinstance(serving, Mapping):
        dtype = receipt.get("base_dtype")
        lines += _serving_lines(r, output, serving, dtype if isinstance(dtype, str) else None)
    return lines


def _rank_lines(ranks: Mapping[str, int]) -> list[str]:
    """The modules of each rank, the largest first."""
    found = group({module: (rank,) for module, rank in ranks.items()})
    width = len(str(max(ranks.values())))
    return [
        str(line) for line in shortened([
            f"  r={g.shape[0]:<{width}}  {printable(g.name)}"
            for g in sorted(found, key=lambda g: -g.shape[0])
        ])
    ]  # fmt: skip


def _serving_lines(
    rank: int, output: str, refusals: Mapping[str, str], dtype: str | None
) -> list[str]:
    """How each engine serves the LoRA of this rank in the folder `output`, or why it does not."""
    lines, lead = [], "to serve:"
    for name, why in refusals.items():
        typed = [] if why else commands(name, rank, dtype, shlex.quote(output))
        lines += [f"{lead if not n else '    then:'} {line}" for n, line in enumerate(typed)]
        lead = "      or:" if typed else lead
    if lines and dtype is None:
        lines.append("          DTYPE is MODEL's own: auto takes 16 bits for a model in float32")
    lines += [f"not by {ENGINES[n].title}, which {why}" for n, why in refusals.items() if why]
    return lines if lead != "to serve:" else [*lines, "to serve: merge it"]


def commands(name: str, rank: int, dtype: str | None, output: str) -> list[str]:
    """What to type so that an engine serves the LoRA of a rank in the folder `output` on a base of
    a dtype.

    >>> commands("vllm", 11, "float32", "OUT")[0][:47]
    'vllm serve MODEL --dtype float32 --enable-lora '
    """
    return [
        line.format(
            output=output, rank=rank, served=served_rank(rank),
            dtype=dtype or "DTYPE", outtype=_OUTTYPES.get(dtype or "", "OUTTYPE"),
        )
        for line in _START.get(name, ())
    ]  # fmt: skip


def plan_table(plan: "Plan") -> list[str]:
    """What a plan writes: its weight files, its tensors by kind, the files beside them."""
    parts = sorted((p for file in plan.files for p in file.parts), key=lambda p: natural(p.name))
    kinds: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for part in parts:
        kinds.setdefault((part.how, part.dtype), {})[part.name] = part.shape
    rows = [(how, dtype, g) for how, dtype in sorted(kinds) for g in group(kinds[how, dtype])]
    files = [f"{f.name}  {len(f.parts)} tensors, {f.nbytes:,} bytes" for f in plan.files]
    sizes = [" x ".join(map(str, g.shape)) or "scalar" for *_, g in rows]
    width, digits = max(map(len, sizes)), len(str(len(parts)))
    table = [
        f"  {how:7}  {dtype:4}  {g.count:>{digits}}  {size:>{width}}  {printable(g.name)}"
        for (how, dtype, g), size in zip(rows, sizes, strict=True)
    ]
    beside = {"edited": sorted(plan.texts), "copied": sorted(plan.sidecars)}
    return [*map(str, shortened(files)), *map(str, shortened(table)),
            *(f"{how}: {', '.join(names)}" for how, names in beside.items() if names)]  # fmt: skip


def merge_summary(receipt: Mapping[str, object], output: str) -> list[str]:
    """The closing lines of a merge."""
    modules, survival = receipt["modules"], receipt["survival"]
    assert isinstance(modules, list)
    lines = [
        f"merged {len(modules)} modules into {output} "
        f"({receipt['tensors']} tensors, {receipt['bytes']:,} bytes)"
    ]
    replaced = receipt["replaced"]
    if isinstance(replaced, list) and replaced:
        lines.append(f"replaced or added {len(replaced)} tensors (biases, saved modules)")
    if isinstance(survival, Mapping):
        lines.append(
            f"checked: {survival['kept']:.1%} of the update kept, rounding noise "
            f"{survival['noise']:.1%} of it, {survival['changed']:.1%} of the weights changed"
        )
        if survival["kept"] < 0.9 or survival["noise"] > 0.5:
            lines.append(
                "the stored dtype loses much of this update: write --dtype float32 or serve the "
                "adapter unmerged"
            )
    if receipt["dtype"] == "float32":
        lines.append(
            "serve it with --dtype float32 (auto of vLLM and SGLang takes 16 bits), convert it "
            "with --outtype f32 (llama.cpp's converter takes f16)"
        )
    return lines
