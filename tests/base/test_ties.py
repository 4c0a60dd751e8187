"""Values that several modules share, of which an adapter changes some: real models and PEFT, merged
and verified through the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from transformers import PreTrainedModel

import gralora_convert as gc
from benchmarks import tiny
from tests.base.test_architectures import CAUSAL, adapt, merge
from tests.builders import random_delta, write_adapter
from tests.command import run, run_ok
from tests.zoo import Architecture, close, load, outputs, save_base

MASKED = "AutoModelForMaskedLM"
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "embedding_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
QUERY = {"Bert": "query", "Roberta": "query", "Albert": "query", "DebertaV2": "query_proj",
         "ModernBert": "Wqkv"}  # fmt: skip


def masked(name: str) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model: PreTrainedModel = getattr(transformers, f"{name}ForMaskedLM")(config)
    return model


@pytest.mark.parametrize("bias", ["all", "gralora_only"])
@pytest.mark.parametrize("whole", [False, True], ids=["decoder-adapted", "decoder-saved"])
@pytest.mark.parametrize("name", QUERY)
def test_the_output_layer_of_a_masked_model_keeps_its_trained_bias(
    name: str, whole: bool, bias: str, tmp_path: Path
) -> None:
    """Its weight is the embeddings', its bias often another parameter's: both are untied."""
    architecture = Architecture(lambda: masked(name), [], None, auto=MASKED)
    base = save_base(architecture, tmp_path / "base")
    options: dict[str, Any] = {"modules_to_save": ["decoder"]} if whole else {}
    targets = [QUERY[name]] if whole else [QUERY[name], "decoder"]
    model = load(base, MASKED)
    adapted = adapt(model, tmp_path / "adapter", targets, bias=bias, **options)
    merged = load(merge(tmp_path), MASKED)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5
    run_ok("verify", tmp_path / "adapter", "--base", base, "--merged", tmp_path / "out")


def test_a_name_on_disk_in_modules_to_save_is_no_module_in_memory(tmp_path: Path) -> None:
    """GPT-NeoX calls its head `embed_out` on disk and `lm_head` in memory: PEFT saves nothing."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "embedding" not in k})
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", CAUSAL)
    adapted = adapt(model, tmp_path / "adapter", ["query_key_value"], modules_to_save=["embed_out"])
    arguments = ["--base", tmp_path / "base"]
    said = run("merge", tmp_path / "adapter", *arguments, "-o", tmp_path / "out")
    assert said.status == 0, said.stderr
    assert "[modules-to-save-unmatched]" in said.stderr
    assert close(outputs(load(tmp_path / "out", CAUSAL)), outputs(adapted)) <= 1e-5


class Aliased(torch.nn.Module):
    """One layer under two names, or one weight in two layers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24)
        if how == "layer":
            self.b = self.a
        else:
            self.b.weight = self.a.weight


def boxes(folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """A detector whose prediction heads are tied to the first, and the names of their layers."""
    model = tiny.build("AutoModelForZeroShotObjectDetection", "mm-grounding-dino")
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder)
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    return model, [n for n in names if n.endswith("layers.0") and ".bbox_embed" in f".{n}"]


@pytest.mark.parametrize("differ", [False, True])
def test_tied_layers_that_lie_on_disk_with_two_values(differ: bool, tmp_path: Path) -> None:
    """As transformers 4.57 saves it, which ties the layers by twos: 5 ties all to the first."""
    _, names = boxes(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    first = next(name for name in names if f"{name}.weight" in tensors)
    other = next(name for name in names if name.endswith("decoder.bbox_embed.1.layers.0"))
    tensors[f"{other}.weight"] = tensors[f"{first}.weight"] + 1.0 * differ
    save_file(tensors, file, metadata={"format": "pt"})
    size = tuple(tensors[f"{first}.weight"].shape)
    write_adapter(tmp_path / "adapter", {name: random_delta(*size, r=4) for name in names})
    outcome = run("validate", tmp_path / "adapter", "--base", tmp_path / "base")
    assert ("which of them it was in training cannot be told" in outcome.stdout) == differ


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_has_the_value_of_what_it_is_tied_to(differ: bool, tmp_path: Path) -> None:
    """Not that of another name, which lies on disk with a value of its own."""
    model = tiny.build("AutoModelForSeq2SeqLM", "t5")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1.0 * differ
    tensors.pop("lm_head.weight", None)
    save_file(tensors, file, metadata={"format": "pt"})
    model = type(model).from_pretrained(tmp_path / "base")
    head = model.lm_head.weight.detach().clone()
    write_adapter(tmp_path / "adapter", {"lm_head": random_delta(*head.shape, r=4)})
    merge(tmp_path)
    merged = type(model).from_pretrained(tmp_path / "out")
    made = gc.Adapter.open(tmp_path / "adapter").delta("lm_head")
    delta = gc.delta_weight(made.A, made.B, made.scaling)
    torch.testing.assert_close(merged.lm_head.weight, head + delta, rtol=0, atol=1e-5)
    inner = merged.decoder.embed_tokens.weight
    torch.testing.assert_close(inner, model.decoder.embed_tokens.weight, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["layer", "weight"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("module", ["a", "b"])
def test_one_tensor_under_two_names_of_an_unknown_model(
    how: str, suffix: str, module: str, tmp_path: Path
) -> None:
    """torch.save keeps both names of one storage, `save_model` one of them and a remark."""
    model = Aliased(how)
    (tmp_path / "base").mkdir()
    if suffix == "bin":
        torch.save(model.state_dict(), tmp_path / "base/pytorch_model.bin")
    else:
        save_model(model, str(tmp_path / "base/model.safetensors"))
    write_adapter(tmp_path / "adapter", {module: random_delta(24, 16)})
    found = gc.validate(tmp_path / "adapter", tmp_path / "base").errors
    assert [finding.code for finding in found] in (["shared-parameter"], ["module-not-in-base"])
    if suffix == "bin" or module == "a":
        assert "is the same tensor as" in found[0].message
