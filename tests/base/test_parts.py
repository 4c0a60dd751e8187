"""Adapters trained on one part of a model, merged into the whole: the part becomes what it was in
training, and all else stays as it is in the base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import GraloraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import tiny
from gralora_convert.base.source_text import modeling
from tests.command import run_ok


def trained(
    part: nn.Module, folder: Path, saved: list[str] | None, task: str | None,
    layers: Sequence[str] = (),
) -> Any:  # fmt: skip
    """PEFT's model of a part with random factors, saved; on some layers unless they are named."""
    ends = "q_proj", "fc1", "down_proj"
    layers = list(layers) or [name for name, _ in part.named_modules() if name.endswith(ends)]
    config = GraloraConfig(
        r=4, gralora_k=2, alpha=8, target_modules=layers, modules_to_save=saved, task_type=task
    )
    adapted = get_peft_model(part, config).eval()
    draws = torch.Generator().manual_seed(7)
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=draws) * 0.3
    adapted.save_pretrained(folder)
    return adapted


def values_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Of a model with adapters in some places: the weights with their deltas, what was saved."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default")
            found[f"{name}.weight"] = (module.base_layer.weight + delta).detach()
    for name, value in model.state_dict().items():
        if "gralora_" not in name and "original_module" not in name:
            plain = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
            found.setdefault(plain, value)
    return found


@pytest.mark.parametrize(
    ("kind", "auto", "part", "saved"),
    [
        ("aimv2", "AutoModel", "text_model", None),  # all modules are named by their whole names
        ("t5gemma", "AutoModel", "encoder", None),
        ("clvp", "AutoModel", "speech_decoder_model", None),
        ("cosmos3_edge", "AutoModel", "language_model", None),  # its names were once the whole's
        ("diffusion_gemma", "AutoModel", "decoder", None),  # its layers are those of the encoder
        ("llama", "AutoModelForCausalLM", "model", ["embed_tokens"]),
        ("mistral3", "AutoModelForImageTextToText", "model.language_model", ["embed_tokens"]),
        ("kosmos-2.5", "AutoModelForImageTextToText", "text_model.model", ["embed_tokens"]),
    ],
)
@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_the_rest_of_the_model_stays(
    kind: str, auto: str, part: str, saved: list[str] | None, task: str | None, tmp_path: Path
) -> None:
    model = tiny.build(auto, kind)
    if kind == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    if task and part != "model":
        pytest.skip("nothing but its class names the part")
    trained(model.get_submodule(part), tmp_path / "adapter", saved, task)
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out").state_dict()
    wanted = values_of(model)
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-5, msg=name)


def test_every_model_type_has_its_source_text() -> None:
    """Those that are only the config of another type's model have none."""
    without = [
        name for name, config in transformers.CONFIG_MAPPING.items()
        if config.model_type == name and not modeling(name)
        and modeling(config.__module__.split(".")[2])
    ]  # fmt: skip
    assert without == []
