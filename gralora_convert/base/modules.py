"""Where one adapted module goes in a base, or why it cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from gralora_convert.adapters import Adapter
from gralora_convert.base.architecture import Architecture
from gralora_convert.base.likeness import is_relevelled, near_misses, starts
from gralora_convert.base.quantisation import ADVICE, RESAVED, by_config, companion, quantised_by
from gralora_convert.base.recipe import Target
from gralora_convert.base.replacements import stored_shape
from gralora_convert.base.scales import Scales, scales_of
from gralora_convert.disk import FLOATING, Checkpoint, Rows, TensorSpec, is_zero
from gralora_convert.errors import Finding, error

_REMOVED = "Remove its tensors, and its name from target_modules, to merge the rest."
_NORMED = (".weight_g", ".weight_v", ".weight_orig")


@dataclass(frozen=True)
class Pair:
    """An adapter beside its base. `frozen` are the adapter's copies of the base's tensors that take
    their place, `renamed` how the base calls its saved modules that it seems to call otherwise."""

    adapter: Adapter
    architecture: Architecture
    frozen: Mapping[str, TensorSpec]
    renamed: Mapping[str, str]

    @property
    def base(self) -> Checkpoint:
        return self.architecture.base

    @cached_property
    def method(self) -> str | None:
        """The quantisation of the base, None for plain numbers."""
        return quantised_by(self.base)

    @cached_property
    def renaming(self) -> Mapping[str, str]:
        """Leading parts of modules that the base lacks -> those under which it has them all, in the
        right shapes, where these have levels more or less; {} when that is not the only way."""
        weights = {name: self.base.tensors[f"{name}.weight"].shape
                   for name in self.architecture.disk_modules()}  # fmt: skip
        taken = {rows.tensor.removesuffix(".weight") for module in self.adapter.modules
                 for rows in self.architecture.locate(f"{module}.weight")}  # fmt: skip
        found: dict[str, str] = {}
        for module in self.adapter.modules:
            if self.architecture.locate(f"{module}.weight"):
                continue
            shape = self.adapter.shape(module)
            fitting = (n for n, s in weights.items() if s in (shape, shape[::-1]))
            pairs = [starts(module, name) for name in fitting if name not in taken]
            pairs = sorted((pair for pair in pairs if is_relevelled(*pair)), key=_first_length)
            if not pairs or (len(pairs) > 1 and _first_length(pairs[0]) == _first_length(pairs[1])):
                return {}
            start, to = pairs[0]
            if found.setdefault(start, to) != to:
                return {}
        every = {**self.architecture.reading.key_map, **self.renamed, **found}
        return dict(sorted(every.items(), reverse=True))  # the longer of two before the shorter

    @cached_property
    def scales(self) -> Scales:
        return scales_of(self.base)


def target_of(pair: Pair, module: str) -> Target | Finding:
    """Where the module goes, or what is wrong with it there."""
    parameter, shape = f"{module}.weight", pair.adapter.shape(module)
    origins, output = _find(pair, parameter, shape)
    if not origins:
        return _absent(pair, module)
    frozen = _frozen(pair, parameter)
    found = stored_shape(origins, pair.base.tensors) if frozen is None else frozen.shape
    problem = _kind_problem(pair, module, origins, found) or _misfit(pair, module, found, shape)
    if problem is not None:
        return problem
    known = pair.architecture.is_transposed(module, found, shape)
    transposed = _agreed(pair, module, known, _stored(pair, origins[0].tensor))
    if isinstance(transposed, Finding):
        return transposed
    if frozen is not None:  # it may have another number of tokens
        origins = (Rows(origins[0].tensor, 0, found[0]),)
    parts = tuple(
        (replace(rows, tensor=output or rows.tensor), _stored(pair, rows.tensor))
        for rows in origins
    )
    return Target(module, parts, transposed, output is not None, frozen)


def _stored(pair: Pair, tensor: str) -> TensorSpec:
    return pair.scales.specs.get(tensor) or pair.base.tensors[tensor]


def _find(
    pair: Pair, parameter: str, shape: tuple[int, int]
) -> tuple[tuple[Rows, ...], str | None]:
    """Where a weight lies on disk, and the name of its own tensor in the output when it has
    none there, but shares another's."""
    architecture = pair.architecture
    origins = architecture.locate(parameter)
    if origins:
        return origins, None
    for other in architecture.sharing(parameter):
        origins = architecture.locate(other)
        if origins:
            same = architecture.is_one_place(parameter, other)
            return origins, None if same else architecture.disk_name(parameter)
    tied = architecture.tied_source(parameter.removesuffix(".weight"), shape)
    if tied is None:
        return (), None
    whole = Rows(tied, 0, pair.base.tensors[tied].shape[0])
    return (whole,), architecture.disk_name(parameter)


def _frozen(pair: Pair, parameter: str) -> TensorSpec | None:
    """The adapter's copy of a base weight that takes the base's place."""
    held = pair.frozen
    return next((held[n] for n in pair.architecture.sharing(parameter) if n in held), None)


def _absent(pair: Pair, module: str) -> Finding:
    architecture = pair.architecture
    if architecture.is_embedding(module):
        return _unsupported(module, "an embedding")
    stacked = f"{architecture.mapped(module)}"
    if stacked in pair.base.tensors:
        return _unsupported(module, "a parameter (a stack of experts)")
    if pair.method is not None:
        return error(
            "base-quantised", module,
            f"is no plain weight in the base, which is quantised ({pair.method})", ADVICE,
        )  # fmt: skip
    names = architecture.disk_modules()
    if computed := next((name for name in pair.base.tensors if _is_computed(name, module)), ""):
        return error(
            "module-kind-unsupported", module,
            f"has no weight of its own: torch computes it ({computed}), as weight_norm and "
            "spectral_norm do, and a merge there is lost when it is computed again",
            "Take it off the base with torch.nn.utils.parametrize.remove_parametrizations, "
            "and save that.",
        )  # fmt: skip
    if pair.renaming:
        advice = f"Another base? If only its names are others: `key_map={pair.renaming}`."
    else:
        advice = f"{near_misses(module, names)} Another base, or `key_map=FROM=TO`?".strip()
    return error("module-not-in-base", module, f"is not in the base {pair.base.source}", advice)


def _first_length(pair: tuple[str, str]) -> int:
    return len(pair[0])


def _kind_problem(
    pair: Pair, module: str, origins: Sequence[Rows], shape: tuple[int, ...]
) -> Finding | None:
    if pair.architecture.is_attention_output(module, origins[0].tensor.removesuffix(".weight")):
        return error(
            "attention-out-proj", module,
            "is the out_proj of nn.MultiheadAttention, whose forward ignores the adapter",
            f"The trained function is the base's here. {_REMOVED}",
        )  # fmt: skip
    if pair.architecture.is_uncalled(module) and _has_effect(pair, module):
        return error(
            "forward-ignores-adapter", module,
            "is a layer that the model never calls by this name (it reads the weight, or calls "
            "what a plain list holds): the adapter there has no effect, and its factors are "
            "not zero",
            f"The trained function is the base's here. {_REMOVED}",
        )  # fmt: skip
    if pair.architecture.is_embedding(module):
        kind = pair.architecture.kind(module)
        if kind not in ("Linear", "Conv1D"):
            return _unsupported(module, f"of kind {kind}" if kind else "an embedding")
    if len(shape) != 2:
        kinds = {3: "a stack of experts or a convolution", 4: "a convolution"}
        return _unsupported(module, kinds.get(len(shape), f"of shape {shape}"))
    return _quantised(pair, module, origins[0].tensor)


def _quantised(pair: Pair, module: str, tensor: str) -> Finding | None:
    """Only a weight that is added to must be readable; the others are copied as they are."""
    spec = _stored(pair, tensor)
    if spec.scale is not None:
        return None
    if why := pair.scales.problems.get(tensor):
        return error("base-quantised", module, why, ADVICE)
    if spec.dtype not in FLOATING:
        method = f" ({pair.method})" if pair.method else ""
        lost = pair.method is not None and by_config(pair.base) is None
        return error(
            "base-quantised", module,
            f"has dtype {spec.dtype}{method}, a 16- or 32-bit one was needed"
            + (", and no quantization_config says how it is read" if lost else ""),
            f"{RESAVED} {ADVICE}" if lost and pair.base.config else ADVICE,
        )  # fmt: skip
    half = pair.method and companion(pair.base, tensor.removesuffix(".weight"))
    if half:
        return error(
            "base-quantised", module,
            f"is {spec.dtype}, yet {half} stands beside it: half of a quantised weight",
            RESAVED,
        )  # fmt: skip
    return None


def _has_effect(pair: Pair, module: str) -> bool:
    """Whether the delta is not all zero, as training leaves it where it gets no gradient."""
    roles = pair.adapter.roles[module]
    return not all(is_zero(spec) for role, spec in roles.items() if role.endswith("B"))


def _unsupported(module: str, what: str) -> Finding:
    return error(
        "module-kind-unsupported", module,
        f"is {what}; GraLoRA adapts nn.Linear and Conv1D only",
        _REMOVED,
    )  # fmt: skip


def _misfit(
    pair: Pair, module: str, found: tuple[int, ...], shape: tuple[int, int]
) -> Finding | None:
    if found == shape or (found == shape[::-1] and pair.architecture.may_hold_conv1d):
        return None
    k = pair.adapter.blocks
    if any(size % k for size in found):
        return error(
            "k-not-dividing", module, f"has shape {found} in the base, which gralora_k={k} "
            "does not divide", "Another base?",
        )  # fmt: skip
    return error(
        "base-shape-mismatch", module,
        f"is {shape} (out, in) in the adapter, {found} in the base", "Another base?",
    )  # fmt: skip


def _agreed(pair: Pair, module: str, known: bool | None, spec: TensorSpec) -> bool | Finding:
    """Whether the weight is stored (in, out): as it is `known` by its shape or its model, else as
    the user says. Another module's layout says nothing of this one."""
    said = pair.architecture.reading.is_transposed(module)
    if known is not None and said not in (None, known):
        return error(
            "fan-in-fan-out-contradicted", module,
            f"is stored {_layout(known)}, and said to be stored {_layout(not known)}",
            "Narrow the pattern.",
        )  # fmt: skip
    decided = said if known is None else known
    if decided is None:
        code = "trust_remote_code=True" if pair.base.config.get("auto_map") else ""
        return error(
            "fan-in-fan-out-ambiguous", module,
            f"is square {spec.shape}, and whether it is stored (out, in) or (in, out) "
            "cannot be told without the architecture",
            "Put the model's config.json beside its weights"
            f"{f', or pass `{code}`' if code else ''}, or say it: "
            f"`fan_in_fan_out={ {module: False} }` for nn.Linear, "
            f"`fan_in_fan_out={ {module: True} }` for Conv1D; * stands for any part of a name.",
        )  # fmt: skip
    if decided and spec.scale is not None:
        return error(
            "base-quantised", module, "is a Conv1D of fp8 codes, which is not read here", ADVICE
        )
    return decided


def _layout(transposed: bool) -> str:
    return "(in, out)" if transposed else "(out, in)"


def _is_computed(tensor: str, module: str) -> bool:
    """Whether a tensor is what torch computes the weight of `module` from (torch 2.13,
    nn/utils/parametrize.py and weight_norm.py)."""
    start, found, _ = tensor.partition(".parametrizations.weight.")
    if not found:
        start = next((tensor.removesuffix(e) for e in _NORMED if tensor.endswith(e)), "")
    return start == module or (start != "" and start.endswith(f".{module}"))
