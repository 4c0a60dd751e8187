"""One table of 121 adapters, each broken in one way, for every depth at which it can be told.

The good adapter has PEFT's form (r=8, k=2, hybrid_r=4, alpha=16, q_proj and down_proj of a tiny
Llama; tests/test_integrity.py holds it against PEFT's own). A row's number is that of the measured
table of defects; what PEFT 0.21.2 does with them ranges from a crash to a silent loss of the whole
adapter. Who needs least to tell a defect is the table it stands in: the config, the adapter, or
the adapter's values and its base.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest

from gralora_convert.adapters.config import CONFIG_NAME, GraloraConfig
from gralora_convert.disk.specs import DTYPE_BITS

WEIGHTS = "adapter_model.safetensors"
P = "base_model.model."
Q0, Q1 = (f"{P}model.layers.{i}.self_attn.q_proj." for i in (0, 1))
D0, D1 = (f"{P}model.layers.{i}.mlp.down_proj." for i in (0, 1))
EMBED, HEAD = f"{P}model.embed_tokens.weight", f"{P}lm_head.weight"
Spec = tuple[str, tuple[int, ...]]  # dtype, shape

# r=8, k=2, hybrid_r=4 on q_proj (32 -> 32) and down_proj (48 -> 32) of two layers
CONFIG: Mapping[str, Any] = GraloraConfig(
    r=8, gralora_k=2, hybrid_r=4, alpha=16, target_modules=["q_proj", "down_proj"],
    task_type="CAUSAL_LM", inference_mode=True,
).to_dict()  # fmt: skip
TENSORS: Mapping[str, Spec] = {
    module + leaf: ("F32", shape)
    for module, size in ((Q0, 32), (D0, 48), (Q1, 32), (D1, 48))
    for leaf, shape in {
        "gralora_A": (2, size // 2, 8),
        "gralora_A_general.weight": (4, size),
        "gralora_B": (2, 8, 16),
        "gralora_B_general.weight": (32, 4),
    }.items()
}
PURE = {key: spec for key, spec in TENSORS.items() if "general" not in key}


@dataclass
class Parts:
    """One adapter to be broken and written: a config, the specs of its tensors, their values."""

    folder: Path
    config: dict[str, Any] = field(default_factory=lambda: dict(CONFIG))
    tensors: dict[str, Spec] = field(default_factory=lambda: dict(TENSORS))
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    trained: bool = False  # random values in float32; else all are zero
    first: dict[str, float] = field(default_factory=dict)  # the first value of a tensor
    zero: set[str] = field(default_factory=set)
    after: list[Callable[["Parts"], object]] = field(default_factory=list)  # once it is written
    base: str = "base"  # the base that it is put beside

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG_NAME

    def data(self, key: str) -> bytes:
        dtype, shape = self.tensors[key]
        if dtype != "F32" or not self.trained or key in self.zero:
            return bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8)
        values = numpy.random.default_rng(0).standard_normal(shape).astype("<f4") * 0.1
        if key in self.first:
            values.flat[0] = self.first[key]
        return values.tobytes()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(json.dumps(self.config, indent=2, sort_keys=True))
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        body = bytearray()
        for key, (dtype, shape) in self.tensors.items():
            start = len(body)
            body += self.data(key)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(body)]}
        text = json.dumps(header).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + body)
        for edit in self.after:
            edit(self)


Break = Callable[[Parts], object]


def intact(parts: Parts) -> None:
    """Nothing is broken."""


def config(**values: Any) -> Break:
    return lambda parts: parts.config.update(values)


def without(*names: str) -> Break:
    return lambda parts: [parts.config.pop(name) for name in names]


def put(key: str, *shape: int, dtype: str = "F32") -> Break:
    return lambda parts: parts.tensors.__setitem__(key, (dtype, shape))


def first(key: str, value: float) -> Break:
    return lambda parts: parts.first.__setitem__(key, value)


def drop(*starts: str) -> Break:
    def apply(parts: Parts) -> None:
        parts.tensors = {k: s for k, s in parts.tensors.items() if not k.startswith(starts)}

    return apply


def rename(to: Callable[[str], str]) -> Break:
    def apply(parts: Parts) -> None:
        parts.tensors = {to(key): spec for key, spec in parts.tensors.items()}

    return apply


def replaced(old: str, new: str) -> Break:
    return rename(lambda key: key.replace(old, new))


def copied(old: str, new: str) -> Break:
    def apply(parts: Parts) -> None:
        parts.tensors |= {k.replace(old, new): s for k, s in parts.tensors.items() if old in k}

    return apply


def tensors(specs: Mapping[str, Spec], **values: Any) -> Break:
    """Another set of tensors, and what the config must say differently."""

    def apply(parts: Parts) -> None:
        parts.tensors = dict(specs)
        parts.config |= values

    return apply


def both(*breaks: Break) -> Break:
    return lambda parts: [one(parts) for one in breaks]


def named(name: str) -> Callable[[str], str]:
    return lambda key: f"{key}.{name}" if key.endswith(("_A", "_B")) else key


def files(edit: Callable[[Parts], object]) -> Break:
    """Edits the files, after they are written."""
    return lambda parts: parts.after.append(edit)


def text(edit: Callable[[str], str]) -> Break:
    """Edits the config as text, after it is written."""
    return files(lambda parts: parts.config_file.write_text(edit(parts.config_file.read_text())))


def metadata(value: dict[str, str] | None) -> Break:
    return lambda parts: setattr(parts, "metadata", value)


def beside(base: str) -> Break:
    return lambda parts: setattr(parts, "base", base)


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (Path.touch, (Path("executed"),))  # type: ignore[return-value]


def as_pickle(value: Callable[[dict[str, Any]], object]) -> Break:
    """The weights as `torch.save` writes them."""

    def apply(parts: Parts) -> None:
        torch = pytest.importorskip("torch")
        held = {key: torch.ones(shape) for key, (_, shape) in parts.tensors.items()}
        torch.save(value(held), parts.folder / "adapter_model.bin")
        parts.weights.unlink()

    return files(apply)


def parameters(held: dict[str, Any]) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {key: torch.nn.Parameter(tensor) for key, tensor in held.items()}


def moved(parts: Parts) -> None:
    (parts.folder / "my_ad").mkdir()
    for path in (parts.weights, parts.config_file):
        path.rename(parts.folder / "my_ad" / path.name)


def swapped_layers(key: str) -> str:
    return key.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1.")


def as_lora(key: str) -> str:
    return key.replace("gralora_A_general", "lora_A").replace("gralora_", "lora_")


# number: (how to break, code, severity); a silent one has neither
Rows = Mapping[int, tuple[Break, str, str]]
NONE = ""
TOLD_BY_CONFIG: Rows = {
    1: (intact, NONE, NONE),
    13: (without("gralora_k"), "config-key-missing", "warning"),
    14: (config(gralora_k=3), "rank-not-divisible", "error"),
    15: (config(gralora_k=0), "config-value-range", "error"),
    16: (config(alpha=32), NONE, NONE),
    17: (without("alpha"), "alpha-missing", "error"),
    18: (config(alpha="16"), "config-value-type", "error"),
    19: (config(alpha=None), "config-value-type", "error"),
    20: (config(alpha=0), "alpha-zero", "warning"),
    21: (config(alpha=math.nan), "config-non-finite", "error"),
    22: (config(r=8.0), "config-value-type", "error"),
    23: (config(r=True, gralora_k=1), "config-value-type", "error"),
    49: (config(bias="all"), NONE, NONE),  # Llama has no biases
    50: (config(bias="bogus"), "bias-mode-unknown", "error"),
    51: (config(bias="lora_only"), "bias-mode-alias", "warning"),
    60: (config(target_modules="("), "target-regex-invalid", "error"),
    62: (config(target_modules=["q_proj", 3]), "config-value-type", "error"),
    63: (config(target_modules={"q_proj": 1}), "config-value-type", "error"),
    65: (
        config(target_modules=r".*(q_proj|down_proj)", layers_to_transform=[1]),
        "layers-to-transform-ignored", "note",
    ),
    66: (config(layers_to_transform="1"), "config-value-type", "error"),
    68: (without("peft_type"), "peft-type-missing", "error"),
    69: (config(peft_type="gralora"), "peft-type-unknown", "error"),
    70: (config(exclude_modules=["v_proj"]), "config-key-unknown", "warning"),
    71: (config(use_rslora=True), "config-key-unsupported", "error"),
    72: (config(rank_pattern={"q_proj": 4}), "config-key-unsupported", "error"),
    73: (both(without("alpha"), config(gralora_alpha=16)), "fork-config", "error"),
    74: (config(task_type="BOGUS"), "task-type-unknown", "error"),
    75: (config(task_type="FEATURE_EXTRACTION"), NONE, NONE),
    77: (config(peft_version="99.0"), "peft-version-unverified", "warning"),
    78: (without("peft_version"), "peft-version-missing", "note"),
    80: (config(fan_in_fan_out="yes"), "config-value-type", "error"),
    81: (config(gralora_dropout=1.0), "dropout-total", "note"),
    82: (config(gralora_dropout=2.0), "config-value-range", "error"),
    83: (config(inference_mode=False), NONE, NONE),
    84: (config(init_weights=False), "init-weights-false", "note"),
    113: (config(modules_to_save="lm_head"), "config-value-type", "error"),
    116: (config(target_modules=["q_proj", "down_proj", "q_proj"]), "target-duplicate", "note"),
    118: (config(hybrid_r=-1), "config-value-range", "error"),
    119: (config(hybrid_r=None), "config-value-type", "error"),
}  # fmt: skip
TOLD_BY_ADAPTER: Rows = {
    2: (drop(Q0 + "gralora_A"), "missing-tensor", "error"),
    3: (drop(Q0 + "gralora_B"), "missing-tensor", "error"),
    5: (drop(Q0 + "gralora_A_general"), "missing-tensor", "error"),
    6: (tensors(PURE), "hybrid-rank-mismatch", "error"),
    7: (config(hybrid_r=0), "hybrid-rank-mismatch", "error"),
    8: (config(hybrid_r=2), "hybrid-rank-mismatch", "error"),
    9: (without("hybrid_r"), "hybrid-rank-mismatch", "error"),
    10: (config(r=16), "rank-mismatch", "error"),
    11: (without("r"), "rank-mismatch", "error"),
    12: (config(gralora_k=4), "k-mismatch", "error"),
    24: (put(D1 + "gralora_A", 2, 8, 24), "tensor-shape", "error"),
    25: (put(Q0 + "gralora_A", 32, 8), "tensor-shape", "error"),
    26: (put(Q0 + "gralora_A", 1), "tensor-shape", "error"),
    27: (put(Q0 + "gralora_A_general.weight", 32, 4), "tensor-shape", "error"),
    28: (
        both(put(Q0 + "gralora_A", 2, 8, 16), put(Q0 + "gralora_B", 2, 16, 8)),
        "tensor-shape", "error",
    ),
    32: (put(Q0 + "gralora_A", 2, 16, 8, dtype="I8"), "tensor-dtype", "error"),
    33: (put(Q0 + "gralora_A", 2, 16, 8, dtype="BOOL"), "tensor-dtype", "error"),
    34: (put(Q0 + "gralora_A", 2, 16, 8, dtype="F8_E4M3"), "tensor-dtype-lossy", "warning"),
    35: (put(Q0 + "gralora_A", 2, 16, 8, dtype="C64"), "tensor-dtype", "error"),
    36: (put(Q0 + "gralora_A", 2, 16, 8, dtype="F16"), "tensor-dtype-mixed", "note"),
    38: (copied("0.self_attn.q_proj", "0.self_attn.v_proj"), "tensors-without-target", "error"),
    40: (rename(lambda k: k.removeprefix(P)), "key-prefix-missing", "error"),
    41: (rename(named("default")), "key-adapter-name", "warning"),
    42: (replaced("model.model.", "model._orig_mod.model."), "key-wrapper-prefix", "error"),
    43: (rename(lambda k: "module." + k), "key-wrapper-prefix", "error"),
    44: (rename(named("weight")), "key-leaf-unknown", "error"),
    45: (rename(as_lora), "key-foreign-method", "error"),
    46: (put(Q0 + "base_layer.weight", 32, 32), "base-weight-in-adapter", "error"),
    47: (put(P + "model.norm.weight", 32), "tensor-unclaimed", "error"),
    48: (put(Q0 + "base_layer.bias", 32), "bias-unexpected", "error"),
    53: (put(HEAD, 32, 32), "tensor-unclaimed", "error"),
    56: (config(target_modules=["q_proj"]), "tensors-without-target", "error"),
    58: (config(target_modules=None), "target-modules-null", "error"),
    59: (config(target_modules=["zzz"]), "target-matches-nothing", "error"),
    64: (config(layers_to_transform=[1]), "tensors-without-target", "error"),
    67: (config(peft_type="LORA"), "peft-type-mismatch", "error"),
    85: (text(lambda s: "[1, 2]"), "config-not-object", "error"),
    86: (text(lambda s: s[: len(s) // 2]), "config-not-json", "error"),
    87: (text(lambda s: s.replace('"r": 8', '"r": 8,\n  "r": 4')), "config-duplicate-key", "error"),
    88: (files(lambda parts: parts.config_file.unlink()), "config-missing", "error"),
    89: (files(lambda parts: parts.weights.unlink()), "weights-missing", "error"),
    90: (
        files(lambda parts: parts.weights.write_bytes(parts.weights.read_bytes()[:-100])),
        "weights-unreadable", "error",
    ),
    91: (
        files(lambda parts: parts.weights.write_text(
            "version https://git-lfs.github.com/spec/v1\noid 1\n"
        )),
        "weights-lfs-pointer", "error",
    ),
    92: (
        files(lambda parts: (parts.folder / "adapter_model.bin").write_bytes(b"x")),
        "weights-ambiguous", "warning",
    ),
    93: (as_pickle(lambda held: {"a": Malicious()}), "weights-unsafe-pickle", "error"),
    94: (as_pickle(lambda held: {"state_dict": held}), "weights-nested", "error"),
    95: (as_pickle(parameters), "weights-pickle", "note"),
    96: (metadata(None), "metadata-missing", "note"),
    97: (metadata({"format": "np"}), "metadata-format", "note"),
    102: (tensors({}), "weights-empty", "error"),
    103: (put(Q0 + "gralora_A.default", 2, 16, 8), "key-duplicate-role", "error"),
    104: (
        both(put(Q0 + "gralora_A", 2, 16, 4), put(Q0 + "gralora_B", 2, 4, 16)),
        "rank-mismatch", "error",
    ),
    106: (rename(named("my")), "key-adapter-name", "error"),
    107: (rename(named("default")), "key-adapter-name", "warning"),
    108: (
        replaced("model.model.", "model._fsdp_wrapped_module.model."),
        "key-wrapper-prefix", "error",
    ),
    109: (put(Q0 + "gralora_A", 0), "tensor-empty", "error"),
    110: (config(r=4), "rank-mismatch", "error"),
    111: (files(moved), "config-missing", "error"),
    112: (
        files(lambda parts: parts.weights.rename(
            parts.folder / "adapter_model-00001-of-00001.safetensors"
        )),
        "weights-sharded", "error",
    ),
    114: (
        both(config(modules_to_save=["lm_head"]),
             put(P + "lm_head.modules_to_save.default.weight", 32, 32)),
        "key-modules-to-save-infix", "error",
    ),
    115: (
        both(config(modules_to_save=["lm.head"]), put(HEAD, 32, 32)), "tensor-unclaimed", "error",
    ),
    117: (text(lambda s: "\ufeff" + s), "config-bom", "error"),
}  # fmt: skip
TOLD_BY_BASE: Rows = {  # or by the values
    4: (drop(Q0), "target-without-tensors", "error"),
    29: (rename(swapped_layers), NONE, NONE),
    30: (first(Q0 + "gralora_A", math.nan), "tensor-non-finite", "error"),
    31: (first(Q0 + "gralora_B", math.inf), "tensor-non-finite", "error"),
    37: (lambda parts: parts.zero.add(Q0 + "gralora_B"), "zero-factor", "warning"),
    39: (copied("layers.0.", "layers.7."), "module-not-in-base", "error"),
    52: (config(modules_to_save=["lm_head"]), "modules-to-save-missing", "error"),
    54: (config(modules_to_save=["score"]), "modules-to-save-unmatched", "note"),
    55: (
        both(config(modules_to_save=["lm_head"]), put(HEAD, 33, 32)),
        "modules-to-save-shape", "error",
    ),
    57: (
        config(target_modules=["q_proj", "down_proj", "v_proj"]), "target-without-tensors", "error",
    ),
    61: (config(target_modules=["q_proj", "down_proj", "zzz"]), "target-name-unmatched", "note"),
    76: (
        both(config(base_model_name_or_path="other/thing"), beside("named")),
        "base-name-mismatch", "warning",
    ),
    79: (config(fan_in_fan_out=True), "fan-in-fan-out-mismatch", "warning"),
    98: (beside("wide"), "base-shape-mismatch", "error"),
    99: (beside("deep"), "target-without-tensors", "error"),
    100: (beside("shallow"), "module-not-in-base", "error"),
    101: (intact, NONE, NONE),  # a wrong base of equal shapes cannot be told
    105: (first(D1 + "gralora_A", math.nan), "tensor-non-finite", "error"),
    120: (put(EMBED, 70, 32), "embedding-size-mismatch", "error"),
    121: (put(EMBED, 32, 32), "embeddings-differ-from-base", "warning"),
}  # fmt: skip
DEFECTS: Rows = {**TOLD_BY_CONFIG, **TOLD_BY_ADAPTER, **TOLD_BY_BASE}
assert sorted(DEFECTS) == list(range(1, 122))
