"""`adapter_config.json` <-> `GraloraConfig`, `LoraConfig`: strict, and nothing is lost on the way.

A rule is written once, as a function that yields findings: constructors raise with all of them,
validation gathers them. Fields and defaults after PEFT 0.21.2, tuners/gralora/config.py and
config.py; the original authors' fields after SqueezeBits/GraLoRA (peft 0.11.2.dev0).
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from gralora_convert.errors import InvalidAdapterError
from gralora_convert.report import Finding, Report, error, note, warning
from gralora_convert.strictjson import JsonError, load_json

__all__ = [
    "CONFIG_NAME",
    "PEFT_VERSION",
    "ConfigFile",
    "GraloraConfig",
    "LoraConfig",
    "parse_config",
    "read_config",
]

CONFIG_NAME = "adapter_config.json"
PEFT_VERSION = "0.21.2"  # the release whose behaviour this package was measured against
_TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
_PEFT_TYPES = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA BOFT "
    "ADAPTION_PROMPT IA3 LOHA LOKR OFT XLORA POLY LN_TUNING VERA FOURIERFT HRA BONE MISS RANDLORA "
    "SHIRA C3A CPT TRAINABLE_TOKENS ROAD WAVEFT DELORA OSF VBLORA CARTRIDGE GRALORA".split()
)
# Keys of other methods that change what factors mean; any non-neutral value must stop us.
_MEANINGFUL = frozenset(
    "use_rslora use_dora rank_pattern alpha_pattern layer_replication "
    "target_parameters trainable_token_indices lora_bias use_qalora alora_invocation_tokens "
    "arrow_config megatron_config loftq_config eva_config corda_config".split()
)

Json = Mapping[str, object]


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _any_of(*checks: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: any(check(value) for check in checks)


def _is_ints(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_int, value))


_Rule = tuple[Callable[[object], bool], str]
_INT: _Rule = (_is_int, "a whole number")
_BOOL: _Rule = (_is_bool, "true or false")
_NUMBER: _Rule = (_is_number, "a number")
_TARGETS: _Rule = (_or_none(_any_of(_is_text, _is_names)), "a list of names, a regex or null")
_LAYERS: _Rule = (_or_none(_any_of(_is_int, _is_ints)), "a layer number, a list of them or null")
_PATTERN: _Rule = (_or_none(_any_of(_is_text, _is_names)), "a name, a list of names or null")
_NAMES: _Rule = (_or_none(_is_names), "a list of names or null")
_TEXT: _Rule = (_or_none(_is_text), "a text or null")
_COMMON_RULES: Mapping[str, _Rule] = {
    "target_modules": _TARGETS, "layers_to_transform": _LAYERS, "layers_pattern": _PATTERN,
    "modules_to_save": _NAMES, "fan_in_fan_out": _BOOL, "inference_mode": _BOOL,
    "base_model_name_or_path": _TEXT, "revision": _TEXT, "peft_version": _TEXT,
    "task_type": _TEXT, "auto_mapping": (_or_none(lambda v: isinstance(v, Mapping)), "an object"),
}  # fmt: skip
_GRALORA_RULES: Mapping[str, _Rule] = {
    "r": _INT, "hybrid_r": _INT, "gralora_k": _INT, "alpha": _NUMBER, "gralora_dropout": _NUMBER,
    "bias": (_is_text, "a text"), "init_weights": _BOOL, **_COMMON_RULES,
}  # fmt: skip
_LORA_RULES: Mapping[str, _Rule] = {
    "r": _INT, "lora_alpha": _NUMBER, "lora_dropout": _NUMBER, "bias": (_is_text, "a text"),
    "use_rslora": _BOOL, "use_dora": _BOOL, "lora_bias": _BOOL,
    "rank_pattern": (_or_none(lambda v: isinstance(v, Mapping)), "an object"),
    "alpha_pattern": (_or_none(lambda v: isinstance(v, Mapping)), "an object"), **_COMMON_RULES,
}  # fmt: skip


def _type_findings(values: Json, rules: Mapping[str, _Rule], where: str) -> Iterator[Finding]:
    for name, (check, needed) in rules.items():
        if name not in values:
            continue
        value = values[name]
        if isinstance(value, float) and not math.isfinite(value):
            yield error("config-non-finite", where, f"{name} is {value}, {needed} was needed")
        elif not check(value):
            hint = "A single module is written as a list." if name == "modules_to_save" else ""
            yield error(
                "config-value-type", where, f"{name} is {value!r}, {needed} was needed", hint
            )


def _gralora_findings(values: Json, where: str) -> Iterator[Finding]:
    """The rules that hold between and within the fields of a GraLoRA config, types being right."""
    yield from _type_findings(values, _GRALORA_RULES, where)
    r, k, h = (values.get(n, d) for n, d in (("r", 32), ("gralora_k", 2), ("hybrid_r", 0)))
    for name, value, least in (("r", r, 1), ("gralora_k", k, 1), ("hybrid_r", h, 0)):
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield error(
                "config-value-range", where, f"{name} is {value}, at least {least} was needed"
            )
    if _is_int(r) and _is_int(k) and isinstance(r, int) and isinstance(k, int) and k > 0 and r % k:
        yield error(
            "rank-not-divisible",
            where,
            f"r={r} is not divisible by gralora_k={k}",
            "Each of the k blocks of an input holds r/k of the rank.",
        )
    dropout = values.get("gralora_dropout", 0.0)
    if isinstance(dropout, int | float) and not isinstance(dropout, bool):
        if not 0 <= dropout <= 1:
            yield error(
                "config-value-range", where, f"gralora_dropout is {dropout}, 0 to 1 was needed"
            )
        elif dropout == 1:
            yield note("dropout-total", where, "gralora_dropout is 1: in training nothing passes")
    if _is_number(values.get("alpha")) and values["alpha"] == 0:
        yield warning("alpha-zero", where, "alpha is 0: the adapter has no effect")
    yield from _bias_findings(values.get("bias", "none"), "gralora_only", where)
    if values.get("init_weights") is False:
        yield note(
            "init-weights-false",
            where,
            "init_weights is false: PEFT leaves random values where a tensor is missing",
        )
    yield from _target_findings(values, where)


def _bias_findings(bias: object, own: str, where: str) -> Iterator[Finding]:
    if not isinstance(bias, str) or bias in ("none", "all", own):
        return
    if bias.endswith("_only"):
        yield warning("bias-mode-alias", where, f"bias is {bias!r}, which PEFT treats as {own!r}")
    else:
        yield error("bias-mode-unknown", where, f"bias is {bias!r}; none, all or {own} was needed")


def _target_findings(values: Json, where: str) -> Iterator[Finding]:
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets.lower() != "all-linear":
        try:
            re.compile(targets)
        except (re.error, RecursionError, OverflowError) as problem:
            yield error(
                "target-regex-invalid", where, f"target_modules is no regular expression: {problem}"
            )
        if values.get("layers_to_transform") not in (None, []):
            yield note(
                "layers-to-transform-ignored",
                where,
                "layers_to_transform has no effect beside a regex in target_modules",
            )
    if isinstance(targets, list) and _is_names(targets) and len(set(targets)) < len(targets):
        yield note("target-duplicate", where, "target_modules names a module twice")


def _header_findings(values: Json, where: str) -> Iterator[Finding]:
    """Fields that every PEFT config has."""
    task = values.get("task_type")
    if isinstance(task, str) and task not in _TASKS:
        yield error(
            "task-type-unknown",
            where,
            f"task_type is {task!r}; one of {', '.join(_TASKS)} was needed",
        )
    version = values.get("peft_version")
    if version is None:
        yield note("peft-version-missing", where, "peft_version is not recorded")
    elif isinstance(version, str) and _release(version) > _release(PEFT_VERSION):
        yield warning(
            "peft-version-unverified",
            where,
            f"written by PEFT {version}; this tool was measured against up to {PEFT_VERSION}",
        )


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


class _Configured:
    """What both configs share: reading, writing, and unknown fields that survive."""

    peft_type: ClassVar[str]

    @classmethod
    def _names(cls) -> set[str]:
        return {f.name for f in dataclasses.fields(cls)} - {"extra"}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """The fields as PEFT writes them: sorted targets, `peft_type`, unknown fields kept."""
        values = {name: getattr(self, name) for name in self._names()}
        values |= {"peft_type": self.peft_type} | dict(getattr(self, "extra", {}))
        for name, value in values.items():
            if isinstance(value, set | frozenset | tuple):
                values[name] = sorted(value) if name == "target_modules" else list(value)
        targets = values.get("target_modules")
        if isinstance(targets, list):
            values["target_modules"] = sorted(targets)
        return values

    def to_json(self) -> bytes:
        """The bytes of `adapter_config.json` as PEFT 0.21.2 lays them out (config.py,
        save_pretrained), the same on every run."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True).encode()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `adapter_config.json` into `folder`, which is made if it does not exist."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG_NAME).write_bytes(self.to_json())


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
    task_type: str | None = field(default=None, kw_only=True)
    base_model_name_or_path: str | None = field(default=None, kw_only=True)
    revision: str | None = field(default=None, kw_only=True)
    inference_mode: bool = field(default=False, kw_only=True)
    auto_mapping: Mapping[str, object] | None = field(default=None, kw_only=True)
    peft_version: str | None = field(default=PEFT_VERSION, kw_only=True)
    extra: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    peft_type: ClassVar[str] = "GRALORA"

    def __post_init__(self) -> None:
        targets = self.target_modules
        if isinstance(targets, set | frozenset):
            object.__setattr__(self, "target_modules", sorted(targets))
        values = {name: getattr(self, name) for name in self._names()}
        Report.of(_gralora_findings(values, "GraloraConfig")).require_ok("GraloraConfig")

    @property
    def scaling(self) -> float:
        """alpha / (r + hybrid_r), of both parts (PEFT 0.21.2, tuners/gralora/layer.py)."""
        return self.alpha / (self.r + self.hybrid_r)

    @classmethod
    def from_dict(cls, values: Json) -> "GraloraConfig":
        """The config that `values` describe, in either dialect.

        Raises:
            InvalidAdapterError: with all findings.
        """
        values = _from_authors(values) if _is_authors(values) else values
        known = {name: value for name, value in values.items() if name in cls._names()}
        extra = {n: v for n, v in values.items() if n not in known and n != "peft_type"}
        known.setdefault("peft_version", None)
        return cls(**known, extra=extra)  # type: ignore[arg-type]  # __post_init__ checks them

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GraloraConfig":
        """The config in `folder`.

        Raises:
            InvalidAdapterError: it is missing or has errors (all are listed).
        """
        file = read_config(Path(folder))
        Report.of(file.findings).require_ok(folder)
        if not isinstance(file.config, cls):
            raise InvalidAdapterError("is the config of a LoRA adapter", where=folder)
        return file.config


@dataclass(frozen=True)
class LoraConfig(_Configured):
    """The configuration of a LoRA adapter (`peft.LoraConfig`, 0.21.2), as far as factors mean
    something by it; everything else is kept in `extra`."""

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    task_type: str | None = field(default=None, kw_only=True)
    base_model_name_or_path: str | None = field(default=None, kw_only=True)
    revision: str | None = field(default=None, kw_only=True)
    inference_mode: bool = field(default=False, kw_only=True)
    auto_mapping: Mapping[str, object] | None = field(default=None, kw_only=True)
    peft_version: str | None = field(default=PEFT_VERSION, kw_only=True)
    extra: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    peft_type: ClassVar[str] = "LORA"

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self._names()}
        Report.of(_lora_findings(values, "LoraConfig")).require_ok("LoraConfig")

    @classmethod
    def from_dict(cls, values: Json) -> "LoraConfig":
        """The config that `values` describe."""
        known = {name: value for name, value in values.items() if name in cls._names()}
        extra = {n: v for n, v in values.items() if n not in known and n != "peft_type"}
        known.setdefault("peft_version", None)
        for name in ("rank_pattern", "alpha_pattern"):
            known[name] = known.get(name) or {}
        return cls(**known, extra=extra)  # type: ignore[arg-type]  # __post_init__ checks them

    def rank(self, module: str) -> int:
        """The rank of one module (PEFT 0.21.2, utils/other.py, get_pattern_key: first match)."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """The scaling of one module: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


_V = TypeVar("_V", int, float)


def _by_pattern(pattern: Mapping[str, _V], module: str, default: _V) -> _V:
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _lora_findings(values: Json, where: str) -> Iterator[Finding]:
    yield from _type_findings(values, _LORA_RULES, where)
    r = values.get("r", 8)
    if isinstance(r, int) and not isinstance(r, bool) and r < 1:
        yield error("config-value-range", where, f"r is {r}, at least 1 was needed")
    for name, least in (("rank_pattern", _is_int), ("alpha_pattern", _is_number)):
        pattern = values.get(name) or {}
        for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
            if not least(value) or (name == "rank_pattern" and value < 1):
                yield error("config-value-type", where, f"{name}[{key!r}] is {value!r}")
            yield from _pattern_findings(name, key, where)
    if _is_number(values.get("lora_alpha")) and values["lora_alpha"] == 0:
        yield warning("alpha-zero", where, "lora_alpha is 0: the adapter has no effect")
    yield from _bias_findings(values.get("bias", "none"), "lora_only", where)
    yield from _target_findings(values, where)


def _pattern_findings(name: str, key: object, where: str) -> Iterator[Finding]:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as problem:
        yield error("target-regex-invalid", where, f"{name} holds {key!r}: {problem}")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What `adapter_config.json` holds: its raw `values`, the `config` (None when it has errors),
    and all findings about it."""

    values: Json
    config: GraloraConfig | LoraConfig | None
    findings: tuple[Finding, ...]
    dialect: Literal["peft", "authors"] = "peft"


def read_config(folder: Path) -> ConfigFile:
    """The config of the adapter in `folder`; a broken one is told in the findings.

    Raises:
        UnreadableError: the file is there but cannot be opened.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        hint = "Is this the adapter's folder?"
        if folder.is_dir():
            inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
            if inner:
                hint = f"The sub-folder {inner[0]!r} holds an adapter: name it."
        return ConfigFile({}, None, (error("config-missing", path, "is missing", hint),))
    try:
        values = load_json(path)
    except JsonError as problem:
        code = f"config-{problem.reason}"
        return ConfigFile({}, None, (error(code, path, problem.message, problem.hint),))
    return parse_config(values, CONFIG_NAME)


def parse_config(values: Json, where: str) -> ConfigFile:
    """The config that `values` describe, with every finding about them."""
    findings = [*_header_findings(values, where), *_type_of_method(values, where)]
    dialect: Literal["peft", "authors"] = "peft"
    if values.get("peft_type") == "LORA":
        findings += _lora_findings(values, where)
        make: Callable[[Json], GraloraConfig | LoraConfig] = LoraConfig.from_dict
    else:
        if _is_authors(values):
            dialect, values = "authors", _from_authors(values)
            findings.append(
                note(
                    "fork-config",
                    where,
                    "written by the original authors' code: read as "
                    f"r={values.get('r')!r}, alpha={values.get('alpha')!r}, PEFT would misread it",
                )
            )
        findings += _gralora_findings(values, where)
        findings += _missing_findings(values, where)
        findings += _unknown_findings(values, where)
        make = GraloraConfig.from_dict
    report = Report.of(findings)
    return ConfigFile(values, make(values) if report.ok else None, report.findings, dialect)


def _type_of_method(values: Json, where: str) -> Iterator[Finding]:
    peft_type = values.get("peft_type")
    if peft_type is None:
        yield error("peft-type-missing", where, "peft_type is missing, GRALORA was needed")
    elif not isinstance(peft_type, str) or peft_type not in _PEFT_TYPES:
        yield error("peft-type-unknown", where, f"peft_type is {peft_type!r}, GRALORA was needed")
    elif peft_type not in ("GRALORA", "LORA"):
        yield error(
            "peft-type-unsupported",
            where,
            f"peft_type is {peft_type!r}; GRALORA or LORA was needed",
        )


def _missing_findings(values: Json, where: str) -> Iterator[Finding]:
    if "alpha" not in values:
        if "gralora_alpha" in values:
            yield error(
                "fork-config",
                where,
                "holds the original authors' gralora_alpha beside fields of PEFT; PEFT ignores it "
                "and takes alpha = 64",
                "Rename it to alpha if the adapter was trained with PEFT.",
            )
        else:
            yield error(
                "alpha-missing",
                where,
                "alpha is missing and cannot be told from the tensors",
                "Add the alpha of the training run; PEFT would take 64.",
            )
    for name, default in (("r", 32), ("gralora_k", 2), ("hybrid_r", 0)):
        if name not in values:
            yield warning("config-key-missing", where, f"{name} is missing; PEFT takes {default}")


def _unknown_findings(values: Json, where: str) -> Iterator[Finding]:
    for name in sorted(values.keys() - GraloraConfig._names() - {"peft_type", "gralora_alpha"}):
        value = values[name]
        empty = value is None or value is False or value in ({}, [], "", 0)
        if name not in _MEANINGFUL:
            yield warning("config-key-unknown", where, f"{name} is no field of GraloraConfig; kept")
        elif empty:
            yield warning(
                "config-key-unsupported", where, f"{name} is no field of GraloraConfig; it is empty"
            )
        else:
            yield error(
                "config-key-unsupported",
                where,
                f"{name} is {value!r}: it would change the mathematics, GraLoRA has no such field",
                "Remove it if the adapter was trained by PEFT's GraLoRA, which ignores it.",
            )


def _is_authors(values: Json) -> bool:
    """The original authors write gralora_alpha, and neither peft_version nor init_weights."""
    return "gralora_alpha" in values and not values.keys() & {
        "alpha", "peft_version", "init_weights",
    }  # fmt: skip


def _from_authors(values: Json) -> Json:
    """Their r is the total rank and their scaling gralora_alpha / r; PEFT's r leaves hybrid_r out,
    so that alpha / (r + hybrid_r) is the same number."""
    mapped = {name: value for name, value in values.items() if name != "gralora_alpha"}
    mapped["alpha"] = values["gralora_alpha"]
    r, h = values.get("r", 8), values.get("hybrid_r", 0)
    mapped["hybrid_r"] = h
    mapped["r"] = r - h if isinstance(r, int) and isinstance(h, int) else r
    return mapped
