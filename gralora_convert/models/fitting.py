"""Where the parts of an adapter go in a live model, and why they may not: nothing is changed here.

Each function that looks yields what is wrong; `Slot` and `Replacement` are what goes where.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from gralora_convert.adapters import (
    PREFIX,
    Adapter,
    GraloraConfig,
    LoraConfig,
    bias_finding,
    extras,
    is_all_linear,
    is_saved,
    saved_findings,
    target_findings,
    unplaced,
)
from gralora_convert.delta import Delta, add_rows_, is_finite
from gralora_convert.disk import read_torch
from gralora_convert.errors import Finding, MisuseError, Report, UnsupportedError, error, nearest
from gralora_convert.models.building import linear_modules
from gralora_convert.models.layer import (
    Branch,
    GraloraLinear,
    bare,
    branch_of,
    is_sharded,
    misfits,
    named_layers,
)

# On a value that an attached adapter brought: the adapter's name.
MARK = "_gralora_convert_adapter"
# After PEFT 0.21.2, tuners/lora: MiCA freezes B, BD-LoRA trains only the blocks, and VeLoRA and
# MonteCLoRA have a forward or backward pass of their own.
_TRAINED_OTHERWISE = {
    "MiCA": ("mica",),
    "BD-LoRA": ("use_bdlora",),
    "VeLoRA": ("velora", "velora_config"),
    "MonteCLoRA": ("monteclora_config",),
}
_MERGED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRAINED_ON = "Is this the model it was trained on?"


@dataclass(frozen=True, slots=True)
class Slot:
    """One adapted module: where it sits in the tree, and the parameters to put there."""

    module: str
    parent: nn.Module
    leaf: str
    branch: Branch

    def install(self, name: str) -> GraloraLinear:
        layer = self.parent._modules[self.leaf]
        assert layer is not None
        adapted = layer if isinstance(layer, GraloraLinear) else GraloraLinear(layer, {})
        adapted.install(name, self.branch)
        if adapted is not layer:
            setattr(self.parent, self.leaf, adapted)
        return adapted


@dataclass(frozen=True, slots=True)
class Replacement:
    """A parameter or buffer whose whole value the adapter brings (biases, modules_to_save)."""

    path: str
    owner: nn.Module
    leaf: str
    original: Tensor
    value: Tensor

    def install(self) -> None:
        setattr(self.owner, self.leaf, self.value)

    def is_undone(self, modules: Collection[nn.Module]) -> bool:
        """Whether the model computes with something else: its own value or another that an adapter
        brought is tied to this place, or the module was replaced by one of another size."""
        now = getattr(self.owner, self.leaf)
        others = now is self.original or (now is not self.value and hasattr(now, MARK))
        return others or self.owner not in modules or now.shape != self.value.shape

    def put(self, value: Tensor) -> None:
        """Gives the model this value in the place of the other one."""
        now = getattr(self.owner, self.leaf)
        moved = (now.device, now.dtype) != (value.device, value.dtype)
        if moved and not value.is_meta and not now.is_meta:
            value.data = value.data.to(now)  # model.to(...) did not reach it
        setattr(self.owner, self.leaf, value)

    def __deepcopy__(self, memo: dict[int, object]) -> "Replacement":
        """A copy of a parameter has no attributes."""
        copy = Replacement(*(deepcopy(getattr(self, field.name), memo) for field in fields(self)))
        if hasattr(self.value, MARK):
            setattr(copy.value, MARK, getattr(self.value, MARK))
        return copy


@dataclass(frozen=True, slots=True)
class Held:
    """Before a model computes: refuses when a value that an adapter brought is gone."""

    model: nn.Module  # what is called may be a replica of it
    changes: Sequence[Replacement]

    def __call__(self, replica: nn.Module, arguments: object) -> None:
        modules = set(self.model.modules())
        for change in self.changes:
            if change.is_undone(modules):
                raise MisuseError(
                    f"{change.path} is not the adapter's any more: the model was tied or resized "
                    "after it was attached (tie_weights, resize_token_embeddings)",
                    hint="Detach the adapter, change the model, and attach it again.",
                )


@dataclass(frozen=True, slots=True)
class Parts:
    """What an adapter, or a plain mapping, brings: deltas by module, whole values by path.

    `adapter` is set where the model must have all that its config selects.
    """

    where: str
    modules: Sequence[str]
    delta: Callable[[str], Delta]
    values: Mapping[str, Tensor]
    dropout: float = 0.0
    adapter: Adapter | None = None


def parts_of(adapter: Adapter | Mapping[str, Delta]) -> Parts:
    if isinstance(adapter, Mapping):
        return Parts("", tuple(adapter), adapter.__getitem__, {}, 0.0)
    values = {path: read_torch(spec) for path, spec in adapter.values.items()}
    own = adapter.config
    rate = own.gralora_dropout if isinstance(own, GraloraConfig) else own.lora_dropout
    return Parts(str(adapter.path), adapter.modules, adapter.delta, values, rate, adapter)


def require_trainable(source: Parts) -> None:
    """Raises `UnsupportedError` for LoRAs of which PEFT trains other parameters than A and B, or
    these by another rule."""
    config = None if source.adapter is None else source.adapter.config
    if not isinstance(config, LoraConfig):
        return
    extra, init = config.extra, config.init_lora_weights
    for name, marks in _TRAINED_OTHERWISE.items():
        if init in marks or any(extra.get(mark) not in (None, False) for mark in marks):
            raise UnsupportedError(
                f"is a {name}, which PEFT trains in another way than the factors of a LoRA",
                where=source.where,
                hint="Attach it without `trainable=True`, train it with PEFT, or convert it to a "
                "plain LoRA first.",
            )


def fitted(
    model: nn.Module,
    source: Parts,
    name: str,
    *,
    dropout: float | None,
    trainable: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Slot], list[Replacement]]:
    """What goes where, for parts that are named as the model is."""
    tree = named_layers(model, every_name=True)
    if (trainable or source.values) and any(map(is_sharded, model.modules())):
        raise MisuseError(
            "the model is sharded already, which shares no new parameters among its processes",
            where=source.where, hint="Attach the adapter first, then shard the model.",
        )  # fmt: skip
    rate = source.dropout if dropout is None else dropout
    slots: list[Slot] = []
    problems: list[Finding] = []
    for module in source.modules:
        delta = source.delta(module)
        if found := list(_target_problems(tree, module, delta, name)):
            problems += found
            continue
        branch = branch_of(tree[module], delta, dropout=rate, trainable=trainable, dtype=dtype)
        parent, _, leaf = module.rpartition(".")
        slot = Slot(module, tree[parent], leaf, branch)
        problems += _same_place(slots, slot)
        slots.append(slot)
    changes, others = _replacements(tree, source, name, trainable)
    lacking = [] if source.adapter is None else _lacking(source.adapter, model, tree)
    Report.of([*problems, *others, *lacking]).require_ok(source.where)
    return slots, changes


def merged(layer: GraloraLinear, slot: Slot) -> Replacement:
    """The layer's weight with the update of one adapter in it, rounded once to its dtype."""
    path, owner = f"{slot.module}.weight", bare(layer)
    weight = owner._parameters.get("weight")
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    if weight is None or not plain or weight.is_meta or weight.dtype not in _MERGED:
        raise UnsupportedError(
            "is quantised, sharded, offloaded or made of other parameters: nothing can be merged "
            "into it", where=path,
            hint="Leave the adapter attached, or merge on disk.",
        )  # fmt: skip
    if hasattr(weight, MARK):
        raise MisuseError(f"is the weight of the adapter {getattr(weight, MARK)!r}", where=path)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    transposed, scale = not isinstance(owner, nn.Linear), slot.branch.scale
    add_rows_(wide, slot.branch.value(), 0, transposed=transposed, weight=scale)
    value = nn.Parameter(wide.to(weight.dtype), requires_grad=False)
    if not is_finite(value.data):
        raise MisuseError(f"is not finite in {weight.dtype} once it is merged", where=path)
    return Replacement(path, owner, "weight", weight, value)


def _target_problems(
    tree: Mapping[str, nn.Module], module: str, delta: Delta, name: str
) -> Iterator[Finding]:
    parent, layer = tree.get(module.rpartition(".")[0]), tree.get(module)
    if not module:
        hint = "Wrap it instead: GraloraLinear(model, ...)."
        yield error("module-not-in-base", "", "the model itself cannot be replaced", hint)
    elif layer is None:
        inside = [name for name in tree if name.endswith(f".{module}")]
        hint = _nearest(tree, module) + _TRAINED_ON
        if inside:
            part = inside[0].removesuffix(f".{module}")
            hint = f"A part of it has: attach to model.get_submodule({part!r})."
        if PREFIX + module in tree:
            hint = "This is a model of PEFT's: attach to model.get_base_model()."
        yield error("module-not-in-base", module, "the model has no such module", hint)
    elif isinstance(parent, nn.MultiheadAttention):
        found = "nn.MultiheadAttention uses the weight of this layer and never calls it"
        hint = "An adapter has no effect there, with PEFT neither; take it out of the adapter."
        yield error("attention-out-proj", module, found, hint)
    else:
        if isinstance(layer, GraloraLinear):
            layer.require_free(name)
        yield from misfits(layer, delta, module)


def _lacking(
    adapter: Adapter, model: nn.Module, tree: Mapping[str, nn.Module]
) -> Iterator[Finding]:
    """What the model says that the adapter must hold, and does not."""
    layers = named_layers(model, every_name=False)
    own = {name: bare(layer) for name, layer in layers.items() if not _is_inside(tree, name)}
    yield from target_findings(
        adapter, linear_modules(model, own, head=not is_all_linear(adapter.config))
    )
    parameters = {
        f"{name}.{leaf}".removeprefix("."): value
        for name, layer in own.items()
        for leaf, value in layer.named_parameters(recurse=False)
    }
    same = {id(parameters[name]) for name in adapter.values if name in parameters}
    written = {name for name, value in parameters.items() if id(value) in same}
    yield from saved_findings(adapter, written, parameters)
    biases = [name for name in parameters if name.endswith(".bias") and name not in written]
    inner = [name for name in biases if name.removesuffix(".bias") in adapter.roles]
    others = biases if adapter.config.bias == "all" and not adapter.biases else []
    if found := bias_finding(adapter, inner, others):
        yield found
    for extra in extras(adapter):
        for name, spec in extra.parameters.items():
            held = parameters.get(name)
            if held is None or held.is_meta or not torch.equal(held, read_torch(spec).to(held)):
                why = "the model has not that value: load the file into it first"
                yield unplaced(extra, name, why)


def _is_inside(tree: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module is a part of an adapted layer, which the adapter's names do not know."""
    words = name.split(".")
    above = (tree[".".join(words[:i])] for i in range(1, len(words)))
    return any(isinstance(layer, GraloraLinear) for layer in above)


def _same_place(slots: Sequence[Slot], slot: Slot) -> Iterator[Finding]:
    for other in slots:
        if other.parent is slot.parent and other.leaf == slot.leaf:
            found = f"is the same layer as {other.module}, and the adapter has a delta for each"
            yield error("shared-module", slot.module, found, "Attach one of the two.")


def _nearest(tree: Mapping[str, nn.Module], module: str) -> str:
    leaf = module.rpartition(".")[2]
    same = [name for name in tree if name.rpartition(".")[2] == leaf]
    close = nearest(module, same or list(tree), least=0.0 if same else 0.6)
    return f"The nearest name in the model is {close[0]}. " if close else ""


def _replacements(
    tree: Mapping[str, nn.Module], source: Parts, name: str, trainable: bool
) -> tuple[list[Replacement], list[Finding]]:
    changes: list[Replacement] = []
    problems: list[Finding] = []
    for path, value in source.values.items():
        prefix, _, leaf = path.rpartition(".")
        owner = bare(tree[prefix]) if prefix in tree else None
        found = list(_value_problems(owner, path, value))
        problems += found
        if owner is None or found:
            continue
        original: Tensor = getattr(owner, leaf)
        new = _value_like(original, value)
        if leaf in owner._parameters:  # while FSDP 1 computes these are plain tensors
            new = nn.Parameter(new, requires_grad=trainable and new.is_floating_point())
        for earlier in changes:  # what was tied stays tied, if the adapter says the same of both
            apart = trainable and _copied_with(source, earlier.path) != _copied_with(source, path)
            same = earlier.original is original and torch.equal(earlier.value, new)
            new = earlier.value if same and not apart else new
        setattr(new, MARK, name)
        changes.append(Replacement(path, owner, leaf, original, new))
    return changes, problems


def _copied_with(source: Parts, path: str) -> str:
    """The module that PEFT copies, and trains by itself, to save this parameter; "" for a bias."""
    adapter = source.adapter
    if adapter is None or path not in adapter.saved:
        return ""
    entry = is_saved(adapter.config, path) or path
    return path[: path.find(f"{entry}.") + len(entry)]


def _value_like(original: Tensor, value: Tensor) -> Tensor:
    device = value.device if original.is_meta else original.device
    return value.to(device, original.dtype, copy=True)


def _value_problems(owner: nn.Module | None, path: str, value: Tensor) -> Iterator[Finding]:
    module, _, leaf = path.rpartition(".")
    shape, rows = tuple(value.shape), value.shape[0] if value.ndim else 1
    if owner is None:
        found = f"the adapter brings {leaf} {shape}, and the model has no such module"
        hint = (
            "If it is a trained head, load the base with it, for instance "
            f"AutoModelForSequenceClassification.from_pretrained(..., num_labels={rows})."
        )
        yield error("module-not-in-base", module, found, hint)
        return
    current = _current(owner, leaf)
    if current is None:
        code = "bias-unexpected" if leaf == "bias" else "module-not-in-base"
        found = f"the adapter brings {leaf} {shape}, and this {type(owner).__name__} has none"
        yield error(code, module, found, _TRAINED_ON)
    elif tuple(current.shape) != shape:
        found = f"has shape {shape} in the adapter and {tuple(current.shape)} in the model"
        yield error("modules-to-save-shape", path, found, _resize(owner, current, value))
    elif hasattr(current, MARK):
        found = f"the attached adapter {getattr(current, MARK)!r} replaces it already"
        yield error("already-replaced", path, found, "Detach that adapter first.")


def _current(owner: nn.Module, leaf: str) -> Tensor | None:
    found = owner._parameters.get(leaf)
    return owner._buffers.get(leaf) if found is None else found


def _resize(owner: nn.Module, current: Tensor, value: Tensor) -> str:
    if value.ndim == 0 or current.shape[1:] != value.shape[1:]:
        return _TRAINED_ON
    rows = value.shape[0]
    if isinstance(owner, nn.Embedding):
        return f"Call model.resize_token_embeddings({rows}) first."
    return (
        f"Load the model with num_labels={rows}, or, if this is the vocabulary, call "
        f"model.resize_token_embeddings({rows}) first."
    )
