"""A tensor's key in an adapter <-> its module and role. The only file that spells PEFT's names.

Grammar of PEFT 0.21.2 (utils/save_and_load.py, tuners/gralora/layer.py, tuners/lora/layer.py):

    KEY  := "base_model.model." MODULE "." LEAF     with the leaves below
          | "base_model.model." PARAMETER           a full tensor: saved module, bias, embedding

Keys are parsed from the right, because a module may itself be called `gralora_A` or `default`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

from gralora_convert.errors import Finding, UnsupportedError, error, warning

Role = Literal[
    "A", "B", "general_A", "general_B", "bias", "base_weight", "lora_bias", "magnitude",
    "embedding_A", "embedding_B", "parameter", "foreign",
]  # fmt: skip
Method = Literal["gralora", "lora"]

PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# leaf -> method and role; the leaf as PEFT saves it, without the adapter's name
_LEAVES: Mapping[tuple[str, ...], tuple[Method, Role]] = {
    ("gralora_A",): ("gralora", "A"),
    ("gralora_B",): ("gralora", "B"),
    ("gralora_A_general", "weight"): ("gralora", "general_A"),
    ("gralora_B_general", "weight"): ("gralora", "general_B"),
    ("lora_A", "weight"): ("lora", "A"),
    ("lora_B", "weight"): ("lora", "B"),
    ("lora_B", "bias"): ("lora", "lora_bias"),
    ("lora_embedding_A",): ("lora", "embedding_A"),
    ("lora_embedding_B",): ("lora", "embedding_B"),
    ("lora_magnitude_vector",): ("lora", "magnitude"),
    ("lora_magnitude_vector", "weight"): ("lora", "magnitude"),
}
_WRITTEN: Mapping[tuple[Method, Role], tuple[str, ...]] = {
    value: leaf for leaf, value in reversed(list(_LEAVES.items()))
}
# Other leaves that PEFT's methods write (adapter_layer_names of 0.21.2), to be refused by name.
_FOREIGN_STARTS = ("gralora_", "lora_", "hada_", "lokr_", "trainable_tokens_", "_osf_")
_FOREIGN = frozenset(
    "adamss_A adamss_B beft_bias boft_R boft_s c3a_kernel deft_P deft_R delora_A delora_B "
    "delora_lambda fourierft_spectrum frod_U frod_V glora_A glora_B hira_A hira_B hra_u ia3_l "
    "lily_A lily_B ln_tuning_layers miss_block bone_block oft_R oft_r osf_svd_params peanut_A "
    "peanut_B poly_lora_A poly_lora_B poly_router prompt_embeddings psoft_R pvera_lambda_b "
    "pvera_lambda_d randlora_lambda randlora_gamma road_alpha road_theta shadow_down shadow_up "
    "shira_weight supertuning_values tinylora_v unilora_theta_d vblora_logits_A vblora_logits_B "
    "vblora_vector_bank vera_lambda_b vera_lambda_d waveft_spectrum".split()
)


@dataclass(frozen=True, slots=True)
class Key:
    """What a key says, and how its spelling differs from PEFT's own.

    `name` is the module in memory; for the roles `parameter` and `foreign` it is the whole path.
    `leaf` is the word of the key that tells the method. `copy_of` is set for a key inside the
    wrapper of a saved module: the paths of the parameter that it may be a second copy of.
    """

    key: str
    name: str
    role: Role
    method: Method | None = None
    prefixed: bool = True
    adapter_name: str | None = None
    wrappers: tuple[str, ...] = ()
    leaf: str = ""
    copy_of: tuple[str, ...] = ()


def key_of(module: str, role: Role, method: Method = "gralora") -> str:
    """The key under which PEFT saves a tensor.

    Raises:
        UnsupportedError: who reads that key would take it for something else, as PEFT would.

    >>> key_of("layers.0.q_proj", "general_A")
    'base_model.model.layers.0.q_proj.gralora_A_general.weight'
    """
    match role:
        case "parameter":
            key = f"{PREFIX}{module}"
        case "bias":
            key = f"{PREFIX}{module}.base_layer.bias"
        case "base_weight":
            key = f"{PREFIX}{module}.base_layer.weight"
        case _:
            key = ".".join((PREFIX + module, *_WRITTEN[method, role]))
    read = parse_key(key)
    if (read.name, read.role) != (module, role):
        raise UnsupportedError(
            f"no adapter can hold its {role}: the key would be taken for the {read.role} of "
            f"{read.name}", where=module,
            hint="Rename the module in the model.",
        )  # fmt: skip
    return key


def parse_key(key: str) -> Key:
    """What `key` means; never fails: what is not understood is a `parameter` or `foreign`.

    >>> parsed = parse_key("base_model.model.layers.0.q_proj.gralora_A")
    >>> parsed.name, parsed.role
    ('layers.0.q_proj', 'A')
    """
    path, wrappers = _without_wrappers(key)
    prefixed = path.startswith(PREFIX)
    path = path.removeprefix(PREFIX)
    words = path.split(".")
    made = partial(Key, key, prefixed=prefixed, wrappers=wrappers)
    found = _factor(words)
    if found is not None:
        size, leaf, adapter_name = found
        method, role = _LEAVES[leaf]
        module = ".".join(words[:-size])
        return made(module, role, method, adapter_name=adapter_name, leaf=leaf[0])
    if words[-2:] == ["base_layer", "bias"]:
        return made(".".join(words[:-2]), "bias")
    if words[-2:] == ["base_layer", "weight"]:
        return made(".".join(words[:-2]), "base_weight")
    copied = _copied(words)
    if copied:
        return made(path, "parameter", copy_of=copied)
    foreign = next((word for word in reversed(words[-3:]) if _is_foreign(word)), None)
    if foreign is not None:
        return made(path, "foreign", leaf=foreign)
    return made(path, "parameter")


def _without_wrappers(key: str) -> tuple[str, tuple[str, ...]]:
    """The key without the names that compiling, DDP and FSDP put into it, and those names.

    DDP's `module` is one only in front: elsewhere a module may really be called so.
    """
    words = key.split(".")
    wrappers = [word for word in words if word in _WRAPPERS]
    words = [word for word in words if word not in _WRAPPERS]
    while words[:1] == ["module"] and len(words) > 2:
        wrappers.append("module")
        words = words[1:]
    return ".".join(words), tuple(dict.fromkeys(wrappers))


def _factor(words: Sequence[str]) -> tuple[int, tuple[str, ...], str | None] | None:
    """How many words belong to the leaf, the leaf, and the adapter's name if it holds one."""
    for leaf in _LEAVES:
        if tuple(words[-len(leaf) :]) == leaf and len(words) > len(leaf):
            return len(leaf), leaf, None
    for leaf in _LEAVES:  # gralora_A.default, gralora_A_general.default.weight
        size = len(leaf) + 1
        end = words[-size:]
        if len(words) > size and (end[0], *end[2:]) == leaf:
            is_name = end[1] not in ("weight", "bias")
            return (size, leaf, end[1]) if is_name else None
    return None


def _copied(words: Sequence[str]) -> tuple[str, ...]:
    """`head.modules_to_save.default.bias` and `head.original_module.bias` stand for `head.bias`;
    whether the adapter's name follows depends on the parameter (PEFT 0.21.2)."""
    for wrapper in ("modules_to_save", "original_module"):
        if wrapper in words[:-1]:
            place = words.index(wrapper)
            before, after = words[:place], words[place + 1 :]
            paths = [[*before, *after]]
            if wrapper == "modules_to_save" and len(after) > 1:
                paths.append([*before, *after[1:]])
            return tuple(".".join(path) for path in paths)
    return ()


def _is_foreign(word: str) -> bool:
    return word in _FOREIGN or word.startswith(_FOREIGN_STARTS)


def _is_compiled_layer(key: Key) -> bool:
    """Whether its only wrappers are those of layers that were compiled one by one."""
    words = key.key.split(".")
    before = [one for one, word in pairwise(words) if word == "_orig_mod"]
    return (
        key.wrappers == ("_orig_mod",)
        and words[0] != "_orig_mod"
        and all(map(str.isdecimal, before))
    )


def spelling_findings(keys: Sequence[Key]) -> Iterator[Finding]:
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
