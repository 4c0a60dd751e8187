"""Every tensor of an adapter's file gets its place, or a finding says why it has none.

Codes and verdicts are those of the measured table of defects (121 broken adapters, PEFT 0.21.2).
Names, shapes and dtypes only; no values.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from gralora_convert.adapters import shapes
from gralora_convert.adapters.config import (
    CONFIG_NAME,
    ConfigFile,
    GraloraConfig,
    LoraConfig,
    without_pipeline,
)
from gralora_convert.adapters.keys import Key, Role, parse_key
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


class Places:
    """The places of the tensors of `file`, and all findings about them.

    `roles` maps module -> role -> tensor, `biases` module -> trained bias, `saved` parameter path
    -> full tensor, `frozen` parameter path -> copy of the base's, `ignored` key -> why it holds
    nothing new;
    `unsupported` names what makes a LoRA's update more than scaling * B @ A.
    """

    def __init__(self, config: ConfigFile, file: TensorFile) -> None:
        self.values, self.config, self.file = config.values, config.config, file
        self.is_lora = self.values.get("peft_type") == "LORA"
        self.bias = self.values.get("bias", "none")
        self.findings: list[Finding] = []
        self.roles: dict[str, dict[Role, TensorSpec]] = {}
        self.biases: dict[str, TensorSpec] = {}
        self.saved: dict[str, TensorSpec] = {}
        self.frozen: dict[str, TensorSpec] = {}
        self.ignored: dict[str, str] = {}
        self.unsupported: dict[str, None] = {}
        self._said: set[str] = set()
        keys = [self._inner(parse_key(name)) for name in file.tensors if len(name) <= _LONGEST_KEY]
        for name in file.tensors.keys() - {key.key for key in keys}:
            self._say(error("tensor-unclaimed", name, f"is a name of {len(name)} characters"))
        self._read_ahead(keys)
        self.findings += _spelling_findings(keys)
        for key in keys:
            self._place(key, file.tensors[key.key])
        self._check()

    def _inner(self, key: Key) -> Key:
        name = without_pipeline(key.name, self.values)
        if name != key.name:
            self._say(note(
                "key-pipeline-prefix", key.key,
                "is of a pipeline of sentence-transformers: names are read without "
                f"{key.name.removesuffix(name)!r}",
            ), once=True)  # fmt: skip
        return replace(key, name=name)

    def _read_ahead(self, keys: Sequence[Key]) -> None:
        """What the place of one key needs to know about the others."""
        parameters = {key.name for key in keys if key.role == "parameter"}
        self._parameters = parameters
        self._has_embedding = any(map(_is_input_embedding, parameters))
        adapted = {key.name for key in keys if key.method is not None}
        self._frozen_modules = {
            key.name
            for key in keys
            if key.role == "base_weight"
            and key.name in adapted
            and key.name.rpartition(".")[2] in _SAVED_TARGETS
        }

    def _say(self, finding: Finding, *, once: bool = False) -> None:
        if not once or finding.code not in self._said:
            self.findings.append(finding)
        self._said.add(finding.code)

    # one tensor ----------------------------------------------------------------------------------

    def _place(self, key: Key, spec: TensorSpec) -> None:
        match key.role:
            case "foreign":
                self._place_foreign(key, spec)
            case "bias":
                self._place_bias(key, spec)
            case "base_weight":
                self._place_base_weight(key, spec)
            case "parameter" if key.copy_of:
                self._place_copy(key)
            case "parameter":
                self._place_parameter(key, spec)
            case _:
                self._place_factor(key, spec)

    def _put(self, places: dict[K, TensorSpec], place: K, spec: TensorSpec) -> None:
        if place in places:
            self._say(error(
                "key-duplicate-role", spec.name, f"means the same tensor as {places[place].name}",
                "Keep one of them.",
            ))  # fmt: skip
        places[place] = spec

    def _place_factor(self, key: Key, spec: TensorSpec) -> None:
        if self.values and key.method == "lora" and not self.is_lora:
            self._say_foreign(key)
        elif key.method == "gralora" and self.is_lora:
            self._say(error(
                "peft-type-mismatch", key.key, "is a GraLoRA tensor, but peft_type is LORA",
                "Set peft_type to GRALORA.",
            ), once=True)  # fmt: skip
        elif self.is_lora and "base_layer" in key.name.split("."):
            self._leave(key, "factors of a layer inside another (attention, experts)")
        else:
            self._put(self.roles.setdefault(key.name, {}), key.role, spec)

    def _leave(self, key: Key, feature: str) -> None:
        """A tensor of a kind of LoRA that is not read here."""
        self.unsupported[feature] = None
        self.ignored[key.key] = f"belongs to {feature}"

    def _place_foreign(self, key: Key, spec: TensorSpec) -> None:
        if self.config is not None and is_saved(self.config, key.name):
            self._put(self.saved, key.name, spec)
        elif self.is_lora and key.leaf in _TRAINING_ONLY:
            self.ignored[key.key] = f"{_TRAINING_ONLY[key.leaf]}, which has no part in inference"
            self._say(warning(
                "lora-sampler-ignored", key.key, "is used in training only; it is left out"
            ), once=True)  # fmt: skip
        elif self.is_lora and key.leaf.startswith("trainable_tokens_"):
            self._leave(key, "trainable_token_indices")
        elif self.is_lora and key.leaf.startswith("lora_"):
            self._leave(key, key.leaf)
        else:
            self._say_foreign(key)

    def _say_foreign(self, key: Key) -> None:
        if key.leaf.startswith("gralora_"):
            self._say(error(
                "key-leaf-unknown", key.key, "does not end as a tensor of GraLoRA does",
                "gralora_A and gralora_B stand without '.weight', the general ones with it.",
            ))  # fmt: skip
        else:
            self._say(error(
                "key-foreign-method", key.key,
                f"holds {key.leaf!r}: it belongs to another method than peft_type says",
            ), once=True)  # fmt: skip

    def _place_bias(self, key: Key, spec: TensorSpec) -> None:
        if self.bias == "none" and key.name in self._frozen_modules:
            self._freeze(key, f"{key.name}.bias", spec)
            return
        if self.bias == "none" and self.values:
            self._say_bias(key)
        self._put(self.biases, key.name, spec)

    def _say_bias(self, key: Key) -> None:
        self._say(error(
            "bias-unexpected", key.key, "is a bias, but bias is 'none' in the config",
            "PEFT would write it into the base.",
        ))  # fmt: skip

    def _place_base_weight(self, key: Key, spec: TensorSpec) -> None:
        if key.name in self._frozen_modules:
            self._freeze(key, f"{key.name}.weight", spec)
        else:
            self._say(error(
                "base-weight-in-adapter", key.key,
                "is a base weight; PEFT would overwrite the base with it",
            ))  # fmt: skip

    def _freeze(self, key: Key, parameter: str, spec: TensorSpec) -> None:
        self.frozen[parameter] = spec
        self.ignored[key.key] = "a copy of the base's, which PEFT saves beside a targeted head"
        self._say(
            note("embeddings-saved", key.key, "is a copy of the base's, which was not trained")
        )

    def _place_copy(self, key: Key) -> None:
        """A key inside the wrapper of a saved module: PEFT saves biases twice with bias='all', and
        embeddings whose vocabulary was resized (0.21.2). It loads the bare name and no other."""
        is_bias = key.name.rpartition(".")[2] == "bias" and self.bias == "all"
        bare = self._parameters.intersection(key.copy_of)
        if is_bias and bare:
            self.ignored[key.key] = "a second copy of a bias"
            self._say(note("bias-saved-twice", key.key, "is a second copy; it is not used"))
        elif any(_is_input_embedding(name) or _is_output_embedding(name) for name in bare):
            self.ignored[key.key] = "a second copy of an embedding"
            self._say(note("embeddings-saved", key.key, "is a second copy; it is not used"))
        else:
            self._say(error(
                "key-modules-to-save-infix", key.key, "holds the wrapper of a saved module; PEFT "
                "saves the bare parameter name and cannot load this",
            ))  # fmt: skip

    def _place_parameter(self, key: Key, spec: TensorSpec) -> None:
        if self.config is not None and is_saved(self.config, key.name):
            self._put(self.saved, key.name, spec)
        elif key.name.endswith(".bias") and self.bias == "all":
            self._put(self.biases, key.name.removesuffix(".bias"), spec)
        elif _is_input_embedding(key.name) or (
            self._has_embedding and _is_output_embedding(key.name)
        ):
            self._put(self.saved, key.name, spec)
            self._say(note(
                "embeddings-saved", key.key, "is a whole embedding; it replaces the base's"
            ))  # fmt: skip
        elif self.config is None:
            return  # what the config says about saved modules is not known
        elif key.name.endswith(".bias") and self.bias == "none":
            self._say_bias(key)
        else:
            self._say(error(
                "tensor-unclaimed", key.key,
                "is no tensor of the adapter: neither a factor nor a part of modules_to_save",
                "PEFT would write it into the base.",
            ))  # fmt: skip

    # all tensors ---------------------------------------------------------------------------------

    def _check(self) -> None:
        factors = [spec for roles in self.roles.values() for spec in roles.values()]
        self.findings += shapes.tensor_findings(factors, self.biases.values(), self.saved.values())
        try:
            if self.is_lora:
                config = self.config if isinstance(self.config, LoraConfig) else None
                self.findings += shapes.lora_shape_findings(self.roles, config)
            elif self.values:
                self.findings += shapes.gralora_shape_findings(self.roles, self.values)
            self.findings += self._target_findings()
        except UnsupportedError as problem:  # a pattern that cannot be carried out
            self._say(error("target-regex-invalid", CONFIG_NAME, problem.message, problem.hint))
        if isinstance(self.config, LoraConfig):
            self._check_features(self.config)
        wrong = any(finding.severity == "error" for finding in self.findings)
        if not self.roles and not self.unsupported and self.config is not None and not wrong:
            self._say(error("missing-tensor", self.file.path.name, "holds no factors at all"))

    def _check_features(self, config: LoraConfig) -> None:
        for feature in config.unsupported_features():
            self.unsupported[feature] = None
        present = {role for roles in self.roles.values() for role in roles}
        for role, feature in (
            ("magnitude", "use_dora"), ("lora_bias", "lora_bias"), ("embedding_A", "embeddings"),
        ):  # fmt: skip
            if role in present:
                self.unsupported[feature] = None
        if any(shapes.is_convolution(roles) for roles in self.roles.values()):
            self.unsupported["convolutions"] = None
        for feature in self.unsupported:
            self._say(warning(
                "lora-feature-unsupported", CONFIG_NAME,
                f"{feature}: the update is more than scaling * B @ A, which is not supported",
                way_out(feature),
            ))  # fmt: skip

    def _target_findings(self) -> Iterator[Finding]:
        config = self.config
        if config is None:
            return
        targets = config.target_modules
        if targets is None:
            if not self.unsupported and not _has_other_targets(config):
                yield error(
                    "target-modules-null", CONFIG_NAME,
                    "target_modules is null; PEFT would adapt the architecture's default modules",
                    "Name the modules that were trained.",
                )  # fmt: skip
            return
        if (isinstance(targets, str) and targets.lower() == "all-linear") or not self.roles:
            return
        chosen = set(select(config, self.roles))
        if not chosen:
            yield error(
                "target-matches-nothing", CONFIG_NAME,
                f"target_modules {targets!r} selects none of the {len(self.roles)} modules here",
            )  # fmt: skip
            return
        others = () if _has_other_targets(config) else self.roles
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


def _is_compiled_layer(key: Key) -> bool:
    """Whether its only wrappers are those of layers that were compiled one by one."""
    words = key.key.split(".")
    before = [one for one, word in pairwise(words) if word == "_orig_mod"]
    return (
        key.wrappers == ("_orig_mod",)
        and words[0] != "_orig_mod"
        and all(map(str.isdecimal, before))
    )


def _spelling_findings(keys: Sequence[Key]) -> Iterator[Finding]:
    """Spellings that PEFT would not load; they are read here all the same, to be named."""
    bare = [key for key in keys if not key.prefixed]
    if bare:
        yield error(
            "key-prefix-missing", bare[0].key,
            f"{len(bare)} of {len(keys)} keys lack the prefix 'base_model.model.'; PEFT would not "
            "load them",
            "Rename them, or save with PeftModel.save_pretrained.",
        )  # fmt: skip
    wrapped = [key for key in keys if key.wrappers]
    if wrapped and all(map(_is_compiled_layer, wrapped)):
        # a model that is compiled in the same way loads them
        yield warning(
            "key-wrapper-prefix", wrapped[0].key,
            f"{len(wrapped)} of {len(keys)} keys name layers that are compiled one by one; they "
            "are read without _orig_mod",
            "Save the model that was not compiled, if others are to load it.",
        )  # fmt: skip
    elif wrapped:
        yield error(
            "key-wrapper-prefix", wrapped[0].key,
            f"{len(wrapped)} of {len(keys)} keys hold {', '.join(wrapped[0].wrappers)} of a "
            "wrapped model; PEFT would not load them",
            "Save the unwrapped model.",
        )  # fmt: skip
    elif keys and all(key.name.startswith("module.") for key in keys):
        # not an error: a model may have a child that is really called so, which the base shows
        yield warning(
            "key-wrapper-prefix", keys[0].key,
            "every module is below 'module', as in a model that DistributedDataParallel wraps; "
            "PEFT loads it into a model of the same names only",
            "Save the unwrapped model.",
        )  # fmt: skip
    named: dict[str, list[str]] = {}
    for key in keys:
        if key.adapter_name is not None:
            named.setdefault(key.adapter_name, []).append(key.key)
    for name, (example, *others) in named.items():
        what = f"{1 + len(others)} of {len(keys)} keys hold the adapter name {name!r}"
        if name == "default":
            yield warning("key-adapter-name", example, f"{what}; PEFT reads them only as such")
        else:
            yield error(
                "key-adapter-name", example, f"{what}; PEFT would not load them",
                "Save with PeftModel.save_pretrained.",
            )  # fmt: skip
