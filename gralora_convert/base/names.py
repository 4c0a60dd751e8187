"""One mapper of names: parameters of the model in memory <-> tensors on disk.

There are two ways to know: headers alone where the two differ by the base-model prefix at most;
else transformers' model on the meta device (`models/meta.py`, which imports torch).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from gralora_convert.base.likeness import LEGACY
from gralora_convert.base.quantisation import nested
from gralora_convert.base.reading import NOTHING_SAID, Reading
from gralora_convert.base.source_text import SourceText
from gralora_convert.base.ways import Way, adder, most, stripper
from gralora_convert.disk import FLOATING, Checkpoint, Rows
from gralora_convert.errors import Finding, error

if TYPE_CHECKING:
    from gralora_convert.models import Blueprint

_EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|\w*embeddings?|embed_in|wte|wpe|shared|tok_embeddings)"
)
AUTO_CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Names:
    """The names of one base, for an adapter whose `modules` are named as in memory.

    `class_name` is the model class in memory (None: the base's own, or that of the task),
    `class_beside` the one that the config beside the adapter names. `shapes` are (out, in) of the
    modules, as far as they are known; `claimed` are all parameters that the adapter has a say in.
    """

    base: Checkpoint
    modules: tuple[str, ...] = ()
    class_name: str | None = None
    task_type: str | None = None
    reading: Reading = NOTHING_SAID
    class_beside: str | None = None
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    claimed: tuple[str, ...] = ()

    @cached_property
    def text(self) -> SourceText:
        """What transformers' source text says of the base."""
        inner = (config.get("model_type") for config in nested(self.base.config))
        names = [name for name in inner if isinstance(name, str)]
        return SourceText(tuple(dict.fromkeys((self.base.model_type, *names))))

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
            trust_remote_code=self.reading.trust_remote_code,
        )  # fmt: skip

    def mapped(self, name: str) -> str:
        """`name` after the user's `key_map` (whole names, or leading parts)."""
        for start, to in self.reading.key_map.items():
            if name == start or name.startswith(f"{start}."):
                return to + name.removeprefix(start)
        return name

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        """What the class in memory may be called as a part of the base, by the source text."""
        return self.text.parts(self.class_name or self.class_beside or "")

    @cached_property
    def _fitting(self) -> tuple["Way", ...]:
        """The ways to names on disk that fit most modules; names as they are if those fit, or if
        none does. A class that is known as a part of the base is that part."""
        ways = [Way(str, "")]
        for prefix in dict.fromkeys((*self.text.prefixes, *self._parts)):
            ways.append(Way(stripper(prefix), f"without the prefix {prefix!r}", strips=prefix))
            ways.append(Way(adder(prefix, self.base), f"with the prefix {prefix!r}", adds=prefix))
        found = {way: self._found(way) for way in ways}
        plain = found[ways[0]]
        if len(plain) == len(self.modules):
            return (ways[0],)
        decided = [way for way in ways if way.adds in self._parts and found[way] not in ({}, plain)]
        best = most(decided or ways, lambda way: len(found[way]))
        if ways[0] in best:
            return (ways[0],)
        best = most(best, lambda way: sum(self._is_sized(*pair) for pair in found[way].items()))
        places = {tuple(found[way].values()): way for way in reversed(best)}
        return tuple(reversed(places.values()))

    def _found(self, way: "Way") -> Mapping[str, str]:
        """The modules that one way finds on disk, and their weights there."""
        names = {m: self._on_disk(way.rename, f"{m}.weight") for m in self.modules}
        return {module: name for module, name in names.items() if name is not None}

    def _is_sized(self, module: str, weight: str) -> bool:
        shape = self.base.tensors[weight].shape
        return self.shapes.get(module) in (shape, shape[::-1])

    @property
    def _way(self) -> "Way":
        return self._fitting[0]

    @cached_property
    def rivals(self) -> Finding | None:
        """The refusal to choose between parts of the base that the modules fit equally."""
        if self._by_blueprint or len(self._fitting) == 1:
            return None
        parts = [way.adds for way in self._fitting]
        names = [name for name in (*self.modules, *self.claimed) if self.mapped(name) == name]
        starts = dict.fromkeys(name.partition(".")[0] for name in names)
        lines = [f"`key_map={ {start: f'{p}.{start}' for start in starts} }`" for p in parts]
        return error(
            "part-ambiguous", names[0],
            f"is in {len(parts)} parts of the base, {' and '.join(parts)}, and nothing says which "
            "of them was trained",
            f"Name it: {', or '.join(lines)}.",
        )  # fmt: skip

    @cached_property
    def part(self) -> str:
        """The part of the base, of several, that all modules lie in without naming it; '' if the
        adapter is on the whole."""
        parts = [
            part for part in dict.fromkeys((*self.text.prefixes, *self._parts))
            if any(name.startswith(f"{part}.") for name in self.base.tensors)
        ]  # fmt: skip
        found = self._found(self._way).values()
        if len(parts) < 2 or not found:
            return ""
        return next(
            (
                part for part in parts
                if all(name.startswith(f"{part}.") for name in found)
                and not any(module.startswith(f"{part}.") for module in self.modules)
            ),
            "",
        )  # fmt: skip

    def _on_disk(self, rename: Callable[[str], str], parameter: str) -> str | None:
        mapped = self.mapped(parameter)
        module, _, leaf = (rename(mapped) if mapped == parameter else mapped).rpartition(".")
        for last in (leaf, LEGACY.get(leaf, leaf)):
            name = f"{module}.{last}" if module else last
            if name in self.base.tensors:
                return name
        return None

    @cached_property
    def _by_blueprint(self) -> bool:
        """Whether names on disk are to be asked of transformers: where it renames tensors, and the
        adapter's names are those of today's model (older adapters carry the names on disk), or of a
        part of it that headers do not show, or that what is outside of it may be tied to."""
        tied = self._way.adds and any(self.is_embedding(p.rpartition(".")[0]) for p in self.claimed)
        if not self.modules or not (self.text.is_converted or self._is_of_a_part or tied):
            return False
        blueprint = self.blueprint
        return blueprint is not None and all(blueprint.today(f"{m}.weight") for m in self.modules)

    @property
    def _is_of_a_part(self) -> bool:
        """Whether the class in memory may be a part of the base's: that lacks modules."""
        named = self.class_name not in (None, *self.base.architectures)
        return named and len(self._found(self._way)) < len(self.modules)

    def today(self, parameter: str) -> str:
        """The name of a parameter in the model of the installed transformers; the adapter was
        perhaps trained under another release, which called it otherwise, or on a part."""
        model = self.blueprint if self._by_blueprint else vars(self).get("blueprint")
        if model is None:
            return parameter
        if (mapped := self.mapped(parameter)) != parameter:
            name, moved = model.loaded_name(mapped)
            return name if moved is None and name in model.state else parameter
        if not (self._by_blueprint or model.part):
            return parameter
        return model.today(parameter) or parameter

    @cached_property
    def _adapters_own(self) -> Mapping[str, str]:
        """Name of a parameter today -> the adapter's for it, where that is another."""
        claimed = dict.fromkeys((*self.claimed, *(f"{module}.weight" for module in self.modules)))
        return {today: name for name in claimed if (today := self.today(name)) != name}

    def spelt(self, parameter: str) -> str:
        """The adapter's name for what is called `parameter` today."""
        return self._adapters_own.get(parameter, parameter)

    @cached_property
    def _own_modules(self) -> Mapping[str, str]:
        """Name of a module today -> the adapter's for it."""
        return {self.today(f"{m}.weight").removesuffix(".weight"): m for m in self.modules}

    @cached_property
    def _starts(self) -> Mapping[str, str]:
        """Leading parts of names today -> those of the adapter, the longest first."""
        found = {}
        for today, own in self._adapters_own.items():
            one, two = today.split("."), own.split(".")
            while one and two and one[-1] == two[-1]:
                one.pop(), two.pop()
            found[".".join(one)] = ".".join(two)
        return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))

    def _module_spelt(self, module: str) -> str:
        """What the adapter would call a module, that it need not have."""
        if (own := self._own_modules.get(module)) is not None:
            return own
        for today, own in self._starts.items():
            if not today or module.startswith(f"{today}."):
                rest = module.removeprefix(f"{today}.") if today else module
                return f"{own}.{rest}" if own else rest
        return module

    def locate(self, parameter: str) -> tuple[Rows, ...]:
        """Where a parameter in memory lies on disk; () when it is not there under its own name."""
        if self._by_blueprint and self.mapped(parameter) == parameter:
            assert self.blueprint is not None
            if (today := self.today(parameter)) in self.blueprint.state:
                return self.blueprint.origins.get(today, ())
        name = self._on_disk(self._way.rename, parameter)
        if name is None:
            return ()
        shape = self.base.tensors[name].shape
        return (Rows(name, 0, shape[0] if shape else 1),)

    @cached_property
    def origins(self) -> Mapping[str, tuple[Rows, ...]]:
        """Every parameter in memory -> where it lies on disk, by transformers' conversion mapping;
        {} when it does not know the architecture."""
        return {} if self.blueprint is None else self.blueprint.origins

    @property
    def layout(self) -> Mapping[str, tuple[Rows, ...]]:
        """As `origins`, with the stacks that are several tensors on disk, by the rows of their
        matrices."""
        return {} if self.blueprint is None else {**self.blueprint.stacks, **self.origins}

    def disk_name(self, parameter: str) -> str:
        """The name that a parameter which is not on disk gets there."""
        if self._by_blueprint and self.mapped(parameter) == parameter:
            assert self.blueprint is not None
            return self.blueprint.disk_name(self.today(parameter))
        mapped = self.mapped(parameter)
        return stripper(self.lacking_prefix)(mapped) if self.lacking_prefix else mapped

    @property
    def prefix_note(self) -> str:
        """What is done to names, for a note; '' when they are the same."""
        return "" if self._by_blueprint else self._way.note

    @property
    def lacking_prefix(self) -> str:
        """The base-model prefix of names in memory that names on disk lack."""
        if self._by_blueprint and self.blueprint is not None:
            prefix = self.blueprint.prefix
            named = any(self.today(f"{m}.weight").startswith(f"{prefix}.") for m in self.modules)
            stored = any(name.startswith(f"{prefix}.") for name in self.base.tensors)
            return prefix if named and not stored else ""
        return self._way.strips

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

    @cached_property
    def parameters(self) -> Mapping[str, str]:
        """Tensor on disk -> the one parameter in memory that it is, of all for which transformers
        knows one."""
        found = {
            parts[0].tensor: name
            for name, parts in self.origins.items()
            if len(parts) == 1 and self._is_all(parts[0])
        }
        model = self.blueprint
        if model is not None:
            scalars = [name for name, spec in self.base.tensors.items() if not spec.shape]
            for name in scalars:  # they have no rows to follow
                parameter, moved = model.loaded_name(name)
                if moved is None and parameter in model.state:
                    found[name] = parameter
        return found

    def parameter(self, tensor: str) -> str:
        """The name in memory of a tensor on disk; its own where it is not known to have another."""
        return self.parameters.get(tensor, tensor)

    def _is_all(self, part: Rows) -> bool:
        shape = self.base.tensors[part.tensor].shape
        return part.order is None and part.count == (shape[0] if shape else 1)

    def is_whole(self, tensor: str) -> bool:
        """Whether a tensor on disk is a parameter in memory, not joined with others or cut."""
        return not self.origins or tensor in self.parameters

    def is_ignored(self, tensor: str) -> bool:
        """Whether the class in memory is known, and does not load this tensor."""
        model = self.blueprint
        if model is None or tensor in self.parameters:
            return False
        if not model.is_own and type(model.model).__name__ != self.class_name:
            return False
        return model.loaded_name(tensor)[0] not in model.state

    def has_parameter(self, name: str) -> bool:
        """Whether the model in memory is known to have a parameter, on disk or not."""
        return self.blueprint is not None and name in self.blueprint.state

    def loaded_as(self, tensor: str) -> tuple[str, set[str]]:
        """The parameter that a tensor beside those of the base would become ('' when none), and the
        tensors of the base that become the same, by the loader's own mapping; `tensor` itself where
        transformers cannot build the model."""
        model = self.blueprint
        if model is None:
            return tensor, set()
        name, moved = model.loaded_name(tensor)
        if name not in model.state or moved is not None:
            return (name if moved is not None else ""), set()
        return name, {rows.tensor for rows in model.origins.get(name, ())}

    # modules --------------------------------------------------------------------------------------

    def likely_modules(self) -> list[str] | None:
        """Names in memory of what looks like a linear layer, from headers alone; None where names
        on disk are others."""
        if self._by_blueprint:
            return None
        known = {self._on_disk(self._way.rename, f"{m}.weight"): m for m in self.modules}
        inside = f"{self.part}." if self.part else ""
        return [
            known.get(f"{name}.weight") or self._in_memory(name)
            for name in self.disk_modules()
            if name.startswith(inside)
        ]

    def _in_memory(self, module: str) -> str:
        """The name in memory of a module on disk: the inverse of what is done to names."""
        for start, to in self.reading.key_map.items():
            if module == to or module.startswith(f"{to}."):
                return start + module.removeprefix(to)
        rename = self._way.rename
        for prefix in dict.fromkeys((*self.text.prefixes, *self._parts)):
            for name in (f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
                if rename(name) == module:
                    return name
        return module

    def disk_modules(self) -> list[str]:
        """Names on disk of what looks like a linear layer: 2-D weights of numbers or of fp8 codes,
        no embeddings."""
        return [
            name.removesuffix(".weight")
            for name, spec in self.base.tensors.items()
            if name.endswith(".weight")
            and len(spec.shape) == 2
            and (spec.dtype in FLOATING or spec.dtype.startswith("F8_E4"))
            and not self.is_embedding(name.removesuffix(".weight"))
        ]

    def is_embedding(self, module: str) -> bool:
        """Whether a module is called like an embedding."""
        return _EMBEDDING.fullmatch(module) is not None
