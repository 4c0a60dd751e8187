"""What a base model is beside its names: orientation, ties, kinds of modules.

Config and headers answer most questions. What they cannot answer is asked of transformers: facts
that stand in its source text first (no import), then the model itself (`models/meta.py`, which
imports torch and transformers).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gralora_convert.base.names import Names
from gralora_convert.base.source_text import HEADS

if TYPE_CHECKING:
    from gralora_convert.models import TieFlag

# Blocks of these models are Conv1D throughout, their heads nn.Linear (transformers 5.23).
_CONV1D_FAMILY = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_IN_BLOCK = re.compile(r"(.*\.)?h\.\d+\..*")


@dataclass(frozen=True)
class Architecture(Names):
    """The base as an adapter sees it: where its parameters lie, and what its modules are."""

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

    # ties -----------------------------------------------------------------------------------------

    def sharing(self, parameter: str) -> tuple[str, ...]:
        """All names of one parameter in memory, itself included."""
        if not self._may_be_tied(parameter) or self.blueprint is None:
            return (parameter,)
        return tuple(self.spelt(name) for name in self.blueprint.sharing(self.today(parameter)))

    def _may_be_tied(self, parameter: str) -> bool:
        """By the source text, which calls what is within a part as the whole does."""
        names = parameter, self.today(parameter), *(rows.tensor for rows in self.locate(parameter))
        return any(map(self.text.may_be_tied, names))

    def place(self, parameter: str) -> object:
        """Names of a shared parameter with the same place are one in the model, so that an adapter
        put there serves them all."""
        found = self.blueprint
        return parameter if found is None else found.slot(self.today(parameter))

    def is_one_place(self, one: str, other: str) -> bool:
        return one == other or self.place(one) == self.place(other)

    def is_tied_by_loader(self, parameter: str) -> bool:
        """Whether its sharing is made while loading, by name; so it is taken to be where the model
        cannot be built."""
        found = self.blueprint
        return found is None or found.is_tied_by_loader(self.today(parameter))

    def tie_source(self, parameter: str) -> str | None:
        """The name that the loader ties this one to."""
        found = self.blueprint
        source = None if found is None else found.tie_source(self.today(parameter))
        return None if source is None else self.spelt(source)

    def tie_flag(self, parameters: Collection[str]) -> "TieFlag | None":
        """The flag that ties these, if one alone does and its place in the config is known; the
        config's own where the model cannot be built."""
        from gralora_convert.models import TieFlag

        if self.blueprint is None:
            return TieFlag((), (), frozenset(parameters))
        flag = self.blueprint.tie_flag(map(self.today, parameters))
        if flag is None:
            return None
        tied, embeddings = map(self.spelt, flag.tied), map(self.spelt, flag.embeddings)
        return TieFlag(flag.path, tuple(tied), frozenset(embeddings))

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
        pooled = any("pooler" in name for name in self.base.tensors)
        head_only = self.text.is_head_only(
            self.task_type, self.lacking_prefix, self.base.architectures, pooled=pooled, given=given
        )
        if head_only or self.blueprint is None:
            return []
        return self.blueprint.lacking(set(map(self.today, given)))

    def misnamed(self) -> tuple[list[str], list[str]]:
        """Parameters of the base's own class that no tensor is loaded into, and tensors that are
        loaded into none, where there are both. The model is built for it only where a tensor is
        called what the source text never says, a list has gaps, or the user renames modules."""
        numbers: dict[str, set[int]] = {}
        words = set()
        for name in self.base.tensors:
            start = ""
            for word in name.split("."):
                words.add(word)
                if word.isdecimal():
                    numbers.setdefault(start, set()).add(int(word))
                start += f"{word}."
        gaps = any(max(found) >= len(found) for found in numbers.values())
        strange = gaps or self.reading.key_map or not all(map(self.text.names, words))
        found = self.blueprint if strange else vars(self).get("blueprint")
        if found is None or not found.is_own:
            return [], []
        lacking, strays = found.lacking(()), found.strays
        return (lacking, strays) if lacking and strays else ([], [])

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
        """Whether layers may be Conv1D of transformers; models of diffusers (0.42) have none."""
        return self.text.may_hold_conv1d and not self.base.is_of_diffusers

    def kind(self, module: str) -> str | None:
        """The class name of a module in memory; None when the model cannot be built or lacks it."""
        return None if self.blueprint is None else self.blueprint.kind(self.module_today(module))

    def module_today(self, module: str) -> str:
        """The name of a module in the model of the installed transformers."""
        return self.today(f"{module}.weight").removesuffix(".weight")

    def is_attention_output(self, module: str, disk_module: str) -> bool:
        """Whether a module is the out_proj of torch's MultiheadAttention: by its siblings on disk,
        unless its class says that it is called (RF-DETR and Step3 are stored like one)."""
        parent, _, last = disk_module.rpartition(".")
        siblings = (f"{parent}.in_proj_weight", f"{parent}.q_proj_weight")
        alike = last == "out_proj" and any(name in self.base.tensors for name in siblings)
        return alike and self.kind(module) in (None, "MultiheadAttention")

    def is_uncalled(self, module: str) -> bool:
        """Whether the model's forward never calls what has the layer's name, so that an adapter
        there has no effect: it reads the weight (Mamba's `dt_proj`, the attention of WavLM), or
        calls the layer out of a plain list (the mask head of MaskFormer)."""
        if self.text.keeps_lists and self.blueprint:
            if self.blueprint.is_listed(self.module_today(module)):
                return True
        leaf = module.rpartition(".")[2]
        if all(leaf != layer for _, layer in self.text.uncalled) or self.blueprint is None:
            return False
        holder = self.module_today(module).rpartition(".")[0]
        return any((name, leaf) in self.text.uncalled for name in self.blueprint.classes(holder))

    def linear_weights(self) -> set[str]:
        """Names on disk of the weights of all linear layers, heads that are tied included; those
        that look like one where the model cannot be built."""
        modules = self.linear_modules(head=True)
        if modules is None:
            return {f"{module}.weight" for module in self.disk_modules()}
        return {
            next((rows.tensor for rows in self.locate(weight)), self.disk_name(weight))
            for weight in (f"{module}.weight" for module in modules)
        }

    def linear_modules(self, *, head: bool = False) -> list[str] | None:
        """Names in memory of all nn.Linear and Conv1D, `head`: with the output embedding; None when
        the model cannot be built."""
        if self.blueprint is None:
            return None
        found, inside = self.blueprint.linear(head=head), f"{self.part}."
        if within := self.blueprint.part:
            return [self._module_spelt(name) for name in found if name.startswith(f"{within}.")]
        if not self.part or any(self.blueprint.has(self.module_today(m)) for m in self.modules):
            return [self._module_spelt(name) for name in found]
        return [name.removeprefix(inside) for name in found if name.startswith(inside)]
