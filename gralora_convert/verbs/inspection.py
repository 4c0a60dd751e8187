"""`inspect`: what is this folder? An adapter, several, or a dense checkpoint; headers alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gralora_convert.adapters import (
    CONFIG_NAME,
    WEIGHTS,
    Adapter,
    GraloraConfig,
    Group,
    LoraConfig,
    Scan,
    chain_findings,
    extra_findings,
    group,
    parse_key,
    read_config,
    scan_adapter,
)
from gralora_convert.base import quantised_by, scales_of
from gralora_convert.disk import RECEIPT_NAME, Checkpoint, TensorSpec, load_json, locate, read_bytes
from gralora_convert.errors import Finding, Report, UnreadableError, error, note, warning
from gralora_convert.verbs.serving import served_rank

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLE = 4096  # bytes of a factor that are looked at: a hint, not a proof

Json = Mapping[str, object]


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is, as far as it tells: config and tensors each on its own."""

    kind: str | None
    dialect: str
    r: object
    k: object
    hybrid_r: object
    alpha: object
    scaling: float | None
    bias: object
    modules: list[str]
    parameters: int
    dtype: list[str]
    exact_lora_rank: int | None
    base_model: object
    peft_version: object
    file: str | None
    tensors: int
    bytes: int


@dataclass(frozen=True)
class SoundFacts(AdapterFacts):
    """What an adapter is whose parts agree: also whether servers take it, and what it has more."""

    exact_lora_rank: int
    max_lora_rank: int | None
    biases: int
    saved: list[str]
    also: list[str]
    beyond_factors: list[str]
    unsupported: list[str]


@dataclass(frozen=True)
class CheckpointFacts:
    """What a dense checkpoint is."""

    kind: Literal["dense"]
    tensors: int
    parameters: int
    bytes: int
    dtype: dict[str, int]
    files: list[str]
    architectures: list[str]
    provenance: Json | None
    model_type: str | None
    layers: int | None
    hidden_size: int | None
    vocabulary: int | None
    tied: bool
    quantisation: str | None
    fp8_weights: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the folder, file or model `name` holds.

    `report` is what is wrong with it, `groups` are its modules (of a checkpoint: its matrices),
    `receipt` is what this tool wrote beside it. `facts` is None where there are adapters in
    sub-folders alone, which are `inner`.
    """

    name: str
    facts: AdapterFacts | CheckpointFacts | None
    report: Report = field(default_factory=Report)
    groups: Sequence[Group] = ()
    receipt: Json | None = None
    inner: Mapping[str, "Inspection"] = field(default_factory=dict)

    def __repr__(self) -> str:
        kind = self.document["kind"]
        return f"Inspection({self.name!r}, {kind!r}, {len(self.report.findings)} findings)"

    @property
    def document(self) -> dict[str, object]:
        """It as JSON."""
        if self.facts is None:
            adapters = {folder: inner.document for folder, inner in self.inner.items()}
            return {"kind": "adapters", "adapters": adapters}
        if isinstance(self.facts, CheckpointFacts):
            return dict(vars(self.facts))
        findings = [finding.as_json() for finding in self.report.findings]
        return {**vars(self.facts), "valid": self.report.ok, "findings": findings}


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
        found = {folder.name: _of_adapter(folder, str(folder)) for folder in inner}
        return Inspection(str(path), None, inner=found)


# adapters -----------------------------------------------------------------------------------------


def _of_adapter(folder: Path, name: str) -> Inspection:
    scan = scan_adapter(folder)
    report = Report.of([*scan.report.findings, *_hints(scan, folder)])
    receipt = folder / RECEIPT_NAME
    made = load_json(receipt) if receipt.is_file() else None
    return Inspection(name, _facts(folder, scan), report, _groups(scan), made)


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
    yield from extra_findings(scan.adapter)
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


def _facts(folder: Path, scan: Scan) -> AdapterFacts:
    adapter, file, read = scan.adapter, scan.file, read_config(folder)
    values = read.values if adapter is None else adapter.config.to_dict()
    stored = list(file.tensors.values()) if file else []
    keys = [parse_key(spec.name) for spec in stored]
    methods = {"GRALORA": "gralora", "LORA": "lora"}
    found = next((key.method for key in keys if key.method), None)
    method = methods.get(str(values.get("peft_type"))) if values else found
    is_lora = method == "lora"
    hybrid_r = 0 if is_lora else values.get("hybrid_r", 0)
    modules, specs = dict.fromkeys(key.name for key in keys if key.role in ("A", "B")), stored
    if adapter is not None:
        modules = dict.fromkeys(adapter.modules)
        specs = [spec for roles in adapter.roles.values() for spec in roles.values()]
    facts = AdapterFacts(
        kind="hybrid" if method == "gralora" and hybrid_r else method,
        dialect=read.dialect,
        r=values.get("r"),
        k=1 if is_lora else values.get("gralora_k"),
        hybrid_r=hybrid_r,
        alpha=values.get("lora_alpha" if is_lora else "alpha"),
        scaling=None,
        bias=values.get("bias"),
        modules=list(modules),
        parameters=sum(spec.numel for spec in specs),
        dtype=sorted({spec.dtype for spec in specs}),
        exact_lora_rank=None,
        base_model=values.get("base_model_name_or_path"),
        peft_version=values.get("peft_version"),
        file=file.path.name if file else None,
        tensors=len(stored),
        bytes=sum(spec.nbytes for spec in stored),
    )
    return facts if adapter is None else _sound(facts, adapter)


def _sound(facts: AdapterFacts, adapter: Adapter) -> SoundFacts:
    config = adapter.config
    if isinstance(config, GraloraConfig):
        scaling, exact = config.scaling, config.gralora_k * config.r + config.hybrid_r
    else:
        scaling = config.scaling("")
        exact = max((config.rank(module) for module in adapter.modules), default=config.r)
    return SoundFacts(
        **vars(facts) | {"scaling": scaling, "exact_lora_rank": exact},
        max_lora_rank=served_rank(exact),
        biases=len(adapter.biases),
        saved=list(adapter.saved),
        also=_also(adapter),
        beyond_factors=list(adapter.unsupported),
        unsupported=[*adapter.unsupported, *_misread(config)],
    )


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
    facts = CheckpointFacts(
        kind="dense",
        tensors=len(checkpoint.tensors),
        parameters=sum(spec.numel for spec in checkpoint.tensors.values()),
        bytes=checkpoint.nbytes,
        dtype=dict(dtypes.most_common()),
        files=list(checkpoint.layout),
        architectures=list(checkpoint.architectures),
        provenance=receipt,
        model_type=checkpoint.model_type,
        layers=_setting(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        hidden_size=_setting(config, "hidden_size", "n_embd", "d_model", "dim"),
        vocabulary=_setting(config, "vocab_size"),
        tied=_is_tied(checkpoint),
        quantisation=quantised_by(checkpoint),
        fp8_weights=len(scales_of(checkpoint).specs),
    )
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
