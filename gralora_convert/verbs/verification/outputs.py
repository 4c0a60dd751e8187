"""Two whole models side by side: base + attached adapter, and the merged checkpoint, as
transformers loads them, on the same inputs.

What difference is right is not guessed. The base gets the weights that a right merge has, rounded
to the stored dtype: its outputs are what the merged model must give. How near it must come is
measured, too: where a sum lies so near the middle of two stored numbers that right merges may
differ, the other one is taken at random, and the outputs' response is the yardstick.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gralora_convert.adapters import Adapter, values_beside
from gralora_convert.base import (
    Recipe,
    different_settings,
    plain_tensors,
    scales_of,
    spellings,
    written_settings,
)
from gralora_convert.delta import Delta, admissible, magnitude_rows, rows, terms
from gralora_convert.disk import Checkpoint, TensorSpec, read_torch, torch_dtype
from gralora_convert.errors import ConvertError, printable
from gralora_convert.models import (
    Attachment,
    CannotRunError,
    GraloraLinear,
    Inputs,
    Loaded,
    Parts,
    first_that_runs,
    has_absurd_counts,
    holder_of,
    load,
    memory_needed,
    outputs_of,
    put_on,
    quiet,
    stored_dtype,
    tokenised,
)
from gralora_convert.system import available_memory
from gralora_convert.verbs.verification.agreement import ModelComparison, NotRun, incomparable

_Change = tuple[Adapter, float, str]
CHUNK_ELEMENTS = 1 << 20  # of a weight that are looked at together


def compare_models(
    recipe: Recipe,
    merged: Checkpoint,
    *,
    slack: float = 1.0,
    device: str = "cpu",
    text: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[ModelComparison | NotRun, tuple[str, ...]]:
    """The comparison, or why there is none; and notes.

    One model is in memory at a time; in float64 where it fits and the model computes in it, else
    in float32.
    """
    if not merged.path.is_dir() or not merged.config:
        known = recipe.base.config.keys() | merged.config.keys()
        why = "the merged checkpoint has no config.json, or an empty one"
        return NotRun(why, is_blind=bool(known)), ()
    base = recipe.base
    types = base.model_type, merged.model_type
    if None not in types and types[0] != types[1]:
        failure = f"its config.json has model_type {types[1]!r}, that of the base {types[0]!r}"
        return incomparable(failure, written_settings(base, merged), (), slack, torch.float32), ()
    if has_absurd_counts(base):
        return NotRun("the base's config.json counts more layers than it has"), ()
    if has_absurd_counts(merged):
        failure = "its config.json counts more layers than it has"
        return incomparable(failure, written_settings(base, merged), (), slack, torch.float32), ()
    free, needed = available_memory(), memory_needed(merged, torch.float32)
    if needed > free:
        why = (
            f"it needs {needed / 1e9:.1f} GB of memory in float32, {free / 1e9:.1f} GB are "
            "available; weights and modules were compared"
        )
        return NotRun(why, is_blind=False), ()
    wide = device == "cpu" and memory_needed(merged, torch.float64) <= free
    vocabulary, tensors = _vocabulary(recipe.edits), plain_tensors(merged)
    reasons: list[str] = []
    # A class of the merged config that has no place for the adapter is no reason not to look.
    for name in _classes(recipe, merged):
        for dtype in (torch.float64, torch.float32) if wide else (torch.float32,):
            runner = _Runner(
                recipe, merged, device, dtype, trust_remote_code, name, vocabulary, tensors
            )
            try:
                with quiet():
                    found = runner.compared(text, slack)
            except CannotRunError as failed:
                reasons.append(str(failed))
                if failed.is_for_memory and dtype == torch.float32:  # no class needs less
                    return NotRun(str(failed), is_blind=False), ()
            else:
                return found, _class_notes(merged, base, name)
    return NotRun(reasons[0]), ()


def _vocabulary(edits: Mapping[str, object]) -> int | None:
    """The rows of embeddings that the adapter brings, where the base has another number."""
    inner = (_vocabulary(value) for value in edits.values() if isinstance(value, Mapping))
    found = edits.get("vocab_size") or next((rows for rows in inner if rows), None)
    return found if isinstance(found, int) else None


def _class_of(checkpoint: Checkpoint) -> str:
    return checkpoint.architectures[0] if checkpoint.architectures else "AutoModel"


def _classes(recipe: Recipe, merged: Checkpoint) -> Iterator[str]:
    """The classes to run both models as: those that the configs name, then those that have the
    adapters' modules."""
    named = list(dict.fromkeys(map(_class_of, (merged, recipe.base))))
    yield from named
    models = (names.blueprint for names in recipe.architectures)
    fitting = dict.fromkeys(type(found.model).__name__ for found in models if found is not None)
    yield from (name for name in fitting if name not in named)


def _class_notes(merged: Checkpoint, base: Checkpoint, name: str) -> tuple[str, ...]:
    if name == _class_of(merged):
        return ()
    own = printable(_class_of(merged)) if merged.architectures else "no class"
    return (
        f"config.json: architectures names {own}; for the adapter both ran as the base's "
        f"{printable(name)}",
    )


@dataclass(frozen=True, slots=True)
class _Reference:
    """Outputs on `inputs`: of the bare base, of base + adapter, of the nearest right merge, and of
    others, drawn at random."""

    inputs: Inputs
    base: Tensor
    adapter: Tensor
    right: Tensor
    others: tuple[Tensor, ...]
    config: Mapping[str, object]
    undecided: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Runner:
    """Loads and runs the two models in `dtype`, one after the other.

    Its methods raise `CannotRunError` where one of them cannot be run.
    """

    recipe: Recipe
    merged: Checkpoint
    device: str
    dtype: torch.dtype
    trust_remote_code: bool
    class_name: str
    vocabulary: int | None
    tensors: Mapping[str, TensorSpec]  # of the merged model, without quantisation

    @property
    def base(self) -> Checkpoint:
        return self.recipe.base

    def compared(self, text: str | None, slack: float) -> ModelComparison:
        given = None if text is None else tokenised(self.merged, text, self.trust_remote_code)
        first = self._reference(given)
        inputs, failure = tuple(first.inputs), ""
        try:
            loaded = self._load(self.merged)
            settings = different_settings(first.config, loaded.model.config.to_dict())
            failure = loaded.undecided(first.undecided)
            second = outputs_of(loaded.model, first.inputs)
        except CannotRunError as failed:
            if failed.is_for_memory:
                raise
            settings, failure = written_settings(self.base, self.merged), failure or str(failed)
            second = first.adapter
        if not failure and first.adapter.shape != second.shape:
            failure = f"its outputs are {_size(second)}, {_size(first.adapter)} were needed"
        if failure:
            return incomparable(failure, settings, inputs, slack, self.dtype)
        is_logits = second.shape[-1] > 1
        has_scale = is_logits and self.vocabulary is None and first.base.shape == second.shape
        same = first.adapter.argmax(-1) == second.argmax(-1)
        return ModelComparison(
            _farthest(first.adapter, second),
            float(first.adapter.abs().max()),
            _farthest(first.adapter, first.right),
            _farthest(first.right, second),
            max(_farthest(first.right, other) for other in first.others),
            _kl(first.adapter, second) if is_logits else None,
            _kl(first.adapter, first.base) if has_scale else None,
            float(same.double().mean()) if is_logits else None,
            same.numel(),
            inputs,
            slack,
            self.dtype,
            settings,
        )

    def _reference(self, given: Inputs | None) -> _Reference:
        loaded = self._load(self.base)
        model = loaded.model
        if self.vocabulary is not None:
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        inputs, plain = first_that_runs(model, self.merged, given)
        with ExitStack() as stack:
            attached = self._attached(model, stack)
            outputs = outputs_of(model, inputs)
            layers = {name: layer for one in attached for name, layer in one.layers.items()}
            for one in attached:
                for layer in one.layers.values():
                    layer.remove(one.name)
            changed = self._changed()
            choices = [self._choice(layer, name, changed[name]) for name, layer in layers.items()]
            self._store(model, {id(layer.weight) for layer in layers.values()})
            right, others = outputs_of(model, inputs), list[Tensor]()
            for side in (False, True):
                for number, choice in enumerate(choices):
                    choice.take(number, side)
                others.append(outputs_of(model, inputs))
        inside = f"{model.base_model_prefix}."
        own = _class_of(self.base) == self.class_name or not hasattr(model, inside[:-1])
        undecided = frozenset(name for name in loaded.missing if own or name.startswith(inside))
        config = model.config.to_dict()
        return _Reference(inputs, plain, outputs, right, tuple(others), config, undecided)

    def _attached(self, model: nn.Module, stack: ExitStack) -> list[Attachment]:
        """All adapters on the model, until `stack` ends; a weight goes into the scaling."""
        found = []
        pairs = zip(self.recipe.weighted, self.recipe.architectures, strict=True)
        for number, ((adapter, weight), names) in enumerate(pairs):
            own = {names.module_today(module): module for module in adapter.modules}
            shared = {  # trained in place, for all names that share it
                name: spec
                for path, spec in values_beside(adapter).items()
                for name in (path, *names.sharing(path))
            }
            given = {**shared, **adapter.values}
            values = {names.today(path): read_torch(spec) for path, spec in given.items()}
            delta = partial(self._delta, adapter, weight, own)
            parts = Parts(str(adapter.path), tuple(own), delta, values)
            try:
                holder = holder_of(model, next(iter(own)), names.part)
                one = put_on(holder, parts, name=f"adapter-{number}")
            except ConvertError as error:
                raise CannotRunError(
                    f"the adapter's names are not the model's ({error.message})"
                ) from error
            found.append(stack.enter_context(one))
        return found

    @staticmethod
    def _delta(adapter: Adapter, weight: float, own: Mapping[str, str], module: str) -> Delta:
        delta = adapter.delta(own[module])
        return replace(delta, scaling=delta.scaling * weight)

    def _dtype(self, parameter: str) -> torch.dtype:
        """What the merged checkpoint stores a parameter of the model in."""
        names = self.recipe.architectures[0]
        places = [rows.tensor for rows in names.locate(parameter)] or [names.disk_name(parameter)]
        spelt = (s for p in (*places, parameter) for s in spellings(p, self.recipe.prefixes))
        return stored_dtype(self.tensors, spelt)

    def _store(self, model: nn.Module, chosen: Set[int]) -> None:
        """Rounds all but the `chosen` parameters as the merged checkpoint stores them: what is
        cast, replaced or added there is no fault of the merge."""
        with torch.no_grad():
            for name, value in model.named_parameters():
                if id(value) not in chosen and value.is_floating_point():
                    value.copy_(value.to(self._dtype(name.replace(".base_layer.", "."))))

    def _changed(self) -> Mapping[str, list[_Change]]:
        """By the name of a module in memory: each adapter with a delta there, its weight, and its
        own name of the module."""
        found: dict[str, list[_Change]] = defaultdict(list)
        pairs = zip(self.recipe.weighted, self.recipe.architectures, strict=True)
        for (adapter, weight), names in pairs:
            for module in adapter.modules:
                found[names.module_today(module)].append((adapter, weight, module))
        return found

    def _choice(self, layer: GraloraLinear, name: str, changed: Sequence[_Change]) -> "_Choice":
        """Gives the layer the weight of the nearest right merge; what others may have instead."""
        held = [(factor, adapter.delta(own)) for adapter, factor, own in changed]
        weight, dtype = layer.weight.detach(), self._dtype(f"{name}.weight")
        short = next(filter(None, (a.short_dtype(own) for a, _, own in changed)), None)
        across = not isinstance(layer.base_layer, nn.Linear)  # Conv1D keeps (in, out)
        right, other = torch.empty_like(weight), torch.empty(weight.shape, dtype=dtype)
        step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
        for start in range(0, len(weight), step):
            span = (start, min(start + step, len(weight)))
            before = weight[slice(*span)].cpu().double()
            update, size = torch.zeros_like(before), before.abs()
            for factor, delta in held:
                update += factor * rows(delta, *span, transposed=across)
                size += abs(factor) * magnitude_rows(delta, *span, transposed=across)
            nearest = (before + update).to(dtype)
            low, high = admissible(
                before + update, update, magnitude=size,
                terms=sum(terms(delta) for _, delta in held), dtype=dtype,
                delta_dtype=None if short is None else torch_dtype(short),
            )  # fmt: skip
            right[slice(*span)] = nearest.to(right)
            other[slice(*span)] = torch.where(low == nearest, high, low)
        # A weight of its own, so that whatever shared the old one (tied embeddings) keeps it.
        layer.base_layer.register_parameter("weight", nn.Parameter(right, requires_grad=False))
        return _Choice(layer, right.clone() if dtype == self.dtype else right.to(dtype), other)

    def _load(self, source: Checkpoint) -> Loaded:
        """`source` as a model of one class; the base with the labels of the merged one, and as the
        config beside the adapter says, if that is of a model like the base, as in `merge`."""
        labels, is_base = self.merged.config.get("id2label"), source is not self.merged
        beside = (
            adapter.path
            for adapter in self.recipe.adapters
            if is_base and adapter.model_config.get("model_type", "") == self.base.model_type
        )
        return load(
            source, self.class_name, self.dtype, device=self.device,
            trust_remote_code=self.trust_remote_code,
            trained=next(beside, None),
            tensors=plain_tensors(source) if scales_of(source).specs else None,
            labels=len(labels) if is_base and isinstance(labels, Mapping) else None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Choice:
    """The two values that right merges may store for each weight of a layer, as they are stored."""

    layer: GraloraLinear
    right: Tensor
    other: Tensor

    def take(self, seed: int, side: bool) -> None:
        """Takes the other value at every second place: those of one `side` of a coin."""
        generator = torch.Generator().manual_seed(seed)
        coin = torch.randint(2, self.right.shape, generator=generator, dtype=torch.bool)
        with torch.no_grad():
            self.layer.weight.copy_(torch.where(coin ^ side, self.right, self.other))


def _farthest(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where one of the two is no number."""
    found = float((one - other).abs().max()) if one.numel() else 0.0
    return found if found == found else float("inf")


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) over positions, in nats."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return max(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), 0.0)  # NaN stays


def _size(outputs: Tensor) -> str:
    return " x ".join(map(str, outputs.shape))
