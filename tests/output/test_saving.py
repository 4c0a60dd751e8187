"""Training through `attach`, and what is saved of it, beside PEFT."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.adapters.keys import Role, key_of
from gralora_convert.delta.forms import Lora
from gralora_convert.errors import MisuseError, OutputError
from gralora_convert.models.attachment import Attachment, attach
from tests.builders import random_delta
from tests.models.test_attachment import epoch, mlp, perturb, saved, tiny, trainable
from tests.zoo import ARCHITECTURES, IDS

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore::FutureWarning", "ignore:Model has `tie_word"
)


def with_peft(model: nn.Module, **config: Any) -> peft.PeftModel:
    torch.manual_seed(2)
    options = {"r": 4, "gralora_k": 2, **config}
    return peft.get_peft_model(copy.deepcopy(model), peft.GraloraConfig(**options))


def read_by_peft(model: nn.Module, folder: Path) -> tuple[peft.PeftModel, set[str]]:
    """The folder in PEFT, and its warnings, but for those of transformers about itself."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read = peft.PeftModel.from_pretrained(model, folder).eval()
    return read, {str(w.message) for w in said if not issubclass(w.category, FutureWarning)}


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "dropout": {"gralora_dropout": 0.1, "hybrid_r": 2},
    "bias": {"bias": "all", "alpha": 3.5},
    "own-bias": {"bias": "gralora_only", "gralora_dropout": 0.2},
    "head": {"modules_to_save": ["lm_head"], "gralora_k": 4, "r": 8},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_epoch_follows_pefts_and_is_saved_as_pefts(
    name: str, config: str, tmp_path: Path
) -> None:
    targets = ARCHITECTURES[name].targets
    reference = with_peft(
        tiny(name), target_modules=targets, fan_in_fan_out=name == "gpt2", **CONFIGS[config]
    )
    model = tiny(name)
    handle = attach(model, saved(reference, tmp_path / "start"), trainable=True)

    assert trained_values(handle) == trained_values_of_peft(reference)
    plain = model(IDS).logits
    losses = epoch(model, handle.parameters())
    assert losses == pytest.approx(epoch(reference, trainable(reference)), rel=1e-4)
    assert not torch.allclose(model.eval()(IDS).logits, plain, atol=1e-2)

    handle.save_pretrained(tmp_path / "end")
    reference.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("end", "peft"))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
        key: (t.shape, t.dtype) for key, t in theirs.items()
    }
    again, said = read_by_peft(tiny(name), tmp_path / "end")
    assert said == read_by_peft(tiny(name), tmp_path / "peft")[1]
    assert not said or "tied layer" in said.pop()  # GPT-2's head
    logits = model(IDS).logits
    torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    handle.detach()
    with attach(model, Adapter.open(tmp_path / "end")):
        assert torch.equal(model(IDS).logits, logits)


def trained_values(handle: Attachment) -> set[str]:
    """The biases and saved parameters that are trained."""
    return {path for path, value in handle.replaced.items() if value.requires_grad}


def trained_values_of_peft(model: peft.PeftModel) -> set[str]:
    names = {n for n, p in model.base_model.model.named_parameters() if p.requires_grad}
    names = {name for name in names if ".gralora_" not in name}
    return {
        name.replace("base_layer.", "").replace("modules_to_save.default.", "") for name in names
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deltas_are_saved_with_the_config_that_they_imply(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = mlp()
    deltas = {"up": random_delta(12, 8, hybrid_r=3), "mid": random_delta(16, 12, hybrid_r=3)}
    handle = attach(model, {"mid": deltas["mid"]}, dropout=0.25, dtype=dtype)
    handle.save_pretrained(tmp_path / "out")
    found = Adapter.open(tmp_path / "out")
    assert found.config.fan_in_fan_out is True
    assert found.scaling("mid") == deltas["mid"].scaling
    assert found.config.to_dict()["gralora_dropout"] == 0.25
    assert {spec.dtype for spec in found.tensors.values()} == {str_of(dtype)}
    x = torch.randn(2, 3, 8)
    expected, said = read_by_peft(mlp(), tmp_path / "out")
    assert not said
    if dtype == torch.float32:
        torch.testing.assert_close(model.eval()(x), expected(x))
    with pytest.raises(OutputError, match="exists"):
        handle.save_pretrained(tmp_path / "out")
    handle.save_pretrained(tmp_path / "out", overwrite=True)


def test_factors_are_saved_by_their_values_however_they_lie_in_memory(tmp_path: Path) -> None:
    """safetensors 0.8.0's NumPy writer stores the memory of a transposed array."""
    plain = random_delta(12, 8, hybrid_r=3)
    roles: tuple[Role, ...] = ("A", "B", "general_A", "general_B")
    turned = {role: getattr(plain, role).mT.contiguous().mT for role in roles}
    assert not any(factor.is_contiguous() for factor in turned.values())
    attach(mlp(), {"up": replace(plain, **turned)}).save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(found) == 4
    for role in roles:
        assert torch.equal(found[key_of("up", role)], getattr(plain, role)), role


def str_of(dtype: torch.dtype) -> str:
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]


def test_a_trained_lora_is_saved_as_pefts(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, target_modules=["up", "down"], rank_pattern={"down": 2}, use_rslora=True, bias="all"
    )
    reference = perturb(peft.get_peft_model(mlp(), config))
    model, x = mlp(), torch.randn(2, 3, 8)
    handle = attach(model, saved(reference, tmp_path / "start"), trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    handle.save_pretrained(tmp_path / "end")
    again, said = read_by_peft(mlp(), tmp_path / "end")
    assert not said
    torch.testing.assert_close(again(x), model(x))


def test_deltas_that_no_config_describes_are_not_saved(tmp_path: Path) -> None:
    mixed = {"up": random_delta(12, 8, r=4), "mid": random_delta(16, 12, r=8)}
    with pytest.raises(MisuseError, match="one r, k, hybrid_r and scaling"):
        attach(mlp(), mixed).save_pretrained(tmp_path / "out")
    lora = {"up": Lora(torch.ones(2, 8), torch.ones(12, 2), 1.0)}
    with pytest.raises(MisuseError, match="not GraLoRAs"):
        attach(mlp(), lora).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_saved_is_what_the_moved_model_holds(tmp_path: Path) -> None:
    """Also buffers, of which `model.to` makes new ones."""
    adapter = saved(perturb(with_peft(mlp(), target_modules=["up"], bias="all")), tmp_path / "a")
    model = mlp()
    handle = attach(model, adapter)
    model.to(torch.bfloat16)
    handle.save_pretrained(tmp_path / "out")
    assert {s.dtype for s in Adapter.open(tmp_path / "out").tensors.values()} == {"BF16"}
    handle.detach()
    handle.save_pretrained(tmp_path / "later")
    files = [(tmp_path / f / "adapter_model.safetensors").read_bytes() for f in ("out", "later")]
    assert files[0] == files[1]
