"""A tensor's key in an adapter <-> its module and role. The only file that spells PEFT's names.

Grammar of PEFT 0.21.2 (peft/utils/save_and_load.py, tuners/gralora/layer.py):

    KEY  := "base_model.model." MODULE "." LEAF     with the leaves below
          | "base_model.model." PARAMETER           a full tensor: saved module, bias, embedding

Keys are parsed from the right, because a module may itself be called `gralora_A` or `default`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["PREFIX", "Key", "Method", "Role", "key_of", "parse_key"]

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
# first words of other methods' leaves: recognised to be refused by name
_FOREIGN = (
    "gralora_", "lora_", "hada_", "lokr_", "oft_", "boft_", "vera_", "ia3_", "vblora_",
    "randlora_", "bone_", "miss_", "fourierft_", "hra_", "poly_", "ln_tuning_", "shira_", "road_",
    "c3a_", "waveft_", "delora_", "osf_", "prompt_", "trainable_tokens_",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Key:
    """What a key says, and how its spelling differs from PEFT's own.

    `name` is the module in memory; for the role `parameter` it is the parameter's whole path.
    """

    key: str
    name: str
    role: Role
    method: Method | None = None
    prefixed: bool = True
    adapter_name: str | None = None
    wrappers: tuple[str, ...] = ()
    infix: Literal["modules_to_save", "original_module"] | None = None
    leaf: str = ""


def key_of(module: str, role: Role, method: Method = "gralora") -> str:
    """The key under which PEFT saves a tensor.

    >>> key_of("layers.0.q_proj", "general_A")
    'base_model.model.layers.0.q_proj.gralora_A_general.weight'
    """
    if role == "parameter":
        return f"{PREFIX}{module}"
    if role == "bias":
        return f"{PREFIX}{module}.base_layer.bias"
    return ".".join((PREFIX + module, *_WRITTEN[method, role]))


def parse_key(key: str) -> Key:
    """What `key` means; never fails: what is not understood is a `parameter` or `foreign`.

    >>> parsed = parse_key("base_model.model.layers.0.q_proj.gralora_A")
    >>> parsed.name, parsed.role
    ('layers.0.q_proj', 'A')
    """
    path, wrappers = _without_wrappers(key)
    prefixed = path.startswith(PREFIX)
    if prefixed:
        path = path.removeprefix(PREFIX)
        inner = path.split(".")
        while inner[:1] == ["module"] and len(inner) > 2:  # wrapped before PEFT saw the model
            wrappers, inner = (*wrappers, "module"), inner[1:]
        path = ".".join(inner)
    words = path.split(".")
    found = _adapter_leaf(words)
    if found is not None:
        module, (method, role), adapter_name, leaf = found
        return Key(key, module, role, method, prefixed, adapter_name, wrappers, leaf=leaf)
    if words[-2:] == ["base_layer", "bias"]:
        return Key(key, ".".join(words[:-2]), "bias", None, prefixed, None, wrappers)
    if words[-2:] == ["base_layer", "weight"]:
        return Key(key, ".".join(words[:-2]), "base_weight", None, prefixed, None, wrappers)
    for infix in ("modules_to_save", "original_module"):
        if infix in words[:-1]:
            place = words.index(infix)
            return Key(
                key, ".".join(words[:place] + words[-1:]), "parameter", None, prefixed, None,
                wrappers, infix,
            )  # fmt: skip
    foreign = next((word for word in words[-3:] if word.startswith(_FOREIGN)), None)
    if foreign is not None:
        return Key(key, path, "foreign", None, prefixed, None, wrappers, leaf=foreign)
    return Key(key, path, "parameter", None, prefixed, None, wrappers)


def _without_wrappers(key: str) -> tuple[str, tuple[str, ...]]:
    """The key without the names that compiling, DDP and FSDP put into it, and those names."""
    words = key.split(".")
    wrappers = [word for word in words if word in _WRAPPERS]
    words = [word for word in words if word not in _WRAPPERS]
    while words[:1] == ["module"] and len(words) > 2:
        wrappers.append("module")
        words = words[1:]
    return ".".join(words), tuple(dict.fromkeys(wrappers))


def _adapter_leaf(
    words: list[str],
) -> tuple[str, tuple[Method, Role], str | None, str] | None:
    """Module, method and role, adapter name, leaf; None when the key is no factor."""
    for leaf, meaning in _LEAVES.items():
        size = len(leaf)
        if tuple(words[-size:]) == leaf and len(words) > size:
            return ".".join(words[:-size]), meaning, None, ".".join(leaf)
    for leaf, meaning in _LEAVES.items():  # with the adapter's name: gralora_A.default,
        size = len(leaf) + 1  # gralora_A_general.default.weight
        named = (*words[-size:][:1], *words[-size:][2:])
        if named == leaf and len(words) > size:
            name = words[-size:][1]
            if leaf == ("gralora_A",) and name in ("weight", "bias"):
                return None
            if leaf == ("gralora_B",) and name in ("weight", "bias"):
                return None
            return ".".join(words[:-size]), meaning, name, ".".join(leaf)
    return None
