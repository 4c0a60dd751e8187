"""Our code in the place of PEFT's GraLoRA while PEFT's own tests run: a plugin of pytest.

`PEERS_WAY` says which part of PEFT is replaced (a name of `WAYS`; "peft": none), `PEERS_RESULTS`
where each test's outcome is written, and whether it called what was put in.
"""

import importlib.util
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import tuners
from peft.tuners.gralora.layer import GraloraLayer, Linear
from peft.tuners.gralora.model import GraloraModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import gralora_convert as gc
from gralora_convert.errors import ConvertError, InvalidAdapterError
from gralora_convert.models.layer import Branch, GraloraLinear

CALLS = 0  # of ours, since the test began
WEIGHTS = "adapter_model.safetensors"
NO_HUB = ("LocalEntryNotFoundError", "couldn't connect", "is not a local folder", "OfflineMode")


def _called() -> None:
    global CALLS
    CALLS += 1


def _factors(layer: Any, name: str) -> dict[str, nn.Parameter]:
    """PEFT's live parameters of one adapter of a layer, by our names."""
    found = {"A": layer.gralora_A[name], "B": layer.gralora_B[name]}
    if layer.hybrid_r[name]:
        found["general_A"] = layer.gralora_A_general[name].weight
        found["general_B"] = layer.gralora_B_general[name].weight
    return found


def _delta(layer: Any, name: str) -> gc.Gralora:
    return gc.Gralora(**_factors(layer, name), scaling=layer.scaling[name])


def _share(branch: Branch, layer: Any, name: str) -> None:
    """PEFT's own parameters in our branch, so that gradients reach them."""
    for role, parameter in _factors(layer, name).items():
        _put(branch, role, parameter)


def _put(owner: nn.Module, leaf: str, live: Tensor) -> None:
    """A live parameter in its place; a plain tensor, too, which FSDP 1 makes of them."""
    owner._parameters.pop(leaf, None)
    if isinstance(live, nn.Parameter):
        setattr(owner, leaf, live)
    else:
        owner.__dict__[leaf] = live


def _on(layer: Any) -> list[str]:
    """The adapters that a layer has to compute."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.gralora_A]


# --- the ways -----------------------------------------------------------------------------------


def forward() -> None:
    theirs = Linear.forward

    def ours(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _on(self):
            return theirs(self, x, *args, **kwargs)  # also undoes a merge
        _called()
        layer = GraloraLinear(self.base_layer, {})
        for name in _on(self):
            rate = getattr(self.gralora_dropout[name], "p", 0.0)
            layer.add(name, _delta(self, name), dropout=rate)
            _share(layer.adapters[name], self, name)
        return layer.train(self.training)(x, *args, **kwargs)

    Linear.forward = ours


def delta() -> None:
    def ours(self: Any, name: str) -> Tensor:
        _called()
        A = self.gralora_A[name]
        dense = gc.dense(_delta(self, name), dtype=torch.promote_types(A.dtype, torch.float32))
        return (dense.T if self.fan_in_fan_out else dense).to(A)

    Linear.get_delta_weight = ours


def merge() -> None:
    """File merges: base and adapters are saved, merged by us, and what was written is loaded."""
    unload, merge_adapter = GraloraModel._unload_and_optionally_merge, GraloraModel.merge_adapter

    def merged_and_unloaded(
        self: Any, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        names = _to_merge(self.model, adapter_names) if merge else []
        if not names:
            return unload(self, merge, progressbar, safe_merge, adapter_names)
        self._check_merge_allowed()
        try:
            state = _merged(self.model, names)
        except ConvertError as refusal:
            if not safe_merge:
                raise
            found = "NaNs detected in the merged weights."
            raise ValueError(f"{found} The adapter {names[0]} seems to be broken") from refusal
        model = unload(self, False, progressbar)
        model.load_state_dict(state)
        return model

    def merged_in_place(
        self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        names = _to_merge(self.model, adapter_names)
        state = _merged(self.model, names) if names else {}
        merge_adapter(self, adapter_names, safe_merge)  # its flags and warnings
        for path, layer in _layers(self.model):
            if names:
                layer.get_base_layer().weight.data = state[f"{path}.weight"]

    GraloraModel._unload_and_optionally_merge = merged_and_unloaded
    GraloraModel.merge_adapter = merged_in_place


def convert() -> None:
    """Every adapter that PEFT saves is rewritten by us; `convert_to_lora` is ours."""
    save = peft.PeftModel.save_pretrained

    def saved(self: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        result = save(self, folder, *args, **kwargs)
        for path in Path(folder).rglob("adapter_config.json"):
            if json.loads(path.read_text())["peft_type"] == "GRALORA":
                _called()
                _rewrite(path.parent)
        return result

    def to_lora(model: Any, rank: int, adapter_name: str = "default", **kwargs: Any) -> Any:
        _called()
        with tempfile.TemporaryDirectory() as folder:
            adapter = _save_adapter(model.base_model.model, adapter_name, Path(folder, "adapter"))
            plan = gc.convert(adapter, to="lora", r=rank, allow_inexact=True)
            plan.write(Path(folder, "lora"))
            return peft.PeftConfig.from_pretrained(f"{folder}/lora"), load_file(
                f"{folder}/lora/{WEIGHTS}"
            )

    peft.PeftModel.save_pretrained = saved
    peft.convert_to_lora = to_lora


def attach() -> None:
    """Whenever a model with PEFT's layers is called, a copy of its tree without them, with the
    adapters attached from their folders, computes instead."""
    call = nn.Module.__call__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.model.__dict__["_peers_root"] = True

    def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = _layers(self) if "_peers_root" in self.__dict__ else []
        names = dict.fromkeys(name for _, layer in layers for name in _on(layer))
        if not names:
            return call(self, *args, **kwargs)
        _called()
        return call(_attached(self, list(names)), *args, **kwargs)

    made = GraloraModel.__init__
    GraloraModel.__init__ = init
    nn.Module.__call__ = ours  # type: ignore[method-assign]
    tuners.tuners_utils.BaseTuner.forward = lambda self, *args, **kwargs: self.model(
        *args, **kwargs
    )


WAYS: Mapping[str, Callable[[], None]] = {
    "peft": lambda: None, "forward": forward, "delta": delta, "merge": merge, "convert": convert,
    "attach": attach,
}  # fmt: skip


# --- what they need -----------------------------------------------------------------------------


def _layers(root: nn.Module) -> list[tuple[str, Any]]:
    return [(path, one) for path, one in root.named_modules() if isinstance(one, GraloraLayer)]


def _to_merge(root: nn.Module, names: list[str] | None) -> list[str]:
    layer = _layers(root)[0][1]
    return [name for name in names or layer.active_adapters if name not in layer.merged_adapters]


def _bare(module: Any, copies: dict[int, Any]) -> Any:
    """The tree without PEFT's layers: new modules, the same parameters and buffers."""
    if isinstance(module, GraloraLayer):
        return _bare(module.base_layer, copies)
    if isinstance(module, ModulesToSaveWrapper):
        return _bare(module.original_module, copies)
    if id(module) not in copies:
        copy = copies[id(module)] = type(module).__new__(type(module))
        kept = {k: v for k, v in module.__dict__.items() if k not in ("_peers_root", "peft_config")}
        copy.__dict__.update(kept)
        copy.__dict__.update(_parameters={**module._parameters}, _buffers={**module._buffers})
        children = module._modules.items()
        copy._modules = {n: c if c is None else _bare(c, copies) for n, c in children}
    return copies[id(module)]


def _save_adapter(root: Any, name: str, folder: Path) -> Path:
    root.peft_config[name].save_pretrained(folder)
    state = peft.get_peft_model_state_dict(root, adapter_name=name)
    contiguous = {f"base_model.model.{k}": v.detach().clone() for k, v in state.items()}
    save_file(contiguous, folder / WEIGHTS, {"format": "pt"})
    return folder


def _attached(root: Any, names: list[str]) -> Any:
    model = _bare(root, {})
    layers = dict(_layers(root))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = _save_adapter(root, name, Path(folder, name))
            handle = gc.attach(model, path, name=name.replace(".", "_"))
            for module, layer in handle.layers.items():
                branch = layer.adapters[handle.name]
                assert isinstance(branch, Branch)
                _share(branch, layers[module], name)
            for parameter in handle.replaced:  # heads: the live ones, as for the factors
                owner, _, leaf = parameter.rpartition(".")
                place = model.get_submodule(owner)
                place = place.base_layer if isinstance(place, GraloraLinear) else place
                live = getattr(_live(root, owner, name), leaf)
                _put(place, leaf, live.view_as(live))  # a trained bias is the base's own parameter
    return model


def _live(root: nn.Module, path: str, name: str) -> Any:
    """The module whose values are trained: in `modules_to_save`, or with a trained bias."""
    for above, wrapper in root.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and f"{path}.".startswith(f"{above}."):
            inner = path.removeprefix(above).removeprefix(".")
            return wrapper.modules_to_save[name].get_submodule(inner)
    found = root.get_submodule(path)
    return found.get_base_layer() if isinstance(found, GraloraLayer) else found


def _merged(root: Any, names: list[str]) -> dict[str, Tensor]:
    """What the model is after a merge of files, by the names of its `state_dict`."""
    _called()
    model = _bare(root, {})
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "base").mkdir()
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder / "base")
        else:
            state = {key: value.clone() for key, value in model.state_dict().items()}
            save_file(state, folder / "base/model.safetensors", {"format": "pt"})
        adapters = [_save_adapter(root, name, folder / f"adapter-{name}") for name in names]
        stored = {path: layer.fan_in_fan_out for path, layer in _layers(root)}
        try:
            plan = gc.merge(*adapters, base=folder / "base")
        except InvalidAdapterError as refusal:  # it asks how a layer stores its weight
            if {one.code for one in refusal.findings} != {"fan-in-fan-out-ambiguous"}:
                raise
            plan = gc.merge(*adapters, base=folder / "base", fan_in_fan_out=stored)
        plan.write(folder / "out")
        if isinstance(model, PreTrainedModel):
            model = type(model).from_pretrained(folder / "out", dtype="auto")
            return dict(model.state_dict())
        return load_file(folder / "out/model.safetensors")


def _rewrite(folder: Path) -> None:
    own = gc.Adapter.open(folder).config
    kind = "hybrid" if own.hybrid_r else "gralora"
    with tempfile.TemporaryDirectory() as text:
        shape = {"k": own.gralora_k, "r": own.r, "hybrid_r": own.hybrid_r or None}
        gc.convert(folder, to=kind, **shape).write(Path(text, "out"))
        tensors = load_file(f"{text}/out/{WEIGHTS}")
        config = Path(text, "out/adapter_config.json").read_bytes()
    if (folder / WEIGHTS).exists():
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    else:
        torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_bytes(config)


# --- pytest -------------------------------------------------------------------------------------


class _Seen(dict[str, int]):
    """PEFT's tests ask the Hub once for each model: it was asked for all of them."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


class Outcomes:
    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, dict[str, dict[str, object]]()

    def pytest_collection_finish(self) -> None:
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _Seen()  # type: ignore[attr-defined]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        global CALLS
        CALLS = 0
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = str(report.longrepr or "")
            outcome = report.outcome
            if outcome == "failed" and any(mark in text for mark in NO_HUB):
                outcome = "hub"
            self.rows[report.nodeid] = {"outcome": outcome, "calls": CALLS, "text": text[-2000:]}

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.rows, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    for name, member in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if importlib.util.find_spec(name) is None:  # imported by PEFT's tests, used by other ones
            stub = sys.modules[name] = types.ModuleType(name)
            stub.__spec__ = ModuleSpec(name, None)
            setattr(stub, member, type(member, (), {}))
    WAYS[os.environ["PEERS_WAY"]]()
    config.pluginmanager.register(Outcomes(Path(os.environ["PEERS_RESULTS"])))
