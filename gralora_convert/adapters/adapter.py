"""An adapter on disk: config, keys and tensors that agree. Headers only; values when asked for.

`scan_adapter` reports everything that is wrong in one run and never raises for a bad adapter;
`Adapter.open` refuses anything with an error. Codes and verdicts are stable words.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

from gralora_convert.adapters.config import GraloraConfig, LoraConfig, read_config, source_of
from gralora_convert.adapters.contents import contents_of
from gralora_convert.adapters.folder import folder_of, read_weights
from gralora_convert.adapters.keys import Role, parse_key
from gralora_convert.adapters.rules import LARGEST_FLOAT32, way_out
from gralora_convert.adapters.shapes import lora_shapes
from gralora_convert.disk import (
    FLOATING,
    TensorFile,
    TensorSpec,
    load_json,
    measured,
    read_torch,
)
from gralora_convert.errors import (
    Finding,
    InvalidAdapterError,
    MisuseError,
    Report,
    UnreadableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    import torch

    from gralora_convert.delta import Gralora, Lora

D = TypeVar("D", "Gralora", "Lora")

LARGEST_UPDATE = 1e140  # its square times all elements of the largest matrix is a float64


@runtime_checkable
class Live(Protocol):
    """An adapter in memory that can be written down: what `attach` returns."""

    def adapter(self) -> "Adapter": ...


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Adapter:
    """A valid adapter: every tensor of its file has a place.

    `roles` maps module -> role -> tensor, `biases` module -> trained bias (absolute), `saved`
    parameter path in memory -> full tensor; `frozen` parameter path -> the copy of a base weight
    that PEFT saves beside a targeted head; `ignored` names the keys that hold nothing new, with the
    reason. `unsupported` names what a LoRA has beyond factors. Modules are named as in memory, in
    natural order.
    """

    path: Path
    config: GraloraConfig | LoraConfig
    dialect: Literal["peft", "authors"]
    file: TensorFile
    modules: tuple[str, ...]
    roles: Mapping[str, Mapping[Role, TensorSpec]]
    biases: Mapping[str, TensorSpec]
    saved: Mapping[str, TensorSpec]
    frozen: Mapping[str, TensorSpec]
    ignored: Mapping[str, str]
    unsupported: tuple[str, ...]
    findings: tuple[Finding, ...]
    _digest: list[str] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def open(cls, path: "AdapterLike") -> "Adapter":
        """The adapter in the folder `path`, or of that name on the Hub (its cache first).

        An open adapter is itself; of one that is attached to a model it is a copy as it is now.

        Raises:
            InvalidAdapterError: it has errors (all are listed in `findings`).
            UnreadableError: there is no such folder.

        >>> adapter = Adapter.open("fixtures/peft-0.21.2/llama-gralora")
        >>> adapter.kind
        'gralora'
        """
        if isinstance(path, Adapter):
            return path
        if isinstance(path, Live):
            return path.adapter()
        if not isinstance(path, str | Path):
            raise TypeError(f"{path!r:.99} is neither an adapter nor its folder or name")
        scan = scan_adapter(path)
        scan.report.require_ok(path)
        assert scan.adapter is not None
        return scan.adapter

    def __repr__(self) -> str:
        return f"Adapter({str(self.path)!r}, {self.title}, {len(self.modules)} modules)"

    @property
    def title(self) -> str:
        """Its kind and sizes, in a line: `gralora, r = 64, k = 4, alpha = 128`."""
        config = self.config
        if not isinstance(config, GraloraConfig):
            return f"{self.kind}, r = {config.r}, alpha = {config.lora_alpha:g}"
        general = f", hybrid_r = {config.hybrid_r}" if config.hybrid_r else ""
        return f"{self.kind}, r = {config.r}, k = {self.blocks}{general}, alpha = {config.alpha:g}"

    @property
    def kind(self) -> Literal["gralora", "hybrid", "lora"]:
        """Which of the formats it is; GraLoRA with hybrid_r > 0 is `hybrid`."""
        if isinstance(self.config, LoraConfig):
            return "lora"
        return "hybrid" if self.config.hybrid_r else "gralora"

    @property
    def blocks(self) -> int:
        """k: blocks per side of each module's delta; 1 for LoRA."""
        return self.config.gralora_k if isinstance(self.config, GraloraConfig) else 1

    @property
    def base_source(self) -> str | None:
        """The base model that the config names, with its revision where that is of the Hub; None
        when it names none."""
        return source_of(self.config.base_model_name_or_path, self.config.revision)

    @property
    def values(self) -> Mapping[str, TensorSpec]:
        """What replaces the base's values, by the path of the parameter: biases, saved modules."""
        return {f"{module}.bias": spec for module, spec in self.biases.items()} | dict(self.saved)

    @property
    def model_config(self) -> Mapping[str, object]:
        """The `config.json` that some trainers save beside the adapter; {} when there is none."""
        path = self.path / "config.json"
        return load_json(path, allow_non_finite=True) if path.is_file() else {}

    @property
    def task_type(self) -> str | None:
        """What the trained model is for. A CrossEncoder says so in the file of its pipeline
        (sentence-transformers 6.2, Transformer), whatever stands in the config."""
        path = self.path / "sentence_bert_config.json"
        said = load_json(path, allow_non_finite=True) if path.is_file() else {}
        is_classifier = said.get("transformer_task") == "sequence-classification"
        return "SEQ_CLS" if is_classifier else self.config.task_type

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the file by its own key."""
        return self.file.tensors

    def shape(self, module: str) -> tuple[int, int]:
        """out_features, in_features of one module."""
        roles = self.roles[module]
        if "embedding_A" in roles:  # (r, rows), (columns, r) of a weight (rows, columns)
            return roles["embedding_A"].shape[1], roles["embedding_B"].shape[0]
        if isinstance(self.config, LoraConfig):
            lora_a, lora_b = lora_shapes(module, roles, self.config)
            return lora_b[0], lora_a[1]
        a, b = roles["A"].shape, roles["B"].shape
        return b[0] * b[2], a[0] * a[1]

    def scaling(self, module: str) -> float:
        """The factor of B @ A of one module."""
        config = self.config
        return config.scaling if isinstance(config, GraloraConfig) else config.scaling(module)

    def factor_bytes(self, module: str) -> int:
        """Bytes of the module's factors once they are read (float32, float64 stays)."""
        specs = self.roles[module].items()
        whole = dict(zip(("A", "B"), self._diagonal(module), strict=True))
        return sum(
            (8 if spec.dtype == "F64" else 4) * spec.numel * whole.get(role, 1)
            for role, spec in specs
        )

    def short_dtype(self, module: str) -> str | None:
        """The dtype of 16 bits that factors of a module are stored in, if any is: other tools
        round the update to it."""
        short = {spec.dtype for spec in self.roles[module].values()} & {"F16", "BF16"}
        return min(short, default=None)

    def _diagonal(self, module: str) -> tuple[int, int]:
        """Blocks on the diagonals of A and B, of which the file holds nothing else."""
        config = self.config
        return config.diagonal(module) if isinstance(config, LoraConfig) else (1, 1)

    def delta(self, module: str) -> "Gralora | Lora":
        """The update of one module, factors in float32 (float64 stays).

        Raises:
            InvalidAdapterError: a factor holds NaN or infinity.
            UnsupportedError: a LoRA whose update is more than scaling * B @ A.
        """
        self.require_plain()
        return self.factors(module)

    def factors(self, module: str) -> "Gralora | Lora":
        """What the factors of one module say, whatever else a LoRA has beyond them; dtypes as
        `delta`."""
        import torch

        from gralora_convert.delta import Gralora, Lora, direct_sum, is_finite

        if module not in self.roles:
            raise MisuseError(
                f"adapts no module {module!r}", where=self.path, hint="`modules` lists all."
            )

        def read(role: Role) -> torch.Tensor:
            spec = self.roles[module][role]
            tensor = read_torch(spec)
            if spec.dtype not in FLOATING:  # 8 bits, of which torch does not say what is finite
                tensor = tensor.float()
            if not is_finite(tensor):
                raise InvalidAdapterError(
                    f"{spec.name}: holds NaN or infinity", where=self.file.path,
                    hint="Training diverged, or the file is damaged: use an earlier checkpoint.",
                )  # fmt: skip
            return tensor if tensor.dtype == torch.float64 else tensor.float()

        if self.kind == "lora":
            a_blocks, b_blocks = self._diagonal(module)
            a, b = direct_sum(read("A").chunk(a_blocks)), direct_sum(read("B").chunk(b_blocks))
            return self._bounded(module, Lora(a, b, self.scaling(module)))
        general = (read("general_A"), read("general_B")) if self.kind == "hybrid" else (None, None)
        delta = Gralora(read("A"), read("B"), self.scaling(module), *general)
        return self._bounded(module, delta)

    def _bounded(self, module: str, delta: "D") -> "D":
        """The delta, if its squares can be summed in float64: factors of float64 may exceed it."""
        largest = abs(delta.scaling) * _largest(delta.A) * _largest(delta.B)
        if not largest < LARGEST_UPDATE:
            raise UnsupportedError(
                f"the product of its factors is up to {largest:.3g}, less than "
                f"{LARGEST_UPDATE:.0g} was needed", where=module,
                hint="Training diverged: use an earlier checkpoint.",
            )  # fmt: skip
        return delta

    def require_plain(self, allowed: Collection[str] = ()) -> None:
        """Raises `UnsupportedError` when factors alone do not determine a LoRA's update, unless
        all that it has beyond them is `allowed`."""
        beyond = [feature for feature in self.unsupported if feature not in allowed]
        if beyond:
            keys = (key for key, why in self.ignored.items() if why.endswith(tuple(beyond)))
            held = sorted({parse_key(key).name for key in keys})
            named = self.config.extra.get("target_parameters")
            held += [str(name) for name in named] if isinstance(named, list) else []
            more = f" and {len(held) - 2} more" if held[2:] else ""
            where = f" (in {', '.join(held[:2])}{more})" if held else ""
            raise UnsupportedError(
                f"is a LoRA with {', '.join(beyond)}{where}: its update is not scaling * B @ A",
                where=self.path,
                hint=way_out(beyond[0]),
            )

    def sha256(self) -> str:
        """The digest of the weights file, as `sha256sum` prints it; computed once."""
        if not self._digest:
            self._digest.append(measured(self.file.path).sha256 or "")
        return self._digest[0]


AdapterLike = Adapter | Live | str | Path


@dataclass(frozen=True, slots=True)
class Scan:
    """What a folder shows: the adapter (None when it has errors), its weights file (None when it
    cannot be read) and everything there is to say about them alone."""

    adapter: Adapter | None
    file: TensorFile | None
    report: Report


def scan_adapter(path: str | Path) -> Scan:
    """Reads the adapter in the folder `path`, or of that name on the Hub, whatever its state.

    Raises:
        UnreadableError: `path` is no folder that can be read, and no adapter of the Hub.
    """
    folder = folder_of(path)
    config = read_config(folder)
    findings = list(config.findings)
    try:
        file = read_weights(folder, findings)
    except OSError as problem:
        raise UnreadableError(f"cannot be read: {problem.strerror}", where=folder) from problem
    if file is None:
        return Scan(None, None, Report.of(findings))
    held = contents_of(config, file)
    report = Report.of([*findings, *held.findings])
    if not report.ok or config.config is None:
        return Scan(None, file, report)
    adapter = Adapter(
        folder, config.config, config.dialect, file, tuple(sorted(held.roles, key=natural)),
        held.roles, held.biases, held.saved, held.frozen, held.ignored,
        tuple(held.unsupported), report.findings,
    )  # fmt: skip
    return Scan(adapter, file, report)


def _largest(factor: "torch.Tensor") -> float:
    """The largest magnitude that a factor holds, or, of float32, could hold."""
    low, high = factor.aminmax() if factor.itemsize == 8 else (0.0, LARGEST_FLOAT32)
    return max(-float(low), float(high))


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 10 else (1, 0, part)
        for part in name.split(".")
    ]
