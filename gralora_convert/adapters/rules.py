"""What may stand in an `adapter_config.json`: each rule once, as a function that yields findings.

Constructors raise with all findings, validation gathers them. Types, ranges and defaults after PEFT
0.21.2 (config.py, tuners/gralora/config.py and layer.py, tuners/lora/config.py).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from types import GenericAlias, NoneType
from typing import TypeGuard, get_args

from gralora_convert.adapters.patterns import require_pattern
from gralora_convert.errors import Finding, UnsupportedError, error, note, warning

Json = Mapping[str, object]
PEFT_VERSION = "0.21.2"  # the release whose behaviour this package was measured against
OLDEST = {"GRALORA": (0, 19)}  # the first release that has the method
LARGEST_FLOAT32 = float.fromhex("0x1.fffffep+127")
LARGEST = 2**63 - 1  # a size that any tensor can have
LONGEST_PATTERNS = 1_000_000  # characters of all patterns in one mapping; names do not count
_PLAIN = re.compile(r"[\w.]*")  # a name of a module, as a pattern matches itself
_TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
_PEFT_TYPES = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA BOFT "
    "ADAPTION_PROMPT IA3 LOHA LOKR OFT XLORA POLY LN_TUNING VERA FOURIERFT HRA BONE MISS RANDLORA "
    "SHIRA C3A CPT TRAINABLE_TOKENS ROAD WAVEFT DELORA OSF VBLORA CARTRIDGE GRALORA".split()
)
# Fields of other methods that change what factors mean; any non-neutral value must stop us.
_MEANINGFUL = frozenset(
    "use_rslora use_dora rank_pattern alpha_pattern layer_replication "
    "target_parameters trainable_token_indices lora_bias use_qalora alora_invocation_tokens "
    "arrow_config megatron_config loftq_config eva_config corda_config".split()
)
# LoRA: fields beside ours that leave the update scaling * B @ A ...
_LORA_HARMLESS = frozenset(
    "exclude_modules megatron_core qalora_group_size eva_config corda_config lora_ga_config "
    "velora_config monteclora_config loftq_config runtime_config".split()
)
# ... and initialisations that leave the base as it was (PEFT 0.21.2, tuners/lora/layer.py)
_LORA_INITS = frozenset(("gaussian", "eva", "orthogonal", "mica", "velora"))
_CHANGED = ", which changed the base"
# Features of a LoRA that become part of its update once the base is at hand
NEEDS_BASE = frozenset(
    ("use_dora", "lora_bias", f"init_lora_weights=pissa{_CHANGED}",
     f"init_lora_weights=olora{_CHANGED}")
)  # fmt: skip
# What to do about the others, by how they begin; most can be merged by PEFT
_FIRST = "Convert it to a LoRA with `base` first, or merge it with PEFT."
_WAYS_OUT: Mapping[str, str] = {
    "use_dora": "Merge it with PEFT, or approximate it: convert with `base` and `max_error=0.05`.",
    "lora_bias": _FIRST,
    f"init_lora_weights=pissa{_CHANGED}": _FIRST,
    f"init_lora_weights=olora{_CHANGED}": _FIRST,
    "init_lora_weights=loftq": "Its start belongs to a quantised base: merge it with PEFT.",
    "init_lora_weights=": "Save it with PEFT's path_initial_model_for_weight_conversion, which "
    "makes it a plain LoRA.",
    "alora_invocation_tokens": "Its update depends on the input: serve it with PEFT.",
    "arrow_config": "Its update depends on the input: serve it with PEFT.",
    "use_qalora": "Its input is pooled: serve it with PEFT.",
    "target_parameters": "No GraLoRA can hold a stack of experts: merge it with PEFT, or train the "
    "layers alone.",
    "factors of a layer inside another (attention, experts)": "No GraLoRA can hold those: merge it "
    "with PEFT, or remove their tensors to go on with the rest.",
    "megatron_config": "Save it from an unsharded run.",
}


def _is(value: object, kind: object) -> bool:
    """Whether a value is of a kind: a type, or a list of one. A bool is no number."""
    if isinstance(value, list | tuple):
        return isinstance(kind, GenericAlias) and all(_is(v, get_args(kind)[0]) for v in value)
    if kind is str or kind is Mapping:
        return isinstance(value, kind)
    return type(value) is kind


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


_Rule = tuple[tuple[object, ...], str]
_INT: _Rule = ((int,), "a whole number")
_BOOL: _Rule = ((bool,), "true or false")
_NUMBER: _Rule = ((int, float), "a number")
_TEXT: _Rule = ((str, NoneType), "a text or null")
_MAP: _Rule = ((Mapping, NoneType), "an object or null")
_NAMES = (str, list[str], NoneType)
_COMMON: Mapping[str, _Rule] = {
    "target_modules": (_NAMES, "a list of names, a regex or null"),
    "layers_to_transform": ((int, list[int], NoneType), "a layer number, a list or null"),
    "layers_pattern": (_NAMES, "a name, a list of names or null"),
    "modules_to_save": ((list[str], NoneType), "a list of names or null"),
    "bias": ((str,), "a text"), "fan_in_fan_out": _BOOL, "inference_mode": _BOOL,
    "base_model_name_or_path": _TEXT, "revision": _TEXT, "peft_version": _TEXT,
    "task_type": _TEXT, "auto_mapping": _MAP,
}  # fmt: skip
_GRALORA: Mapping[str, _Rule] = {
    "r": _INT, "hybrid_r": _INT, "gralora_k": _INT, "alpha": _NUMBER, "gralora_dropout": _NUMBER,
    "init_weights": _BOOL, **_COMMON,
}  # fmt: skip
_LORA: Mapping[str, _Rule] = {
    "r": _INT, "lora_alpha": _NUMBER, "lora_dropout": _NUMBER, "use_rslora": _BOOL,
    "use_dora": _BOOL, "lora_bias": _BOOL, "rank_pattern": _MAP, "alpha_pattern": _MAP,
    "init_lora_weights": ((bool, str, NoneType), "true, false or a name"),
    "exclude_modules": (_NAMES, "a list of names, a regex or null"),
    **_COMMON,
}  # fmt: skip


def gralora_findings(values: Json, where: str) -> Iterator[Finding]:
    """Types and ranges of the fields of a GraLoRA config, and what they say together."""
    yield from _type_findings(values, _GRALORA, where)
    r, k, h = values.get("r", 32), values.get("gralora_k", 2), values.get("hybrid_r", 0)
    if type(r) is type(h) is int and r == 0 < h:  # of the authors' r, which includes hybrid_r
        yield error(
            "config-value-range", where, f"hybrid_r={h} is the whole rank, so no blocks are left: "
            "a LoRA, not a GraLoRA",
            f"Its general factors are those of a LoRA with r={h} and lora_alpha = alpha.",
        )  # fmt: skip
    else:
        yield from _size_findings("r", values.get("r"), 1, where)
    yield from _size_findings("gralora_k", values.get("gralora_k"), 1, where)
    yield from _size_findings("hybrid_r", h, 0, where)
    yield from alpha_findings("alpha", values.get("alpha"), where)
    if type(r) is int and type(k) is int and k > 0 and r % k:
        yield error(
            "rank-not-divisible", where, f"r={r} is not divisible by gralora_k={k}",
            "Each of the k blocks of an input holds r/k of the rank.",
        )  # fmt: skip
    yield from _dropout_findings("gralora_dropout", values, where)
    yield from _bias_findings(values.get("bias", "none"), "gralora_only", where)
    if values.get("init_weights") is False:
        yield note(
            "init-weights-false", where,
            "init_weights is false: PEFT leaves random values where a tensor is missing",
        )  # fmt: skip
    yield from _target_findings(values, where)


def lora_findings(values: Json, where: str) -> Iterator[Finding]:
    """Types and ranges of the fields of a LoRA config."""
    yield from _type_findings(values, _LORA, where)
    yield from _size_findings("r", values.get("r"), 1, where)
    yield from alpha_findings("lora_alpha", values.get("lora_alpha"), where)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(name)
        if not isinstance(pattern, Mapping):
            continue
        if sum(len(str(key)) for key in pattern if not _is_plain(key)) > LONGEST_PATTERNS:
            yield error(
                "target-regex-invalid", where,
                f"{name} holds patterns of more than {LONGEST_PATTERNS} characters",
            )  # fmt: skip
            continue
        for key, value in pattern.items():
            place = f"{name}[{key!r}]"
            rule = _INT if name == "rank_pattern" else _NUMBER
            yield from _type_findings({place: value}, {place: rule}, where)
            if name == "rank_pattern":
                yield from _size_findings(place, value, 1, where)
            else:
                yield from alpha_findings(place, value, where)
            if not _is_plain(key):
                yield from _regex_findings(name, rf"(.*\.)?({key})$", where)
    yield from _dropout_findings("lora_dropout", values, where)
    yield from _bias_findings(values.get("bias", "none"), "lora_only", where)
    yield from _target_findings(values, where)


FINDINGS_OF: Mapping[str, Callable[[Json, str], Iterator[Finding]]] = {
    "GRALORA": gralora_findings, "LORA": lora_findings,
}  # fmt: skip


def _type_findings(values: Json, rules: Mapping[str, _Rule], where: str) -> Iterator[Finding]:
    for name, (kinds, needed) in rules.items():
        if name not in values:
            continue
        value = values[name]
        if isinstance(value, float) and not math.isfinite(value):
            yield error("config-non-finite", where, f"{name} is {value}, {needed} was needed")
        elif not any(_is(value, kind) for kind in kinds):
            hint = "A single module is written as a list." if name == "modules_to_save" else ""
            found = f"{name} is {value!r}, {needed} was needed"
            yield error("config-value-type", where, found, hint)


def _size_findings(name: str, value: object, least: int, where: str) -> Iterator[Finding]:
    if type(value) is int and not least <= value <= LARGEST:
        needed = f"at least {least}" if value < least else f"at most {LARGEST}"
        yield error("config-value-range", where, f"{name} is {value}, {needed} was needed")


def alpha_findings(name: str, alpha: object, where: str) -> Iterator[Finding]:
    """What is wrong with the numerator of a scaling."""
    if alpha == 0 and _is_number(alpha):
        yield warning("alpha-zero", where, f"{name} is 0: the adapter has no effect")
    if isinstance(alpha, int | float) and LARGEST_FLOAT32 < abs(alpha) < math.inf:
        yield error(
            "config-value-range", where, f"{name} is too large: at most {LARGEST_FLOAT32:.4g}, the "
            "largest float32, was needed",
        )  # fmt: skip


def _dropout_findings(name: str, values: Json, where: str) -> Iterator[Finding]:
    dropout = values.get(name, 0.0)
    if not _is_number(dropout) or dropout != dropout:
        return
    if not 0 <= dropout <= 1:
        yield error("config-value-range", where, f"{name} is {dropout}, 0 to 1 was needed")
    elif dropout == 1:
        yield note("dropout-total", where, f"{name} is 1: in training nothing passes")


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
        yield from _regex_findings("target_modules", targets, where)
        if values.get("layers_to_transform") not in (None, []):
            yield note(
                "layers-to-transform-ignored", where,
                "layers_to_transform has no effect beside a regex in target_modules",
            )  # fmt: skip
    if isinstance(targets, list) and _is(targets, list[str]) and len(set(targets)) < len(targets):
        yield note("target-duplicate", where, "target_modules names a module twice")


def _is_plain(key: object) -> bool:
    return isinstance(key, str) and _PLAIN.fullmatch(key) is not None


def _regex_findings(name: str, pattern: str, where: str) -> Iterator[Finding]:
    try:
        require_pattern(pattern)
    except UnsupportedError as problem:
        found = f"{name} holds what cannot be used: {problem.message}"
        yield error("target-regex-invalid", where, found, problem.hint)


def header_findings(values: Json, where: str) -> Iterator[Finding]:
    """The fields that the configs of all methods have."""
    task = values.get("task_type")
    if isinstance(task, str) and task not in _TASKS:
        yield error(
            "task-type-unknown", where, f"task_type is {task!r}; one of {', '.join(_TASKS)} was "
            "needed",
        )  # fmt: skip
    version = values.get("peft_version")
    if version is None:
        yield note("peft-version-missing", where, "peft_version is not recorded")
    elif isinstance(version, str):
        oldest = OLDEST.get(str(values.get("peft_type")), (0, 0))
        newest = release(PEFT_VERSION)
        found = release(version)
        if found is None or newest is None or not oldest <= found <= newest:
            yield warning(
                "peft-version-unverified", where,
                f"was written by PEFT {version}; this tool was measured against up to "
                f"{PEFT_VERSION}",
            )  # fmt: skip


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version of PEFT; None when it has none."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return (int(found[1]), int(found[2])) if found else None


def method_findings(values: Json, where: str) -> Iterator[Finding]:
    """Whether `peft_type` is one that is read here."""
    peft_type = values.get("peft_type")
    if peft_type is None and {"config", "model_class"} <= values.keys():  # adapters 1.3.0, loading
        yield error(
            "peft-type-unsupported", where, "was written by the library `adapters`, not by PEFT; "
            "GRALORA or LORA was needed", "Load and merge it there.",
        )  # fmt: skip
    elif peft_type is None:
        yield error("peft-type-missing", where, "peft_type is missing, GRALORA was needed")
    elif not isinstance(peft_type, str) or peft_type not in _PEFT_TYPES:
        yield error("peft-type-unknown", where, f"peft_type is {peft_type!r}, GRALORA was needed")
    elif peft_type not in ("GRALORA", "LORA"):
        yield error(
            "peft-type-unsupported", where, f"peft_type is {peft_type}; GRALORA or LORA was needed",
            "Merge it with PEFT.",
        )  # fmt: skip


def missing_findings(values: Json, where: str) -> Iterator[Finding]:
    """Fields that are not there; defaults that cannot be meant are errors."""
    is_lora = values.get("peft_type") == "LORA"
    alpha, default = ("lora_alpha", 8) if is_lora else ("alpha", 64)
    if alpha not in values and "gralora_alpha" in values and not is_lora:
        yield error(
            "fork-config", where, "holds the original authors' gralora_alpha beside fields of "
            "PEFT; PEFT ignores it and takes alpha = 64",
            "Rename it to alpha if the adapter was trained with PEFT.",
        )  # fmt: skip
    elif alpha not in values:
        yield error(
            "alpha-missing", where, f"{alpha} is missing and cannot be told from the tensors",
            f"Add the {alpha} of the training run; PEFT would take {default}.",
        )  # fmt: skip
    sizes = {"r": 8} if is_lora else {"r": 32, "gralora_k": 2, "hybrid_r": 0}
    for name, size in sizes.items():
        if name not in values:
            yield warning("config-key-missing", where, f"{name} is missing; PEFT takes {size}")


def unknown_findings(values: Json, known: Set[str], where: str) -> Iterator[Finding]:
    """Fields that a GraLoRA config has not; those that would change the mathematics are errors."""
    for name in sorted(values.keys() - known - {"peft_type"}):
        value = values[name]
        if name == "gralora_alpha":
            if "alpha" in values and value != values["alpha"]:
                yield error(
                    "fork-config", where,
                    f"holds gralora_alpha {value!r} beside alpha {values['alpha']!r}",
                    "Keep the one that the adapter was trained with, as alpha.",
                )  # fmt: skip
        elif name not in _MEANINGFUL:
            yield warning("config-key-unknown", where, f"{name} is no field of GraloraConfig; kept")
        elif _is_neutral(value):
            yield warning(
                "config-key-unsupported", where, f"{name} is no field of GraloraConfig; it is empty"
            )
        else:
            yield error(
                "config-key-unsupported", where,
                f"{name} is {value!r}: it would change the mathematics, GraLoRA has no such field",
                "Remove it if the adapter was trained by PEFT's GraLoRA, which ignores it.",
            )  # fmt: skip


def _is_neutral(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "", 0)


def unsupported_features(values: Json, known: Set[str]) -> Iterator[str]:
    """What makes a LoRA's update something else than scaling * B @ A, in words."""
    if values.get("use_dora"):
        yield "use_dora"
    if values.get("lora_bias"):
        yield "lora_bias"
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init not in _LORA_INITS:
        yield f"init_lora_weights={init}{_CHANGED}"
    for name in sorted(values.keys() - known - _LORA_HARMLESS - {"peft_type"}):
        if not _is_neutral(values[name]) and not (name == "use_bdlora" and _is_bd(values[name])):
            yield name


def _is_bd(value: object) -> bool:
    """Whether this is a BdLoraConfig that says which factors are block diagonal."""
    if not isinstance(value, Mapping) or type(value.get("nblocks")) is not int:
        return False
    named = (value.get(f"target_modules_bd_{side}") or () for side in "ab")
    return value["nblocks"] >= 1 and all(_is(names, list[str]) for names in named)


def way_out(feature: str) -> str:
    """What to do with a LoRA that has one of the unsupported features.

    >>> way_out("use_rslora_of_tomorrow")
    'Merge it with PEFT.'
    """
    found = (hint for start, hint in _WAYS_OUT.items() if feature.startswith(start))
    return next(found, "Merge it with PEFT.")
