"""Adapters alone: every tensor has a place, every defect that needs no base has its verdict."""

import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gralora_convert.adapters.adapter import Adapter, Scan, scan_adapter
from gralora_convert.adapters.completeness import suspicions
from gralora_convert.adapters.config import CONFIG_NAME, LoraConfig
from gralora_convert.errors import (
    InvalidAdapterError,
    MisuseError,
    UnreadableError,
    UnsupportedError,
)
from gralora_convert.verbs.merging import merge
from tests.defects import (
    CONFIG,
    D0,
    D1,
    DEFECTS,
    EMBED,
    HEAD,
    PURE,
    Q0,
    Q1,
    TENSORS,
    TOLD_BY_BASE,
    WEIGHTS,
    Break,
    P,
    Parts,
    Spec,
    both,
    config,
    drop,
    files,
    moved,
    put,
    rename,
    replaced,
    tensors,
    without,
)

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
ADAPTERS = sorted(path.parent for path in FIXTURES.glob("peft-*/**/adapter_config.json"))
LORA: Mapping[str, Any] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
LORA_TENSORS: Mapping[str, Spec] = {
    Q0 + "lora_A.weight": ("F32", (4, 32)),
    Q0 + "lora_B.weight": ("F32", (32, 4)),
}


def scan(folder: Path, *breaks: Break) -> Scan:
    parts = Parts(folder)
    for one in breaks:
        one(parts)
    parts.write()
    return scan_adapter(folder)


def lora(specs: Mapping[str, Spec] = LORA_TENSORS, **values: Any) -> Break:
    def apply(parts: Parts) -> None:
        parts.tensors, parts.config = dict(specs), {**LORA, **values}

    return apply


def codes(found: Scan, severity: str) -> set[str]:
    return {f.code for f in found.report.findings if f.severity == severity}


# the table of defects -----------------------------------------------------------------------------

MORE: Mapping[str, tuple[Break, str, str]] = {
    "a compiled model in a wrapper": (
        replaced(P, P + "_orig_mod."), "key-wrapper-prefix", "error",
    ),
    "wrapped layers": (
        replaced(".layers.", "._fsdp_wrapped_module.layers."), "key-wrapper-prefix", "error",
    ),
    "LoRA's keys without a general part": (
        tensors({k.replace("gralora_", "lora_") + ".weight": s for k, s in PURE.items()}),
        "key-foreign-method", "error",
    ),
    "a LoRA's config": (
        config(peft_type="LORA", lora_alpha=16), "peft-type-mismatch", "error",
    ),
    "a factor in bfloat16": (
        put(Q0 + "gralora_A", 2, 16, 8, dtype="BF16"), "tensor-dtype-mixed", "note",
    ),
    "both transposed": (
        both(put(Q0 + "gralora_A", 2, 8, 16), put(Q0 + "gralora_B", 2, 16, 8)),
        "tensor-shape", "error",
    ),
    "one half of a general part": (
        both(tensors(PURE, hybrid_r=0), put(Q0 + "gralora_A_general.weight", 4, 32)),
        "missing-tensor", "error",
    ),
    "general part of another width": (
        both(put(Q0 + "gralora_A_general.weight", 4, 48)), "tensor-shape", "error",
    ),
    "every module below one that is called module": (
        rename(lambda k: k.replace(P, P + "module.")), "key-wrapper-prefix", "warning",
    ),
    "k of A and B differ": (put(Q0 + "gralora_B", 4, 8, 8), "tensor-shape", "error"),
    "no factors at all": (
        tensors({HEAD: ("F32", (4, 4))}, modules_to_save=["lm_head"]), "missing-tensor", "error",
    ),
    "a bias of whole numbers": (
        both(config(bias="all"), put(P + "model.norm.bias", 4, dtype="I32")),
        "tensor-dtype", "error",
    ),
    "an empty bias": (both(config(bias="all"), put(P + "norm.bias", 0)), "tensor-empty", "error"),
    "an empty head": (
        both(config(modules_to_save=["lm_head"]), put(HEAD, 0, 32)), "tensor-empty", "error",
    ),
    "a bias of an untargeted layer": (put(P + "model.norm.bias", 4), "bias-unexpected", "error"),
    "the same, not trained": (
        both(config(bias="gralora_only"), put(P + "model.norm.bias", 4)),
        "tensor-unclaimed", "error",
    ),
    "a bias under two names": (
        both(config(bias="all"), put(Q0 + "base_layer.bias", 4), put(Q0 + "bias", 4)),
        "key-duplicate-role", "error",
    ),
    "a position embedding": (put(P + "wpe.position_embeddings.weight", 4, 4),
                             "tensor-unclaimed", "error"),
    "a regex that fits nothing": (config(target_modules=".*zzz"), "target-matches-nothing",
                                  "error"),
    "an endless regex": (config(target_modules=r"([\w.]|[\w.]{2})+(?<!j)"),
                         "target-regex-invalid", "error"),
    "a name without end": (put(P + "a." * 100_000 + "weight", 1), "tensor-unclaimed", "error"),
    "a broken saved module": (config(modules_to_save=["("]), "target-regex-invalid", "error"),
    "the keys of another method": (put(Q0 + "hada_w1_a", 4, 4), "key-foreign-method", "error"),
    "another method": (config(peft_type="LOHA"), "peft-type-unsupported", "error"),
    "a LoRA of another rank": (lora(r=8), "rank-mismatch", "error"),
    "a LoRA transposed": (lora({**LORA_TENSORS, Q0 + "lora_A.weight": ("F32", (32, 4))}),
                          "tensor-shape", "error"),
    "half a LoRA": (lora({Q0 + "lora_A.weight": ("F32", (4, 32))}), "missing-tensor", "error"),
    "a LoRA of a shard": (lora({**LORA_TENSORS, Q0 + "lora_B.weight": ("F32", (0,))}),
                          "tensor-empty", "error"),
    "a LoRA of bytes": (lora({**LORA_TENSORS, Q0 + "lora_B.weight": ("U8", (32, 4))}),
                        "tensor-dtype", "error"),
    "a LoRA elsewhere": (lora(target_modules=["zzz"]), "target-matches-nothing", "error"),
    "a LoRA's excluded module": (lora(exclude_modules=["q_proj"]), "target-matches-nothing",
                                 "error"),
    "a LoRA without targets": (lora(target_modules=None), "target-modules-null", "error"),
    "a base weight in a LoRA": (lora({**LORA_TENSORS, Q0 + "base_layer.weight": ("F32", (32, 32))}),
                                "base-weight-in-adapter", "error"),
}  # fmt: skip


# what the same break does besides
ALSO: Mapping[int, Set[str]] = {
    14: {"k-mismatch"}, 15: {"k-mismatch"}, 44: {"missing-tensor"}, 67: {"alpha-missing"},
    111: {"weights-missing"}, 118: {"hybrid-rank-mismatch"},
}  # fmt: skip


def require(found: Scan, code: str, severity: str, also: Set[str] = frozenset()) -> None:
    told = {(f.code, f.severity) for f in found.report.findings}
    assert codes(found, "error") == ({code, *also} if severity == "error" else set()), told
    assert not code or (code, severity) in told
    assert (found.adapter is None) is (severity == "error")


@pytest.mark.parametrize("row", DEFECTS)
def test_every_defect_has_its_verdict(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how, code, severity = DEFECTS[row]
    found = scan(tmp_path / "adapter", how)
    if row in TOLD_BY_BASE:
        code, severity = "", ""
    require(found, code, severity, ALSO.get(row, set()))
    if not code:
        known = {"embeddings-saved"} if row in (120, 121) else set()
        assert {f.code for f in found.report.findings} == known
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", MORE)
def test_more_defects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gralora_convert.adapters.patterns.REGEX_SECONDS", 0.05)
    how, code, severity = MORE[name]
    require(scan(tmp_path, how), code, severity)


def test_all_defects_are_told_at_once(tmp_path: Path) -> None:
    found = scan(
        tmp_path, config(gralora_k=4), drop(Q0 + "gralora_A_general"), put(P + "x.weight", 3),
        put(Q1 + "gralora_B", 2, 8, 16, dtype="I64"), put(D0 + "gralora_A", 0),
    )  # fmt: skip
    assert codes(found, "error") == {
        "k-mismatch", "missing-tensor", "tensor-unclaimed", "tensor-dtype", "tensor-empty",
    }  # fmt: skip


# files --------------------------------------------------------------------------------------------


def test_a_sub_folder_is_named_and_can_be_opened(tmp_path: Path) -> None:
    found = scan(tmp_path, files(moved))
    assert codes(found, "error") == {"config-missing", "weights-missing"}
    hint = next(f.hint for f in found.report.findings if f.code == "config-missing")
    assert str(tmp_path / "my_ad") in hint
    assert Adapter.open(tmp_path / "my_ad").kind == "hybrid"


def test_a_pickle_without_tensors(tmp_path: Path) -> None:
    Parts(tmp_path).write()
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    assert codes(scan_adapter(tmp_path), "error") == {"weights-unreadable"}


@pytest.mark.parametrize("name", ["", CONFIG_NAME, WEIGHTS])
def test_an_adapter_is_named_by_its_folder_or_its_files(name: str, tmp_path: Path) -> None:
    Parts(tmp_path).write()
    assert Adapter.open(tmp_path / name).path == tmp_path


@pytest.mark.parametrize("name", ["missing", "README.md", "a\0b"])
def test_what_is_no_adapters_folder_is_unreadable(name: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UnreadableError, match="the folder of an adapter was needed"):
        scan_adapter(tmp_path / name)


def test_opening_a_broken_adapter_tells_the_first_error_and_carries_all(tmp_path: Path) -> None:
    scan(tmp_path, config(r=16), put(P + "x.weight", 3))
    with pytest.raises(InvalidAdapterError, match=r"more; `validate` lists all") as caught:
        Adapter.open(tmp_path)
    assert {f.code for f in caught.value.findings} == {"rank-mismatch", "tensor-unclaimed"}


# valid adapters -----------------------------------------------------------------------------------


def require_accounted(adapter: Adapter) -> None:
    """Every tensor of the file is in exactly one place."""
    held = [spec.name for roles in adapter.roles.values() for spec in roles.values()]
    held += [spec.name for spec in [*adapter.biases.values(), *adapter.saved.values()]]
    assert sorted([*held, *adapter.ignored]) == sorted(adapter.tensors)
    assert {spec.name for spec in adapter.frozen.values()} <= adapter.ignored.keys()


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_peft_wrote_is_valid_and_accounted_for(folder: Path) -> None:
    adapter = Adapter.open(folder)
    require_accounted(adapter)
    assert adapter.modules
    for module in adapter.modules:
        assert math.isfinite(adapter.scaling(module))
        assert min(adapter.shape(module)) > 0
    assert codes(scan_adapter(folder), "warning") == set()


VALID: Mapping[str, tuple[Break, Callable[[Adapter], bool]]] = {
    "a pure GraLoRA": (
        tensors(PURE, hybrid_r=0), lambda a: a.kind == "gralora" and a.blocks == 2,
    ),
    "k = 1": (
        tensors({Q0 + "gralora_A": ("F32", (1, 32, 8)), Q0 + "gralora_B": ("F32", (1, 8, 64))},
                hybrid_r=0, gralora_k=1),
        lambda a: a.shape("model.layers.0.self_attn.q_proj") == (64, 32),
    ),
    "the rank of a block": (
        tensors({Q0 + "gralora_A": ("F32", (2, 8, 8)), Q0 + "gralora_B": ("F32", (2, 8, 8))},
                hybrid_r=0),
        lambda a: a.shape("model.layers.0.self_attn.q_proj") == (16, 16),
    ),
    "biases": (
        both(config(bias="all"), put(Q0 + "base_layer.bias", 32), put(P + "model.norm.bias", 32)),
        lambda a: set(a.biases) == {"model.layers.0.self_attn.q_proj", "model.norm"},
    ),
    "biases of a nested head, saved twice": (
        both(
            config(bias="all", modules_to_save=["classifier"]),
            put(P + "classifier.dense.weight", 3, 3),
            put(P + "classifier.dense.bias", 3),
            put(P + "classifier.modules_to_save.default.dense.bias", 3),
            put(P + "classifier.original_module.dense.bias", 3),
        ),
        lambda a: set(a.saved) == {"classifier.dense.weight", "classifier.dense.bias"}
        and len(a.ignored) == 2 and not a.biases,
    ),
    "a saved module": (
        both(config(modules_to_save=["score"]), put(P + "score.weight", 3, 32)),
        lambda a: set(a.saved) == {"score.weight"},
    ),
    "a saved module called gralora_head": (
        both(config(modules_to_save=["gralora_head"]), put(P + "gralora_head.weight", 3, 32)),
        lambda a: set(a.saved) == {"gralora_head.weight"},
    ),
    "a pair of embeddings": (
        both(put(EMBED, 9, 32), put(HEAD, 9, 32), put(P + "lm_head.bias", 9)),
        lambda a: set(a.saved) == {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"},
    ),
    "an embedding alone": (put(EMBED, 9, 32), lambda a: len(a.saved) == 1),
    "a targeted head with its frozen weight": (
        tensors({
            P + "lm_head.gralora_A": ("F32", (2, 16, 8)),
            P + "lm_head.gralora_B": ("F32", (2, 8, 5)),
            P + "lm_head.base_layer.weight": ("BF16", (10, 32)),
            P + "lm_head.base_layer.bias": ("BF16", (10,)),
        }, hybrid_r=0, target_modules=["lm_head"]),
        lambda a: set(a.frozen) == {"lm_head.weight", "lm_head.bias"} and not a.biases,
    ),
    "modules called like keys": (
        tensors({
            f"{P}{module}.{leaf}": ("F32", shape)
            for module in ("default", "gralora_A", "block.module", "module.inner")
            for leaf, shape in {"gralora_A": (2, 4, 8), "gralora_B": (2, 8, 4)}.items()
        }, hybrid_r=0, target_modules=["default", "gralora_A", "module", "inner"]),
        lambda a: a.modules == ("block.module", "default", "gralora_A", "module.inner"),
    ),
    "layers in natural order": (
        tensors({
            f"{P}layers.{i}.q.{leaf}": ("F32", (2, 8, 8))
            for i in (10, 2, 1) for leaf in ("gralora_A", "gralora_B")
        }, hybrid_r=0, target_modules=["q"]),
        lambda a: a.modules == ("layers.1.q", "layers.2.q", "layers.10.q"),
    ),
    "all-linear": (config(target_modules="all-linear"), lambda a: len(a.modules) == 4),
    "the original authors'": (
        both(without("alpha", "peft_version", "init_weights"), config(gralora_alpha=24, r=12)),
        lambda a: a.dialect == "authors" and a.scaling("") == 2.0 and a.config.r == 8,
    ),
    "a LoRA": (lora(), lambda a: a.kind == "lora" and a.scaling("q_proj") == 2.0),
    "a LoRA with patterns": (
        lora(rank_pattern={"q_proj": 4}, alpha_pattern={"layers.0.self_attn.q_proj": 9}, r=64),
        lambda a: a.scaling(a.modules[0]) == 2.25,
    ),
    "a LoRA that excludes": (
        lora(exclude_modules=["v_proj"], target_modules=".*proj"), lambda a: len(a.modules) == 1,
    ),
    "a LoRA's sampler": (
        lora({**LORA_TENSORS, Q0 + "lora_monteclora_sampler.std_prior": ("F32", (3,))}),
        lambda a: len(a.ignored) == 1 and not a.unsupported,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_valid_adapters_are_read(name: str, tmp_path: Path) -> None:
    how, holds = VALID[name]
    adapter = scan(tmp_path, how).adapter
    assert adapter is not None, scan_adapter(tmp_path).report
    assert holds(adapter)
    require_accounted(adapter)


BEYOND: Mapping[str, tuple[Break, str]] = {
    "magnitudes": (
        lora({**LORA_TENSORS, Q0 + "lora_magnitude_vector": ("F32", (32,))}, use_dora=True),
        "use_dora",
    ),
    "magnitudes unannounced": (
        lora({**LORA_TENSORS, Q0 + "lora_magnitude_vector.weight": ("F32", (32,))}), "use_dora",
    ),
    "a bias of lora_B": (
        lora({**LORA_TENSORS, Q0 + "lora_B.bias": ("F32", (32,))}, lora_bias=True), "lora_bias",
    ),
    "embeddings": (
        lora({
            P + "embed_tokens.lora_embedding_A": ("F32", (4, 9)),
            P + "embed_tokens.lora_embedding_B": ("F32", (32, 4)),
            P + "embed_tokens.base_layer.weight": ("F32", (9, 32)),
        }, target_modules=["embed_tokens"]),
        "embeddings",
    ),
    "convolutions": (
        lora({P + "c.lora_A.weight": ("F32", (4, 3, 5, 5)),
              P + "c.lora_B.weight": ("F32", (8, 4, 1, 1))}, target_modules=["c"]),
        "convolutions",
    ),
    "attention": (
        lora({**LORA_TENSORS, P + "mha.base_layer.out_proj.lora_A.weight": ("F32", (4, 32))}),
        "factors of a layer inside another",
    ),
    "trained tokens": (
        lora({**LORA_TENSORS, P + "e.token_adapter.trainable_tokens_delta": ("F32", (2, 32))}),
        "trainable_token_indices",
    ),
    "an unknown tensor": (
        lora({**LORA_TENSORS, Q0 + "lora_diag": ("F32", (4,))}), "lora_diag",
    ),
    "parameters": (
        lora({P + "experts.base_layer.lora_A.weight": ("F32", (4, 32))}, target_modules=None,
             target_parameters=["experts.up"]),
        "target_parameters",
    ),
    "an initialisation that changed the base": (lora(init_lora_weights="olora"), "olora"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_a_lora_with_more_than_factors_is_named_and_not_used(name: str, tmp_path: Path) -> None:
    how, feature = BEYOND[name]
    found = scan(tmp_path, how)
    adapter = found.adapter
    assert adapter is not None, found.report
    assert codes(found, "warning") == {"lora-feature-unsupported"}
    assert any(feature in f.message for f in found.report.findings)
    with pytest.raises(UnsupportedError, match=feature):
        merge(adapter, base=tmp_path / "never read")
    for module in adapter.modules:
        assert min(adapter.shape(module)) > 0
        with pytest.raises(UnsupportedError, match=feature):
            adapter.delta(module)
    require_accounted(adapter)


def llama(**more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes | more, num_attention_heads=4, num_key_value_heads=2, head_dim=4
    )
    return transformers.LlamaForCausalLM(config)


def roberta() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def phi() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.PhiConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    return transformers.PhiForCausalLM(config)


HEAD_PARTS = {f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")}
PAIR = {"model.embed_tokens.weight", "lm_head.weight"}
# name: (model, config class, its arguments, save_pretrained's, saved, frozen, biases)
PEFT_SAVES: Mapping[str, tuple[Any, ...]] = {
    "a nested head and all biases": (
        roberta, "Gralora", {"bias": "all", "task_type": "SEQ_CLS", "target_modules": ["query"]},
        {}, HEAD_PARTS, set(), 9,
    ),
    "a nested head and own biases": (
        roberta, "Gralora", {"bias": "gralora_only", "modules_to_save": ["classifier"],
                             "target_modules": ["query"]},
        {}, HEAD_PARTS, set(), 1,
    ),
    "both embeddings": (
        llama, "Gralora", {"target_modules": ["q_proj"]}, {"save_embedding_layers": True},
        PAIR, set(), 0,
    ),
    "a head with a bias beside the embeddings": (
        phi, "Gralora", {"target_modules": ["q_proj"]}, {"save_embedding_layers": True},
        PAIR | {"lm_head.bias"}, set(), 0,
    ),
    "a targeted head": (
        llama, "Gralora", {"target_modules": ["q_proj", "lm_head"]}, {},
        set(), {"lm_head.weight"}, 0,
    ),
    "a targeted head with a bias": (
        phi, "Gralora", {"target_modules": ["q_proj", "lm_head"]}, {},
        set(), {"lm_head.weight", "lm_head.bias"}, 0,
    ),
    "a saved pair": (
        llama, "Gralora", {"target_modules": ["q_proj"],
                           "modules_to_save": ["lm_head", "embed_tokens"]}, {},
        PAIR, set(), 0,
    ),
    "LoRA: a nested head and all biases": (
        roberta, "Lora", {"bias": "all", "task_type": "SEQ_CLS", "target_modules": ["query"]},
        {}, HEAD_PARTS, set(), 9,
    ),
    "LoRA: embeddings": (
        llama, "Lora", {"target_modules": ["q_proj", "embed_tokens"]}, {},
        set(), {"model.embed_tokens.weight"}, 0,
    ),
    "LoRA: magnitudes": (
        llama, "Lora", {"target_modules": ["q_proj"], "use_dora": True}, {}, set(), set(), 0,
    ),
    "LoRA: all but one": (
        llama, "Lora", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, {},
        set(), set(), 0,
    ),
}  # fmt: skip


def test_an_authors_folder_without_blocks_is_refused_for_that_alone(tmp_path: Path) -> None:
    specs = {
        Q0 + "gralora_A": ("F32", (2, 16, 0)), Q0 + "gralora_B": ("F32", (2, 0, 16)),
        Q0 + "gralora_A_general.weight": ("F32", (8, 32)),
        Q0 + "gralora_B_general.weight": ("F32", (32, 8)),
    }  # fmt: skip
    fork = config(gralora_alpha=24, r=8, hybrid_r=8)
    found = scan(tmp_path, tensors(specs), without("alpha", "peft_version", "init_weights"), fork)
    (problem,) = found.report.errors
    assert "hybrid_r=8 is the whole rank" in problem.message


SAVED_TARGETS = {  # of modules that are saved, too: targets, modules_to_save
    "one of all layers": (["q_proj", "up_proj"], ["layers.1.mlp.up_proj"]),
    "a whole layer": (["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"], ["layers.1"]),
    "all-linear": ("all-linear", ["layers.1.mlp.up_proj"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Gralora", "Lora"])
@pytest.mark.parametrize("name", SAVED_TARGETS)
def test_a_target_that_peft_saved_whole_is_not_missed(name: str, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets, saved = SAVED_TARGETS[name]
    config = getattr(peft, f"{kind}Config")(r=4, target_modules=targets, modules_to_save=saved)
    peft.get_peft_model(llama(num_hidden_layers=2), config).save_pretrained(tmp_path)
    assert not [f for f in suspicions(Adapter.open(tmp_path)) if f.severity == "warning"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_the_weight_has_no_more_rank_than_it(start: str, tmp_path: Path) -> None:
    """PEFT saves and loads it with the rank of the weight, and scales by the config's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=12, target_modules=["q_proj", "k_proj"], init_lora_weights=start)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(llama(), tmp_path)
    adapter = Adapter.open(tmp_path)
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    assert (adapter.roles[q]["A"].shape, adapter.roles[k]["A"].shape) == ((12, 16), (8, 16))
    assert adapter.scaling(k) == 8 / 12
    saved = tmp_path / CONFIG_NAME
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"r": 6}))
    assert codes(scan_adapter(tmp_path), "error") == {"rank-mismatch"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEFT_SAVES)
def test_what_peft_saves_of_unusual_models_is_valid(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build, kind, arguments, options, saved, frozen, biases = PEFT_SAVES[name]
    config = getattr(peft, f"{kind}Config")(**{"r": 4} | arguments)
    peft.get_peft_model(build(), config).save_pretrained(tmp_path, **options)
    adapter = Adapter.open(tmp_path)
    require_accounted(adapter)
    assert (set(adapter.saved), set(adapter.frozen)) == (saved, frozen)
    assert len(adapter.biases) == biases


@pytest.mark.filterwarnings("ignore")
def test_what_pefts_conversion_loses_is_no_finding(tmp_path: Path) -> None:
    """PEFT 0.21.2 writes no task, no base and each module twice; `add_adapter` an empty base."""
    peft = pytest.importorskip("peft")
    config = peft.GraloraConfig(
        r=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"
    )
    peft.save_as_lora(tmp_path / "lora", peft.get_peft_model(llama(), config), rank=8)
    model = llama()
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "added")
    for name, base, targets in (("lora", None, 2), ("added", "", 1)):
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert saved["task_type"] == (None if name == "lora" else "CAUSAL_LM")
        assert (saved["base_model_name_or_path"], len(saved["target_modules"])) == (base, targets)
        adapter = Adapter.open(tmp_path / name)
        require_accounted(adapter)
        assert {f.severity for f in adapter.findings} <= {"note"}
        with pytest.raises(MisuseError, match="names no base model"):
            merge(adapter)


# values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hybrid_r", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_deltas_hold_the_values_of_the_file(dtype: str, hybrid_r: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rng = numpy.random.default_rng(0)
    specs = {k: s for k, s in TENSORS.items() if hybrid_r or "general" not in k}
    held = {k: rng.standard_normal(shape).astype(dtype) for k, (_, shape) in specs.items()}
    Parts(tmp_path, {**CONFIG, "hybrid_r": hybrid_r}, dict(specs)).write()
    save_file(held, tmp_path / WEIGHTS, metadata={"format": "pt"})
    adapter = Adapter.open(tmp_path)
    module = "model.layers.1.mlp.down_proj"
    assert adapter.shape(module) == (32, 48)
    delta: Any = adapter.delta(module)
    expected = torch.float64 if dtype == "float64" else torch.float32
    general = {"general_A": "A_general.weight", "general_B": "B_general.weight"}
    for name, leaf in ({"A": "A", "B": "B"} | (general if hybrid_r else {})).items():
        tensor = getattr(delta, name)
        assert tensor.dtype == expected
        assert numpy.array_equal(
            tensor.numpy(), held[f"{D1}gralora_{leaf}"].astype(tensor.numpy().dtype)
        )
    assert delta.scaling == 16 / (8 + hybrid_r)
    assert (delta.general_A is None) is (hybrid_r == 0)
    assert adapter.factor_bytes(module) == sum(
        tensor.nbytes for tensor in (delta.A, delta.B, delta.general_A, delta.general_B)
        if tensor is not None
    )  # fmt: skip


def test_a_loras_delta_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("lora", "lora-patterns", "lora-rslora"):
        adapter = Adapter.open(FIXTURES / "peft-0.21.2" / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "bases/llama")
        theirs = peft.PeftModel.from_pretrained(model, FIXTURES / "peft-0.21.2" / name)
        for module in adapter.modules:
            delta: Any = adapter.delta(module)
            layer = theirs.base_model.model.get_submodule(module)
            expected = layer.get_delta_weight("default")
            found = delta.scaling * (delta.B @ delta.A)
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9), (name, module)


def test_reading_an_adapter_imports_no_torch(tmp_path: Path) -> None:
    Parts(tmp_path).write()
    code = (
        "import sys; from gralora_convert.adapters import Adapter; Adapter.open(sys.argv[1]); "
        "print({'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# whatever the file says ---------------------------------------------------------------------------

words = st.sampled_from(
    ["model", "layers", "0", "self_attn", "q_proj", "gralora_A", "gralora_B", "default", "weight",
     "bias", "base_layer", "lora_A", "modules_to_save", "embed_tokens", "lm_head", "module", ""]
)  # fmt: skip
keys = st.lists(words, max_size=7).map(".".join).map(lambda path: P + path) | st.sampled_from(
    [*TENSORS, *LORA_TENSORS]
)
specs = st.tuples(
    st.sampled_from(["F32", "BF16", "I8", "F8_E4M3"]),
    st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32]), max_size=4).map(tuple),
)
values = st.sampled_from(
    [None, True, 0, 1, 2, 3, 4, 8, -1, 2.5, "", "all", "none", "gralora_only", [], ["q_proj"], {},
     ["lm_head"], [0], ".*", "GRALORA", "LORA", {"q_proj": 2}]
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(sorted({*CONFIG, *LORA, "gralora_alpha"})), values, max_size=4),
    st.dictionaries(keys, specs, max_size=4),
    st.sets(st.sampled_from(sorted(TENSORS)), max_size=2),
)
def test_no_adapter_makes_it_fail(
    tmp_path_factory: pytest.TempPathFactory,
    different: dict[str, Any], more: dict[str, Spec], fewer: set[str],
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    for good, held in ((CONFIG, TENSORS), (LORA, LORA_TENSORS)):
        kept = {k: s for k, s in held.items() if k not in fewer}
        Parts(folder, {**good, **different}, {**kept, **more}).write()
        found = scan_adapter(folder)
        assert (found.adapter is None) is bool(codes(found, "error"))
        if found.adapter is not None:
            require_accounted(found.adapter)
            for module in found.adapter.modules:
                assert min(found.adapter.shape(module)) > 0
                assert math.isfinite(found.adapter.scaling(module))


def test_factors_that_are_not_finite_are_refused_where_they_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree("fixtures/peft-0.21.2/llama-gralora", folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff" * 4)
    adapter = Adapter.open(folder)
    last = max(adapter.tensors.values(), key=lambda spec: spec.offset)
    module = next(m for m in adapter.modules if f".{m}." in last.name)
    with pytest.raises(InvalidAdapterError, match="NaN or infinity"):
        adapter.delta(module)
