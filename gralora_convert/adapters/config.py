"""`adapter_config.json` <-> `GraloraConfig`, `LoraConfig`: strict, and nothing is lost on the way.

Fields and defaults after PEFT 0.21.2 (tuners/gralora/config.py, tuners/lora/config.py, config.py);
the original authors' fields after SqueezeBits/GraLoRA (peft 0.11.2.dev0).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from gralora_convert.adapters.patterns import Patterns
from gralora_convert.adapters.rules import (
    FINDINGS_OF,
    PEFT_VERSION,
    header_findings,
    method_findings,
    missing_findings,
    unknown_findings,
    unsupported_features,
)
from gralora_convert.disk import is_there, load_json, parse_name
from gralora_convert.errors import (
    Finding,
    InvalidAdapterError,
    OutputError,
    Report,
    UnreadableError,
    error,
    note,
)

CONFIG_NAME = "adapter_config.json"
Json = Mapping[str, object]
V = TypeVar("V", int, float)


@dataclass(frozen=True, kw_only=True)
class _Configured:
    """What both configs share: fields of all methods, reading, writing, unknown fields survive."""

    METHOD: ClassVar[str]  # its `peft_type`

    peft_type: str = ""
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: Mapping[str, object] | None = None
    peft_version: str | None = PEFT_VERSION
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = type(self).__name__
        Report.of(self._own_findings()).require_ok(where)
        self._normalise()
        values = self.to_dict()
        findings = [*header_findings(values, where), *FINDINGS_OF[self.METHOD](values, where)]
        Report.of(findings).require_ok(where)

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """The names of all fields that are known, as the file spells them."""
        return frozenset(f.name for f in dataclasses.fields(cls)) - {"extra"}

    def _values(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.field_names()}

    def _own_findings(self) -> Iterator[Finding]:
        """What must hold of both configs. `peft_type` is a field because PEFT's class takes it."""
        where = type(self).__name__
        yield from method_findings(self._values(), where)
        found, extra = self.peft_type, self.extra
        if found in ("GRALORA", "LORA") and found != self.METHOD:
            yield error("peft-type-mismatch", where, f"peft_type is {found}, not {self.METHOD}")
        if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
            yield error("config-value-type", where, f"extra is {extra!r}, an object was needed")

    def _normalise(self) -> None:
        """Sets and tuples become what JSON has; the targets are a set to PEFT, here sorted. Old
        releases write null for no patterns."""
        for name, value in self._values().items():
            if value is None and name in ("rank_pattern", "alpha_pattern"):
                object.__setattr__(self, name, {})
            elif isinstance(value, set | frozenset | tuple | list):
                named = name == "target_modules" and all(isinstance(v, str) for v in value)
                plain = sorted(set(value)) if named else list(value)
                object.__setattr__(self, name, plain)

    def to_dict(self) -> dict[str, object]:
        """The fields as PEFT writes them; unknown ones are kept."""
        return dict(self.extra) | self._values()

    def to_json(self) -> bytes:
        """The bytes of `adapter_config.json`, the same on every run.

        Layout after PEFT 0.21.2, config.py, save_pretrained, but for `target_modules`, whose order
        is random there and sorted here.
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False).encode()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `adapter_config.json` into `folder`, which is made if it does not exist.

        Raises:
            OutputError: it cannot be written there.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / CONFIG_NAME).write_bytes(self.to_json())
        except (OSError, ValueError) as problem:
            raise OutputError(f"cannot be written: {problem}", where=folder) from problem

    @classmethod
    def from_dict(cls, values: Json) -> Self:
        """The config that the fields `values` describe, in the dialect of PEFT or of the original
        authors; those not known go into `extra`.

        Raises:
            InvalidAdapterError: with all findings.
        """
        if cls.METHOD == "GRALORA" and _is_authors(values):
            values = _from_authors(values)
        names = cls.field_names()
        known: dict[str, Any] = {name: value for name, value in values.items() if name in names}
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(**{"peft_version": None} | known, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The config in `folder`, which may be named by the file in it.

        Raises:
            InvalidAdapterError: it is missing, has errors (all are listed), or is of another kind.
            UnreadableError: a path that no file can have.
        """
        path = Path(folder)
        try:
            file = read_config(path.parent if path.name == CONFIG_NAME else path)
        except (OSError, ValueError) as problem:
            raise UnreadableError(f"is not a usable path: {problem}", where=folder) from problem
        Report.of(file.findings).require_ok(folder)
        if not isinstance(file.config, cls):
            found = file.values.get("peft_type")
            raise InvalidAdapterError(
                f"peft_type is {found}, {cls.METHOD} was needed", where=folder
            )
        return file.config


@dataclass(frozen=True)
class GraloraConfig(_Configured):
    """The configuration of a GraLoRA (hybrid_r = 0) or Hybrid GraLoRA adapter.

    Fields, order and defaults are those of `peft.GraloraConfig` (0.21.2), so that code moves over
    by changing an import. `extra` holds fields that are not known, as they were read.

    Raises:
        InvalidAdapterError: values of a wrong type or range, r not divisible by gralora_k.

    >>> GraloraConfig(r=64, gralora_k=4, alpha=128).scaling
    2.0
    """

    r: int = 32
    hybrid_r: int = 0
    target_modules: Sequence[str] | str | None = None
    alpha: float = 64
    gralora_dropout: float = 0.0
    gralora_k: int = 2
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    peft_type: str = field(default="GRALORA", kw_only=True)

    METHOD: ClassVar[str] = "GRALORA"

    @property
    def scaling(self) -> float:
        """alpha / (r + hybrid_r), of both parts (PEFT 0.21.2, tuners/gralora/layer.py)."""
        return self.alpha / (self.r + self.hybrid_r)


@dataclass(frozen=True)
class LoraConfig(_Configured):
    """The configuration of a LoRA adapter (`peft.LoraConfig`, 0.21.2), as far as factors mean
    something by it; everything else is kept in `extra`.

    Raises:
        InvalidAdapterError: values of a wrong type or range.

    >>> LoraConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}).scaling("layers.0.q_proj")
    4.0
    """

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str | None = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    peft_type: str = field(default="LORA", kw_only=True)

    METHOD: ClassVar[str] = "LORA"

    @property
    def exclude_modules(self) -> Sequence[str] | str | None:
        """Modules that are not adapted although `target_modules` names them."""
        found = self.extra.get("exclude_modules")
        return found if isinstance(found, str | list) else None

    def rank(self, module: str) -> int:
        """The rank of one module (PEFT 0.21.2, utils/other.py, get_pattern_key: first match).

        Raises:
            UnsupportedError: a pattern takes too long on this name.
        """
        return self._by_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """The scaling of one module: alpha / r, or alpha / sqrt(r) with `use_rslora`.

        Raises:
            UnsupportedError: a pattern takes too long on this name.
        """
        rank, alpha = (
            self.rank(module),
            self._by_pattern(self.alpha_pattern, module, self.lora_alpha),
        )
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @functools.cached_property
    def _patterns(self) -> Patterns:
        return Patterns()

    def _by_pattern(self, pattern: Mapping[str, V], module: str, default: V) -> V:
        match = self._patterns.match
        return next((v for k, v in pattern.items() if match(rf"(.*\.)?({k})$", module)), default)

    def diagonal(self, module: str) -> tuple[int, int]:
        """Blocks on the diagonals of A and of B, of which BD-LoRA stores nothing else; 1 for a
        factor that is stored whole.

        PEFT 0.21.2, tuners/lora/variants.py, BdLoraLinearVariant.

        >>> bd = {"target_modules_bd_b": ["q_proj"], "nblocks": 2}
        >>> LoraConfig(extra={"use_bdlora": bd}).diagonal("layers.0.q_proj")
        (1, 2)
        """
        found = self.extra.get("use_bdlora")
        if not isinstance(found, Mapping):
            return 1, 1
        for side, sizes in (("a", (found["nblocks"], 1)), ("b", (1, found["nblocks"]))):
            if any(name in module for name in found.get(f"target_modules_bd_{side}") or ()):
                return sizes
        return 1, 1

    def unsupported_features(self) -> tuple[str, ...]:
        """The fields that make an update something else than scaling * B @ A."""
        return tuple(unsupported_features(self.to_dict(), self.field_names()))


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What `adapter_config.json` holds: its raw `values` (in PEFT's dialect; empty when it cannot
    be read), the `config` (None when it has errors), and all findings about it."""

    values: Json
    config: GraloraConfig | LoraConfig | None
    findings: tuple[Finding, ...]
    dialect: Literal["peft", "authors"] = "peft"


def read_config(folder: Path) -> ConfigFile:
    """The config of the adapter in `folder`; one that is missing or broken is told in findings."""
    path = folder / CONFIG_NAME
    if not path.exists():
        missing = error("config-missing", path, "is missing", _where_it_may_be(folder))
        return ConfigFile({}, None, (missing,))
    try:
        values = load_json(path)
    except UnreadableError as problem:
        found = error(f"config-{problem.reason}", path, problem.message, problem.hint)
        return ConfigFile({}, None, (found,))
    return parse_config(values, CONFIG_NAME)


def source_of(name: object, revision: object) -> str | None:
    """The model that `base_model_name_or_path` names, with its revision where that is of the Hub.

    None when it names none: PEFT 0.21.2 writes null for a model made in memory, the `add_adapter`
    of transformers 5.23 an empty text."""
    if not isinstance(name, str) or not name:
        return None
    if not isinstance(revision, str) or not revision or is_there(name) or "@" in name:
        return name
    return f"{name}@{revision}" if parse_name(name) else name


def _where_it_may_be(folder: Path) -> str:
    """PEFT saves every adapter that is not named `default` in a sub-folder of its name."""
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not inner and (folder / "config.json").exists():
        return "It holds a whole model: are adapter and base in each other's place?"
    if not inner:
        return "Is this the adapter's folder?"
    if len(inner) == 1:
        return f"The sub-folder {inner[0]!r} holds an adapter: name {folder / inner[0]}."
    return f"Its sub-folders {', '.join(inner)} hold adapters: name one of them."


def parse_config(values: Json, where: str) -> ConfigFile:
    """The config that `values` describe, with every finding about them."""
    findings = [*header_findings(values, where), *method_findings(values, where)]
    if any(finding.code == "peft-type-unsupported" for finding in findings):
        return ConfigFile(values, None, tuple(findings))
    cls = LoraConfig if values.get("peft_type") == "LORA" else GraloraConfig
    dialect: Literal["peft", "authors"] = "peft"
    if cls is GraloraConfig and _is_authors(values):
        dialect, values = "authors", _from_authors(values)
        findings.append(note(
            "fork-config", where,
            f"written by the original authors' code: read as r={values['r']!r}, "
            f"alpha={values['alpha']!r}; PEFT would misread it",
        ))  # fmt: skip
    values = {name: _on_model(value, values) for name, value in values.items()}
    findings += FINDINGS_OF[cls.METHOD](values, where)
    if cls is GraloraConfig:
        findings += unknown_findings(values, cls.field_names(), where)
    findings += missing_findings(values, where)
    report = Report.of(findings)
    config = cls.from_dict(values) if report.ok else None
    return ConfigFile(values, config, report.findings, dialect)


def without_pipeline(name: str, values: Json) -> str:
    """A name of an adapter that was put on a pipeline of sentence-transformers as one of the model
    in it, its step 0 (6.2); other names stay."""
    mapping = values.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    return _STEP.sub("", name) if str(library).startswith("sentence_transformers.") else name


def _on_model(value: object, values: Json) -> object:
    """A value of the config, of which lists may be of names."""
    if not isinstance(value, list):
        return value
    return [without_pipeline(one, values) if isinstance(one, str) else one for one in value]


def _is_authors(values: Json) -> bool:
    """The original authors write gralora_alpha, and neither peft_version nor init_weights."""
    others = {"alpha", "peft_version", "init_weights"}
    return "gralora_alpha" in values and not values.keys() & others


def _from_authors(values: Json) -> Json:
    """Their r is the total rank and their scaling gralora_alpha / r; PEFT's r leaves hybrid_r out,
    so that alpha / (r + hybrid_r) is the same number. Default r: 8."""
    mapped = {name: value for name, value in values.items() if name != "gralora_alpha"}
    mapped["alpha"] = values["gralora_alpha"]
    r, h = values.get("r", 8), values.get("hybrid_r", 0)
    mapped["hybrid_r"] = h
    mapped["r"] = r - h if type(r) is int and type(h) is int else r
    return mapped


_STEP = re.compile(r"^0\.(auto_)?model\.")

NAMES: Mapping[str, str] = {"gralora": "GraLoRA", "hybrid": "Hybrid GraLoRA", "lora": "LoRA"}
