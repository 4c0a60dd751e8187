"""The forward path on live models, against PEFT and against a dense float64 truth."""

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.delta.forms import Dense, Gralora, Lora
from gralora_convert.delta.forward import gralora_product
from gralora_convert.errors import InvalidAdapterError, MisuseError, UnsupportedError
from gralora_convert.models.attachment import attach
from gralora_convert.models.layer import GraloraLinear
from tests.zoo import ARCHITECTURES, IDS, load, outputs, save_base, train

# PEFT and transformers warn about facts that the tests set up on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# --- builders ---


def gralora(
    n_in: int,
    n_out: int,
    *,
    k: int = 2,
    s: int = 2,
    h: int = 0,
    scaling: float = 0.5,
    seed: int = 0,
) -> Gralora:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    A, B = normal(k, n_in // k, k * s), normal(k, k * s, n_out // k)
    general = (normal(h, n_in), normal(n_out, h)) if h else (None, None)
    return Gralora(A, B, scaling, *general)


class Mlp(nn.Module):
    """A Linear with a bias, a Conv1D, and a Linear without; 8 -> 12 -> 16 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = (
            nn.Linear(8, 12),
            Conv1D(16, 12),
            nn.Linear(16, 4, bias=False),
        )
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.down(torch.tanh(self.mid(torch.tanh(self.up(x))))))
        return result


def mlp() -> Mlp:
    torch.manual_seed(1)
    return Mlp()


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = ARCHITECTURES[name].build().eval()
    return model


TARGETS = ["up", "mid", "down"]


def with_peft(model: nn.Module, **config: Any) -> peft.PeftModel:
    """PEFT's GraLoRA on a copy of `model`, with random values also in what starts at zero."""
    arguments = {"r": 4, "gralora_k": 2, "init_weights": False, **config}
    cast = bool(arguments.pop("autocast_adapter_dtype", True))
    torch.manual_seed(2)
    return peft.get_peft_model(
        copy.deepcopy(model), peft.GraloraConfig(**arguments), autocast_adapter_dtype=cast
    )


def deltas_of(model: peft.PeftModel, name: str = "default") -> dict[str, Gralora]:
    """The factors that live in a PEFT model, by module."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "gralora_A") and name in layer.gralora_A:
            general = layer.hybrid_r[name] > 0
            found[path] = Gralora(
                layer.gralora_A[name].detach(),
                layer.gralora_B[name].detach(),
                layer.scaling[name],
                layer.gralora_A_general[name].weight.detach() if general else None,
                layer.gralora_B_general[name].weight.detach() if general else None,
            )
    return found


def perturb(model: peft.PeftModel) -> peft.PeftModel:
    """As after training: everything trainable has moved."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def saved(model: peft.PeftModel, folder: Path) -> Adapter:
    model.save_pretrained(str(folder))
    return Adapter.open(folder)


def snapshot(model: nn.Module) -> list[tuple[str, int, Tensor, bool]]:
    """Names, identities, values and flags of all parameters and buffers."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return [(name, id(t), t.detach().clone(), t.requires_grad) for name, t in tensors]


def assert_unchanged(model: nn.Module, before: list[tuple[str, int, Tensor, bool]]) -> None:
    after = snapshot(model)
    assert [(name, at, flag) for name, at, _, flag in after] == [
        (name, at, flag) for name, at, _, flag in before
    ]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def truth(delta: Gralora) -> NDArray[np.float64]:
    """The dense delta (out, in) by the definition, in float64, block by block."""
    A, B = delta.A.double().numpy(), delta.B.double().numpy()
    k, m, r = A.shape
    s, p = r // k, B.shape[2]
    dense = np.zeros((k * p, k * m))
    for j in range(k):
        for n in range(k):
            block = A[n][:, j * s : (j + 1) * s] @ B[j][n * s : (n + 1) * s]
            dense[j * p : (j + 1) * p, n * m : (n + 1) * m] = block.T
    if delta.general_A is not None and delta.general_B is not None:
        dense += delta.general_B.double().numpy() @ delta.general_A.double().numpy()
    return delta.scaling * dense


def backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient, in training mode, with a fixed seed for the dropout."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    y: Tensor = model(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach(), x.grad


def assert_close(found: Tensor | None, expected: Tensor | None, ulps: float = 16) -> None:
    """Within `ulps` roundings of the largest entry."""
    assert found is not None
    assert expected is not None
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    eps = torch.finfo(expected.dtype).eps * ulps
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=eps * scale)


# --- one layer, against the dense truth ---

leading = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@settings(max_examples=60)
@given(
    k=st.sampled_from([1, 2, 3, 4]),
    s=st.integers(1, 3),
    h=st.integers(0, 3),
    m=st.integers(1, 4),
    p=st.integers(1, 4),
    shape=leading,
    conv=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_the_dense_delta(
    k: int, s: int, h: int, m: int, p: int, shape: tuple[int, ...], conv: bool, seed: int
) -> None:
    n_in, n_out = k * m, k * p
    delta = gralora(n_in, n_out, k=k, s=s, h=h, seed=seed)
    base = (Conv1D(n_out, n_in) if conv else nn.Linear(n_in, n_out)).double()
    layer = GraloraLinear(base, {"default": delta}, trainable=True)
    x = torch.randn(*shape, n_in, dtype=torch.float64, requires_grad=True)

    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)

    dense = torch.from_numpy(truth(delta))
    weight = (base.weight.T if conv else base.weight).detach() + dense
    rows, grads = x.detach().reshape(-1, n_in), upstream.reshape(-1, n_out)
    assert y.shape == (*shape, n_out)
    torch.testing.assert_close(y.detach().reshape(-1, n_out), rows @ weight.T + base.bias.detach())
    assert x.grad is not None
    torch.testing.assert_close(x.grad.reshape(-1, n_in), grads @ weight)
    # The dense delta is linear in each factor, so a finite difference is its exact slope.
    branch = layer.adapters["default"]
    for role, factor in branch.named_parameters():
        assert factor.grad is not None
        step = torch.randn_like(factor)
        moved = {name: value.detach() for name, value in branch.named_parameters()}
        moved[role] = moved[role] + step
        change = truth(
            Gralora(
                moved["A"],
                moved["B"],
                delta.scaling,
                moved.get("general_A"),
                moved.get("general_B"),
            )
        )
        slope = ((grads.T @ rows) * (torch.from_numpy(change) - dense)).sum()
        torch.testing.assert_close((factor.grad * step).sum(), slope)


def test_k_times_fewer_flops_than_the_scattered_product_and_nothing_dense() -> None:
    n_in, n_out, k, r, rows = 64, 96, 4, 8, 5
    delta = gralora(n_in, n_out, k=k, s=r // k)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    counter = FlopCounterMode(display=False)
    x = torch.randn(rows, n_in)
    with Sizes():  # type: ignore[no-untyped-call]
        gralora_product(x, delta.A, delta.B)
    with counter:
        gralora_product(x, delta.A, delta.B)
    assert counter.get_total_flops() == 2 * rows * r * (n_in + n_out)  # LoRA: rank k * r
    assert max(sizes) <= max(rows * max(n_in, n_out, k * r), delta.A.numel(), delta.B.numel())


# --- against PEFT ---


ROLES = {"A": "A", "B": "B", "general_A": "A_general", "general_B": "B_general"}


def assert_follows(
    model: nn.Module,
    reference: peft.PeftModel,
    x: Tensor,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Outputs, input gradients and factor gradients, in training mode, same seed."""
    reference.train()
    model.train()
    handle = attach(model, deltas_of(reference), trainable=True, dropout=dropout, dtype=dtype)
    y, gradient = backward(model, x)
    expected_y, expected_gradient = backward(reference, x)
    assert_close(y, expected_y)
    assert_close(gradient, expected_gradient)
    for path, layer in handle.layers.items():
        theirs = reference.base_model.model.get_submodule(path)
        for role, ours in layer.adapters["default"].named_parameters():
            other = getattr(theirs, f"gralora_{ROLES[role]}")["default"]
            other = other.weight if isinstance(other, nn.Linear) else other
            assert ours.dtype == other.dtype
            assert_close(ours.grad, other.grad)


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "k1": {"gralora_k": 1, "r": 3},
    "k4": {"gralora_k": 4, "r": 8},
    "hybrid": {"hybrid_r": 3},
    "alpha-float": {"alpha": 0.7, "hybrid_r": 1},
    "alpha-negative": {"alpha": -3},
    "dropout": {"gralora_dropout": 0.3},
    "dropout-hybrid": {"gralora_dropout": 0.5, "hybrid_r": 2},
    "dropout-total": {"gralora_dropout": 1.0},
    "fan-in-fan-out": {"fan_in_fan_out": True},
    "targets-regex": {"target_modules": "mid|down"},
}


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_are_pefts(name: str, shape: tuple[int, ...]) -> None:
    config = {"target_modules": TARGETS, **CONFIGS[name]}
    reference = with_peft(mlp(), **config)
    assert_follows(mlp(), reference, torch.randn(shape), dropout=config.get("gralora_dropout", 0.0))


@pytest.mark.parametrize("shape", [(8,), (2, 3, 2, 8)], ids=str)
@pytest.mark.parametrize("name", ["default", "hybrid"])
def test_inputs_that_pefts_forward_cannot_take(name: str, shape: tuple[int, ...]) -> None:
    """One vector, and images in channels-last order: each row gives what PEFT gives for it."""
    reference = with_peft(mlp(), target_modules=TARGETS, **CONFIGS[name])
    model, x = mlp(), torch.randn(shape)
    attach(model, deltas_of(reference))
    with pytest.raises(ValueError, match="to unpack"):
        reference(x)
    with torch.no_grad():
        assert_close(model(x), reference(x.reshape(-1, 8)).reshape(*shape[:-1], 4))


@pytest.mark.parametrize("cast", [True, False], ids=["factors-fp32", "factors-as-base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_pefts(dtype: torch.dtype, cast: bool) -> None:
    reference = with_peft(
        mlp().to(dtype),
        target_modules=TARGETS,
        hybrid_r=2,
        gralora_dropout=0.25,
        autocast_adapter_dtype=cast,
    )
    factors = None if cast else dtype
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert_follows(mlp().to(dtype), reference, x, dropout=0.25, dtype=factors)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_pefts(cast: torch.dtype, base: torch.dtype) -> None:
    reference = with_peft(mlp().to(base), target_modules=TARGETS, hybrid_r=2, gralora_dropout=0.25)
    with torch.autocast("cpu", dtype=cast):
        assert_follows(mlp().to(base), reference, torch.randn(2, 3, 8, dtype=base), dropout=0.25)


def test_a_model_of_pefts_is_adapted_further_where_it_is_named(tmp_path: Path) -> None:
    model, x = with_peft(mlp(), target_modules=["up"]), torch.randn(2, 3, 8)
    plain, deltas = model(x), deltas_of(with_peft(mlp(), target_modules=["up", "mid"]))
    with pytest.raises(InvalidAdapterError, match=r"attach to model.get_base_model\(\)"):
        attach(model, deltas)
    with attach(model.get_base_model(), {"mid": deltas["mid"]}):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)


def test_gradient_checkpointing_is_pefts() -> None:
    config = {"target_modules": ["q_proj", "v_proj"], "hybrid_r": 2, "gralora_dropout": 0.2}
    reference, model = with_peft(tiny("llama"), **config), tiny("llama")
    handle = attach(model, deltas_of(reference), trainable=True, dropout=0.2)
    gradients = []
    for one in (model, reference):
        one.train()
        one.gradient_checkpointing_enable()
        one.enable_input_require_grads()
        torch.manual_seed(0)
        one(input_ids=IDS, labels=IDS).loss.backward()
    for path, layer in handle.layers.items():
        theirs = reference.base_model.model.get_submodule(path)
        ours = layer.get_parameter("adapters.default.A")
        gradients.append((ours.grad, theirs.gralora_A["default"].grad))
    assert len(gradients) == 4
    for found, expected in gradients:
        assert_close(found, expected)


def test_two_adapters_are_summed_as_by_peft() -> None:
    reference = with_peft(mlp(), target_modules=TARGETS)
    other = peft.GraloraConfig(
        r=8, gralora_k=4, hybrid_r=1, alpha=5, target_modules=["up", "mid"], init_weights=False
    )
    reference.add_adapter("other", other)
    reference.base_model.set_adapter(["default", "other"])
    model, x = mlp(), torch.randn(2, 3, 8)
    before, plain = snapshot(model), model(x)
    first = attach(model, deltas_of(reference))
    second = attach(model, deltas_of(reference, "other"), name="other")
    assert_close(model(x), reference(x))

    first.detach()
    reference.base_model.set_adapter("other")
    assert_close(model(x), reference(x))
    second.detach()
    second.detach()
    assert torch.equal(model(x), plain)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_is_pefts(dtype: torch.dtype, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3,
        use_rslora=True,
        rank_pattern={"mid": 2},
        alpha_pattern={"down": 5},
        target_modules=TARGETS,
        lora_dropout=0.4,
        bias="lora_only",
    )
    reference = perturb(peft.get_peft_model(mlp().to(dtype), config))
    model, x = mlp().to(dtype), torch.randn(2, 3, 8, dtype=dtype)
    with attach(model, saved(reference, tmp_path), trainable=True) as handle:
        (y, gradient), expected = backward(model, x), backward(reference, x)
        assert_close(y, expected[0])
        assert_close(gradient, expected[1])
        assert isinstance(handle.deltas()["mid"], Lora)
        assert len(handle.parameters()) == len(trainable(reference))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5"])
def test_whole_models_are_pefts_and_come_back_bit_for_bit(name: str) -> None:
    kind = ARCHITECTURES[name]
    reference = with_peft(tiny(name), target_modules=kind.targets, hybrid_r=2)
    model = tiny(name)
    before, plain = snapshot(model), model(**kind.inputs).logits
    with attach(model, deltas_of(reference)) as handle:
        assert len(handle.layers) == len(deltas_of(reference)) > 0
        # Random deltas amplify what rounding the untouched layers leave to the memory alignment.
        assert_close(model(**kind.inputs).logits, reference(**kind.inputs).logits, ulps=200)
        assert not torch.equal(model(**kind.inputs).logits, plain)
        assert not any(parameter.requires_grad for parameter in handle.parameters())
    assert torch.equal(model(**kind.inputs).logits, plain)
    assert_unchanged(model, before)


def test_an_adapted_tied_head_leaves_the_embedding_alone() -> None:
    model = tiny("llama-tied")
    embedding = model.get_parameter("model.embed_tokens.weight")
    hidden = model.get_submodule("model")(input_ids=IDS).last_hidden_state
    with attach(model, {"lm_head": gralora(16, 32)}) as handle:
        assert model.get_parameter("lm_head.weight") is embedding
        assert torch.equal(model.get_submodule("model")(input_ids=IDS).last_hidden_state, hidden)
        logits = hidden.double() @ (embedding.double() + torch.from_numpy(truth(gralora(16, 32)))).T
        torch.testing.assert_close(model(input_ids=IDS).logits, logits.float())
        model.tie_weights()
        assert handle.layers["lm_head"].base_layer.weight is embedding


def epoch(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """One epoch over 24 short sequences, with dropout; the loss of each step."""
    data = (torch.arange(8) + torch.arange(48)[:, None]) % 32
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    model.train()
    torch.manual_seed(6)
    losses = []
    for batch in data.view(-1, 4, 8):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_follows_pefts_loss_curve(dtype: torch.dtype) -> None:
    config = {"target_modules": ["q_proj", "down_proj", "lm_head"], "r": 8, "hybrid_r": 2}
    reference = with_peft(tiny("llama").to(dtype), **config, gralora_dropout=0.1, init_weights=True)
    model = tiny("llama").to(dtype)
    handle = attach(model, deltas_of(reference), dropout=0.1, trainable=True)
    losses = epoch(model, handle.parameters())
    expected = epoch(reference, trainable(reference))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert losses[-1] < losses[0] - 0.1
    assert losses == pytest.approx(expected, rel=tolerance)


# --- adapters from disk: biases, saved modules, dropout of the config ---


@pytest.mark.parametrize("bias", ["none", "gralora_only", "all"])
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_bias_modes_replace_and_come_back(name: str, bias: str, tmp_path: Path) -> None:
    build = mlp if name == "mlp" else lambda: tiny("gpt2")
    targets = TARGETS if name == "mlp" else ["c_attn", "c_fc"]
    reference = perturb(with_peft(build(), target_modules=targets, bias=bias))
    adapter, model = saved(reference, tmp_path), build()
    x = torch.randn(2, 3, 8) if name == "mlp" else IDS
    before = snapshot(model)
    with attach(model, adapter) as handle:
        found, expected = model(x), reference.eval()(x)
        if name == "gpt2":
            found, expected = found.logits, expected.logits
        assert_close(found, expected)
        assert bool(handle.replaced) is (bias != "none")
        assert (
            not trainable(model)
            or bias == "none"
            or not any(value.requires_grad for value in handle.replaced.values())
        )
    assert_unchanged(model, before)


def test_a_loaded_adapter_trains_on_as_with_peft(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "bias": "none", "modules_to_save": ["lm_head"]}
    reference = perturb(with_peft(tiny("llama"), gralora_dropout=0.2, **config))
    adapter, model = saved(reference, tmp_path), tiny("llama")
    base, before = tiny("llama"), snapshot(model)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    handle = attach(model, adapter, trainable=True)
    assert sorted(p.numel() for p in handle.parameters()) == sorted(
        p.numel() for p in trainable(again)
    )
    assert epoch(model, handle.parameters()) == pytest.approx(
        epoch(again, trainable(again)), rel=1e-4
    )
    handle.detach()
    model.eval()
    assert_unchanged(model, before)


def test_a_trained_classifier_head_replaces_the_models(tmp_path: Path) -> None:
    kind = ARCHITECTURES["bert-classifier"]

    def classifier() -> nn.Module:
        torch.manual_seed(1)
        config = tiny("bert-classifier").config
        config.num_labels = 3
        model: nn.Module = BertForSequenceClassification(config).eval()
        return model

    reference = perturb(
        with_peft(classifier(), target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    adapter, model = saved(reference, tmp_path), classifier()
    before = snapshot(model)
    with attach(model, adapter) as handle:
        assert set(handle.replaced) == {"classifier.weight", "classifier.bias"}
        assert_close(model(**kind.inputs).logits, reference.eval()(**kind.inputs).logits)
    assert_unchanged(model, before)

    headless = nn.Module()
    headless.bert = tiny("bert-classifier")
    before = snapshot(headless)
    with pytest.raises(InvalidAdapterError, match=r"classifier: .*no such module.*num_labels=3"):
        attach(headless, adapter)
    assert_unchanged(headless, before)


# --- refusals: one error, before anything is changed ---


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.embed, self.conv = nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.shared = nn.Linear(8, 8)
        self.block = nn.Module()
        self.block.fc = nn.Linear(8, 8)
        self.again = self.block


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (
            {"proj": (8, 8), "layers.0.proj": (8, 8)},
            r"layers\.0\.proj: .*no such module.*is proj\.",
        ),
        ({"proj": (8, 8), "xyz": (8, 8)}, r"xyz: .*no such module.* Is this the model"),
        ({"proj": (8, 8), "embed": (8, 8)}, "embed: .*is of type Embedding; only nn.Linear and"),
        ({"proj": (8, 8), "conv": (8, 8)}, "conv: .*is of type Conv2d"),
        ({"proj": (8, 8), "attention": (8, 8)}, "attention: .*is of type MultiheadAtt"),
        (
            {"proj": (8, 8), "attention.out_proj": (8, 8)},
            r"out_proj: .*never calls it.* An adapter",
        ),
        ({"proj": (8, 8), "shared": (8, 12)}, "shared: .*maps 8 to 12 features, the layer 8 to 8"),
        ({"block.fc": (8, 8), "again.fc": (8, 8)}, "again.fc: .*is the same layer as block.fc"),
        ({"proj": (8, 8), "": (8, 8)}, "the model itself cannot be replaced.*GraloraLinear"),
        ({"embed": (8, 8), "conv": (8, 8), "x": (8, 8)}, "embed: .*and 2 more"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    modules: Mapping[str, tuple[int, int]], words: str
) -> None:
    model = Zoo()
    before, tree = snapshot(model), dict(model.named_modules())
    with pytest.raises(InvalidAdapterError, match=words):
        attach(model, {name: gralora(*shape) for name, shape in modules.items()})
    assert_unchanged(model, before)
    assert dict(model.named_modules()) == tree


def test_misuse() -> None:
    model, delta = mlp(), gralora(8, 12)
    with attach(model, {"up": delta}), pytest.raises(MisuseError, match="'default' is attached"):
        attach(model, {"mid": gralora(12, 16), "up": delta})
    for name in ("", "a.b", "keys"):
        with pytest.raises(MisuseError, match="cannot be the name"):
            attach(model, {"up": delta}, name=name)
    with pytest.raises(MisuseError, match="nothing to attach"):
        attach(model, {})
    with pytest.raises(UnsupportedError, match="dense delta"):
        attach(model, {"up": Dense(torch.zeros(12, 8))})
    with pytest.raises(TypeError, match="not a Tensor"):
        attach(model, {"up": torch.zeros(12, 8)})  # type: ignore[dict-item]
    assert isinstance(model.up, nn.Linear)


def test_two_adapters_cannot_bring_the_same_bias(tmp_path: Path) -> None:
    adapter = saved(perturb(with_peft(mlp(), target_modules=["up"], bias="all")), tmp_path)
    model = mlp()
    first = attach(model, adapter)
    with pytest.raises(InvalidAdapterError, match=r"bias: .*'default' replaces it already"):
        attach(model, adapter, name="other")
    first.detach()
    attach(model, adapter, name="other")


def test_what_is_tied_stays_tied_when_both_are_replaced(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].bias = model[0].bias
        return model

    reference = perturb(with_peft(tied(), target_modules=["0"], bias="all"))
    model = tied()
    with attach(model, saved(reference, tmp_path), trainable=True) as handle:
        assert model[1].bias is model[0].bias is handle.replaced["0.bias"]
        assert model[2].bias is not model[0].bias
        assert len(handle.parameters()) == len(trainable(reference)) == 4
    assert model[1].bias is model[0].bias


def test_values_that_have_no_place_are_refused(tmp_path: Path) -> None:
    def bare_bias() -> Mlp:
        model = mlp()
        model.up.register_parameter("bias", None)
        return model

    adapter = saved(with_peft(mlp(), target_modules=["up"], bias="all"), tmp_path / "bias")
    with pytest.raises(InvalidAdapterError, match=r"up: .*brings bias \(12,\).*Linear has none"):
        attach(bare_bias(), adapter)

    options = {"target_modules": ["up"], "modules_to_save": ["down"]}
    adapter = saved(with_peft(mlp(), **options), tmp_path / "head")
    other = mlp()
    other.down = nn.Linear(16, 5, bias=False)
    with pytest.raises(
        InvalidAdapterError, match=r"down.weight: .*\(4, 16\).*\(5, 16\).*num_labels=4"
    ):
        attach(other, adapter)


# --- living with an attached adapter ---


def test_state_dict_keeps_the_names_of_the_base() -> None:
    model = mlp()
    base = copy.deepcopy(model.state_dict())
    handle = attach(model, {"up": gralora(8, 12, h=1), "down": gralora(16, 4)})
    attached = model.state_dict()
    added = ["A", "B", "general_A", "general_B"]
    assert [key for key in attached if ".adapters." not in key] == list(base)
    assert [key for key in attached if key.startswith("up.adapters")] == [
        f"up.adapters.default.{role}" for role in added
    ]
    assert all(torch.equal(attached[key], base[key]) for key in base)

    stored = {key: value + 1 for key, value in attached.items()}
    model.load_state_dict(stored)
    assert torch.equal(handle.deltas()["up"].B, gralora(8, 12, h=1).B + 1)
    assert torch.equal(model.up.weight, base["up.weight"] + 1)
    result = model.load_state_dict(base, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(attached) - set(base)
    handle.detach()
    model.load_state_dict(base)


def test_a_base_saved_while_an_adapter_is_attached_is_the_base(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    plain = model(input_ids=IDS).logits
    attach(model, {"lm_head": gralora(16, 32), "model.layers.0.self_attn.q_proj": gralora(16, 16)})
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, plain)


def test_copies_and_pickles_of_an_attached_model_are_whole() -> None:
    model, x = tiny("gpt2"), IDS
    attach(model, {"transformer.h.0.mlp.c_fc": gralora(16, 64, h=2)}, dropout=0.5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x).logits, model(x).logits)
        assert list(other.state_dict()) == list(model.state_dict())


def test_nothing_is_shared_with_the_caller() -> None:
    delta = gralora(8, 12, h=1)
    before = copy.deepcopy(delta)
    model, x = mlp(), torch.randn(3, 8)
    handle = attach(model, {"up": delta}, trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    trained = handle.deltas()["up"]
    assert isinstance(trained, Gralora)
    assert torch.equal(delta.A, before.A)
    assert not trained.A.any()
    assert trained.general_B is not None
    trained.general_B.add_(1)
    assert torch.equal(model(x), mlp()(x))


def test_modes_and_moves_reach_the_model_that_comes_back(tmp_path: Path) -> None:
    adapter = saved(perturb(with_peft(mlp(), target_modules=TARGETS, bias="all")), tmp_path)
    model, x = mlp().eval(), torch.randn(3, 8)
    handle = attach(model, adapter, dropout=0.9)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))
    model.double().eval()
    assert model(x.double()).dtype == torch.float64
    handle.detach()
    assert torch.equal(model(x.double()), mlp().double()(x.double()))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}


def test_fused_kernels_do_not_pass_an_adapter_by() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x, deltas = torch.randn(2, 3, 8), {"linear1": gralora(8, 16), "linear2": gralora(16, 8)}
    with torch.no_grad():
        plain = layer(x)
        with attach(layer, deltas):
            fused = layer(x)
            with torch.enable_grad():
                slow = layer(x.requires_grad_())
        assert not torch.allclose(fused, plain, atol=1e-2)
        torch.testing.assert_close(fused, slow)
        padded = nn.TransformerEncoder(layer, 1).eval()
        mask = torch.tensor([[False, False, True], [False, False, False]])
        with attach(padded, {"layers.0.linear1": deltas["linear1"]}):
            with pytest.raises(UnsupportedError, match="enable_nested_tensor=False"):
                padded(x, src_key_padding_mask=mask)


def test_compiles_as_one_graph() -> None:
    model, x = mlp(), torch.randn(2, 3, 8)
    attach(model, {"up": gralora(8, 12, h=2), "mid": gralora(12, 16, k=4)})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_the_layer_alone() -> None:
    base = nn.Linear(8, 12, dtype=torch.bfloat16).eval()
    layer = GraloraLinear(base, {"one": gralora(8, 12), "two": gralora(8, 12, k=4, seed=1)})
    assert (layer.in_features, layer.out_features) == (8, 12)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not layer.training
    assert layer.delta("one").A.dtype == torch.float32
    x = torch.randn(8, dtype=torch.bfloat16)
    exact = base.double().weight + torch.from_numpy(truth(gralora(8, 12)))
    exact = exact + torch.from_numpy(truth(gralora(8, 12, k=4, seed=1)))
    base.bfloat16()
    expected = x.double() @ exact.T + base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=0.2)
    layer.remove("one")
    assert list(layer.adapters) == ["two"]
    with pytest.raises(InvalidAdapterError, match="is of type Embedding"):
        GraloraLinear(nn.Embedding(8, 8), {"one": gralora(8, 8)})


def test_the_forward_path_needs_neither_peft_nor_transformers() -> None:
    code = (
        "import sys, torch, gralora_convert.models as f, gralora_convert.delta as d\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "delta = d.Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 2), 1.0)\n"
        "f.attach(model, {'0': delta})\n"
        "model(torch.ones(4))\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def with_saved_head(name: str, folder: Path) -> PreTrainedModel:
    """A model whose adapter, with a head of its own, is in `folder`."""
    base = save_base(ARCHITECTURES[name], folder / "base")
    train(base, ARCHITECTURES[name], folder / "adapter", modules_to_save=["lm_head"])
    return load(base, ARCHITECTURES[name].auto)


@pytest.mark.parametrize("change", ["tie_weights", "resize_token_embeddings"])
def test_a_saved_head_that_is_tied_back_is_not_used(change: str, tmp_path: Path) -> None:
    """The adapter's head would be gone without a word; PEFT keeps it in a wrapper of its own."""
    model = with_saved_head("llama-tied", tmp_path)
    before = outputs(model)
    handle = attach(model, tmp_path / "adapter")
    adapted = outputs(model)
    getattr(model, change)(*([33] if change.startswith("resize") else []))
    with pytest.raises(MisuseError, match="tied or resized"):
        outputs(model)
    handle.detach()
    if change == "tie_weights":
        assert torch.equal(outputs(model), before)
        with attach(model, tmp_path / "adapter"):
            assert torch.equal(outputs(model), adapted)


def test_two_saved_modules_that_are_tied_to_each_other_are_not_used(tmp_path: Path) -> None:
    """`tie_weights` puts the adapter's embedding into the head, for which it has another value."""
    base = save_base(ARCHITECTURES["llama-tied"], tmp_path / "base")
    train(base, ARCHITECTURES["llama-tied"], tmp_path / "adapter", target_modules=["q_proj"],
          modules_to_save=["embed_tokens", "lm_head"])  # fmt: skip
    model = load(base, "AutoModelForCausalLM")
    handle = attach(model, tmp_path / "adapter")
    outputs(model)
    model.tie_weights()
    with pytest.raises(MisuseError, match="tied or resized"):
        outputs(model)
    handle.detach()


def test_saved_modules_of_a_tied_model_train_each_alone_as_with_peft(tmp_path: Path) -> None:
    """Both with the same values in the adapter, as before any step."""
    base = save_base(ARCHITECTURES["llama-tied"], tmp_path / "base")
    train(base, ARCHITECTURES["llama-tied"], tmp_path / "adapter", target_modules=["q_proj"],
          modules_to_save=["embed_tokens", "lm_head"], steps=0)  # fmt: skip
    model, plain = (load(base, "AutoModelForCausalLM") for _ in range(2))
    again = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), is_trainable=True)
    handle = attach(model, tmp_path / "adapter", trainable=True)
    for one, parameters in ((model, handle.parameters()), (again, trainable(again))):
        optimiser = torch.optim.SGD(parameters, 0.5)
        for _ in range(3):
            optimiser.zero_grad()
            one(input_ids=IDS, labels=IDS).loss.backward()
            optimiser.step()
    assert_close(outputs(model), outputs(again))


def test_an_adapted_tied_head_is_tied_but_not_resized() -> None:
    model = tiny("llama-tied")
    before = outputs(model)
    handle = attach(model, {"lm_head": gralora(16, 32)})
    adapted = outputs(model)
    model.tie_weights()
    assert torch.equal(outputs(model), adapted)
    with pytest.raises(MisuseError, match="keeps its out_features: 32, not 40"):
        model.resize_token_embeddings(40)
    handle.detach()
    assert torch.equal(outputs(model)[..., :32], before)


@pytest.mark.parametrize("how", ["assign", "overwrite"])
def test_new_objects_for_the_values_of_an_adapter_are_its_own(how: str, tmp_path: Path) -> None:
    """`load_state_dict(assign=True)` and some moves replace parameters by others."""
    model = with_saved_head("llama", tmp_path)
    before = outputs(model)
    handle = attach(model, tmp_path / "adapter")
    adapted = outputs(model)
    if how == "assign":
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    else:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert torch.equal(outputs(model), adapted)
    with handle.disabled():
        assert torch.equal(outputs(model), before)
    assert torch.equal(outputs(model), adapted)
    handle.detach()
    assert torch.equal(outputs(model), before)


def test_a_copy_knows_what_its_adapter_brought(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    adapted = outputs(model), attach(model, tmp_path / "adapter"), outputs(model)
    twin, handle = copy.deepcopy((model, adapted[1]))
    with pytest.raises(InvalidAdapterError, match="'default' replaces it already"):
        attach(twin, tmp_path / "adapter", name="second")
    handle.detach()
    assert torch.equal(outputs(twin), adapted[0])
    assert torch.equal(outputs(model), adapted[2])


def test_the_model_is_frozen_while_any_adapter_is_trained() -> None:
    model, delta = mlp(), {"up": gralora(8, 12)}
    one, two = (attach(model, delta, name=name, trainable=True) for name in ("one", "two"))
    one.detach()
    assert {id(p) for p in trainable(model)} == {id(p) for p in two.parameters()}
    two.detach()
    assert len(trainable(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("dropout", [1.5, -1.0, float("nan"), "0.1"])
def test_a_dropout_is_a_probability(dropout: Any) -> None:
    with pytest.raises(MisuseError, match="not a number from 0 to 1"):
        attach(mlp(), {"up": gralora(8, 12)}, dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_factors_are_of_a_dtype_to_compute_in(dtype: torch.dtype) -> None:
    model = mlp()
    with pytest.raises(MisuseError, match="no dtype to compute factors in"):
        attach(model, {"up": gralora(8, 12)}, dtype=dtype)
    assert isinstance(model.up, nn.Linear)


def test_saving_the_model_says_that_the_adapter_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = with_saved_head("llama", tmp_path)
    handle = attach(model, tmp_path / "adapter")
    adapted = outputs(model)
    handle.save_pretrained(tmp_path / "again")
    assert "without the adapter" not in caplog.text
    for name, one in {"model": model, "copy": copy.deepcopy(model)}.items():
        caplog.clear()
        one.save_pretrained(tmp_path / name)
        assert "load it without the adapter" in caplog.text
        loaded = load(tmp_path / name, "AutoModelForCausalLM")
        attach(loaded, tmp_path / "again")
        assert torch.equal(outputs(loaded), adapted)
    caplog.clear()
    handle.merge()
    model.save_pretrained(tmp_path / "merged")
    handle.detach()
    model.save_pretrained(tmp_path / "base-again")
    assert "without the adapter" not in caplog.text
    assert "save_pretrained" not in vars(model)
    merged = load(tmp_path / "merged", "AutoModelForCausalLM")
    torch.testing.assert_close(outputs(merged), adapted)


def test_a_parameter_that_is_a_plain_tensor_now_is_replaced(tmp_path: Path) -> None:
    """As FSDP 1 has them while it computes."""
    adapter = saved(perturb(with_peft(mlp(), target_modules=TARGETS, bias="all")), tmp_path)
    plain, model, x = mlp(), mlp(), torch.randn(3, 8)
    model.up._parameters["bias"] = model.up.bias.detach()  # type: ignore[assignment]
    attach(plain, adapter)
    handle = attach(model, adapter, trainable=True)
    assert torch.equal(model(x), plain(x))
    assert isinstance(handle.replaced["up.bias"], nn.Parameter)


def test_a_part_that_the_adapter_fits_is_named(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    plain, wrapper = outputs(model), nn.Sequential(nn.Identity(), model)
    with pytest.raises(InvalidAdapterError, match=r"attach to model\.get_submodule\('1'\)"):
        attach(wrapper, tmp_path / "adapter")
    part = {"layers.0.self_attn.q_proj": gralora(16, 16)}
    first = attach(model.model, part, name="part")
    second = attach(wrapper.get_submodule("1"), tmp_path / "adapter")
    first.detach()
    second.detach()
    assert torch.equal(outputs(model), plain)
    assert not [m for m in model.modules() if "save_pretrained" in vars(m)]


def test_a_trainer_trains_and_resumes_as_with_peft(tmp_path: Path) -> None:
    with_saved_head("llama", tmp_path)
    adapter = tmp_path / "adapter"

    def trained(ours: bool, resumed: bool = False) -> PreTrainedModel:
        model: Any = load(tmp_path / "base", "AutoModelForCausalLM")
        if ours:
            attach(model, adapter, trainable=True)
        else:
            model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
        folder = tmp_path / f"ours-{ours}"
        options = TrainingArguments(
            output_dir=str(folder), max_steps=2, save_steps=1, use_cpu=True, report_to=[],
            learning_rate=0.01, gradient_checkpointing=True, disable_tqdm=True,
        )  # fmt: skip
        rows: Any = [{"input_ids": row, "labels": row} for row in IDS]
        trainer = Trainer(model=model, args=options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resumed else None)
        found: PreTrainedModel = model
        return found

    expected = outputs(trained(False))
    assert_close(outputs(trained(True)), expected)
    assert_close(outputs(trained(True, resumed=True)), expected)


def test_within_disabled_the_model_is_its_own(tmp_path: Path) -> None:
    """As PEFT's `disable_adapter`; the other adapters, and the trained values, stay."""
    model = with_saved_head("llama", tmp_path)
    before = outputs(model)
    with attach(model, tmp_path / "adapter") as handle:
        adapted = outputs(model)
        with handle.disabled():
            assert torch.equal(outputs(model), before)
        assert torch.equal(outputs(model), adapted)
        with pytest.raises(ZeroDivisionError), handle.disabled():
            raise ZeroDivisionError
        other = {"model.layers.0.self_attn.q_proj": gralora(16, 16)}
        with attach(model, other, name="other"):
            both = outputs(model)
            with handle.disabled():
                alone = outputs(model)
            assert torch.equal(outputs(model), both)
        assert not torch.equal(alone, before)
        assert torch.equal(outputs(model), adapted)
    with handle.disabled():
        assert torch.equal(outputs(model), before)


def test_training_an_adapter_freezes_the_model_until_it_is_taken_off(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    own = list(model.parameters())
    own[0].requires_grad_(False)
    first = attach(model, tmp_path / "adapter", trainable=True)
    second = attach(model, {"model.layers.0.self_attn.q_proj": gralora(16, 16)}, name="second",
                    trainable=True)  # fmt: skip
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for handle in (first, second) for p in handle.parameters()}
    second.detach()
    first.detach()
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(own) - 1)
    with attach(model, tmp_path / "adapter", trainable=True, freeze=False):
        assert own[1].requires_grad
