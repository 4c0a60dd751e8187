"""Every tensor of an adapter's file gets its place, or a finding says why it has none.

Codes and verdicts are those of the measured table of defects (121 broken adapters, PEFT 0.21.2).
Names, shapes and dtypes only; no values.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from gralora_convert.adapters import shapes
from gralora_convert.adapters.config import (
    CONFIG_NAME,
    ConfigFile,
    GraloraConfig,
    LoraConfig,
    without_pipeline,
)
from gralora_convert.adapters.keys import Key, Role, parse_key, spelling_findings
from gralora_convert.adapters.rules import way_out
from gralora_convert.adapters.targets import is_saved, select
from gralora_convert.disk import TensorFile, TensorSpec
from gralora_convert.errors import Finding, UnsupportedError, error, note, warning

K = TypeVar("K", str, Role)

# What get_input_embeddings and get_output_embeddings of transformers 5.23 return, by its name.
_INPUT_EMBEDDINGS = re.compile(
    r"(?!\w*(pos|type|patch|segment|rel))(\w*emb(ed\w*)?|wte|shared)\.weight"
)
_OUTPUT_EMBEDDINGS = re.compile(
    r"(\w*lm_head|embed_out|output|proj_out|output_projection|lm_loss|vocab_projector"
    r"|(predictions|lm_head|head)\.decoder)\.(weight|bias)"
)
_LONGEST_KEY = 1000  # characters; PEFT's have below 200
# Frozen layers that PEFT saves whole when they are targets (0.21.2, utils/constants.py)
_SAVED_TARGETS = ("embed_tokens", "lm_head")
# Tensors of LoRA variants that their forward pass uses in training only (tuners/lora/variants.py)
_TRAINING_ONLY = {
    "lora_monteclora_sampler": "the sampler of MonteCLoRA",
    "lora_velora_embed": "the projection of VeLoRA",
}
# Said of the first tensor only: the others show the same.
_ONCE = frozenset(
    {"key-pipeline-prefix", "peft-type-mismatch", "lora-sampler-ignored", "key-foreign-method"}
)


@dataclass(slots=True)
class Contents:
    """The places of the tensors of a file, and all findings about them.

    `roles` maps module -> role -> tensor, `biases` module -> trained bias, `saved` parameter path
    -> full tensor, `frozen` parameter path -> copy of the base's, `ignored` key -> why it holds
    nothing new; `unsupported` names what makes a LoRA's update more than scaling * B @ A.
    """

    roles: dict[str, dict[Role, TensorSpec]] = field(default_factory=dict)
    biases: dict[str, TensorSpec] = field(default_factory=dict)
    saved: dict[str, TensorSpec] = field(default_factory=dict)
    frozen: dict[str, TensorSpec] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    unsupported: dict[str, None] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Put:
    """The place of a tensor: a factor of a module, its bias, or a parameter in memory."""

    where: Literal["factor", "biases", "saved", "frozen"]
    name: str


@dataclass(frozen=True, slots=True)
class _Leave:
    """A tensor that holds nothing new, or belongs to a `feature` that is not read here."""

    reason: str
    feature: str | None = None


_Place = Iterator[_Put | _Leave | Finding]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the place of one key needs to know: the config, and what the other keys are."""

    file: ConfigFile
    parameters: frozenset[str]
    has_embedding: bool
    frozen_modules: frozenset[str]

    @classmethod
    def of(cls, file: ConfigFile, keys: Sequence[Key]) -> "_Known":
        parameters = frozenset(key.name for key in keys if key.role == "parameter")
        adapted = {key.name for key in keys if key.method is not None}
        frozen = (
            key.name for key in keys
            if key.role == "base_weight" and key.name in adapted
            and key.name.rpartition(".")[2] in _SAVED_TARGETS
        )  # fmt: skip
        has_embedding = any(map(_is_input_embedding, parameters))
        return cls(file, parameters, has_embedding, frozenset(frozen))

    @property
    def is_lora(self) -> bool:
        return self.file.values.get("peft_type") == "LORA"

    @property
    def bias(self) -> object:
        return self.file.values.get("bias", "none")

    def is_saved(self, parameter: str) -> bool:
        return self.file.config is not None and bool(is_saved(self.file.config, parameter))


def contents_of(config: ConfigFile, file: TensorFile) -> Contents:
    """The places of the tensors of `file`, which stands beside `config`."""
    held = Contents()
    keys = [parse_key(name) for name in file.tensors if len(name) <= _LONGEST_KEY]
    for name in file.tensors.keys() - {key.key for key in keys}:
        held.findings.append(
            error("tensor-unclaimed", name, f"is a name of {len(name)} characters")
        )
    for i, key in enumerate(keys):
        name = without_pipeline(key.name, config.values)
        if name != key.name:
            held.findings.append(note(
                "key-pipeline-prefix", key.key,
                "is of a pipeline of sentence-transformers: names are read without "
                f"{key.name.removesuffix(name)!r}",
            ))  # fmt: skip
        keys[i] = replace(key, name=name)
    held.findings += spelling_findings(keys)
    known = _Known.of(config, keys)
    for key in keys:
        for place in _place(known, key):
            _take(held, key, file.tensors[key.key], place)
    _check(held, known, file)
    held.findings = list(_said_once(held.findings))
    return held


def _said_once(findings: Sequence[Finding]) -> Iterator[Finding]:
    seen: set[str] = set()
    for finding in findings:
        if finding.code not in seen & _ONCE:
            yield finding
        seen.add(finding.code)


# one tensor --------------------------------------------------------------------------------------


def _take(held: Contents, key: Key, spec: TensorSpec, place: _Put | _Leave | Finding) -> None:
    if isinstance(place, Finding):
        held.findings.append(place)
    elif isinstance(place, _Leave):
        held.ignored[key.key] = place.reason
        if place.feature is not None:
            held.unsupported[place.feature] = None
    elif place.where == "factor":
        _put(held, held.roles.setdefault(place.name, {}), key.role, spec)
    else:
        _put(held, getattr(held, place.where), place.name, spec)


def _put(held: Contents, places: dict[K, TensorSpec], place: K, spec: TensorSpec) -> None:
    if place in places:
        held.findings.append(error(
            "key-duplicate-role", spec.name, f"means the same tensor as {places[place].name}",
            "Keep one of them.",
        ))  # fmt: skip
    places[place] = spec


def _place(known: _Known, key: Key) -> _Place:
    match key.role:
        case "foreign":
            return _place_foreign(known, key)
        case "bias":
            return _place_bias(known, key)
        case "base_weight":
            return _place_base_weight(known, key)
        case "parameter" if key.copy_of:
            return _place_copy(known, key)
        case "parameter":
            return _place_parameter(known, key)
    return _place_factor(known, key)


def _place_factor(known: _Known, key: Key) -> _Place:
    if known.file.values and key.method == "lora" and not known.is_lora:
        yield _of_another_method(key)
    elif key.method == "gralora" and known.is_lora:
        yield error(
            "peft-type-mismatch", key.key, "is a GraLoRA tensor, but peft_type is LORA",
            "Set peft_type to GRALORA.",
        )  # fmt: skip
    elif known.is_lora and "base_layer" in key.name.split("."):
        yield _feature("factors of a layer inside another (attention, experts)")
    else:
        yield _Put("factor", key.name)


def _feature(name: str) -> _Leave:
    """A tensor of a kind of LoRA that is not read here."""
    return _Leave(f"belongs to {name}", name)


def _place_foreign(known: _Known, key: Key) -> _Place:
    if known.is_saved(key.name):
        yield _Put("saved", key.name)
    elif known.is_lora and key.leaf in _TRAINING_ONLY:
        yield _Leave(f"{_TRAINING_ONLY[key.leaf]}, which has no part in inference")
        yield warning("lora-sampler-ignored", key.key, "is used in training only; it is left out")
    elif known.is_lora and key.leaf.startswith("trainable_tokens_"):
        yield _feature("trainable_token_indices")
    elif known.is_lora and key.leaf.startswith("lora_"):
        yield _feature(key.leaf)
    else:
        yield _of_another_method(key)


def _of_another_method(key: Key) -> Finding:
    if key.leaf.startswith("gralora_"):
        return error(
            "key-leaf-unknown", key.key, "does not end as a tensor of GraLoRA does",
            "gralora_A and gralora_B stand without '.weight', the general ones with it.",
        )  # fmt: skip
    return error(
        "key-foreign-method", key.key,
        f"holds {key.leaf!r}: it belongs to another method than peft_type says",
    )  # fmt: skip


def _place_bias(known: _Known, key: Key) -> _Place:
    if known.bias == "none" and key.name in known.frozen_modules:
        yield from _frozen(key, f"{key.name}.bias")
        return
    if known.bias == "none" and known.file.values:
        yield _unexpected_bias(key)
    yield _Put("biases", key.name)


def _unexpected_bias(key: Key) -> Finding:
    return error(
        "bias-unexpected", key.key, "is a bias, but bias is 'none' in the config",
        "PEFT would write it into the base.",
    )  # fmt: skip


def _place_base_weight(known: _Known, key: Key) -> _Place:
    if key.name in known.frozen_modules:
        yield from _frozen(key, f"{key.name}.weight")
    else:
        yield error(
            "base-weight-in-adapter", key.key,
            "is a base weight; PEFT would overwrite the base with it",
        )  # fmt: skip


def _frozen(key: Key, parameter: str) -> _Place:
    yield _Put("frozen", parameter)
    yield _Leave("a copy of the base's, which PEFT saves beside a targeted head")
    yield note("embeddings-saved", key.key, "is a copy of the base's, which was not trained")


def _place_copy(known: _Known, key: Key) -> _Place:
    """A key inside the wrapper of a saved module: PEFT saves biases twice with bias='all', and
    embeddings whose vocabulary was resized (0.21.2). It loads the bare name and no other."""
    is_bias = key.name.rpartition(".")[2] == "bias" and known.bias == "all"
    bare = known.parameters.intersection(key.copy_of)
    if is_bias and bare:
        yield _Leave("a second copy of a bias")
        yield note("bias-saved-twice", key.key, "is a second copy; it is not used")
    elif any(_is_input_embedding(name) or _is_output_embedding(name) for name in bare):
        yield _Leave("a second copy of an embedding")
        yield note("embeddings-saved", key.key, "is a second copy; it is not used")
    else:
        yield error(
            "key-modules-to-save-infix", key.key, "holds the wrapper of a saved module; PEFT "
            "saves the bare parameter name and cannot load this",
        )  # fmt: skip


def _place_parameter(known: _Known, key: Key) -> _Place:
    is_bias = key.name.endswith(".bias")
    if known.is_saved(key.name):
        yield _Put("saved", key.name)
    elif is_bias and known.bias == "all":
        yield _Put("biases", key.name.removesuffix(".bias"))
    elif _is_input_embedding(key.name) or (known.has_embedding and _is_output_embedding(key.name)):
        yield _Put("saved", key.name)
        yield note("embeddings-saved", key.key, "is a whole embedding; it replaces the base's")
    elif known.file.config is None:
        return  # what the config says about saved modules is not known
    elif is_bias and known.bias == "none":
        yield _unexpected_bias(key)
    else:
        yield error(
            "tensor-unclaimed", key.key,
            "is no tensor of the adapter: neither a factor nor a part of modules_to_save",
            "PEFT would write it into the base.",
        )  # fmt: skip


# all tensors -------------------------------------------------------------------------------------


def _check(held: Contents, known: _Known, file: TensorFile) -> None:
    config, values, findings = known.file.config, known.file.values, held.findings
    factors = [spec for roles in held.roles.values() for spec in roles.values()]
    findings += shapes.tensor_findings(factors, held.biases.values(), held.saved.values())
    try:
        if known.is_lora:
            lora = config if isinstance(config, LoraConfig) else None
            findings += shapes.lora_shape_findings(held.roles, lora)
        elif values:
            findings += shapes.gralora_shape_findings(held.roles, values)
        findings += [] if config is None else _target_findings(held, config)
    except UnsupportedError as problem:  # a pattern that cannot be carried out
        findings.append(error("target-regex-invalid", CONFIG_NAME, problem.message, problem.hint))
    if isinstance(config, LoraConfig):
        _check_features(held, config)
    wrong = any(finding.severity == "error" for finding in findings)
    if not held.roles and not held.unsupported and config is not None and not wrong:
        findings.append(error("missing-tensor", file.path.name, "holds no factors at all"))


def _check_features(held: Contents, config: LoraConfig) -> None:
    for feature in config.unsupported_features():
        held.unsupported[feature] = None
    present = {role for roles in held.roles.values() for role in roles}
    for role, feature in (
        ("magnitude", "use_dora"), ("lora_bias", "lora_bias"), ("embedding_A", "embeddings"),
    ):  # fmt: skip
        if role in present:
            held.unsupported[feature] = None
    if any(shapes.is_convolution(roles) for roles in held.roles.values()):
        held.unsupported["convolutions"] = None
    for feature in held.unsupported:
        held.findings.append(warning(
            "lora-feature-unsupported", CONFIG_NAME,
            f"{feature}: the update is more than scaling * B @ A, which is not supported",
            way_out(feature),
        ))  # fmt: skip


def _target_findings(held: Contents, config: GraloraConfig | LoraConfig) -> Iterator[Finding]:
    targets = config.target_modules
    if targets is None:
        if not held.unsupported and not _has_other_targets(config):
            yield error(
                "target-modules-null", CONFIG_NAME,
                "target_modules is null; PEFT would adapt the architecture's default modules",
                "Name the modules that were trained.",
            )  # fmt: skip
        return
    if (isinstance(targets, str) and targets.lower() == "all-linear") or not held.roles:
        return
    chosen = set(select(config, held.roles))
    if not chosen:
        yield error(
            "target-matches-nothing", CONFIG_NAME,
            f"target_modules {targets!r} selects none of the {len(held.roles)} modules here",
        )  # fmt: skip
        return
    others = () if _has_other_targets(config) else held.roles
    for module in others:
        if module not in chosen:
            yield error(
                "tensors-without-target", module,
                "has tensors, but the config does not select it; PEFT would ignore them",
            )  # fmt: skip


def _is_input_embedding(parameter: str) -> bool:
    return _INPUT_EMBEDDINGS.fullmatch(".".join(parameter.split(".")[-2:])) is not None


def _is_output_embedding(parameter: str) -> bool:
    words = parameter.split(".")
    return any(_OUTPUT_EMBEDDINGS.fullmatch(".".join(words[-n:])) for n in (2, 3))


def _has_other_targets(config: GraloraConfig | LoraConfig) -> bool:
    return isinstance(config, LoraConfig) and bool(config.extra.get("target_parameters"))
