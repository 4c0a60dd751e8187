"""`inspect`: what is this folder? An adapter, several, or a dense checkpoint; headers alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gralora_convert.adapters import (
    CONFIG_NAME,
    WEIGHTS,
    Adapter,
    GraloraConfig,
    Group,
    LoraConfig,
    Scan,
    chain_findings,
    group,
    parse_key,
    read_config,
    scan_adapter,
)
from gralora_convert.base import extra_weights, quantised_by, scales_of
from gralora_convert.disk import (
    RECEIPT_NAME,
    Checkpoint,
    TensorFile,
    TensorSpec,
    load_json,
    locate,
    read_bytes,
)
from gralora_convert.errors import Finding, Report, UnreadableError, error, note, warning
from gralora_convert.verbs.serving import served_rank

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLE = 4096  # bytes of a factor that are looked at: a hint, not a proof

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the folder, file or model `name` holds, as a JSON document.

    `report` is what is wrong with it, `groups` are its modules (of a checkpoint: its matrices),
    `receipt` is what this tool wrote beside it, and `inner` the adapters in its sub-folders.
    """

    name: str
    document: Json
    report: Report = field(default_factory=Report)
    groups: Sequence[Group] = ()
    receipt: Json | None = None
    inner: Mapping[str, "Inspection"] = field(default_factory=dict)


def inspect(path: str | Path) -> Inspection:
    """What the folder, file or Hub id `path` is. A broken adapter is told as far as it can be read.

    Raises:
        UnreadableError, UnsupportedError: it is neither an adapter nor a checkpoint.

    >>> inspect("fixtures/peft-0.21.2/llama-hybrid").document["exact_lora_rank"]
    11
    """
    place = locate(path)
    if place.is_file() and place.name != CONFIG_NAME and place.suffix not in SUFFIXES:
        raise UnreadableError(
            "is neither a folder nor a file of tensors", where=path,
            hint="Name the folder of an adapter or a model.",
        )  # fmt: skip
    folder = place.parent if place.name in (CONFIG_NAME, *WEIGHTS) else place
    if (folder / CONFIG_NAME).exists() or any((folder / name).exists() for name in WEIGHTS):
        return _of_adapter(folder, str(path if folder == place else folder))
    try:
        return _of_checkpoint(Checkpoint.open(path))
    except UnreadableError:
        inner = _adapters_below(place)
        if not inner:
            raise
        return _of_adapters(str(path), inner)


# adapters -----------------------------------------------------------------------------------------


def _of_adapter(folder: Path, name: str) -> Inspection:
    scan = scan_adapter(folder)
    report = Report.of([*scan.report.findings, *_hints(scan, folder)])
    facts = _facts(folder, scan) | {
        "valid": report.ok,
        "findings": [finding.as_json() for finding in report.findings],
    }
    receipt = folder / RECEIPT_NAME
    made = load_json(receipt) if receipt.is_file() else None
    return Inspection(name, facts, report, _groups(scan), made)


def _of_adapters(name: str, folders: Sequence[Path]) -> Inspection:
    found = {folder.name: _of_adapter(folder, str(folder)) for folder in folders}
    document = {
        "kind": "adapters",
        "adapters": {folder: inner.document for folder, inner in found.items()},
    }
    return Inspection(name, document, inner=found)


def _adapters_below(folder: Path) -> list[Path]:
    """Sub-folders that hold an adapter: PEFT's adapters with a name, a trainer's checkpoints."""
    return sorted(found.parent for found in folder.glob(f"*/{CONFIG_NAME}"))


def _hints(scan: Scan, folder: Path) -> Iterator[Finding]:
    """What costs little to look at, beyond the headers."""
    inner = _adapters_below(folder)
    if inner:
        names = ", ".join(path.name for path in inner)
        yield note("adapters-below", folder, f"its sub-folders {names} hold adapters, too")
    if scan.adapter is None:
        return
    yield from chain_findings(scan.adapter)
    yield from extra_weights(scan.adapter)
    factors = scan.adapter.roles.values()
    specs = [spec for roles in factors for role, spec in roles.items() if role == "B"]
    try:
        starts = (read_bytes(spec, 0, min(SAMPLE, spec.nbytes)) for spec in specs)
        # bytes of zeros of either sign
        untrained = bool(specs) and not any(bytes(start).strip(b"\0\x80") for start in starts)
    except UnreadableError as problem:
        yield error("weights-unreadable", scan.adapter.file.path.name, problem.message)
        return
    if untrained:
        yield warning(
            "zero-factor", scan.adapter.file.path.name,
            f"the first values of all {len(specs)} B factors are zero: they may have no effect",
            "Is it trained? `validate` reads all values.",
        )  # fmt: skip


def _facts(folder: Path, scan: Scan) -> dict[str, object]:
    """The keys of the JSON document; None for what a broken adapter does not tell."""
    if scan.adapter is None:
        return _facts_of_broken(folder, scan.file)
    adapter, config = scan.adapter, scan.adapter.config
    factors = [spec for roles in adapter.roles.values() for spec in roles.values()]
    if isinstance(config, GraloraConfig):
        k, hybrid_r, alpha, scaling = (
            config.gralora_k, config.hybrid_r, config.alpha, config.scaling,
        )  # fmt: skip
        exact = k * config.r + hybrid_r
    else:
        k, hybrid_r, alpha, scaling = 1, 0, config.lora_alpha, config.scaling("")
        exact = max((config.rank(module) for module in adapter.modules), default=config.r)
    return {
        "kind": adapter.kind,
        "dialect": adapter.dialect,
        "r": config.r,
        "k": k,
        "hybrid_r": hybrid_r,
        "alpha": alpha,
        "scaling": scaling,
        "bias": config.bias,
        "modules": list(adapter.modules),
        "parameters": sum(spec.numel for spec in factors),
        "dtype": sorted({spec.dtype for spec in factors}),
        "exact_lora_rank": exact,
        "base_model": config.base_model_name_or_path,
        "peft_version": config.peft_version,
        **_file_facts(adapter.file),
        "max_lora_rank": served_rank(exact),
        "biases": len(adapter.biases),
        "saved": list(adapter.saved),
        "also": _also(adapter),
        "beyond_factors": list(adapter.unsupported),
        "unsupported": [*adapter.unsupported, *_misread(config)],
    }


def _facts_of_broken(folder: Path, file: TensorFile | None) -> dict[str, object]:
    """What config and tensors say each on its own, without a claim that they agree."""
    config = read_config(folder)
    values = config.values
    keys = [parse_key(name) for name in (file.tensors if file else ())]
    methods = {"GRALORA": "gralora", "LORA": "lora"}
    found = next((key.method for key in keys if key.method), None)
    method = methods.get(str(values.get("peft_type"))) if values else found
    is_lora, hybrid_r = method == "lora", values.get("hybrid_r", 0)
    kind = "hybrid" if method == "gralora" and hybrid_r else method
    specs = list(file.tensors.values()) if file else []
    return {
        "kind": kind,
        "dialect": config.dialect,
        "r": values.get("r"),
        "k": 1 if is_lora else values.get("gralora_k"),
        "hybrid_r": hybrid_r,
        "alpha": values.get("lora_alpha" if is_lora else "alpha"),
        "scaling": None,
        "bias": values.get("bias"),
        "modules": list(dict.fromkeys(key.name for key in keys if key.role in ("A", "B"))),
        "parameters": sum(spec.numel for spec in specs),
        "dtype": sorted({spec.dtype for spec in specs}),
        "exact_lora_rank": None,
        "base_model": values.get("base_model_name_or_path"),
        "peft_version": values.get("peft_version"),
        **_file_facts(file),
    }


def _file_facts(file: TensorFile | None) -> dict[str, object]:
    specs = list(file.tensors.values()) if file else []
    return {
        "file": file.path.name if file else None,
        "tensors": len(specs),
        "bytes": sum(spec.nbytes for spec in specs),
    }


def _also(adapter: Adapter) -> list[str]:
    found = [f"{len(adapter.biases)} trained biases"] if adapter.biases else []
    return found + [f"the whole {kind.name}" for kind in _grouped(adapter.saved)]


def _misread(config: GraloraConfig | LoraConfig) -> list[str]:
    """Fields of a LoRA that some servers leave out when they scale it."""
    if isinstance(config, GraloraConfig):
        return []
    fields = ("rank_pattern", "alpha_pattern", "use_rslora")
    return [name for name in fields if getattr(config, name)]


def _groups(scan: Scan) -> list[Group]:
    """Modules with (out, in), or bare tensors where they are not known to agree."""
    if scan.adapter is not None and "convolutions" not in scan.adapter.unsupported:
        return group({module: scan.adapter.shape(module) for module in scan.adapter.modules})
    return _grouped(scan.file.tensors if scan.file else {})


def _grouped(tensors: Mapping[str, TensorSpec]) -> list[Group]:
    return group({name: spec.shape for name, spec in tensors.items()})


# checkpoints --------------------------------------------------------------------------------------


def _of_checkpoint(checkpoint: Checkpoint) -> Inspection:
    config, receipt = checkpoint.config, checkpoint.receipt
    dtypes = Counter(spec.dtype for spec in checkpoint.tensors.values())
    facts: dict[str, object] = {
        "kind": "dense",
        "tensors": len(checkpoint.tensors),
        "parameters": sum(spec.numel for spec in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "dtype": dict(dtypes.most_common()),
        "files": list(checkpoint.layout),
        "architectures": list(checkpoint.architectures),
        "provenance": None if receipt is None else dict(receipt),
        "model_type": checkpoint.model_type,
        "layers": _setting(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        "hidden_size": _setting(config, "hidden_size", "n_embd", "d_model", "dim"),
        "vocabulary": _setting(config, "vocab_size"),
        "tied": _is_tied(checkpoint),
        "quantisation": quantised_by(checkpoint),
        "fp8_weights": len(scales_of(checkpoint).specs),
    }
    weights = {name: spec for name, spec in checkpoint.tensors.items() if len(spec.shape) > 1}
    return Inspection(checkpoint.source, facts, groups=_grouped(weights), receipt=receipt)


def _setting(config: Json, *names: str) -> int | None:
    """A whole number of the config, or of the text model's config inside it."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        for name in names:
            value = values.get(name)
            if type(value) is int:
                return value
    return None


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the output head is the input embedding: no tensor of its own, and the config says."""
    flag = checkpoint.config.get("tie_word_embeddings")
    return flag is True and not any(n.endswith("lm_head.weight") for n in checkpoint.tensors)
