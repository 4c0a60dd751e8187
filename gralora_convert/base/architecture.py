"""What a base model is: names in memory <-> names on disk, orientation, ties, kinds of modules.

Config and headers answer most questions. What they cannot answer is asked of transformers: facts
that stand in its source text first (no import), then the model itself (`blueprint.py`, which
imports torch and transformers).
"""

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from gralora_convert.base.quantisation import nested
from gralora_convert.base.source_text import HEADS, LINES, converted, modeling
from gralora_convert.disk import FLOATING, Checkpoint, Rows

if TYPE_CHECKING:
    from gralora_convert.models import Blueprint

__all__ = [
    "Architecture",
    "near_misses",
]


# Blocks of these models are Conv1D throughout, their heads nn.Linear (transformers 5.23).
_CONV1D_FAMILY = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_MOST_COMPARED = 2_000  # names, for near misses
_IN_BLOCK = re.compile(r"(.*\.)?h\.\d+\..*")
_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|\w*embeddings?|embed_in|wte|wpe|shared|tok_embeddings)"
)
_LEGACY = {"weight": "gamma", "bias": "beta"}  # norms of the first BERT checkpoints
AUTO_CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Architecture:
    """The base as an adapter sees it, whose `modules` are named as in memory.

    `class_name` is the model class in memory (None: the base's own, or that of the task).
    """

    base: Checkpoint
    modules: tuple[str, ...] = ()
    class_name: str | None = None
    task_type: str | None = None
    key_map: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False

    # facts from text ------------------------------------------------------------------------------

    @cached_property
    def _types(self) -> tuple[str, ...]:
        """The model types of the config and of the configs within it."""
        found = [config.get("model_type") for config in nested(self.base.config)]
        return tuple(dict.fromkeys(name for name in found if isinstance(name, str)))

    @cached_property
    def source(self) -> str:
        """The text of transformers' modeling files of this base, '' when it has none."""
        if not self.base.model_type or not modeling(self.base.model_type):
            return ""
        return "\n".join(modeling(name) for name in self._types)

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """The architecture's own `base_model_prefix`, from the source text."""
        text = modeling(self.base.model_type) if self.base.model_type else ""
        found = re.findall(r"^    base_model_prefix = \"(\w+)\"", text, re.MULTILINE)
        return tuple(dict.fromkeys(found))

    @cached_property
    def is_converted(self) -> bool:
        """Whether names in memory may differ from those on disk by more than a prefix."""
        classes = set(re.findall(r"^class (\w+)\(", self.source, re.MULTILINE))
        return not converted().isdisjoint({*self._types, *classes})

    @cached_property
    def _tie_patterns(self) -> tuple[re.Pattern[str], ...]:
        """Patterns of the parameters that may be one and the same with others."""
        any_may_be = (re.compile(""),)
        if "_tied_weights_keys[" in self.source:  # made while the model is built
            return any_may_be
        words: set[str] = set()
        for block in re.findall(
            r"_tied_weights_keys\b[^=\n]*=\s*(\{.*?\})", self.source, re.DOTALL
        ):
            try:
                pairs = ast.literal_eval(block)
            except (ValueError, SyntaxError):  # made of the config, likewise
                return any_may_be
            for pair in pairs.items():
                words.update(word.removeprefix("^") for word in pair)
        if not self.source:
            words = {rf"(^|\.){name}\.weight" for name in HEADS}
        return tuple(re.compile(word) for word in sorted(words))

    def may_be_tied(self, parameter: str) -> bool:
        return any(pattern.search(parameter) for pattern in self._tie_patterns)

    @property
    def tie_flag_means_more(self) -> bool:
        """Whether the forward pass reads the flag too (T5 scales the decoder's output by it), so
        that only the presence of a tensor may untie it."""
        pattern = r"if (not )?self\.config\.(tie_word_embeddings|scale_decoder_outputs):"
        return re.search(pattern, self.source) is not None

    @cached_property
    def blueprint(self) -> "Blueprint | None":
        """The model on the meta device; None when transformers cannot build the architecture."""
        if self.base.model_type is None:
            return None
        from gralora_convert.models import Blueprint

        auto = AUTO_CLASSES.get(self.task_type or "")
        names = [self.class_name, auto, *self.base.architectures]
        return Blueprint.build(
            self.base, [name for name in names if name], self.modules,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def build_problem(self, class_name: str) -> str:
        """Why transformers cannot build a class from the base's config; '' when it can."""
        from gralora_convert.models import build_problem

        return build_problem(self.base, class_name)

    def misfit(self, config: Mapping[str, object], other: Mapping[str, object]) -> str:
        """Where the models that two configs (the base's, another) describe differ in a parameter;
        '' when they do not, or when transformers cannot build one of them."""
        from gralora_convert.models import absurd_count, bare_shapes

        if absurd_count(config, len(self.base.tensors)):
            return ""
        if name := absurd_count(other, len(self.base.tensors)):
            return f"{name} counts more by it than the tensors here could be of"
        one, two = bare_shapes(config), bare_shapes(other)
        for name in dict.fromkeys((*(one or ()), *(two or ()))):
            if one is not None and two is not None and one.get(name) != two.get(name):
                return f"{name} is {two.get(name, 'absent')} by it, {one.get(name, 'absent')} here"
        return ""

    # names ----------------------------------------------------------------------------------------

    def mapped(self, name: str) -> str:
        """`name` after the user's `key_map` (whole names, or leading parts)."""
        for start, to in self.key_map.items():
            if name == start or name.startswith(f"{start}."):
                return to + name.removeprefix(start)
        return name

    @cached_property
    def _prefixing(self) -> tuple[Callable[[str], str], str, str]:
        """The way from names in memory to names on disk that fits most modules, what it does, and
        the prefix that it strips ('' when names are the same)."""
        choices: list[tuple[Callable[[str], str], str, str]] = [(str, "", "")]
        for prefix in self.prefixes:
            choices.append((_stripper(prefix), f"without the prefix {prefix!r}", prefix))
            choices.append((_adder(prefix, self.base), f"with the prefix {prefix!r}", ""))

        def hits(choice: tuple[Callable[[str], str], str, str]) -> int:
            return sum(self._on_disk(choice[0], f"{m}.weight") is not None for m in self.modules)

        return max(choices, key=hits)  # the first of equals: names as they are

    def _on_disk(self, rename: Callable[[str], str], parameter: str) -> str | None:
        mapped = self.mapped(parameter)
        module, _, leaf = (rename(mapped) if mapped == parameter else mapped).rpartition(".")
        for last in (leaf, _LEGACY.get(leaf, leaf)):
            name = f"{module}.{last}" if module else last
            if name in self.base.tensors:
                return name
        return None

    @cached_property
    def _by_blueprint(self) -> bool:
        """Whether names on disk are to be asked of transformers: where it renames tensors, and the
        adapter's names are those of today's model (older adapters carry the names on disk)."""
        if not self.is_converted or not self.modules:
            return False
        blueprint = self.blueprint
        return blueprint is not None and all(blueprint.has(m) for m in self.modules)

    def locate(self, parameter: str) -> tuple[Rows, ...]:
        """Where a parameter in memory lies on disk; () when it is not there under its own name."""
        if self._by_blueprint and self.mapped(parameter) == parameter:
            assert self.blueprint is not None
            if parameter in self.blueprint.state:
                return self.blueprint.origins.get(parameter, ())
        name = self._on_disk(self._prefixing[0], parameter)
        if name is None:
            return ()
        shape = self.base.tensors[name].shape
        return (Rows(name, 0, shape[0] if shape else 1),)

    @cached_property
    def origins(self) -> Mapping[str, tuple[Rows, ...]]:
        """Every parameter in memory -> where it lies on disk, by transformers' conversion mapping;
        {} when it does not know the architecture."""
        return {} if self.blueprint is None else self.blueprint.origins

    def disk_name(self, parameter: str) -> str:
        """The name that a parameter which is not on disk gets there."""
        if self._by_blueprint and self.mapped(parameter) == parameter:
            assert self.blueprint is not None
            return self.blueprint.disk_name(parameter)
        mapped = self.mapped(parameter)
        return _stripper(self.lacking_prefix)(mapped) if self.lacking_prefix else mapped

    @property
    def prefix_note(self) -> str:
        """What is done to names, for a note; '' when they are the same."""
        return "" if self._by_blueprint else self._prefixing[1]

    @property
    def lacking_prefix(self) -> str:
        """The base-model prefix of names in memory that names on disk lack."""
        if self._by_blueprint and self.blueprint is not None:
            prefix = self.blueprint.prefix
            named = any(m.startswith(f"{prefix}.") for m in self.modules)
            stored = any(name.startswith(f"{prefix}.") for name in self.base.tensors)
            return prefix if named and not stored else ""
        return self._prefixing[2]

    def outer_names(self) -> dict[str, str]:
        """Every tensor of a bare base -> its name beside a head: with the prefix that it lacks.
        {} when names need no change."""
        prefix = self.lacking_prefix
        if not prefix:
            return {}
        if not self._by_blueprint:
            return {name: f"{prefix}.{name}" for name in self.base.tensors}
        assert self.blueprint is not None
        found = {name: self.blueprint.outer_name(name) for name in self.base.tensors}
        return {name: outer for name, outer in found.items() if outer is not None}

    # ties -----------------------------------------------------------------------------------------

    def sharing(self, parameter: str) -> tuple[str, ...]:
        """All names of one parameter in memory, itself included."""
        if not self.may_be_tied(parameter) or self.blueprint is None:
            return (parameter,)
        return self.blueprint.sharing(parameter)

    def is_one_place(self, one: str, other: str) -> bool:
        """Whether two names of a shared parameter are the same place in the model, so that an
        adapter put there serves both."""
        found = self.blueprint
        return one == other or (found is not None and found.slot(one) == found.slot(other))

    def tied_source(self, module: str, shape: tuple[int, ...]) -> str | None:
        """Without a blueprint: the input embedding on disk that an output head without a tensor
        of its own must share."""
        if module.rpartition(".")[2] not in HEADS or self.blueprint is not None:
            return None
        found = [
            name
            for name, spec in self.base.tensors.items()
            if spec.shape == shape and name.endswith(".weight")
            and self.is_embedding(name.removesuffix(".weight"))
            and "position" not in name and not name.endswith("wpe.weight")
        ]  # fmt: skip
        shared = [name for name in found if name.endswith("shared.weight")]
        return shared[0] if shared else found[0] if len(found) == 1 else None

    def lacking(self, given: Collection[str]) -> list[str]:
        """Parameters of the model in memory that neither the base nor `given` holds: they were
        drawn at random when it was trained."""
        if self._is_whole_beside(given) or self.blueprint is None:
            return []
        return self.blueprint.lacking(given)

    def _is_whole_beside(self, given: Collection[str]) -> bool:
        """Whether the source text already shows that the class in memory is its bare model, which
        the base is, and layers that `given` holds."""
        ending = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
        wanted = f"For{ending.get(self.task_type or '', '?')}("
        bodies = re.findall(rf"^class \w+{re.escape(wanted)}.*?\n(?=\S|\Z)", self.source, LINES)
        if len(bodies) != 1 or not self.lacking_prefix:
            return False
        assigned = dict(re.findall(r"^        self\.(\w+)[^=\n]*= (.*)$", bodies[0], re.MULTILINE))
        bare = assigned.pop(self.lacking_prefix, "")
        pooled = "add_pooling_layer=False" in bare or any("pooler" in n for n in self.base.tensors)
        if not pooled or (bare.partition("(")[0],) != self.base.architectures:
            return False
        return all(
            re.fullmatch(r"config(\.\w+)?", value) or value.startswith("nn.Dropout(")
            or _is_given(layer, value, given)
            for layer, value in assigned.items()
        )  # fmt: skip

    # kinds ----------------------------------------------------------------------------------------

    def is_transposed(
        self, module: str, stored: tuple[int, ...], shape: tuple[int, int]
    ) -> bool | None:
        """Whether a weight of shape `stored` is (in, out), as Conv1D has it; None when that cannot
        be told. `shape` is (out, in) of the adapter."""
        if shape[0] != shape[1]:
            return stored != shape
        if self.base.model_type in _CONV1D_FAMILY:
            return _IN_BLOCK.fullmatch(module) is not None
        if not self.may_hold_conv1d:
            return False
        kind = self.kind(module)
        return None if kind is None else kind == "Conv1D"

    @property
    def may_hold_conv1d(self) -> bool:
        """Whether the architecture uses Conv1D, or is not known."""
        return not self.source or "Conv1D" in self.source

    def kind(self, module: str) -> str | None:
        """The class name of a module in memory; None when the model cannot be built or lacks it."""
        return None if self.blueprint is None else self.blueprint.kind(module)

    def is_attention_output(self, disk_module: str) -> bool:
        """Whether a module is the out_proj of torch's MultiheadAttention, by its siblings."""
        parent, _, last = disk_module.rpartition(".")
        siblings = (f"{parent}.in_proj_weight", f"{parent}.q_proj_weight")
        return last == "out_proj" and any(name in self.base.tensors for name in siblings)

    @cached_property
    def _uncalled(self) -> frozenset[tuple[str, str]]:
        """(class, layer) of linear layers whose weight the class uses while it never calls them."""
        found = set()
        for name, body in re.findall(r"^class (\w+)\((.*?)(?=^\S|\Z)", self.source, LINES):
            if ".weight" not in body:
                continue
            usual = re.sub(r"if hasattr\(self\.config, \"_is_quantized\"\):\n.*\n", "", body)
            for layer in re.findall(r"^        self\.(\w+) = (?:nn\.Linear|Conv1D)\(", body, LINES):
                called = rf"self\.{layer}(?![.\w])(?! =)"
                if f"self.{layer}.weight" in usual and not re.search(called, usual):
                    found.add((name, layer))
        return frozenset(found)

    def is_uncalled(self, module: str) -> bool:
        """Whether the model's forward never calls what has the layer's name, so that an adapter
        there has no effect: it reads the weight (Mamba's `dt_proj`, the attention of WavLM), or
        calls the layer out of a plain list (the mask head of MaskFormer)."""
        if "add_module(" in self.source and self.blueprint and self.blueprint.is_listed(module):
            return True
        parent, _, leaf = module.rpartition(".")
        if all(leaf != layer for _, layer in self._uncalled) or self.blueprint is None:
            return False
        return any((name, leaf) in self._uncalled for name in self.blueprint.classes(parent))

    def is_embedding(self, module: str) -> bool:
        """Whether a module is called like an embedding."""
        return _EMBEDDING.fullmatch(module) is not None

    # modules --------------------------------------------------------------------------------------

    def linear_modules(self, *, head: bool = False) -> list[str] | None:
        """Names in memory of all nn.Linear and Conv1D, `head`: with the output embedding; None when
        the model cannot be built."""
        return None if self.blueprint is None else self.blueprint.linear(head=head)

    def likely_modules(self) -> list[str] | None:
        """Names in memory of what looks like a linear layer, from headers alone; None where names
        on disk are others."""
        if self._by_blueprint:
            return None
        known = {self._on_disk(self._prefixing[0], f"{m}.weight"): m for m in self.modules}
        return [
            known.get(f"{name}.weight") or self._in_memory(name) for name in self.disk_modules()
        ]

    def _in_memory(self, module: str) -> str:
        """The name in memory of a module on disk: the inverse of the prefix that is changed."""
        rename = self._prefixing[0]
        for prefix in self.prefixes:
            for name in (f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
                if rename(name) == module:
                    return name
        return module

    def disk_modules(self) -> list[str]:
        """Names on disk of what looks like a linear layer: 2-D floating weights, no embeddings."""
        return [
            name.removesuffix(".weight")
            for name, spec in self.base.tensors.items()
            if name.endswith(".weight")
            and len(spec.shape) == 2
            and spec.dtype in FLOATING
            and not self.is_embedding(name.removesuffix(".weight"))
        ]


def _is_given(layer: str, value: str, given: Collection[str]) -> bool:
    """Whether `given` has all parameters of a layer that is assigned `value` in the source text; a
    linear layer has a bias unless the text says otherwise."""
    if value.startswith("nn.Linear(") and "bias=" not in value:
        return {f"{layer}.weight", f"{layer}.bias"} <= set(given)
    return any(parameter.startswith(f"{layer}.") for parameter in given)


def _stripper(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(f"{prefix}.")


def _adder(prefix: str, base: Checkpoint) -> Callable[[str], str]:
    """Adds the prefix, except to what stands beside the base model (a head)."""
    return lambda name: name if name in base.tensors else f"{prefix}.{name}"


def near_misses(name: str, names: Sequence[str]) -> str:
    """The names most like `name`, for a message; '' when none is."""
    import difflib

    if len(names) > _MOST_COMPARED:  # that would take seconds for each name
        leaf = name.rpartition(".")[2]
        names = [n for n in names if n.rpartition(".")[2] == leaf][:_MOST_COMPARED]
    found = difflib.get_close_matches(name, names, 3, 0.6)
    return f"Near misses: {', '.join(found)}." if found else ""
