"""Full tensors of an adapter and the ones of the base that they replace: trained biases, modules
saved whole, embeddings. Values are absolute: they replace, they are never added.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import ne

from gralora_convert.adapters import (
    Adapter,
    Extra,
    GraloraConfig,
    LoraConfig,
    extras,
    is_saved,
    saved_findings,
    unplaced,
)
from gralora_convert.base.architecture import Architecture
from gralora_convert.base.likeness import is_relevelled, starts
from gralora_convert.base.quantisation import nested
from gralora_convert.base.recipe import Patched, Replaced
from gralora_convert.disk import Checkpoint, Rows, TensorSpec, same_values
from gralora_convert.errors import Finding, error, warning

Trained = tuple[tuple[str, Replaced | Patched], ...]  # what replaces which tensor of the output
_TASK_HEADS = ("classifier", "score", "qa_outputs")  # what PEFT adds to modules_to_save by task
_HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# What follows the vocabulary beside the embeddings themselves.
_VOCABULARY = ("lm_head", "embed", "predictions", "final_logits_bias", "shared", "wte", "output")


@dataclass(slots=True)
class Replacements:
    """What the full tensors of `adapter` do to the base.

    `trained` maps a parameter in memory to its new value (several where it is cut on disk),
    `frozen` to a copy of the base's that differs; `in_place` are those that were trained where they
    are, for all names that share them; `heads` counts the rows of trained heads, `resized` those
    of embeddings, before and now; `renamed` maps names to those under which the base seems to have
    what it lacks (`renamed_values`); `vocabulary` is (rows before, rows now) of all embeddings,
    `is_new_head` says that the base has no such head.
    """

    adapter: Adapter
    architecture: Architecture
    trained: dict[str, Trained] = field(default_factory=dict)
    frozen: dict[str, TensorSpec] = field(default_factory=dict)
    in_place: set[str] = field(default_factory=set)
    heads: dict[str, int] = field(default_factory=dict)
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    renamed_values: list[str] = field(default_factory=list)
    vocabulary: tuple[int, int] | None = None
    is_new_head: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def base(self) -> Checkpoint:
        return self.architecture.base

    @property
    def config(self) -> GraloraConfig | LoraConfig:
        return self.adapter.config

    @property
    def head_rows(self) -> int | None:
        """Rows of the layer that gives a trained head's outputs: the head itself, or its last."""
        for last in (*_TASK_HEADS, "out_proj"):
            for parameter, rows in self.heads.items():
                if parameter.removesuffix(".weight").rpartition(".")[2] == last:
                    return rows
        return min(self.heads.values(), default=None)


def replacements_of(adapter: Adapter, architecture: Architecture) -> Replacements:
    """What the full tensors of `adapter` do to the base, with all findings about them."""
    held = Replacements(adapter, architecture)
    for module, spec in adapter.biases.items():
        held.in_place.add(f"{module}.bias")
        _place_bias(held, f"{module}.bias", spec)
    for parameter, spec in adapter.saved.items():
        _place_saved(held, parameter, spec)
    for parameter, spec in adapter.frozen.items():
        _place_frozen(held, parameter, spec)
    for extra in extras(adapter):
        _place_extra(held, extra)
    renaming = {**architecture.reading.key_map, **held.renamed}
    for parameter in held.renamed_values:
        held.findings.append(error(
            "module-not-in-base", parameter, "is a saved module that the base calls otherwise",
            f"Another base? If only its names are others: `key_map={renaming}`.",
        ))  # fmt: skip
    _check_vocabulary(held)
    _check_saved(held)
    return held


# one tensor -----------------------------------------------------------------------------------


def find(held: Replacements, parameter: str) -> tuple[Rows, ...]:
    """Where a parameter lies on disk, under its own name or one that shares its values."""
    found = held.architecture.locate(parameter)
    if found:
        return found
    for other in held.architecture.sharing(parameter):
        found = held.architecture.locate(other)
        if found:
            return found
    return ()


def _put(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    own = held.architecture.locate(parameter)
    if own:
        held.trained[parameter] = tuple(_replacements(spec, own, held.base.tensors))
    else:
        _put_new(held, parameter, spec)


def _put_new(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    name = held.architecture.disk_name(parameter)
    held.trained[parameter] = ((name, Replaced(spec, spec.dtype)),)


def _place_bias(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    origins = find(held, parameter)
    if not origins:
        held.findings.append(error(
            "module-not-in-base", parameter, "is a trained bias that the base lacks",
            "Another base, or `key_map=FROM=TO`?",
        ))  # fmt: skip
    elif stored_shape(origins, held.base.tensors) != spec.shape:
        held.findings.append(error(
            "base-shape-mismatch", parameter, f"has shape {spec.shape} in the adapter, "
            f"{stored_shape(origins, held.base.tensors)} in the base", "Another base?",
        ))  # fmt: skip
    else:
        _put(held, parameter, spec)


def _place_saved(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    entry = is_saved(held.config, parameter)
    if entry is None:
        _place_frozen(held, parameter, spec)
        return
    origins = find(held, parameter)
    if not origins:
        _place_new(held, parameter, spec)
        return
    found = stored_shape(origins, held.base.tensors)
    if found != spec.shape and _is_vocabulary(held, parameter, spec, found):
        held.resized[parameter] = found[0], spec.shape[0]
    elif found != spec.shape and not _is_head(held, entry):
        held.findings.append(_misfit("modules-to-save-shape", parameter, spec, found))
        return
    if _is_head(held, entry) and len(spec.shape) == 2:
        held.heads[parameter] = spec.shape[0]
    _put(held, parameter, spec)


def _place_new(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    """A saved tensor that the base lacks: an output head that shares the embeddings, or a head
    trained for a task."""
    shared = held.architecture.tied_source(parameter.rpartition(".")[0], spec.shape)
    if shared is None and (renaming := _renaming(held, parameter, spec)):
        held.renamed |= renaming
        held.renamed_values.append(parameter)
        return
    if shared is None:
        held.is_new_head = True
        _check_new(held, parameter, spec)
        if len(spec.shape) == 2:
            held.heads[parameter] = spec.shape[0]
    _put_new(held, parameter, spec)


def _renaming(held: Replacements, parameter: str, spec: TensorSpec) -> dict[str, str]:
    """How the base calls a parameter that it seems to have with levels more or less; {} where its
    model has one of the adapter's name that no tensor is loaded into, and where names are
    converted while loading: there the loader's own mapping is asked of what will be written."""
    if held.architecture.text.is_converted:
        return {}
    model = held.architecture.blueprint
    if model is not None and (today := model.today(parameter)) and today not in model.loaded:
        return {}
    alike = [starts(parameter, n) for n, s in held.base.tensors.items() if s.shape == spec.shape]
    found = [pair for pair in alike if is_relevelled(*pair)]
    return dict(found) if len(found) == 1 else {}


def _check_new(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    """What a tensor of a new head shows beside the others of its layer, and in the model."""
    module, _, leaf = parameter.rpartition(".")
    weight = held.adapter.saved.get(f"{module}.weight")
    model = held.architecture.blueprint
    if leaf == "bias" and weight is None:
        held.findings.append(error(
            "modules-to-save-missing", f"{module}.weight",
            "is neither in the base nor in the adapter, which has the bias beside it",
            "Incomplete adapter, or another base?",
        ))  # fmt: skip
    elif leaf == "bias" and weight is not None and len(weight.shape) == 2:
        if spec.shape not in ((weight.shape[0],), (weight.shape[1],)):  # Conv1D: (in, out)
            held.findings.append(error(
                "modules-to-save-shape", parameter,
                f"has shape {spec.shape}, ({weight.shape[0]},) was needed beside its weight",
            ))  # fmt: skip
    elif model is not None and (today := held.architecture.today(parameter)) in model.state:
        own = tuple(model.state[today].shape)
        if len(own) != len(spec.shape) or sum(map(ne, own, spec.shape)) > 1:  # but for labels
            held.findings.append(error(
                "modules-to-save-shape", parameter,
                f"has shape {spec.shape}, one like {own} was needed by "
                f"{type(model.model).__name__}", "Another base?",
            ))  # fmt: skip
    elif leaf not in ("weight", "bias") and model is not None and model.has(module):
        held.findings.append(error(
            "tensor-unclaimed", parameter,
            f"is no parameter of {type(model.model).__name__}, whose {module} has no "
            f"{leaf!r}",
        ))  # fmt: skip


def _place_frozen(held: Replacements, parameter: str, spec: TensorSpec) -> None:
    """A base weight that PEFT saved without training it, and loads over the base."""
    origins = find(held, parameter)
    shared = held.architecture.tied_source(parameter.rpartition(".")[0], spec.shape)
    if shared is not None and not origins:
        origins = (Rows(shared, 0, spec.shape[0]),)
    if len(origins) != 1:
        held.findings.append(error(
            "module-not-in-base", parameter, "is a saved embedding that the base lacks",
            "Another base?",
        ))  # fmt: skip
        return
    found = held.base.tensors[origins[0].tensor]
    if found.shape == spec.shape:
        if same_values(spec, found):
            return
        held.findings.append(warning(
            "embeddings-differ-from-base", parameter,
            "differs from the base's although it was not trained; the adapter's is used",
            "Was the adapter trained on another base?",
        ))  # fmt: skip
    elif _is_vocabulary(held, parameter, spec, found.shape):
        held.resized[parameter] = found.shape[0], spec.shape[0]
    else:
        held.findings.append(_misfit("embedding-size-mismatch", parameter, spec, found.shape))
        return
    held.frozen[parameter] = spec


def _place_extra(held: Replacements, extra: Extra) -> None:
    """What was trained with the adapter, and saved in another file."""
    for parameter, spec in extra.parameters.items():
        origins = find(held, parameter)
        if not origins:
            held.findings.append(unplaced(extra, parameter, "the base has no such tensor"))
        elif (found := stored_shape(origins, held.base.tensors)) != spec.shape:
            held.findings.append(
                unplaced(extra, parameter, f"it has shape {spec.shape}, there {found}")
            )
        elif parameter in {*held.adapter.values, *held.frozen, *held.trained}:
            held.findings.append(unplaced(extra, parameter, "another file has it, too"))
        else:
            _put(held, parameter, spec)
            held.in_place.add(parameter)


# heads and vocabularies -----------------------------------------------------------------------


def _is_head(held: Replacements, entry: str) -> bool:
    return entry in _TASK_HEADS and held.adapter.task_type in _HEADED_TASKS


def _is_vocabulary(
    held: Replacements, parameter: str, spec: TensorSpec, found: tuple[int, ...]
) -> bool:
    """Whether two shapes of a parameter differ in the number of tokens only."""
    return (
        len(found) == len(spec.shape) == 2
        and found[1] == spec.shape[1]
        and found[0] in set(_vocabulary_sizes(held.base.config))
        and any(word in parameter for word in _VOCABULARY)
    )


def _check_vocabulary(held: Replacements) -> None:
    """A vocabulary is resized as a whole: embeddings, head and its bias, or not at all."""
    if not held.resized:
        return
    before = {old for old, _ in held.resized.values()}
    now = {new for _, new in held.resized.values()}
    written = {name for parts in held.trained.values() for name, _ in parts}
    for parameter in (*held.frozen, *held.resized):
        for name in held.architecture.sharing(parameter):
            written.update(origin.tensor for origin in held.architecture.locate(name))
    kept = [
        name for name, spec in held.base.tensors.items()
        if before & set(spec.shape) and name not in written
        and any(word in name for word in _VOCABULARY) and "position" not in name
    ]  # fmt: skip
    if len(now) == 1 and not kept:
        held.vocabulary = before.pop(), now.pop()
        return
    for parameter, (old, new) in held.resized.items():
        code = "modules-to-save-shape" if is_saved(held.config, parameter) else (
            "embedding-size-mismatch"
        )  # fmt: skip
        other = f"{kept[0]} keeps {old}" if kept else f"others have {sorted(now - {new})}"
        held.findings.append(error(
            code, parameter, f"has {new} rows, {other}",
            "Was the vocabulary resized? Save input and output embeddings with the adapter.",
        ))  # fmt: skip


# what is missing ------------------------------------------------------------------------------


def _check_saved(held: Replacements) -> None:
    """By names in memory where those on disk are others, as PEFT sees them."""
    blueprint = held.architecture.blueprint if held.architecture.text.is_converted else None
    if blueprint is None:
        written: set[str] = {name for parts in held.trained.values() for name, _ in parts}
        written |= {rows.tensor for name in held.frozen for rows in find(held, name)}
        held.findings += saved_findings(held.adapter, written, held.base.tensors)
    else:
        given = {*held.adapter.saved, *held.adapter.frozen}
        every = {other for name in given for other in held.architecture.sharing(name)}
        written = {held.architecture.today(name) for name in every | given}
        held.findings += saved_findings(held.adapter, written, blueprint.own)


def stored_shape(origins: Sequence[Rows], tensors: Mapping[str, TensorSpec]) -> tuple[int, ...]:
    """The shape in memory of what lies on disk in these parts."""
    inner = tensors[origins[0].tensor].shape
    return (sum(origin.count for origin in origins), *inner[1:]) if inner else ()


def _replacements(
    spec: TensorSpec, origins: Sequence[Rows], tensors: Mapping[str, TensorSpec]
) -> Iterator[tuple[str, Replaced | Patched]]:
    """`spec` in the places of these parts of tensors on disk."""
    for rows in origins:
        stored = tensors[rows.tensor]
        if len(origins) == 1 and rows.order is None and (stored.shape or (1,))[0] == rows.count:
            yield rows.tensor, Replaced(spec, spec.dtype)
        else:
            yield rows.tensor, Patched(stored, stored.dtype, ((rows, spec),))


def _misfit(code: str, parameter: str, spec: TensorSpec, found: tuple[int, ...]) -> Finding:
    return error(
        code, parameter, f"has shape {spec.shape} in the adapter, {found} in the base",
        "Another base?",
    )  # fmt: skip


def _vocabulary_sizes(config: Mapping[str, object]) -> Iterator[int]:
    """Every `vocab_size` of a config and of those within it."""
    found = (inner.get("vocab_size") for inner in nested(config))
    yield from (size for size in found if isinstance(size, int))
