"""What is done with attached adapters on a live model: wrappers, switches, weights, merges."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import gralora_convert as gc
from gralora_convert.adapters import Adapter
from gralora_convert.delta import dense
from gralora_convert.disk import read_torch
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.models.attachment import Attachment, attach
from tests.models.test_attachment import (
    TARGETS,
    deltas_of,
    gralora,
    mlp,
    perturb,
    tiny,
    with_peft,
    with_saved_head,
)
from tests.zoo import load, outputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(4)).to(dtype)


def compiled(model: nn.Module) -> nn.Module:
    found: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return found


def compiled_inside(model: nn.Module) -> nn.Module:
    """Two levels: a compiled container, and a compiled layer in it."""
    inner = copy.deepcopy(model)
    inner.up = compiled(inner.get_submodule("up"))
    return nn.ModuleDict({"body": compiled(inner)})


# wrappers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["compile", "DataParallel"])
def test_a_wrapped_model_is_taken_for_what_it_wraps(wrap: type[nn.Module]) -> None:
    model = mlp()
    adapted = perturb(with_peft(model, target_modules=TARGETS))
    outer, x = wrap(model), inputs()
    before = outer(x)
    names = list(outer.state_dict())
    with attach(outer, deltas_of(adapted)):
        assert torch.equal(outer(x), model(x))
        assert torch.allclose(outer(x), adapted(x), atol=1e-6)
    assert torch.equal(outer(x), before)
    assert list(outer.state_dict()) == names


def test_layers_that_are_compiled_one_by_one_are_found_by_their_names() -> None:
    model = mlp()
    adapted = perturb(with_peft(model, target_modules=TARGETS))
    outer, x = compiled_inside(model), inputs()
    names = list(outer.state_dict())
    before = outer["body"](x)  # type: ignore[index]
    deltas = {f"body.{name}": delta for name, delta in deltas_of(adapted).items()}
    with attach(outer, deltas) as handle:
        assert handle.layers["body.up"].in_features == 8
        assert torch.allclose(outer["body"](x), adapted(x), atol=1e-6)  # type: ignore[index]
        assert set(names) < set(outer.state_dict())
    assert torch.equal(outer["body"](x), before)  # type: ignore[index]
    assert list(outer.state_dict()) == names


def test_replicas_of_a_model_keep_the_values_of_its_adapter(tmp_path: Path) -> None:
    """DataParallel calls copies that share the hooks of the model."""
    model = with_saved_head("llama", tmp_path)
    attach(model, tmp_path / "adapter")
    replica = copy.copy(model)
    replica._modules = {
        name: copy.deepcopy(layer) if layer is not None else None
        for name, layer in model._modules.items()
    }
    assert torch.equal(outputs(replica), outputs(model))


# identity ---------------------------------------------------------------------------------------


def test_the_bases_parameters_are_the_same_objects_all_along(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    before = {name: id(p) for name, p in model.named_parameters()}
    names, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    with attach(model, tmp_path / "adapter", trainable=True) as handle:
        there = {id(p) for p in model.parameters()}
        assert set(before.values()) - there == {before["lm_head.weight"]}
        handle.merge()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


# merges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_live_merge_is_pefts_and_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), inputs(dtype)
    adapted = perturb(with_peft(model, target_modules=TARGETS, hybrid_r=2))
    deltas = deltas_of(adapted)
    weights = {name: model.get_parameter(f"{name}.weight") for name in TARGETS}
    before = model(x)
    with attach(model, deltas) as handle:
        separate = model(x)
        handle.merge()
        handle.merge()
        for name, weight in weights.items():
            update = dense(deltas[name], torch.float64)
            exact = weight.double() + (update.T if name == "mid" else update)
            found = model.get_parameter(f"{name}.weight")
            assert found.dtype == dtype
            bound = exact.abs() * torch.finfo(dtype).eps + 1e-6
            assert bool(((found.double() - exact).abs() <= bound).all())
        eps = torch.finfo(dtype).eps
        assert torch.allclose(model(x).double(), separate.double(), atol=40 * eps + 1e-6)
        adapted.merge_adapter()
        assert torch.allclose(model(x).double(), adapted(x).double(), atol=40 * eps + 1e-6)
        assert not torch.allclose(model(x), before, atol=0.05)
        handle.unmerge()
        assert torch.equal(model(x), separate)
        assert all(model.get_submodule(n).weight is w for n, w in weights.items())
    assert torch.equal(model(x), before)


def test_a_live_merge_has_the_weights_of_a_merge_on_disk(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    gc.merge(tmp_path / "adapter", base=tmp_path / "base").write(tmp_path / "merged")
    attach(model, tmp_path / "adapter").merge()
    on_disk = gc.Checkpoint.open(tmp_path / "merged").tensors
    state = model.state_dict()
    assert len(on_disk) > 10
    for name, spec in on_disk.items():
        assert torch.equal(read_torch(spec), state[name])


def test_a_merge_leaves_a_tied_embedding_alone() -> None:
    model = tiny("llama-tied")
    embedding = model.get_input_embeddings().weight
    own, before = embedding.clone(), outputs(model)
    with attach(model, {"lm_head": gralora(*model.lm_head.weight.shape[::-1])}) as handle:
        adapted = outputs(model)
        handle.merge()
        assert torch.equal(embedding, own)
        assert torch.allclose(outputs(model), adapted, atol=1e-5)
        model.tie_weights()
        with pytest.raises(MisuseError, match="tied or resized"):
            outputs(model)
        handle.set_active(False)
    assert model.lm_head.weight is embedding
    assert torch.equal(outputs(model), before)


def test_merges_come_apart_in_the_other_order_only() -> None:
    model, x = mlp(), inputs()
    before = model(x)
    one = attach(model, {"up": gralora(8, 12)}, name="one")
    two = attach(model, {"up": gralora(8, 12, seed=1)}, name="two")
    both = model(x)
    one.merge()
    assert torch.allclose(model(x), both, atol=1e-5)
    two.merge()
    assert torch.allclose(model(x), both, atol=1e-5)
    for step in (one.unmerge, one.detach, lambda: one.set_active(False)):
        with pytest.raises(MisuseError, match="was changed after"):
            step()
    two.unmerge()
    with two.disabled(), one.disabled():
        assert torch.equal(model(x), before)
    assert torch.allclose(model(x), both, atol=1e-5)
    one.detach()
    two.detach()
    assert torch.equal(model(x), before)


def test_what_cannot_be_merged_is_refused_before_anything_changes() -> None:
    model = mlp()
    weights = dict(model.named_parameters())
    handle = attach(model, {"up": gralora(8, 12), "down": gralora(16, 4, scaling=1e30)})
    model.to(torch.float16)
    with pytest.raises(MisuseError, match="not finite"):
        handle.merge()
    assert all(model.get_parameter(name.replace("up.", "up.base_layer.").replace(
        "down.", "down.base_layer.")) is p for name, p in weights.items())  # fmt: skip
    handle.detach()
    nn.utils.parametrizations.weight_norm(model.up)
    with attach(model, {"up": gralora(8, 12)}) as handle, pytest.raises(UnsupportedError):
        handle.merge()
    handle.set_active(False)
    with pytest.raises(MisuseError, match="detached"):
        handle.set_active(True)


# several adapters -------------------------------------------------------------------------------


def test_adapters_are_switched_as_by_peft() -> None:
    model, x = mlp(), inputs()
    adapted = with_peft(model, target_modules=TARGETS)
    adapted.add_adapter("other", peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS,
                                                    init_weights=False))  # fmt: skip
    handles: dict[str, Attachment] = {
        name: attach(model, deltas_of(adapted, name), name=name) for name in ("default", "other")
    }
    for active in handles:
        adapted.set_adapter(active)
        for name, handle in handles.items():
            handle.set_active(name == active)
        assert torch.equal(model(x), adapted(x))


def test_heads_of_two_adapters_are_switched(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    before = outputs(model)
    one = attach(model, tmp_path / "adapter", name="one")
    first = outputs(model)
    one.set_active(False)
    assert torch.equal(outputs(model), before)
    two = attach(model, tmp_path / "adapter", name="two")
    assert torch.equal(outputs(model), first)
    with pytest.raises(MisuseError, match="lm_head"):
        one.set_active(True)
    assert torch.equal(one.replaced["lm_head.weight"], two.replaced["lm_head.weight"])
    two.set_active(False)
    one.set_active(True)
    assert torch.equal(outputs(model), first)
    one.set_active(False)
    one.detach()
    two.detach()
    assert torch.equal(outputs(model), before)


def test_a_move_while_an_adapter_is_off_reaches_its_values(tmp_path: Path) -> None:
    model = with_saved_head("llama", tmp_path)
    with attach(model, tmp_path / "adapter") as handle:
        with handle.disabled():
            model.to(torch.float64)
        assert model.lm_head.weight.dtype == torch.float64
        outputs(model)


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.25])
def test_a_scale_weighs_the_forward_path_and_the_merge(scale: float, tmp_path: Path) -> None:
    model, x = mlp(), inputs()
    deltas = {"up": gralora(8, 12, h=2), "mid": gralora(12, 16)}
    with attach(model, deltas) as handle:
        handle.set_scale(scale)
        assert handle.deltas()["up"].scaling == 0.5
        found = model(x)
        handle.merge()
        assert torch.allclose(model(x), found, atol=1e-5)
        with pytest.raises(MisuseError, match="is merged"):
            handle.set_scale(2)
    weighed = {name: gralora(*size, scaling=0.5 * scale) for name, size in
               {"up": (8, 12, ), "mid": (12, 16)}.items()}  # fmt: skip
    weighed["up"] = gralora(8, 12, h=2, scaling=0.5 * scale)
    with attach(model, weighed):
        assert torch.allclose(model(x), found, atol=1e-5)
    head = attach(with_saved_head("llama", tmp_path), tmp_path / "adapter")
    with pytest.raises(MisuseError, match="brings biases or heads"):
        head.set_scale(2)
    with pytest.raises(MisuseError, match="finite"):
        head.set_scale(float("nan"))


# FSDP 2 -----------------------------------------------------------------------------------------

SHARDED = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from gralora_convert import Gralora, attach
from gralora_convert.errors import MisuseError
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=0, world_size=1)
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 4)
delta = Gralora(torch.randn(2, 2, 2), torch.randn(2, 2, 3), 0.5)
handle = attach(model, {"0": delta}, trainable=True)
wanted = model(x)
fully_shard(model)
assert torch.allclose(model(x), wanted, atol=1e-6)
handle.save_pretrained(sys.argv[1] + "/saved")
try:
    attach(model, {"0": delta}, trainable=True, name="late")
except MisuseError as refused:
    print(refused)
dist.destroy_process_group()
"""


def test_a_sharded_model_saves_whole_factors(tmp_path: Path) -> None:
    """FSDP 2, one process: parameters are DTensors then."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Attach the adapter first, then shard the model" in done.stdout
    saved = Adapter.open(tmp_path / "saved")
    torch.manual_seed(0)
    nn.Linear(4, 6), torch.randn(2, 4)
    assert torch.equal(saved.delta("0").A, torch.randn(2, 2, 2))


# verbs on what is attached ----------------------------------------------------------------------

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
HYBRID, LLAMA = FIXTURES / "peft-0.21.2/llama-hybrid", FIXTURES / "bases/llama"


def test_verbs_take_what_is_attached_as_it_is_now(tmp_path: Path) -> None:
    model = load(LLAMA, "AutoModelForCausalLM")
    handle = attach(model, HYBRID, trainable=True)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(1.5)
    trained = outputs(model)
    gc.merge(handle, base=LLAMA).write(tmp_path / "merged")
    merged = outputs(load(tmp_path / "merged", "AutoModelForCausalLM"))
    assert np.abs(merged - trained).max() < 1e-6
    assert gc.verify(handle, base=LLAMA, merged=tmp_path / "merged").ok
    assert not gc.verify(HYBRID, base=LLAMA, merged=tmp_path / "merged").ok
    assert gc.validate(handle, LLAMA).ok

    gc.convert(handle, to="lora").write(tmp_path / "lora")
    handle.detach()
    with attach(model, tmp_path / "lora"):
        assert np.abs(outputs(model) - trained).max() < 1e-5
    assert repr(handle) == "Attachment('default', 4 modules, detached)"


def test_a_copy_of_what_is_attached_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    handle = attach(mlp(), {"up": gralora(8, 12)})
    copy = handle.adapter()
    assert Adapter.open(copy) is copy
    assert copy.path.is_relative_to(tmp_path)
    assert torch.equal(dense(copy.delta("up")), dense(handle.deltas()["up"]))
    del copy
    assert list(tmp_path.iterdir()) == []

    handle.set_scale(0.5)
    with pytest.raises(MisuseError, match=r"counts 0\.5 times"):
        handle.adapter()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_adapter_is_a_slip_of_the_program() -> None:
    with pytest.raises(TypeError, match="3 is neither an adapter"):
        gc.merge(3, base=LLAMA)  # type: ignore[arg-type]
