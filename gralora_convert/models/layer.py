"""The full GraLoRA forward path of one live layer, with gradients.

    y = W x + scaling * (GraLoRA(dropout(x)) + general_B general_A dropout(x)),  for every adapter

The order of the operations, the casts and the random draws are those of PEFT 0.21.2
(`tuners/gralora/layer.py`, `forward`), so that a seeded run can be compared with one of PEFT's.
Nothing of size out x in is ever allocated.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gralora_convert.delta import Delta, Dense, Gralora, Lora, gralora_product, tensors_of
from gralora_convert.errors import Finding, MisuseError, Report, UnsupportedError, error, is_number


class Branch(nn.Module):
    """One adapter of one module: its factors as parameters, its dropout and its scaling."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self, delta: Gralora | Lora, dropout: float, made: Callable[[Tensor], nn.Parameter]
    ) -> None:
        super().__init__()
        if not is_number(dropout) or not 0 <= dropout <= 1:
            raise MisuseError(f"the dropout {dropout!r} is not a number from 0 to 1")
        # As PEFT does: without dropout no random number is drawn, in training mode either.
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.rate = dropout
        self.is_on = True
        self.scaling, self.scale = delta.scaling, 1.0  # the other one in use only
        self._kind = type(delta)
        for role, factor in tensors_of(delta).items():
            self.register_parameter(role, made(factor))
        # of the whole factors, whatever FSDP keeps of them here
        self.shapes = {role: factor.shape for role, factor in self.named_parameters()}

    def value(self) -> Gralora | Lora:
        factors = {role: whole(getattr(self, role), shape) for role, shape in self.shapes.items()}
        return self._kind(**factors, scaling=self.scaling)

    def extra_repr(self) -> str:
        shapes = {name: tuple(factor.shape) for name, factor in self.named_parameters()}
        return ", ".join(f"{name}={shape}" for name, shape in shapes.items()) + (
            f", scaling={self.scaling:g}"
        )


class _GraloraBranch(Branch):
    general_A: nn.Parameter
    general_B: nn.Parameter

    def forward(self, x: Tensor, result: Tensor) -> Tensor:
        """`result` + this adapter's part; each term is rounded to the dtype of `result`."""
        # Each part casts and drops on its own, as in PEFT: the same draws, the same gradients.
        blocks = gralora_product(self.dropout(x.to(self.A)), self.A, self.B)
        scaling = self.scaling * self.scale
        result = result + scaling * blocks.to(result)
        if "general_A" not in self.shapes:
            return result
        hidden = F.linear(self.dropout(x.to(self.A)), self.general_A)
        general = F.linear(hidden, self.general_B)
        return result + scaling * general.to(result)


class _LoraBranch(Branch):
    def forward(self, x: Tensor, result: Tensor) -> Tensor:
        """`result` + this adapter's part, in the wider of the two dtypes (PEFT's LoRA forward)."""
        product = F.linear(F.linear(self.dropout(x.to(self.A)), self.A), self.B)
        return result + product.to(result.device) * (self.scaling * self.scale)


def whole(value: Tensor, shape: torch.Size) -> Tensor:
    """A copy of a value of this shape; one that FSDP 2 shards is gathered, which every rank has to
    ask for.
    """
    found = value.detach()
    gather = getattr(found, "full_tensor", None)
    if gather is not None:
        found = gather()
    freed = found.numel() > 0 and found.untyped_storage().nbytes() == 0
    if found.shape != shape or freed:
        raise MisuseError(
            "FSDP 1 keeps the adapter's values in pieces",
            hint="Ask within `with FullyShardedDataParallel.summon_full_params(model):`, on every "
            "rank.",
        )
    return found.clone()


class GraloraLinear(nn.Module):
    """A live linear layer with GraLoRA, Hybrid GraLoRA or LoRA adapters; their parts are summed.

        x (..., in)  ->  (..., out); in the dtype of x, as PEFT's GraLoRA layer returns it

    `base_layer` is an `nn.Linear` (or a subclass: quantised ones too, only its forward is used) or
    a `Conv1D` of transformers. It is wrapped, not copied, and never changed: taking `base_layer`
    out again is all that it takes to detach.

    * Factors are copied, to the device of the base weight. `dtype` None means PEFT's default:
      float64 beside a float64 base, else float32 (also on a bfloat16 or float16 base).
      `torch.bfloat16` and the like is PEFT's `autocast_adapter_dtype=False`.
    * In training mode `dropout` is drawn for the blocks and once more for the Hybrid part.
    * `trainable` says whether the factors require gradients; the base layer keeps its own flags.
    * `state_dict()` keeps the names of the base layer (`weight`, `bias`) and adds the factors under
      `adapters.<name>.<role>`; `load_state_dict` reads the same. Under FSDP 1 the base layer's are
      `base_layer.weight`, which `load_state_dict` reads, too. `named_parameters()` tells the
      truth about where the base layer is (`base_layer.weight`).

    Raises:
        InvalidAdapterError: not such a layer, or the shapes do not agree.
        MisuseError: an adapter of this name is there, or the name cannot be one.
        UnsupportedError: a dense delta.

    >>> delta = Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), scaling=0.5)
    >>> layer = GraloraLinear(nn.Linear(4, 6), {"default": delta})
    >>> layer(torch.zeros(3, 1, 2, 4)).shape
    torch.Size([3, 1, 2, 6])
    >>> list(layer.state_dict())
    ['weight', 'bias', 'adapters.default.A', 'adapters.default.B']

    After PEFT 0.21.2, tuners/gralora/layer.py, and tuners/lora/layer.py for plain LoRA.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapters: Mapping[str, Delta],
        *,
        dropout: float = 0.0,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.training = base_layer.training
        # Fused kernels read `weight` and skip this forward (nn.TransformerEncoderLayer in eval
        # mode); they stand back from a layer that has a hook.
        self.register_forward_pre_hook(_no_fused_kernel)
        self.register_state_dict_post_hook(_save_base_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_base_names)  # type: ignore[no-untyped-call]
        for name, delta in adapters.items():
            self.add(name, delta, dropout=dropout, trainable=trainable, dtype=dtype)

    def add(
        self,
        name: str,
        delta: Delta,
        *,
        dropout: float = 0.0,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Adds one adapter; arguments and errors are those of the class."""
        self.require_free(name)
        Report.of(misfits(self, delta)).require_ok("")
        branch = branch_of(self, delta, dropout=dropout, trainable=trainable, dtype=dtype)
        self.install(name, branch)

    def install(self, name: str, branch: Branch) -> None:
        """Adds what `branch_of` made for this layer."""
        self.adapters[name] = branch.train(self.training)

    def require_free(self, name: str) -> None:
        """Raises `MisuseError` when `name` is not a name, or taken."""
        require_name(name)
        if name in self.adapters:
            raise MisuseError(
                f"an adapter named {name!r} is attached already",
                hint="Detach it, or give this one another name.",
            )

    def remove(self, name: str) -> None:
        """Takes the adapter `name` off."""
        del self.adapters[name]

    def delta(self, name: str) -> Gralora | Lora:
        """The delta weight of the adapter `name` as it is now (after training), a copy."""
        branch = self.adapters[name]
        assert isinstance(branch, Branch)
        return branch.value()

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if x.is_nested:
            raise UnsupportedError(
                "a nested tensor as input of an adapted layer",
                hint="Build nn.TransformerEncoder with enable_nested_tensor=False.",
            )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        branches = [branch for branch in self.adapters.values() if branch.is_on]
        blocks = any(isinstance(branch, _GraloraBranch) for branch in branches)
        dtype = x.dtype if blocks else result.dtype
        for branch in branches:
            result = branch(x, result)
        return result.to(dtype)

    # Models look at these of their linear layers (T5 at wo.weight.dtype, tie_weights at lm_head).

    @property
    def weight(self) -> Tensor:
        return _tensor(bare(self), "weight")

    @property
    def bias(self) -> Tensor | None:
        layer = bare(self)
        return None if layer.bias is None else _tensor(layer, "bias")

    @property
    def in_features(self) -> int:
        return _features(bare(self))[0]

    @property
    def out_features(self) -> int:
        return _features(bare(self))[1]

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name in ("weight", "bias"):
            setattr(bare(self), name, value)
        elif name in ("in_features", "out_features"):  # tie_weights says the size that it has
            if value != getattr(self, name):
                raise MisuseError(
                    f"an adapted layer keeps its {name}: {getattr(self, name)}, not {value}",
                    hint="Detach the adapter, change the model, and attach it again.",
                )
        else:
            super().__setattr__(name, value)


def _tensor(owner: nn.Module, leaf: str) -> Tensor:
    value = getattr(owner, leaf)
    assert isinstance(value, Tensor)
    return value


def _no_fused_kernel(module: nn.Module, args: object) -> None:
    """Does nothing, by being there."""


_BASE = "base_layer."


def _save_base_names(
    module: nn.Module, state: dict[str, object], prefix: str, metadata: object
) -> None:
    managed = getattr(module, "_is_fsdp_managed_module", False)
    if managed and not any(hasattr(value, "full_tensor") for value in module.parameters()):
        return  # FSDP 1 looks for the names of `named_parameters`
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + key.removeprefix(prefix).removeprefix(_BASE)] = state.pop(key)


def _load_base_names(
    module: nn.Module, state: dict[str, object], prefix: str, *rest: object
) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        leaf = key.removeprefix(prefix)
        if not leaf.startswith(("adapters.", _BASE)):
            state[prefix + _BASE + leaf] = state.pop(key)


def branch_of(
    layer: nn.Module,
    delta: Delta,
    *,
    dropout: float = 0.0,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> Branch:
    """The parameters of one adapter, for the layer that they fit; arguments as `GraloraLinear`."""
    weight = _tensor(bare(layer), "weight")
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise MisuseError(f"{dtype} is no dtype to compute factors in", hint="Use torch.float32.")
    default = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # A base on the meta device has its values elsewhere (offloading); ours stay where they are.
    device = None if weight.device.type == "meta" else weight.device

    def made(factor: Tensor) -> nn.Parameter:
        """A parameter of its own beside the base layer, which never shares its storage."""
        values = factor.detach().to(device or factor.device, dtype or default, copy=True)
        return nn.Parameter(values.contiguous(), requires_grad=trainable)

    match delta:
        case Gralora():
            return _GraloraBranch(delta, dropout, made)
        case Lora():
            return _LoraBranch(delta, dropout, made)
        case Dense():
            raise UnsupportedError(
                "a dense delta cannot be attached, only factors",
                hint="Add it to the weight, or extract a GraLoRA or LoRA from it first.",
            )
        case _:
            assert_never(delta)


def require_name(name: str) -> None:
    """Raises `MisuseError` when `name` cannot be the name of an adapter."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise MisuseError(f"{name!r} cannot be the name of an adapter", hint="Choose another name.")


def misfits(layer: nn.Module, delta: Delta, where: str = "") -> Iterator[Finding]:
    """Why `delta` cannot be put on `layer`, if so; `where` is the name of the module."""
    layer, hint = bare(layer), "Is this the model it was trained on?"
    if not is_linear(layer):
        message = f"is of type {type(layer).__name__}; only nn.Linear and Conv1D can be adapted"
        yield error("target-unsupported", where, message, hint)
        return
    if not isinstance(delta, Gralora | Lora | Dense):
        raise TypeError(f"a delta is a Gralora or a Lora, not a {type(delta).__name__}")
    (n_in, n_out), a_in, a_out = _features(layer), delta.in_features, delta.out_features
    if (n_in, n_out) != (a_in, a_out):
        message = f"the adapter maps {a_in} to {a_out} features, the layer {n_in} to {n_out}"
        yield error("base-shape-mismatch", where, message, hint)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that `torch.compile`, DataParallel or DistributedDataParallel wraps."""
    inner = model._modules.get("_orig_mod")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is None else unwrapped(inner)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP 1 or 2 holds the parameters of a module (found without importing it)."""
    names = {cls.__name__ for cls in type(module).__mro__}
    return not names.isdisjoint(("FSDPModule", "FullyShardedDataParallel"))


def named_layers(model: nn.Module, *, every_name: bool) -> dict[str, nn.Module]:
    """The modules by name, as if none were compiled; with `every_name` a shared one by each."""
    return {
        name.replace("_orig_mod.", ""): unwrapped(layer)
        for name, layer in model.named_modules(remove_duplicate=not every_name)
        if name.rpartition(".")[2] != "_orig_mod"
    }


def bare(layer: nn.Module) -> nn.Module:
    """The layer below the adapters."""
    return unwrapped(layer.base_layer if isinstance(layer, GraloraLinear) else layer)


def is_linear(layer: nn.Module) -> bool:
    """Whether this is an nn.Linear, or a Conv1D of transformers (found without importing it)."""
    return isinstance(layer, nn.Linear) or any(
        cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
        for cls in type(layer).__mro__
    )


def _features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    n_in, n_out = _tensor(layer, "weight").shape  # Conv1D keeps (in, out)
    return n_in, n_out
