"""The base's model without its weights: built by transformers on the meta device.

It answers what config and headers cannot: which class a module has, which parameters are one and
the same, and where the rows of each parameter lie on disk. transformers renames tensors while it
loads them, and for some architectures cuts, joins or permutes them (core_model_loading.py,
conversion_mapping.py, 5.23): renames are asked key by key, from the real names on disk, and where
values move, every row is followed through the conversion.
"""

import copy
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from gralora_convert.disk import Checkpoint, Rows
from gralora_convert.models.building import linear_modules, models
from gralora_convert.models.foreign import ForeignError, foreign, quiet
from gralora_convert.models.tying import TieFlag, tie_flag

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming


class Blueprint:
    """The model of one class, on the meta device, beside the checkpoint that it would load."""

    def __init__(self, model: torch.nn.Module, base: Checkpoint) -> None:
        self.model, self.base = model, base
        self.part = ""  # of the model, that alone was adapted: names are meant within it
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        self.state: dict[str, torch.Tensor] = dict(model.state_dict())

    @classmethod
    def build(
        cls,
        base: Checkpoint,
        class_names: Sequence[str],
        modules: Sequence[str],
        *,
        trust_remote_code: bool = False,
    ) -> "Blueprint | None":
        """The first of the classes that has all `modules`, as parts of it of the first class may,
        else the one that has most of them; None when transformers can build none of them. What is a
        part of the base's own class is that part of it."""
        best: tuple[int, Blueprint] | None = None
        with quiet():
            for model in models(base, class_names, trust_remote_code):
                found = cls(model, base)
                is_first = type(model).__name__ in class_names[:1]
                if not is_first and found._enter_part(class_names[:1], modules):
                    return found
                hits = found._hits(modules)
                if best is None or hits > best[0]:
                    best = hits, found
                if hits == len(modules):
                    break
            if best is None:
                return None
            name, own = type(best[1].model).__name__, base.architectures
            for model in (
                models(base, own, trust_remote_code) if modules and name not in own else ()
            ):
                whole = cls(model, base)
                if whole.is_own and whole._enter_part([name], modules):
                    return whole
        return best[1]

    @property
    def is_own(self) -> bool:
        """Whether the model is of the class that the base names as its own."""
        return type(self.model).__name__ in self.base.architectures

    def _hits(self, modules: Sequence[str]) -> int:
        """How many of the modules it has; those of a part that was built alone it must load."""
        names = [self.today(f"{module}.weight") for module in modules]
        if self.is_own:
            return sum(name is not None for name in names)
        return sum(name in self.loaded for name in names)

    def _enter_part(self, classes: Sequence[str], modules: Sequence[str]) -> bool:
        """Takes names as within the part of these classes that has all `modules`, if it is one."""
        holding = []
        for name, inner in self._modules.items():
            if name and type(inner).__name__ in classes:
                self.part = name
                if self._hits(modules) == len(modules):
                    holding.append(name)
        self.part = holding[0] if len(holding) == 1 else ""
        return self.part != ""

    @property
    def config(self) -> dict[str, object]:
        """The config that the model was built from, as transformers reads it."""
        config: Any = self.model.config
        return dict(config.to_dict())

    # modules ------------------------------------------------------------------------------------

    @cached_property
    def _modules(self) -> Mapping[str, torch.nn.Module]:
        return dict(self.model.named_modules())

    def has(self, module: str) -> bool:
        return module in self._modules

    def kind(self, module: str) -> str | None:
        """`Linear` (or a subclass of it), `Conv1D`, or the class's own name; None if unknown."""
        found = self._modules.get(module)
        if found is None:
            return None
        parent = self._modules.get(module.rpartition(".")[0])
        if isinstance(parent, torch.nn.MultiheadAttention):
            return "MultiheadAttention"
        return "Linear" if isinstance(found, torch.nn.Linear) else type(found).__name__

    def classes(self, module: str) -> tuple[str, ...]:
        """The names of a module's class and of those that it derives from."""
        found = self._modules.get(module)
        return () if found is None else tuple(cls.__name__ for cls in type(found).__mro__)

    def is_listed(self, module: str) -> bool:
        """Whether its parent keeps a module in a plain list, too, where nobody replaces it."""
        found, parent = self._modules.get(module), self._modules.get(module.rpartition(".")[0])
        lists = [held for held in vars(parent).values() if isinstance(held, list | tuple)]
        return found is not None and any(item is found for held in lists for item in held)

    def linear(self, *, head: bool) -> list[str]:
        """Names of all nn.Linear and Conv1D; without `head`, but the output embedding."""
        return linear_modules(self.model, self._modules, head=head)

    # ties ---------------------------------------------------------------------------------------

    @cached_property
    def _groups(self) -> Mapping[str, tuple[str, ...]]:
        owners: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners[id(parameter)].append(name)
        shared = [tuple(names) for names in owners.values() if len(names) > 1]
        return {name: names for names in shared for name in names}

    def sharing(self, parameter: str) -> tuple[str, ...]:
        """All names of one parameter in memory: itself, that which the loader ties it to, whose
        value it has when it lies on disk, and the others in the model's order."""
        source, names = self._tied_keys.get(parameter), self._groups.get(parameter, ())
        return tuple(dict.fromkeys((parameter, *(n for n in names if n == source), *names)))

    def slot(self, parameter: str) -> tuple[int, str]:
        """Names with the same slot are one place in memory: what PEFT puts there serves them all.

        PEFT replaces a module in its parent, so one that has two parents is adapted in one only.
        """
        module, _, leaf = parameter.rpartition(".")
        parent, _, name = module.rpartition(".")
        owner = self.model.get_submodule(parent) if parent else self.model
        return id(owner), f"{name}.{leaf}"

    def is_tied_by_loader(self, parameter: str) -> bool:
        """Whether the sharing is made while loading, by name, so that two differing tensors on
        disk stay two (transformers 5.23, `PreTrainedModel.tie_weights`)."""
        return parameter in self._tied_keys

    @cached_property
    def _tied_keys(self) -> Mapping[str, str]:
        """Name that is tied -> name that it is tied to."""
        found = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {str(target): str(source) for target, source in found.items()}

    def tie_source(self, parameter: str) -> str | None:
        return self._tied_keys.get(parameter)

    def tie_flag(self, parameters: Iterable[str]) -> TieFlag | None:
        """The flag that ties these, if one alone does and its place in the config is known."""
        wanted = {p for name in parameters for p in self.sharing(name)} & self._tied_keys.keys()
        return tie_flag(self.model, wanted)

    @property
    def own(self) -> Mapping[str, torch.Tensor]:
        """All that the adapted part holds, or the whole."""
        inside = f"{self.part}." if self.part else ""
        return {name: held for name, held in self.state.items() if name.startswith(inside)}

    # names --------------------------------------------------------------------------------------

    @cached_property
    def _mapping(self) -> tuple[list["WeightRenaming"], list["WeightConverter"]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(self.model)
        return (
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
        )

    def loaded_name(self, key: str) -> tuple[str, str | None]:
        """The parameter that a tensor on disk becomes, and the pattern of the conversion that
        moves its values (None: they stay); after transformers' own loading loop."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, *self._mapping, self.prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.state)
        return name, pattern

    def today(self, parameter: str) -> str | None:
        """The name of a parameter in this model, which another release of transformers may have
        called otherwise: what the loader makes of a checkpoint of that release. None when there is
        no such parameter, or its values are stored in another form."""
        if self.part:
            parameter = f"{self.part}.{parameter}"
        if parameter in self.state:
            return parameter
        name, moved = self.loaded_name(parameter)
        return name if moved is None and name in self.state else None

    @cached_property
    def loaded(self) -> frozenset[str]:
        """Every parameter that some tensor on disk has a part in."""
        _, converters = self._mapping
        targets_of = {p: c.target_patterns for c in converters for p in c.source_patterns}
        found = set()
        for key in self.base.tensors:
            name, pattern = self.loaded_name(key)
            found.add(name)
            targets = [] if pattern is None else targets_of[pattern]
            found.update(name.replace(targets[0], target) for target in targets)
        return frozenset(found)

    def lacking(self, given: Iterable[str]) -> list[str]:
        """Parameters that neither the disk nor `given` has, under any of their names."""
        known = self.loaded.union(given)
        return [
            name
            for name, _ in self.model.named_parameters()
            if known.isdisjoint(self.sharing(name))
        ]

    @cached_property
    def strays(self) -> list[str]:
        """Tensors on disk that are no parameter or buffer of the model, and that it does not say
        to ignore."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return [
            key
            for key in self.base.tensors
            if self.loaded_name(key)[0] not in self.state
            and not any(re.search(pattern, key) for pattern in patterns)
            and "rotary_emb.inv_freq" not in key
        ]

    @cached_property
    def origins(self) -> Mapping[str, tuple[Rows, ...]]:
        """Name of a parameter -> where its rows lie on disk. Parameters whose values do not lie
        there as whole rows are left out."""
        return self._read[0] | self._moved(lambda value: value.ndim <= 2)  # no stack of experts

    @cached_property
    def stacks(self) -> Mapping[str, tuple[Rows, ...]]:
        """Stack of matrices (experts) -> where its rows, one matrix after the other, lie on disk,
        where that is not one tensor."""
        return self._moved(lambda value: value.ndim == 3)

    def _moved(self, are_meant: Callable[[torch.Tensor], bool]) -> dict[str, tuple[Rows, ...]]:
        found: dict[str, tuple[Rows, ...]] = {}
        for name, keys in self._read[1].items():
            if are_meant(self.state[name]):
                found |= self._followed(name, keys)
        return found

    @cached_property
    def _read(self) -> tuple[dict[str, tuple[Rows, ...]], dict[str, list[tuple[str, str]]]]:
        """Parameters that are one tensor on disk; and others, by the tensors and patterns of the
        conversion that makes them."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, tuple[Rows, ...]] = {}
        moved: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for key in sorted(self.base.tensors, key=dot_natural_key):
            name, pattern = self.loaded_name(key)
            if name not in self.state:
                continue
            if pattern is not None:
                moved[name].append((key, pattern))
            elif self.base.tensors[key].shape:
                found.setdefault(name, (Rows(key, 0, self.base.tensors[key].shape[0]),))
        return found, moved

    def _followed(
        self, first: str, keys: Sequence[tuple[str, str]]
    ) -> Mapping[str, tuple[Rows, ...]]:
        """Origins of the parameters that one conversion makes of `keys`: their rows are numbered,
        sent through it, and recognised."""
        _, converters = self._mapping
        pattern_of = {pattern: c for c in converters for pattern in c.source_patterns}
        converter = copy.deepcopy(pattern_of[keys[0][1]])
        starts, names, position = [], [], 0
        for key, pattern in keys:
            shape = self.base.tensors[key].shape
            if not shape:
                return {}
            rows = torch.arange(position, position + shape[0], dtype=torch.int64)
            numbered = rows.view(-1, *[1] * (len(shape) - 1))
            converter.add_tensor(first, key, pattern, numbered)
            starts.append(position)
            names.append(key)
            position += shape[0]
        try:
            with foreign():
                made = converter.convert(first, model=self.model, config=self.model.config)
        except ForeignError:
            return {}
        found = {}
        for name, value in made.items():
            tensor = value[0] if isinstance(value, list) else value
            if name in self.state and tuple(tensor.shape) in self._numbered_shapes(name):
                found[name] = tuple(_segments(tensor.flatten().tolist(), starts, names))
        return found

    def _numbered_shapes(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Of a parameter by its rows, and of a stack by the rows of its matrices."""
        shape = tuple(self.state[name].shape)
        rows = shape[:1] + (1,) * (len(shape) - 1)
        return (rows, (*shape[:2], 1)) if len(shape) == 3 else (rows,)

    def disk_name(self, parameter: str) -> str:
        """The name under which a parameter that is not on disk is loaded when it is put there."""
        candidates = [
            self._reverted(parameter), parameter, parameter.removeprefix(f"{self.prefix}."),
        ]  # fmt: skip
        for name in candidates:
            if name is not None and self.loaded_name(name)[0] == parameter:
                return name
        return parameter

    def _reverted(self, parameter: str) -> str | None:
        renamings, _ = self._mapping
        try:
            with foreign():
                reverse = [entry.reverse_transform() for entry in reversed(renamings)]
                for entry in reverse:
                    parameter, _ = entry.rename_source_key(parameter)
        except ForeignError:
            return None
        return parameter

    def outer_name(self, key: str) -> str | None:
        """The name of a tensor on disk with the base-model prefix put before it, None when it
        would be loaded elsewhere then."""
        name = f"{self.prefix}.{key}"
        return name if self.loaded_name(name) == self.loaded_name(key) else None


def _segments(rows: Sequence[int], starts: Sequence[int], names: Sequence[str]) -> Iterator[Rows]:
    """Runs of rows on disk that hold a parameter whose row i is number `rows[i]`."""
    pairs = sorted((number, row) for row, number in enumerate(rows))
    first = 0
    while first < len(pairs):
        source = bisect_right(starts, pairs[first][0]) - 1
        limit = starts[source + 1] if source + 1 < len(starts) else pairs[-1][0] + 1
        stop = first + 1
        while (
            stop < len(pairs) and pairs[stop][0] < limit
            and pairs[stop][0] == pairs[stop - 1][0] + 1
        ):  # fmt: skip
            stop += 1
        order = tuple(row for _, row in pairs[first:stop])
        start = pairs[first][0] - starts[source]
        if order == tuple(range(order[0], order[0] + len(order))):
            yield Rows(names[source], start, stop - first, order[0])
        else:
            yield Rows(names[source], start, stop - first, 0, order)
        first = stop
