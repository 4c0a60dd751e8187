"""`inspect`: what is this folder? An adapter or a dense checkpoint, from headers alone."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_convert.adapter import Adapter, scan_adapter
from gralora_convert.checkpoint import Checkpoint, locate
from gralora_convert.config import CONFIG_NAME, GraloraConfig, LoraConfig
from gralora_convert.tensors import TensorSpec

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder holds, as a JSON document and as a page."""

    document: Mapping[str, object]
    text: str


def inspect(path: str | Path) -> Inspection:
    """What the folder, file or Hub id `path` is.

    Raises:
        InvalidAdapterError: it is an adapter with errors (all are listed).
        UnreadableError, UnsupportedError: it is neither an adapter nor a checkpoint.

    >>> inspect("fixtures/peft-0.21.2/llama-hybrid").document["exact_lora_rank"]
    11
    """
    place = locate(path)
    if (place / CONFIG_NAME).exists():
        scan = scan_adapter(place)
        scan.report.require_ok(place)
        assert scan.adapter is not None
        return _of_adapter(scan.adapter)
    return _of_checkpoint(Checkpoint.open(path))


def _of_adapter(adapter: Adapter) -> Inspection:
    config = adapter.config
    if isinstance(config, GraloraConfig):
        k, hybrid_r, alpha = config.gralora_k, config.hybrid_r, config.alpha
        exact = k * config.r + hybrid_r
    else:
        k, hybrid_r, alpha = 1, 0, config.lora_alpha
        exact = max((config.rank(module) for module in adapter.modules), default=config.r)
    document: dict[str, object] = {
        "kind": adapter.kind,
        "dialect": adapter.dialect,
        "r": config.r,
        "k": k,
        "hybrid_r": hybrid_r,
        "alpha": alpha,
        "scaling": _scaling(config),
        "bias": config.bias,
        "modules": list(adapter.modules),
        "parameters": sum(s.numel for s in _factors(adapter)),
        "dtype": sorted({spec.dtype for spec in _factors(adapter)}),
        "exact_lora_rank": exact,
        "base_model": config.base_model_name_or_path,
        "peft_version": config.peft_version,
    }
    names = {"gralora": "GraLoRA", "hybrid": "Hybrid GraLoRA", "lora": "LoRA"}
    shape = f"r={config.r}" + (f" k={k} hybrid_r={hybrid_r}" if adapter.kind != "lora" else "")
    dtypes = sorted({spec.dtype for spec in _factors(adapter)})
    extra = [f"{len(adapter.biases)} trained biases"] if adapter.biases else []
    extra += [f"saved modules: {', '.join(adapter.saved)}"] if adapter.saved else []
    base = config.base_model_name_or_path or "MODEL"
    lines = [
        f"{adapter.path}: {names[adapter.kind]} adapter",
        f"  {shape} alpha={alpha} scaling={document['scaling']:g}; "
        f"as a LoRA, exactly: rank {exact}",
        f"  base: {config.base_model_name_or_path or 'not named'}; written by {_writer(adapter)}",
        f"  {document['parameters']:,} parameters, {', '.join(dtypes)}, "
        f"{sum(s.nbytes for s in adapter.tensors.values()):,} bytes",
        f"  {len(adapter.modules)} modules:",
        *(f"    {line}" for line in _grouped(adapter.modules)),
        *(f"  {line}" for line in extra),
        *(f"  {finding}" for finding in adapter.findings),
        f"next: gralora-convert merge {adapter.path} --base {base} -o OUT",
    ]
    return Inspection(document, "\n".join(lines))


def _factors(adapter: Adapter) -> list[TensorSpec]:
    return [spec for roles in adapter.roles.values() for spec in roles.values()]


def _scaling(config: GraloraConfig | LoraConfig) -> float:
    return config.scaling if isinstance(config, GraloraConfig) else config.scaling("")


def _writer(adapter: Adapter) -> str:
    if adapter.dialect == "authors":
        return "the original authors' code"
    return f"PEFT {adapter.config.peft_version}" if adapter.config.peft_version else "PEFT"


def _grouped(names: Sequence[str]) -> list[str]:
    """Names with their layer numbers gathered: `layers.{0-21}.mlp.up_proj`."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if found:
            groups[found[1], found[3]].append(int(found[2]))
        else:
            groups[(name,)] = []
    return [
        key[0] if len(key) == 1 else f"{key[0]}{{{_ranges(numbers)}}}{key[1]}"
        for key, numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as ranges: 0-3,7."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _of_checkpoint(checkpoint: Checkpoint) -> Inspection:
    dtypes = Counter(spec.dtype for spec in checkpoint.tensors.values())
    receipt = checkpoint.receipt
    document: dict[str, object] = {
        "kind": "dense",
        "tensors": len(checkpoint.tensors),
        "parameters": sum(spec.numel for spec in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "dtype": dict(dtypes),
        "files": list(checkpoint.layout),
        "architectures": list(checkpoint.architectures),
        "provenance": None if receipt is None else dict(receipt),
    }
    files = list(checkpoint.layout)
    lines = [
        f"{checkpoint.source}: dense checkpoint, {', '.join(checkpoint.architectures) or '?'}",
        f"  {document['parameters']:,} parameters in {len(checkpoint.tensors)} tensors, "
        f"{checkpoint.nbytes:,} bytes",
        "  " + ", ".join(f"{count} x {dtype}" for dtype, count in dtypes.most_common()),
        f"  {len(files)} file(s): {files[0]}{' ...' if len(files) > 1 else ''}",
    ]
    if receipt is not None:
        inputs = receipt.get("inputs")
        lines.append(f"  made by gralora-convert {receipt.get('command')}: {json.dumps(inputs)}")
    lines.append(f"next: gralora-convert merge ADAPTER --base {checkpoint.source} -o OUT")
    return Inspection(document, "\n".join(lines))
