"""121 adapters, each broken in one way, through `validate`: every defect gets its verdict.

The good adapter is PEFT's (r=8, k=2, hybrid_r=4, alpha=16, q_proj and down_proj of a tiny Llama).
Rows carry the numbers of the measured table of defects; what PEFT 0.21.2 does with each of them
ranges from a crash to a silent loss of the whole adapter.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import run
from tests.zoo import Architecture, llama, save_base, train

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
PREFIX = "base_model.model."
Q0 = PREFIX + "model.layers.0.self_attn.q_proj."
DOWN1 = PREFIX + "model.layers.1.mlp.down_proj."
LLAMA = llama("LlamaForCausalLM", "LlamaConfig", hidden_size=32, intermediate_size=48, head_dim=8)
ATTENTION = Architecture(LLAMA, ["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base and the good adapter."""
    folder = tmp_path_factory.mktemp("good")
    save_base(ATTENTION, folder / "base")
    train(folder / "base", ATTENTION, folder / "adapter", hybrid_r=4)
    return folder


@dataclass
class Broken:
    """One copy of the good adapter, to be broken."""

    folder: Path
    config: Config
    tensors: Tensors
    metadata: dict[str, str] | None
    base: Path

    def save(self) -> None:
        path = self.folder / "adapter_model.safetensors"
        if path.exists():
            save_file(self.tensors, path, metadata=self.metadata)
        path = self.folder / "adapter_config.json"
        if path.exists():
            path.write_text(json.dumps(self.config, indent=2, sort_keys=True))


Break = Callable[[Broken], object]


def config(**values: Any) -> Break:
    return lambda b: b.config.update(values)


def without(*names: str) -> Break:
    def remove(b: Broken) -> None:
        for name in names:
            del b.config[name]

    return remove


def drop(*keys: str) -> Break:
    def remove(b: Broken) -> None:
        for key in [k for k in b.tensors if k.startswith(keys)]:
            del b.tensors[key]

    return remove


def change(key: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    def apply(b: Broken) -> None:
        b.tensors[key] = to(b.tensors[key]).contiguous()

    return apply


def rename(to: Callable[[str], str]) -> Break:
    def apply(b: Broken) -> None:
        b.tensors = {to(key): tensor for key, tensor in b.tensors.items()}

    return apply


def add(key: str, tensor: torch.Tensor) -> Break:
    return lambda b: b.tensors.__setitem__(key, tensor.clone())


def all_of(*breaks: Break) -> Break:
    return lambda b: [one(b) for one in breaks]


def text(edit: Callable[[str], str]) -> Break:
    """Edits the config as text, after it is saved."""

    def apply(b: Broken) -> None:
        b.save()
        path = b.folder / "adapter_config.json"
        edited = edit(path.read_text())
        path.unlink()
        b.after = lambda: path.write_text(edited)  # type: ignore[attr-defined]

    return apply


def files(edit: Callable[[Broken], object]) -> Break:
    """Edits the files, after they are saved."""

    def apply(b: Broken) -> None:
        b.after = lambda: edit(b)  # type: ignore[attr-defined]

    return apply


def put(key: str, value: float) -> Break:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        edited = tensor.clone()
        edited.view(-1)[0] = value
        return edited

    return change(key, edit)


def _path(b: Broken) -> Path:
    return b.folder / "adapter_model.safetensors"


def _as_pickle(b: Broken, value: object) -> None:
    torch.save(value, b.folder / "adapter_model.bin")
    _path(b).unlink()


class _Malicious:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (Path.touch, (Path("executed"),))  # type: ignore[return-value]


def _into_subfolder(b: Broken) -> None:
    (b.folder / "my_ad").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (b.folder / name).rename(b.folder / "my_ad" / name)


def _layers(count: int, hidden: int = 32) -> Break:
    def apply(b: Broken) -> None:
        cls = llama(
            "LlamaForCausalLM", "LlamaConfig", num_hidden_layers=count, hidden_size=hidden,
            intermediate_size=hidden * 3 // 2,
            head_dim=8,
        )  # fmt: skip
        b.base = save_base(Architecture(cls, []), b.folder.parent / "other")

    return apply


def _swap_layers(key: str) -> str:
    return key.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace(
        "layers.x", "layers.1"
    )  # fmt: skip


def _swap_factors(b: Broken) -> None:
    b.tensors[Q0 + "gralora_A"], b.tensors[Q0 + "gralora_B"] = (
        b.tensors[Q0 + "gralora_B"].clone(), b.tensors[Q0 + "gralora_A"].clone(),
    )  # fmt: skip


def _only(b: Broken) -> None:
    b.tensors = {}


V0 = PREFIX + "model.layers.0.self_attn.v_proj."
EMBED = PREFIX + "model.embed_tokens.weight"
HEAD = PREFIX + "lm_head.weight"
NONE = ""
# number: (how to break, the code expected, its severity)
ROWS: Mapping[int, tuple[Break, str, str]] = {
    1: (lambda b: None, NONE, NONE),
    2: (drop(Q0 + "gralora_A"), "missing-tensor", "error"),
    3: (drop(Q0 + "gralora_B"), "missing-tensor", "error"),
    4: (drop(Q0), "target-without-tensors", "error"),
    5: (drop(Q0 + "gralora_A_general"), "missing-tensor", "error"),
    6: (
        lambda b: setattr(b, "tensors", {k: t for k, t in b.tensors.items() if "general" not in k}),
        "hybrid-rank-mismatch", "error",
    ),
    7: (config(hybrid_r=0), "hybrid-rank-mismatch", "error"),
    8: (config(hybrid_r=2), "hybrid-rank-mismatch", "error"),
    9: (without("hybrid_r"), "hybrid-rank-mismatch", "error"),
    10: (config(r=16), "rank-mismatch", "error"),
    11: (without("r"), "rank-mismatch", "error"),
    12: (config(gralora_k=4), "k-mismatch", "error"),
    13: (without("gralora_k"), "config-key-missing", "warning"),
    14: (config(gralora_k=3), "rank-not-divisible", "error"),
    15: (config(gralora_k=0), "config-value-range", "error"),
    16: (config(alpha=32), NONE, NONE),
    17: (without("alpha"), "alpha-missing", "error"),
    18: (config(alpha="16"), "config-value-type", "error"),
    19: (config(alpha=None), "config-value-type", "error"),
    20: (config(alpha=0), "alpha-zero", "warning"),
    21: (config(alpha=float("nan")), "config-non-finite", "error"),
    22: (config(r=8.0), "config-value-type", "error"),
    23: (config(r=True, gralora_k=1), "config-value-type", "error"),
    24: (change(DOWN1 + "gralora_A", lambda t: t.transpose(1, 2)), "tensor-shape", "error"),
    25: (change(Q0 + "gralora_A", lambda t: t.reshape(-1, t.shape[2])), "tensor-shape", "error"),
    26: (change(Q0 + "gralora_A", lambda t: t.flatten()[:1]), "tensor-shape", "error"),
    27: (change(Q0 + "gralora_A_general.weight", lambda t: t.T), "tensor-shape", "error"),
    28: (_swap_factors, "tensor-shape", "error"),
    29: (rename(_swap_layers), NONE, NONE),
    30: (put(Q0 + "gralora_A", float("nan")), "tensor-non-finite", "error"),
    31: (put(Q0 + "gralora_B", float("inf")), "tensor-non-finite", "error"),
    32: (change(Q0 + "gralora_A", lambda t: t.to(torch.int8)), "tensor-dtype", "error"),
    33: (change(Q0 + "gralora_A", lambda t: t > 0), "tensor-dtype", "error"),
    34: (
        change(Q0 + "gralora_A", lambda t: t.to(torch.float8_e4m3fn)),
        "tensor-dtype-lossy", "warning",
    ),
    35: (change(Q0 + "gralora_A", lambda t: t.to(torch.complex64)), "tensor-dtype", "error"),
    36: (change(Q0 + "gralora_A", lambda t: t.half()), "tensor-dtype-mixed", "note"),
    37: (change(Q0 + "gralora_B", torch.zeros_like), "zero-factor", "warning"),
    38: (
        lambda b: b.tensors.update(
            {k.replace("q_proj", "k_proj"): t.clone() for k, t in b.tensors.items() if Q0 in k}
        ),
        "tensors-without-target", "error",
    ),
    39: (
        lambda b: b.tensors.update(
            {k.replace("s.0.", "s.7."): t.clone() for k, t in b.tensors.items() if "s.0." in k}
        ),
        "module-not-in-base", "error",
    ),
    40: (rename(lambda k: k.removeprefix(PREFIX)), "key-prefix-missing", "error"),
    41: (
        rename(lambda k: k + ".default" if k.endswith(("_A", "_B")) else k),
        "key-adapter-name", "warning",
    ),
    42: (rename(lambda k: k.replace("model.model.", "model._orig_mod.model.", 1)),
         "key-wrapper-prefix", "error"),
    43: (rename(lambda k: "module." + k), "key-wrapper-prefix", "error"),
    44: (
        rename(lambda k: k + ".weight" if k.endswith(("_A", "_B")) else k),
        "key-leaf-unknown", "error",
    ),
    45: (
        rename(lambda k: k.replace("gralora_A_general", "lora_A").replace("gralora_", "lora_")),
        "key-foreign-method", "error",
    ),
    46: (add(Q0 + "base_layer.weight", torch.randn(32, 32)), "base-weight-in-adapter", "error"),
    47: (add(PREFIX + "model.norm.weight", torch.ones(32)), "tensor-unclaimed", "error"),
    48: (add(Q0 + "base_layer.bias", torch.ones(32)), "bias-unexpected", "error"),
    49: (config(bias="all"), NONE, NONE),  # Llama has no biases
    50: (config(bias="bogus"), "bias-mode-unknown", "error"),
    51: (config(bias="lora_only"), "bias-mode-alias", "warning"),
    52: (config(modules_to_save=["lm_head"]), "modules-to-save-missing", "error"),
    53: (add(HEAD, torch.randn(32, 32)), "tensor-unclaimed", "error"),
    54: (config(modules_to_save=["score"]), "modules-to-save-unmatched", "note"),
    55: (
        all_of(config(modules_to_save=["lm_head"]), add(HEAD, torch.randn(33, 32))),
        "modules-to-save-shape", "error",
    ),
    56: (config(target_modules=["q_proj"]), "tensors-without-target", "error"),
    57: (config(target_modules=["q_proj", "down_proj", "v_proj"]),
         "target-without-tensors", "error"),
    58: (config(target_modules=None), "target-modules-null", "error"),
    59: (config(target_modules=["zzz"]), "target-matches-nothing", "error"),
    60: (config(target_modules="("), "target-regex-invalid", "error"),
    61: (config(target_modules=["q_proj", "down_proj", "zzz"]), "target-name-unmatched", "note"),
    62: (config(target_modules=["q_proj", 3]), "config-value-type", "error"),
    63: (config(target_modules={"q_proj": 1}), "config-value-type", "error"),
    64: (config(layers_to_transform=[1]), "tensors-without-target", "error"),
    65: (
        config(target_modules=r".*(q_proj|down_proj)", layers_to_transform=[1]),
        "layers-to-transform-ignored", "note",
    ),
    66: (config(layers_to_transform="1"), "config-value-type", "error"),
    67: (config(peft_type="LORA"), "peft-type-mismatch", "error"),
    68: (without("peft_type"), "peft-type-missing", "error"),
    69: (config(peft_type="gralora"), "peft-type-unknown", "error"),
    70: (config(exclude_modules=["v_proj"]), "config-key-unknown", "warning"),
    71: (config(use_rslora=True), "config-key-unsupported", "error"),
    72: (config(rank_pattern={"q_proj": 4}), "config-key-unsupported", "error"),
    73: (all_of(without("alpha"), config(gralora_alpha=16)), "fork-config", "error"),
    74: (config(task_type="BOGUS"), "task-type-unknown", "error"),
    75: (config(task_type="FEATURE_EXTRACTION"), NONE, NONE),
    76: (
        all_of(config(base_model_name_or_path="other/thing"), lambda b: _name_base(b)),
        "base-name-mismatch", "warning",
    ),
    77: (config(peft_version="99.0"), "peft-version-unverified", "warning"),
    78: (without("peft_version"), "peft-version-missing", "note"),
    79: (config(fan_in_fan_out=True), "fan-in-fan-out-mismatch", "warning"),
    80: (config(fan_in_fan_out="yes"), "config-value-type", "error"),
    81: (config(gralora_dropout=1.0), "dropout-total", "note"),
    82: (config(gralora_dropout=2.0), "config-value-range", "error"),
    83: (config(inference_mode=False), NONE, NONE),
    84: (config(init_weights=False), "init-weights-false", "note"),
    85: (text(lambda s: "[1, 2]"), "config-not-object", "error"),
    86: (text(lambda s: s[: len(s) // 2]), "config-not-json", "error"),
    87: (text(lambda s: s.replace('"r": 8', '"r": 8,\n  "r": 4')), "config-duplicate-key", "error"),
    88: (files(lambda b: (b.folder / "adapter_config.json").unlink()), "config-missing", "error"),
    89: (files(lambda b: _path(b).unlink()), "weights-missing", "error"),
    90: (
        files(lambda b: _path(b).write_bytes(_path(b).read_bytes()[:-100])),
        "weights-unreadable", "error",
    ),
    91: (
        files(lambda b: _path(b).write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")),
        "weights-lfs-pointer", "error",
    ),
    92: (
        files(lambda b: torch.save({"a": torch.ones(1)}, b.folder / "adapter_model.bin")),
        "weights-ambiguous", "warning",
    ),
    93: (
        files(lambda b: _as_pickle(b, {"a": _Malicious()})),
        "weights-unsafe-pickle", "error",
    ),
    94: (files(lambda b: _as_pickle(b, {"state_dict": b.tensors})), "weights-nested", "error"),
    95: (
        files(lambda b: _as_pickle(
            b, {k: torch.nn.Parameter(t) for k, t in b.tensors.items()}
        )),
        "weights-pickle", "note",
    ),
    96: (lambda b: setattr(b, "metadata", None), "metadata-missing", "note"),
    97: (lambda b: setattr(b, "metadata", {"format": "np"}), "metadata-format", "note"),
    98: (_layers(2, hidden=64), "base-shape-mismatch", "error"),
    99: (_layers(3), "target-without-tensors", "error"),
    100: (_layers(1), "module-not-in-base", "error"),
    101: (lambda b: None, NONE, NONE),  # a wrong base of equal shapes cannot be told
    102: (_only, "weights-empty", "error"),
    103: (
        lambda b: b.tensors.update(
            {Q0 + "gralora_A.default": torch.zeros_like(b.tensors[Q0 + "gralora_A"])}
        ),
        "key-duplicate-role", "error",
    ),
    104: (
        all_of(
            change(Q0 + "gralora_A", lambda t: t[:, :, :4]),
            change(Q0 + "gralora_B", lambda t: t[:, :4]),
        ),
        "rank-mismatch", "error",
    ),
    105: (put(DOWN1 + "gralora_A", float("nan")), "tensor-non-finite", "error"),
    106: (
        rename(lambda k: k + ".my" if k.endswith(("_A", "_B")) else k),
        "key-adapter-name", "error",
    ),
    107: (
        rename(lambda k: k + ".default" if k.endswith(("_A", "_B")) else k),
        "key-adapter-name", "warning",
    ),
    108: (rename(lambda k: k.replace("model.model.", "model._fsdp_wrapped_module.model.", 1)),
          "key-wrapper-prefix", "error"),
    109: (change(Q0 + "gralora_A", lambda t: t.flatten()[:0]), "tensor-empty", "error"),
    110: (config(r=4), "rank-mismatch", "error"),
    111: (files(_into_subfolder), "config-missing", "error"),
    112: (
        files(lambda b: _path(b).rename(b.folder / "adapter_model-00001-of-00001.safetensors")),
        "weights-sharded", "error",
    ),
    113: (config(modules_to_save="lm_head"), "config-value-type", "error"),
    114: (
        all_of(
            config(modules_to_save=["lm_head"]),
            add(PREFIX + "lm_head.modules_to_save.default.weight", torch.randn(32, 32)),
        ),
        "key-modules-to-save-infix", "error",
    ),
    115: (
        all_of(config(modules_to_save=["lm.head"]), add(HEAD, torch.randn(32, 32))),
        "tensor-unclaimed", "error",
    ),
    116: (config(target_modules=["q_proj", "down_proj", "q_proj"]), "target-duplicate", "note"),
    117: (text(lambda s: "\ufeff" + s), "config-bom", "error"),
    118: (config(hybrid_r=-1), "config-value-range", "error"),
    119: (config(hybrid_r=None), "config-value-type", "error"),
    120: (add(EMBED, torch.randn(70, 32)), "embedding-size-mismatch", "error"),
    121: (add(EMBED, torch.randn(32, 32)), "embeddings-differ-from-base", "warning"),
}  # fmt: skip


def _name_base(b: Broken) -> None:
    folder = b.folder.parent / "named"
    shutil.copytree(b.base, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"_name_or_path": "this/model"}))
    b.base = folder


def broken(good: Path, tmp_path: Path, how: Break) -> Broken:
    folder = tmp_path / "adapter"
    shutil.copytree(good / "adapter", folder)
    copy = Broken(
        folder,
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
        {"format": "pt"},
        good / "base",
    )
    how(copy)
    copy.save()
    getattr(copy, "after", lambda: None)()
    return copy


@pytest.mark.parametrize("row", ROWS)
def test_every_defect_gets_its_verdict(
    row: int, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how, code, severity = ROWS[row]
    copy = broken(good, tmp_path, how)
    outcome = run("validate", copy.folder, "--base", copy.base, "--json")
    findings = outcome.json["findings"]
    assert isinstance(findings, list)
    if code:
        assert (code, severity) in {(f["code"], f["severity"]) for f in findings}, findings
    is_error = severity == "error"
    assert outcome.json["ok"] is not is_error, findings
    assert (outcome.status != 0) is is_error
    assert not (tmp_path / "executed").exists()
    if is_error:  # the same adapter never reaches a merge
        refused = run("merge", copy.folder, "--base", copy.base, "-o", tmp_path / "out")
        assert refused.status == 2, refused
        assert not (tmp_path / "out").exists()


def test_all_rows_are_here() -> None:
    assert sorted(ROWS) == list(range(1, 122))


def test_annotations_and_text_carry_the_same_findings(good: Path, tmp_path: Path) -> None:
    copy = broken(good, tmp_path, all_of(config(r=16), drop(Q0 + "gralora_B")))
    shown = run("validate", copy.folder, "--format", "text")
    annotated = run("validate", copy.folder, "--format", "github")
    assert shown.status == annotated.status == 1
    for code in ("rank-mismatch", "missing-tensor"):
        assert f"error[{code}]" in shown.stdout
        assert f"::error title={code}::" in annotated.stdout
