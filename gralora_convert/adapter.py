"""An adapter on disk: config, keys and tensors that agree. Headers only; values when asked for.

`scan_adapter` reports everything that is wrong in one run and never raises for a bad adapter;
`Adapter.open` refuses anything with an error. Codes and verdicts are stable words.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from gralora_convert.config import CONFIG_NAME, ConfigFile, GraloraConfig, LoraConfig, read_config
from gralora_convert.errors import UnreadableError, UnsupportedError
from gralora_convert.keys import Key, Role, key_of, parse_key
from gralora_convert.report import Finding, Report, error, note, warning
from gralora_convert.strictjson import JsonError
from gralora_convert.targets import is_saved, select
from gralora_convert.tensors import (
    FLOATING,
    TensorFile,
    TensorFileError,
    TensorSpec,
    open_regular,
    read_tensor_file,
    read_torch,
)

if TYPE_CHECKING:
    from gralora_convert.delta import Gralora, Lora

__all__ = ["Adapter", "Scan", "scan_adapter"]

K = TypeVar("K", str, Role)

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SHARDED = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model.*\.index\.json")
_REASONS = {
    "lfs-pointer": "weights-lfs-pointer",
    "unsafe-pickle": "weights-unsafe-pickle",
    "nested": "weights-nested",
}
_INPUT_EMBEDDINGS = re.compile(r"(.*\.)?(\w*embed\w*|wte|shared)\.weight")
_OUTPUT_EMBEDDINGS = re.compile(r"(.*\.)?(lm_head|embed_out|output)\.weight")
_FACTORS: tuple[Role, ...] = ("A", "B", "general_A", "general_B")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A valid adapter: every tensor of its file has a place.

    `roles` maps module -> role -> tensor, `biases` module -> trained bias (absolute), `saved`
    parameter path in memory -> full tensor; `ignored` names the keys that hold nothing new, with
    the reason. Modules are named as in memory, in natural order.
    """

    path: Path
    config: GraloraConfig | LoraConfig
    dialect: Literal["peft", "authors"]
    file: TensorFile
    modules: tuple[str, ...]
    roles: Mapping[str, Mapping[Role, TensorSpec]]
    biases: Mapping[str, TensorSpec]
    saved: Mapping[str, TensorSpec]
    ignored: Mapping[str, str]
    findings: tuple[Finding, ...]

    @classmethod
    def open(cls, path: str | Path) -> "Adapter":
        """The adapter in the folder `path`.

        Raises:
            InvalidAdapterError: it has errors (all are listed in `findings`).
            UnreadableError: there is no such folder.

        >>> adapter = Adapter.open("fixtures/peft-0.21.2/llama-gralora")
        >>> adapter.kind
        'gralora'
        """
        scan = scan_adapter(path)
        scan.report.require_ok(path)
        assert scan.adapter is not None
        return scan.adapter

    @property
    def kind(self) -> Literal["gralora", "hybrid", "lora"]:
        if isinstance(self.config, LoraConfig):
            return "lora"
        return "hybrid" if self.config.hybrid_r else "gralora"

    @property
    def blocks(self) -> int:
        """k: blocks per side of each module's delta; 1 for LoRA."""
        return self.config.gralora_k if isinstance(self.config, GraloraConfig) else 1

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self.file.tensors

    def shape(self, module: str) -> tuple[int, int]:
        """out_features, in_features of one module."""
        roles = self.roles[module]
        a, b = roles["A"].shape, roles["B"].shape
        return (b[0], a[1]) if self.kind == "lora" else (b[0] * b[2], a[0] * a[1])

    def scaling(self, module: str) -> float:
        """The factor of B @ A of one module."""
        config = self.config
        return config.scaling if isinstance(config, GraloraConfig) else config.scaling(module)

    def factor_bytes(self, module: str) -> int:
        """Bytes of the module's factors once they are read (float32)."""
        return sum(4 * spec.numel for spec in self.roles[module].values())

    def delta(self, module: str) -> "Gralora | Lora":
        """The update of one module, factors in float32 (float64 stays).

        Raises:
            UnsupportedError: a LoRA whose update is more than scaling * B @ A.
        """
        import torch

        from gralora_convert.delta import Gralora, Lora

        def read(role: Role) -> torch.Tensor:
            tensor = read_torch(self.roles[module][role])
            return tensor if tensor.dtype == torch.float64 else tensor.float()

        if self.kind == "lora":
            self.require_plain()
            return Lora(read("A"), read("B"), self.scaling(module))
        general = (read("general_A"), read("general_B")) if self.kind == "hybrid" else (None, None)
        return Gralora(read("A"), read("B"), self.scaling(module), *general)

    def require_plain(self) -> None:
        """Raises `UnsupportedError` when factors alone do not determine a LoRA's update."""
        if not isinstance(self.config, LoraConfig):
            return
        found = sorted(_beyond_factors(self.config, self.roles))
        if found:
            raise UnsupportedError(
                f"is a LoRA with {', '.join(found)}: its update is not scaling * B @ A",
                where=self.path,
                hint="Merge it with PEFT.",
            )

    def sha256(self) -> str:
        """The digest of the weights file, as `sha256sum` prints it."""
        with open_regular(self.file.path) as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def _beyond_factors(
    config: LoraConfig, roles: Mapping[str, Mapping[Role, TensorSpec]]
) -> Iterator[str]:
    present = {role for of_module in roles.values() for role in of_module}
    if config.use_dora or "magnitude" in present:
        yield "DoRA magnitudes"
    if "lora_bias" in present or config.lora_bias:
        yield "biases of lora_B"
    if present & {"embedding_A", "embedding_B"}:
        yield "embedding factors"
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        yield f"{init} initialisation, which changed the base"
    for name in (
        "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora",
        "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "megatron_config",
    ):  # fmt: skip
        if config.extra.get(name):
            yield name


@dataclass(frozen=True, slots=True)
class Scan:
    """What a folder shows: the adapter (None when it has errors), its weights file (None when it
    cannot be read) and everything there is to say about them alone."""

    adapter: Adapter | None
    file: TensorFile | None
    report: Report


def scan_adapter(path: str | Path) -> Scan:
    """Reads the adapter in the folder `path`, whatever its state.

    Raises:
        UnreadableError: `path` is no folder that can be read.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise UnreadableError(
            "is not a folder; the folder of an adapter was needed", where=path,
            hint=f"It holds {CONFIG_NAME} and {WEIGHTS[0]}.",
        )  # fmt: skip
    config = read_config(folder)
    findings = list(config.findings)
    file = _read_weights(folder, findings)
    if file is None:
        return Scan(None, None, Report.of(findings))
    places = _Places(config, file, findings)
    report = Report.of(findings)
    if not report.ok or config.config is None:
        return Scan(None, file, report)
    adapter = Adapter(
        folder, config.config, config.dialect, file, tuple(sorted(places.roles, key=natural)),
        places.roles, places.biases, places.saved, places.ignored, report.findings,
    )  # fmt: skip
    return Scan(adapter, file, report)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 10 else (1, 0, part)
        for part in name.split(".")
    ]


def _read_weights(folder: Path, findings: list[Finding]) -> TensorFile | None:
    present = [name for name in WEIGHTS if (folder / name).exists()]
    if not present:
        shards = sorted(entry.name for entry in folder.iterdir() if _SHARDED.fullmatch(entry.name))
        if shards:
            findings.append(
                error(
                    "weights-sharded",
                    folder / shards[0],
                    "PEFT does not read sharded adapters",
                    f"Save all tensors in one {WEIGHTS[0]}.",
                )
            )
        else:
            findings.append(error("weights-missing", folder, f"{WEIGHTS[0]} is missing"))
        return None
    if len(present) > 1:
        findings.append(
            warning(
                "weights-ambiguous", folder, f"holds {' and '.join(present)}; PEFT reads the first"
            )
        )
    path = folder / present[0]
    try:
        file = read_tensor_file(path)
    except (TensorFileError, JsonError, UnreadableError) as problem:
        reason = problem.reason if isinstance(problem, TensorFileError) else ""
        code = _REASONS.get(reason, "weights-unreadable")
        findings.append(error(code, path.name, problem.message, problem.hint))
        return None
    if file.pickled:
        findings.append(
            note("weights-pickle", path.name, "is a pickle; safetensors is read by every tool")
        )
    elif file.metadata is None:
        findings.append(note("metadata-missing", path.name, "has no __metadata__"))
    elif file.metadata.get("format") != "pt":
        found = file.metadata.get("format")
        findings.append(
            note("metadata-format", path.name, f"says format {found!r}, PEFT writes 'pt'")
        )
    if not file.tensors:
        findings.append(error("weights-empty", path.name, "holds no tensors"))
        return None
    return file


class _Places:
    """Gives every tensor of the file its place, and collects what is wrong with it."""

    def __init__(self, config: ConfigFile, file: TensorFile, findings: list[Finding]) -> None:
        self.config, self.file, self.findings = config, file, findings
        self.values = config.values
        self.is_lora = self.values.get("peft_type") == "LORA"
        self.roles: dict[str, dict[Role, TensorSpec]] = {}
        self.biases: dict[str, TensorSpec] = {}
        self.saved: dict[str, TensorSpec] = {}
        self.ignored: dict[str, str] = {}
        keys = [parse_key(name) for name in file.tensors]
        self._check_spelling(keys)
        for key in keys:
            self._place(key, keys)
        self._check_modules()
        self._check_dtypes()
        if config.config is not None:
            self._check_targets()

    def _say(self, finding: Finding) -> None:
        self.findings.append(finding)

    def _check_spelling(self, keys: list[Key]) -> None:
        factors = [key for key in keys if key.method is not None]
        bare = [key for key in keys if not key.prefixed]
        if bare:
            self._say(error(
                "key-prefix-missing", bare[0].key,
                f"{len(bare)} keys lack the prefix 'base_model.model.'; PEFT would not load them",
                "Rename them, or save with PeftModel.save_pretrained.",
            ))  # fmt: skip
        wrapped = [key for key in keys if key.wrappers]
        if wrapped:
            self._say(error(
                "key-wrapper-prefix", wrapped[0].key,
                f"{len(wrapped)} keys hold {', '.join(wrapped[0].wrappers)} of a wrapped model; "
                "PEFT would not load them",
                "Save the unwrapped model.",
            ))  # fmt: skip
        names = Counter(key.adapter_name for key in factors if key.adapter_name is not None)
        for name, count in names.items():
            example = next(key.key for key in factors if key.adapter_name == name)
            what = f"{count} keys hold the adapter name {name!r}"
            if name == "default":
                self._say(
                    warning("key-adapter-name", example, f"{what}; PEFT reads them only as such")
                )
            else:
                self._say(error(
                    "key-adapter-name", example, f"{what}; PEFT would not load them",
                    "Save with PeftModel.save_pretrained.",
                ))  # fmt: skip

    def _place(self, key: Key, keys: list[Key]) -> None:
        spec = self.file.tensors[key.key]
        match key.role:
            case "foreign":
                self._say_foreign(key)
            case "bias":
                if self.values.get("bias", "none") == "none":
                    self._say(error(
                        "bias-unexpected", key.key, "is a bias, but bias is 'none' in the config",
                        "PEFT would write it into the base.",
                    ))  # fmt: skip
                self._put(self.biases, key.name, spec, key)
            case "base_weight":
                self._place_base_weight(key)
            case "parameter":
                self._place_parameter(key, spec, keys)
            case _:
                if key.method == "lora" and not self.is_lora:
                    self._say_foreign(key)
                elif key.method == "gralora" and self.is_lora:
                    if not any(f.code == "peft-type-mismatch" for f in self.findings):
                        self._say(error(
                            "peft-type-mismatch", key.key,
                            "is a GraLoRA tensor, but peft_type is LORA",
                            "Set peft_type to GRALORA.",
                        ))  # fmt: skip
                else:
                    self._put(self.roles.setdefault(key.name, {}), key.role, spec, key)

    def _put(self, places: dict[K, TensorSpec], place: K, spec: TensorSpec, key: Key) -> None:
        if place in places:
            self._say(error(
                "key-duplicate-role", key.key, f"means the same tensor as {places[place].name}"
            ))  # fmt: skip
        places[place] = spec

    def _say_foreign(self, key: Key) -> None:
        if key.leaf.startswith("gralora_"):
            self._say(error(
                "key-leaf-unknown", key.key, f"ends in {key.leaf!r} and more, which is no tensor "
                "of GraLoRA", "gralora_A and gralora_B stand without '.weight'.",
            ))  # fmt: skip
        elif not any(f.code == "key-foreign-method" for f in self.findings):
            self._say(error(
                "key-foreign-method", key.key, "belongs to another method than peft_type says"
            ))  # fmt: skip

    def _place_base_weight(self, key: Key) -> None:
        last = key.name.rpartition(".")[2]
        beside = [key_of(key.name, "A"), key_of(key.name, "A", "lora")]
        if last in ("lm_head", "embed_tokens") and any(k in self.file.tensors for k in beside):
            self.ignored[key.key] = (
                "the frozen base weight, which PEFT saves beside a targeted head"
            )
            self._say(
                note("embeddings-saved", key.key, "is the frozen base weight; it is not used")
            )
        else:
            self._say(error(
                "base-weight-in-adapter", key.key,
                "is a base weight; PEFT would overwrite the base with it",
            ))  # fmt: skip

    def _place_parameter(self, key: Key, spec: TensorSpec, keys: list[Key]) -> None:
        bias = self.values.get("bias", "none")
        if key.infix is not None:
            if key.key.endswith(f"{key.infix}.bias"):
                self.ignored[key.key] = "a second copy of a bias"
                self._say(note("bias-saved-twice", key.key, "is a second copy; it is not used"))
            else:
                self._say(error(
                    "key-modules-to-save-infix", key.key,
                    f"holds {key.infix!r}; PEFT saves the bare parameter name and cannot load this",
                ))  # fmt: skip
            return
        config = self.config.config
        if config is not None and is_saved(config, key.name):
            self._put(self.saved, key.name, spec, key)
        elif key.name.endswith(".bias") and bias == "all":
            self._put(self.biases, key.name.removesuffix(".bias"), spec, key)
        elif key.name.endswith(".bias") and bias == "none":
            self._say(error(
                "bias-unexpected", key.key, "is a bias, but bias is 'none' in the config"
            ))  # fmt: skip
        elif self._is_embedding(key, keys):
            self._put(self.saved, key.name, spec, key)
            self._say(
                note("embeddings-saved", key.key, "is a whole embedding; it replaces the base's")
            )
        elif config is not None or not self.values:
            self._say(error(
                "tensor-unclaimed", key.key,
                "is no tensor of the adapter: neither a factor nor a part of modules_to_save",
                "PEFT would write it into the base.",
            ))  # fmt: skip

    @staticmethod
    def _is_embedding(key: Key, keys: list[Key]) -> bool:
        if _INPUT_EMBEDDINGS.fullmatch(key.name):
            return True
        has_input = any(k.role == "parameter" and _INPUT_EMBEDDINGS.fullmatch(k.name) for k in keys)
        return has_input and _OUTPUT_EMBEDDINGS.fullmatch(key.name) is not None

    def _check_modules(self) -> None:
        if self.is_lora:
            for module, roles in self.roles.items():
                self._check_lora(module, roles)
            return
        sizes = [self.values.get(n, d) for n, d in (("r", 32), ("gralora_k", 2), ("hybrid_r", 0))]
        if not all(type(size) is int for size in sizes) or not self.roles:
            return
        r, k, h = (int(str(size)) for size in sizes)
        generals = any("general_A" in x or "general_B" in x for x in self.roles.values())
        if h > 0 and not generals:
            self._say(error(
                "hybrid-rank-mismatch", CONFIG_NAME,
                f"hybrid_r is {h}, but no module has gralora_A_general and gralora_B_general",
            ))  # fmt: skip
        for module, roles in self.roles.items():
            if all(spec.nbytes for spec in roles.values()):
                self._check_missing(module, roles, h if generals else 0)
                self._check_gralora(module, roles, r, k)
                self._check_general(module, roles, h)
            else:
                self._say(error(
                    "tensor-empty", module, "has a tensor without elements",
                    "Saved from one rank of a sharded run? Gather the parameters before saving.",
                ))  # fmt: skip

    def _check_missing(self, module: str, roles: Mapping[Role, TensorSpec], h: int) -> None:
        for role in _FACTORS if h else _FACTORS[:2]:
            if role not in roles:
                self._say(error(
                    "missing-tensor", module, f"{key_of(module, role)} is missing",
                    "PEFT would fill it with its initial value, which may be random.",
                ))  # fmt: skip

    def _check_gralora(self, module: str, roles: Mapping[Role, TensorSpec], r: int, k: int) -> None:
        if "A" not in roles or "B" not in roles:
            return
        a, b = roles["A"].shape, roles["B"].shape
        found = f"gralora_A {a}, gralora_B {b}"
        agree = len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1]
        if not agree or (a[2] != r and a[1] == r and b[2] == r):
            self._say(error(
                "tensor-shape", module, f"{found}; with r={r} and gralora_k={k}, "
                f"({k}, in/{k}, {r}) and ({k}, {r}, out/{k}) were needed",
                "Transposed or swapped?",
            ))  # fmt: skip
            return
        if a[0] != k:
            self._say(error(
                "k-mismatch", module, f"{found}: k is {a[0]}, gralora_k of the config is {k}"
            ))  # fmt: skip
        if a[2] != r:
            self._say(
                error("rank-mismatch", module, f"{found}: r is {a[2]}, r of the config is {r}")
            )

    def _check_general(self, module: str, roles: Mapping[Role, TensorSpec], h: int) -> None:
        if "general_A" not in roles or "general_B" not in roles:
            return
        a, b = roles["general_A"].shape, roles["general_B"].shape
        found = f"gralora_A_general {a}, gralora_B_general {b}"
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not self._fits(roles, a[1], b[0]):
            self._say(
                error("tensor-shape", module, f"{found}; ({h}, in) and (out, {h}) were needed")
            )
        elif a[0] != h:
            self._say(error(
                "hybrid-rank-mismatch", module,
                f"{found}: hybrid_r is {a[0]}, hybrid_r of the config is {h}",
            ))  # fmt: skip

    @staticmethod
    def _fits(roles: Mapping[Role, TensorSpec], in_features: int, out_features: int) -> bool:
        a, b = roles.get("A"), roles.get("B")
        return (a is None or len(a.shape) != 3 or a.shape[0] * a.shape[1] == in_features) and (
            b is None or len(b.shape) != 3 or b.shape[0] * b.shape[2] == out_features
        )

    def _check_lora(self, module: str, roles: Mapping[Role, TensorSpec]) -> None:
        if roles.keys() & {"embedding_A", "embedding_B"}:
            return
        for role in _FACTORS[:2]:
            if role not in roles:
                missing = key_of(module, role, "lora")
                self._say(error("missing-tensor", module, f"{missing} is missing"))
                return
        a, b = roles["A"].shape, roles["B"].shape
        config = self.config.config
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            self._say(error(
                "tensor-shape", module, f"lora_A {a}, lora_B {b}; (r, in) and (out, r) were needed"
            ))  # fmt: skip
        elif isinstance(config, LoraConfig) and config.rank(module) != a[0]:
            self._say(error(
                "rank-mismatch", module, f"r is {a[0]}, r of the config is {config.rank(module)}"
            ))  # fmt: skip

    def _check_dtypes(self) -> None:
        factors = [spec for roles in self.roles.values() for spec in roles.values()]
        for spec in factors:
            if spec.dtype.startswith("F") and spec.dtype not in FLOATING:
                self._say(warning(
                    "tensor-dtype-lossy", spec.name, f"has dtype {spec.dtype}, too coarse for it"
                ))  # fmt: skip
            elif spec.dtype not in FLOATING:
                self._say(error(
                    "tensor-dtype", spec.name, f"has dtype {spec.dtype}, a floating one was needed"
                ))  # fmt: skip
        found = sorted({spec.dtype for spec in factors})
        if len(found) > 1:
            self._say(note("tensor-dtype-mixed", self.file.path.name, f"holds {', '.join(found)}"))

    def _check_targets(self) -> None:
        config = self.config.config
        assert config is not None
        targets = config.target_modules
        if targets is None:
            self._say(error(
                "target-modules-null", CONFIG_NAME,
                "target_modules is null; PEFT would adapt the architecture's default modules",
                "Name the modules that were trained.",
            ))  # fmt: skip
            return
        if (isinstance(targets, str) and targets.lower() == "all-linear") or not self.roles:
            return
        try:
            chosen = set(select(config, self.roles))
        except UnsupportedError as problem:
            self._say(error("target-regex-invalid", CONFIG_NAME, problem.message, problem.hint))
            return
        if not chosen:
            self._say(error(
                "target-matches-nothing", CONFIG_NAME,
                f"target_modules {targets!r} selects none of the {len(self.roles)} modules here",
            ))  # fmt: skip
            return
        for module in self.roles:
            if module not in chosen:
                self._say(error(
                    "tensors-without-target", module,
                    "has tensors, but the config does not select it; PEFT would ignore them",
                ))  # fmt: skip
