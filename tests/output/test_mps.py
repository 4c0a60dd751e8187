"""`device="mps"` on an imitation: tensors that say they are there, without float64, on this CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from gralora_convert.adapters import Adapter
from gralora_convert.adapters.update import Update
from gralora_convert.delta import Gralora, device_for, require_device
from gralora_convert.disk import Checkpoint, Rows
from gralora_convert.errors import MisuseError
from gralora_convert.output.tiles import MergedTensor
from gralora_convert.verbs import convert, extract
from tests.builders import SHAPES, random_delta, write_adapter, write_base

MPS = torch.device("mps")
MODULE = "layers.0.up"


class There(torch.Tensor):
    """A tensor of the imitated device; `here` holds its values."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=MPS,
        )  # fmt: skip
        if here.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64. Please use float32 instead")
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return carried_out(func, args, kwargs or {})


def carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: on the imitated device where its tensors are, or where it was asked for."""
    values = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, torch.Tensor)]
    there = [value for value in values if isinstance(value, There)]
    moves = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    if there and not moves and any(v.dim() for v in values if not isinstance(v, There)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    asked = kwargs.get("device")
    is_there = isinstance(args[0], There) if moves else bool(there)
    is_there = is_there if asked is None else torch.device(asked).type == "mps"
    made = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    for one in there:
        if made is one.here:
            return one
    if not is_there:
        return made
    return tree_map(lambda value: There(value) if isinstance(value, torch.Tensor) else value, made)


def _here(value: object) -> object:
    if isinstance(value, There):
        return value.here
    return torch.device("cpu") if value == MPS else value


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """What looks for the real device before it asks for the operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) > 1 and args[1] in ("mps", MPS):
            dtype = args[2] if len(args) > 2 else args[0].dtype
            return torch.ops.aten._to_copy.default(args[0], dtype=dtype, device=MPS)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], There):
            return There(args[0].here[args[1]])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mps() -> Any:
    with _Moves(), _Operations():  # type: ignore[no-untyped-call]
        yield


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_there_writes_what_the_cpu_writes(
    dtype: torch.dtype, transposed: bool, factors: torch.dtype, tmp_path: Path, mps: None
) -> None:
    shape = SHAPES[MODULE]
    write_base(tmp_path / "base", {MODULE: shape[::-1] if transposed else shape}, dtype)
    deltas = {MODULE: astype(random_delta(*shape, hybrid_r=2), factors)}
    adapter = Adapter.open(write_adapter(tmp_path / "adapter", deltas))
    spec = Checkpoint.open(tmp_path / "base").tensors[f"{MODULE}.weight"]
    update = Update(adapter, MODULE, Rows(spec.name, 0, spec.shape[0]), transposed, 0.5)
    made = {}
    for device in ("cpu", "mps"):
        tensor = MergedTensor(spec, spec.dtype, [update], device=device)
        made[device] = b"".join(bytes(tensor.produce(tile)) for tile in range(tensor.count))
        assert tensor.worst <= 1
        assert tensor.changed
    assert made["cpu"] == made["mps"]
    narrow = dtype == torch.bfloat16 and factors == torch.float32
    assert tensor.device.type == ("mps" if narrow else "cpu")


def astype(delta: Gralora, dtype: torch.dtype) -> Gralora:
    assert delta.general_A is not None
    assert delta.general_B is not None
    a, b, general_a, general_b = (
        factor.to(dtype) for factor in (delta.A, delta.B, delta.general_A, delta.general_B)
    )
    return replace(delta, A=a, B=b, general_A=general_a, general_B=general_b)


def test_what_needs_float64_is_refused_or_done_on_the_cpu(tmp_path: Path, mps: None) -> None:
    assert require_device("mps") == MPS == device_for("mps", torch.float32)
    assert device_for("mps", torch.float64) == torch.device("cpu")
    write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {MODULE: random_delta(*SHAPES[MODULE])})
    with pytest.raises(MisuseError, match=r"^.*'mps'.*float64.*$"):
        convert(adapter, to="lora", device="mps")
    with pytest.raises(MisuseError, match=r"^.*'mps'.*float64.*$"):
        extract(base=tmp_path / "base", tuned=tmp_path / "base", to="lora", device="mps")


def test_torch_without_it_refuses(tmp_path: Path) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this one has it")
    with pytest.raises(MisuseError, match="'mps'"):
        require_device("mps")
