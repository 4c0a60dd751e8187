"""Full tensors of an adapter and the ones of the base that they replace: trained biases, modules
saved whole, embeddings. Values are absolute: they replace, they are never added.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import ne

from gralora_convert.adapters import (
    CONFIG_NAME,
    Adapter,
    Extra,
    bias_finding,
    extras,
    is_saved,
    saved_findings,
    unplaced,
)
from gralora_convert.base.architecture import Architecture
from gralora_convert.base.quantisation import nested
from gralora_convert.base.recipe import Patched, Replaced
from gralora_convert.disk import Rows, TensorSpec, same_values
from gralora_convert.errors import Finding, error, warning

Trained = tuple[tuple[str, Replaced | Patched], ...]  # what replaces which tensor of the output
_TASK_HEADS = ("classifier", "score", "qa_outputs")  # what PEFT adds to modules_to_save by task
_HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# What follows the vocabulary beside the embeddings themselves.
_VOCABULARY = ("lm_head", "embed", "predictions", "final_logits_bias", "shared", "wte", "output")


class Values:
    """What the full tensors of `adapter` do to the base.

    `trained` maps a parameter in memory to its new value (several where it is cut on disk),
    `frozen` to a copy of the base's that differs; `in_place` are those that were trained
    where they are, for all names that share them; `head_rows` counts the labels of a trained head,
    `vocabulary` is (rows before, rows now) of resized embeddings, `is_new_head` says that the base
    has no such head.
    """

    def __init__(self, adapter: Adapter, architecture: Architecture) -> None:
        self.adapter, self.architecture = adapter, architecture
        self.base, self.config = architecture.base, adapter.config
        self.findings: list[Finding] = []
        self.trained: dict[str, Trained] = {}
        self.frozen: dict[str, TensorSpec] = {}
        self.in_place = {f"{module}.bias" for module in adapter.biases}
        self.head_rows: int | None = None
        self.vocabulary: tuple[int, int] | None = None
        self.is_new_head = False
        self._heads: dict[str, int] = {}
        self._resized: dict[str, tuple[int, int]] = {}
        for module, spec in adapter.biases.items():
            self._place_bias(f"{module}.bias", spec)
        for parameter, spec in adapter.saved.items():
            self._place_saved(parameter, spec)
        for parameter, spec in adapter.frozen.items():
            self._place_frozen(parameter, spec)
        for extra in extras(adapter):
            self._place_extra(extra)
        self.head_rows = self._label_count()
        self._check_vocabulary()
        self._check_saved()

    def _say(self, finding: Finding) -> None:
        self.findings.append(finding)

    # one tensor -----------------------------------------------------------------------------------

    def _find(self, parameter: str) -> tuple[Rows, ...]:
        """Where a parameter lies on disk, under its own name or one that shares its values."""
        found = self.architecture.locate(parameter)
        if found:
            return found
        for other in self.architecture.sharing(parameter):
            found = self.architecture.locate(other)
            if found:
                return found
        return ()

    def _put(self, parameter: str, spec: TensorSpec) -> None:
        own = self.architecture.locate(parameter)
        if own:
            self.trained[parameter] = tuple(_replacements(spec, own, self.base.tensors))
        else:
            self._put_new(parameter, spec)

    def _put_new(self, parameter: str, spec: TensorSpec) -> None:
        name = self.architecture.disk_name(parameter)
        self.trained[parameter] = ((name, Replaced(spec, spec.dtype)),)

    def _place_bias(self, parameter: str, spec: TensorSpec) -> None:
        origins = self._find(parameter)
        if not origins:
            self._say(error(
                "module-not-in-base", parameter, "is a trained bias that the base lacks",
                "Another base, or `key_map=FROM=TO`?",
            ))  # fmt: skip
        elif stored_shape(origins, self.base.tensors) != spec.shape:
            self._say(error(
                "base-shape-mismatch", parameter, f"has shape {spec.shape} in the adapter, "
                f"{stored_shape(origins, self.base.tensors)} in the base", "Another base?",
            ))  # fmt: skip
        else:
            self._put(parameter, spec)

    def _place_saved(self, parameter: str, spec: TensorSpec) -> None:
        entry = is_saved(self.config, parameter)
        if entry is None:
            self._place_frozen(parameter, spec)
            return
        origins = self._find(parameter)
        if not origins:
            self._place_new(parameter, spec)
            return
        found = stored_shape(origins, self.base.tensors)
        if found != spec.shape and self._is_vocabulary(parameter, spec, found):
            self._resized[parameter] = found[0], spec.shape[0]
        elif found != spec.shape and not self._is_head(entry):
            self._say(_misfit("modules-to-save-shape", parameter, spec, found))
            return
        if self._is_head(entry) and len(spec.shape) == 2:
            self._heads[parameter] = spec.shape[0]
        self._put(parameter, spec)

    def _place_new(self, parameter: str, spec: TensorSpec) -> None:
        """A saved tensor that the base lacks: an output head that shares the embeddings, or a head
        trained for a task."""
        shared = self.architecture.tied_source(parameter.rpartition(".")[0], spec.shape)
        if shared is None:
            self.is_new_head = True
            self._check_new(parameter, spec)
            if len(spec.shape) == 2:
                self._heads[parameter] = spec.shape[0]
        self._put_new(parameter, spec)

    def _check_new(self, parameter: str, spec: TensorSpec) -> None:
        """What a tensor of a new head shows beside the others of its layer, and in the model."""
        module, _, leaf = parameter.rpartition(".")
        weight = self.adapter.saved.get(f"{module}.weight")
        model = self.architecture.blueprint
        if leaf == "bias" and weight is None:
            self._say(error(
                "modules-to-save-missing", f"{module}.weight",
                "is neither in the base nor in the adapter, which has the bias beside it",
                "Incomplete adapter, or another base?",
            ))  # fmt: skip
        elif leaf == "bias" and weight is not None and len(weight.shape) == 2:
            if spec.shape not in ((weight.shape[0],), (weight.shape[1],)):  # Conv1D: (in, out)
                self._say(error(
                    "modules-to-save-shape", parameter,
                    f"has shape {spec.shape}, ({weight.shape[0]},) was needed beside its weight",
                ))  # fmt: skip
        elif model is not None and (today := self.architecture.today(parameter)) in model.state:
            own = tuple(model.state[today].shape)
            if len(own) != len(spec.shape) or sum(map(ne, own, spec.shape)) > 1:  # but for labels
                self._say(error(
                    "modules-to-save-shape", parameter,
                    f"has shape {spec.shape}, one like {own} was needed by "
                    f"{type(model.model).__name__}", "Another base?",
                ))  # fmt: skip
        elif leaf not in ("weight", "bias") and model is not None and model.has(module):
            self._say(error(
                "tensor-unclaimed", parameter,
                f"is no parameter of {type(model.model).__name__}, whose {module} has no "
                f"{leaf!r}",
            ))  # fmt: skip

    def _place_frozen(self, parameter: str, spec: TensorSpec) -> None:
        """A base weight that PEFT saved without training it, and loads over the base."""
        origins = self._find(parameter)
        shared = self.architecture.tied_source(parameter.rpartition(".")[0], spec.shape)
        if shared is not None and not origins:
            origins = (Rows(shared, 0, spec.shape[0]),)
        if len(origins) != 1:
            self._say(error(
                "module-not-in-base", parameter, "is a saved embedding that the base lacks",
                "Another base?",
            ))  # fmt: skip
            return
        found = self.base.tensors[origins[0].tensor]
        if found.shape == spec.shape:
            if same_values(spec, found):
                return
            self._say(warning(
                "embeddings-differ-from-base", parameter,
                "differs from the base's although it was not trained; the adapter's is used",
                "Was the adapter trained on another base?",
            ))  # fmt: skip
        elif self._is_vocabulary(parameter, spec, found.shape):
            self._resized[parameter] = found.shape[0], spec.shape[0]
        else:
            self._say(_misfit("embedding-size-mismatch", parameter, spec, found.shape))
            return
        self.frozen[parameter] = spec

    def _place_extra(self, extra: Extra) -> None:
        """What was trained with the adapter, and saved in another file."""
        for parameter, spec in extra.parameters.items():
            origins = self._find(parameter)
            if not origins:
                self._say(unplaced(extra, parameter, "the base has no such tensor"))
            elif (found := stored_shape(origins, self.base.tensors)) != spec.shape:
                self._say(unplaced(extra, parameter, f"it has shape {spec.shape}, there {found}"))
            elif parameter in {*self.adapter.values, *self.frozen, *self.trained}:
                self._say(unplaced(extra, parameter, "another file has it, too"))
            else:
                self._put(parameter, spec)
                self.in_place.add(parameter)

    # heads and vocabularies -----------------------------------------------------------------------

    def _is_head(self, entry: str) -> bool:
        return entry in _TASK_HEADS and self.config.task_type in _HEADED_TASKS

    def _label_count(self) -> int | None:
        """Rows of the layer that gives a trained head's outputs: the head itself, or its last."""
        for last in (*_TASK_HEADS, "out_proj"):
            for parameter, rows in self._heads.items():
                if parameter.removesuffix(".weight").rpartition(".")[2] == last:
                    return rows
        return min(self._heads.values(), default=None)

    def _is_vocabulary(self, parameter: str, spec: TensorSpec, found: tuple[int, ...]) -> bool:
        """Whether two shapes of a parameter differ in the number of tokens only."""
        return (
            len(found) == len(spec.shape) == 2
            and found[1] == spec.shape[1]
            and found[0] in set(_vocabulary_sizes(self.base.config))
            and any(word in parameter for word in _VOCABULARY)
        )

    def _check_vocabulary(self) -> None:
        """A vocabulary is resized as a whole: embeddings, head and its bias, or not at all."""
        if not self._resized:
            return
        before = {old for old, _ in self._resized.values()}
        now = {new for _, new in self._resized.values()}
        written = {name for parts in self.trained.values() for name, _ in parts}
        for parameter in (*self.frozen, *self._resized):
            for name in self.architecture.sharing(parameter):
                written.update(origin.tensor for origin in self.architecture.locate(name))
        kept = [
            name for name, spec in self.base.tensors.items()
            if before & set(spec.shape) and name not in written
            and any(word in name for word in _VOCABULARY) and "position" not in name
        ]  # fmt: skip
        if len(now) == 1 and not kept:
            self.vocabulary = before.pop(), now.pop()
            return
        for parameter, (old, new) in self._resized.items():
            code = "modules-to-save-shape" if is_saved(self.config, parameter) else (
                "embedding-size-mismatch"
            )  # fmt: skip
            other = f"{kept[0]} keeps {old}" if kept else f"others have {sorted(now - {new})}"
            self._say(error(
                code, parameter, f"has {new} rows, {other}",
                "Was the vocabulary resized? Save input and output embeddings with the adapter.",
            ))  # fmt: skip

    # what is missing ------------------------------------------------------------------------------

    def _check_saved(self) -> None:
        """By names in memory where those on disk are others, as PEFT sees them."""
        blueprint = self.architecture.blueprint if self.architecture.text.is_converted else None
        if blueprint is None:
            written: set[str] = {name for parts in self.trained.values() for name, _ in parts}
            written |= {rows.tensor for name in self.frozen for rows in self._find(name)}
            self.findings += saved_findings(self.adapter, written, self.base.tensors)
        else:
            given = {*self.adapter.saved, *self.adapter.frozen}
            every = {other for name in given for other in self.architecture.sharing(name)}
            written = {self.architecture.today(name) for name in every | given}
            self.findings += saved_findings(self.adapter, written, blueprint.state)

    def check_head(self) -> None:
        """A class with a new head may have more layers that the base lacks, unsaved by PEFT."""
        if not self.is_new_head:
            return
        if not self._names_a_class():
            self._say(error(
                "head-incomplete", self.config.modules_to_save[0] if self.config.modules_to_save
                else CONFIG_NAME, "is trained and new, and neither task_type nor auto_mapping says "
                "which class of model has it", "Write task_type into adapter_config.json.",
            ))  # fmt: skip
            return
        lacking = self.architecture.lacking(self.adapter.values.keys())
        if lacking:
            holder = lacking[0].rpartition(".")[0]
            self._say(error(
                "head-incomplete", lacking[0],
                f"is one of {len(lacking)} parameters of the trained model that neither the base "
                "nor the adapter has: they were drawn at random, and are lost",
                f"Train again from a base that has them, or with {holder!r} in modules_to_save.",
            ))  # fmt: skip

    def _names_a_class(self) -> bool:
        """Whether the class with the new head is known, or there are no classes to choose from."""
        known = self.config.task_type or self.architecture.class_name
        beside = (self.adapter.path / "config.json").is_file()
        return bool(known) or beside or self.base.model_type is None

    def check_biases(self, modules: Sequence[str]) -> None:
        """Biases of the adapted `modules` (and of all others, by mode) that should be here."""
        mode = self.config.bias
        if mode == "none":
            return
        saved = {name.removesuffix(".bias") for name in self.adapter.saved}
        present = saved.union(self.adapter.biases)
        own = [m for m in modules if m not in present and self._find(f"{m}.bias")]
        others = self._other_biases() if mode == "all" and not self.adapter.biases else []
        if others and not own and self.architecture.blueprint is not None:  # of another head?
            state = self.architecture.blueprint.state
            every = {shared for name in self.trained for shared in self.architecture.sharing(name)}
            given = set(map(self.architecture.today, every))
            others = [n for n in state if n.endswith(".bias") and self._find(n) and n not in given]
        if found := bias_finding(self.adapter, [f"{module}.bias" for module in own], others):
            self._say(found)

    def _other_biases(self) -> list[str]:
        """Biases on disk that the adapter has no value for."""
        written = {name for parts in self.trained.values() for name, _ in parts}
        return [
            name for name in self.base.tensors
            if name.endswith((".bias", ".beta")) and name not in written
        ]  # fmt: skip


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
