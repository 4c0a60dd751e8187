"""What differs between two checkpoints, as modules of the model in memory, and how an adapter can
hold it: linear layers by factors, the rest whole, biases by the bias mode.
"""

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from gralora_convert.base import Architecture, near_misses, read_parameter
from gralora_convert.delta import Dense, half_ulp, is_finite
from gralora_convert.disk import FLOATING, Checkpoint, Rows, TensorSpec, same_values, torch_dtype
from gralora_convert.errors import InvalidAdapterError, MisuseError, UnsupportedError

__all__ = [
    "Differences",
    "Module",
]


ROWS = 1024  # of a weight that are looked at together
Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer that differs: its name in memory, where its weight lies in both checkpoints,
    and its (out, in); `transposed`: stored (in, out)."""

    name: str
    parts: tuple[Rows, ...]
    shape: tuple[int, int]
    transposed: bool
    before: Tensors = field(repr=False)
    after: Tensors = field(repr=False)

    def delta(self, device: str) -> Dense:
        difference = read_parameter(self.parts, self.after).to(device).double()
        difference -= read_parameter(self.parts, self.before).to(device)
        if not is_finite(difference):
            raise InvalidAdapterError(
                "the difference of the two weights is not finite", where=self.name,
                hint="Leave it out with --exclude.",
            )  # fmt: skip
        return Dense(difference.T if self.transposed else difference)

    @property
    def nbytes(self) -> int:
        """Bytes of the difference."""
        rows, columns = self.shape
        return 8 * rows * columns

    def rounding2(self) -> float | None:
        """The squared norm that rounding the tuned weight to 16 bits accounts for: a twelfth of
        the squared unit in the last place, element by element. None for wider weights."""
        dtype = self.after[self.parts[0].tensor].dtype
        if dtype not in ("BF16", "F16"):
            return None
        weight = read_parameter(self.parts, self.after)
        found = 0.0
        for start in range(0, len(weight), ROWS):
            unit = 2 * half_ulp(weight[start : start + ROWS].double(), torch_dtype(dtype))
            found += float(unit.square().sum()) / 12
        return found


class Differences:
    """What differs between two checkpoints, and how an adapter can hold it."""

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        include: Sequence[str],
        exclude: Sequence[str],
        trust_remote_code: bool,
    ) -> None:
        self.modules: list[Module] = []
        self.saved: dict[str, TensorSpec] = {}
        self.biases: dict[str, TensorSpec] = {}
        self.notes: list[str] = []
        self.entries: set[str] = set()  # of modules_to_save
        self._left_out: set[str] = set()  # tensors that differ and keep the base's values
        self._has_biases = False
        names = Names(Architecture(before, trust_remote_code=trust_remote_code))
        old, new = self._paired(before, after, names, trust_remote_code)
        changed = frozenset(n for n, spec in old.items() if not _same(spec, new[n]))
        modules = {names.parameter(name).rpartition(".")[0] for name in old}
        self.notes += _unmatched(modules, include, exclude, after)
        held: set[str] = set()
        for module in names.linear(changed, old, new):
            held.update(part.tensor for part in module.parts)
            if _chosen(module.name, include, exclude):
                self.modules.append(module)
            else:
                self._leave_out(module.name, *(part.tensor for part in module.parts))
        others = [name for name in old if name in changed - (held - names.lost)]
        if not self.modules:
            raise MisuseError(
                "no linear layer differs" + (" that was chosen" if self.notes else ""),
                where=after.path,
                hint=f"Is it the fine-tuned one of {before.source}?",
            )
        self._save(self._holders(others, names, new, exclude), names, old, new)

    def _paired(
        self, before: Checkpoint, after: Checkpoint, names: "Names", trust_remote_code: bool
    ) -> tuple[Tensors, Tensors]:
        """The tensors of both checkpoints under the names of the first. Where names differ, those
        are one that are loaded as one; what is not loaded, or a copy that ties make, is no matter.

        Raises:
            UnsupportedError: one of them has more.
        """
        alone = before.tensors.keys() ^ after.tensors.keys()
        if not alone:
            return before.tensors, after.tensors
        others = Names(Architecture(after, trust_remote_code=trust_remote_code))
        there = {others.parameter(n): n for n in after.tensors if n in alone and others.knows(n)}
        renamed = {
            name: there[names.parameter(name)]
            for name in before.tensors
            if name in alone and names.knows(name) and names.parameter(name) in there
        }
        matched = {*renamed, *renamed.values()}
        single = [
            (name, held) for held in (names, others) for name in held.architecture.base.tensors
            if name in alone and name not in matched
        ]  # fmt: skip
        lost = [name for name, held in single if not held.is_spare(name)]
        if lost:
            raise UnsupportedError(
                f"{len(lost)} tensors are in one checkpoint only, first {min(lost)}",
                where=after.path,
                hint="Extract from a model with the same tensors as its base.",
            )
        spare = sorted({name for name, _ in single})
        if spare:
            more = f" and {len(spare) - 1} more" if spare[1:] else ""
            self.notes.append(f"{spare[0]}{more}: in one checkpoint only, and not needed: left out")
        kept = before.tensors.keys() - set(spare)
        old = {name: spec for name, spec in before.tensors.items() if name in kept}
        return old, {name: after.tensors[renamed.get(name, name)] for name in old}

    def _leave_out(self, what: str, *tensors: str) -> None:
        self.notes.append(f"{what} differs and was left out")
        self._left_out.update(tensors)

    def _holders(
        self, others: Sequence[str], names: "Names", after: Tensors, exclude: Sequence[str]
    ) -> set[str]:
        """The modules that must be saved whole; biases alone are left to the bias mode."""
        holders = set()
        for name in others:
            holder = names.holder(name)
            if names.is_ignored(name):
                self.notes.append(f"{name} differs and is nothing that the model loads: left out")
            elif not _chosen(holder, (), exclude):
                self._leave_out(name, name)
            elif not names.is_whole(name):
                raise _inseparable(name, holder)
            elif not holder:
                raise UnsupportedError(
                    "differs, and is a parameter of the model itself, which no adapter can hold",
                    where=name, hint="Leave it out with --exclude ''.",
                )  # fmt: skip
            elif name.endswith(".bias") and not self._is_norm(name, after):
                self._has_biases = True
            else:
                holders.add(holder)
        return holders

    def _save(self, holders: Set[str], names: "Names", before: Tensors, after: Tensors) -> None:
        """Whole tensors: all within a holder for `modules_to_save`, all biases for bias `all`."""
        self.entries = names.entries(holders)
        values = {name: (before if name in self._left_out else after)[name] for name in after}
        for name, spec in values.items():
            parameters = names.sharing(name)
            if names.is_ignored(name) or not any(_is_within(p, self.entries) for p in parameters):
                continue
            if not names.is_whole(name):
                raise _inseparable(name, names.holder(name))
            for parameter in parameters:
                self.saved[parameter] = spec
                if not _is_within(parameter, self.entries):
                    self.entries.add(names.holder(name, parameter))
                if spec.shape != before[name].shape:
                    self.notes.append(
                        f"{parameter} has shape {spec.shape}, {before[name].shape} in the "
                        "base: PEFT loads the adapter into a model resized to that"
                    )
        for name, spec in values.items() if self._has_biases else ():
            parameter = names.parameter(name)
            if name.endswith(".bias") and names.is_whole(name) and parameter not in self.saved:
                self.biases[parameter.removesuffix(".bias")] = spec
        self._give_up_layers()

    def _give_up_layers(self) -> None:
        """Linear layers within a module that is saved whole are saved with it."""
        within = [m for m in self.modules if _is_within(m.name, self.entries)]
        self.modules = [module for module in self.modules if module not in within]
        if not within:
            return
        found = sorted(e for e in self.entries if any(_is_within(m.name, {e}) for m in within))
        more = f" and {len(found) - 1} more" if found[1:] else ""
        if not self.modules:
            raise UnsupportedError(
                f"has parameters of its own that differ{more and f' ({more[5:]} have, too)'}: it "
                "would be saved whole, and no linear layer that differs is left", where=found[0],
                hint=f"Leave its own out with --exclude {found[0]!r}.",
            )  # fmt: skip
        self.notes.append(
            f"{found[0]}{more}: saved whole, {len(within)} linear layers with it, for parameters "
            f"of its own that differ; --exclude {found[0]!r} leaves its own out"
        )

    @staticmethod
    def _is_norm(name: str, after: Tensors) -> bool:
        weight = after.get(name.removesuffix("bias") + "weight")
        return weight is not None and len(weight.shape) == 1


class Names:
    """Names on disk as names in memory, by transformers where it knows the architecture."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._origins = architecture.origins
        tensors = architecture.base.tensors
        self._parameters = {
            found[0].tensor: name
            for name, found in self._origins.items()
            if len(found) == 1 and _is_whole(found[0], tensors)
        }
        model = self.blueprint = architecture.blueprint
        if model is not None:
            scalars = [name for name, spec in tensors.items() if not spec.shape]
            loaded = {name: model.loaded_name(name) for name in scalars}  # no rows to follow
            self._parameters |= {
                name: parameter
                for name, (parameter, moved) in loaded.items()
                if moved is None and parameter in model.state
            }
        known = architecture.linear_modules()
        self._linear = None if known is None else set(known)
        self.lost: set[str] = set()  # tensors of which a changed part is no linear layer

    def parameter(self, name: str) -> str:
        return self._parameters.get(name, name)

    def sharing(self, name: str) -> tuple[str, ...]:
        """All names in memory of a tensor: PEFT unties a saved embedding from its head, so that
        both must be saved."""
        return self.architecture.sharing(self.parameter(name))

    def holder(self, name: str, parameter: str | None = None) -> str:
        """The module that a tensor belongs to (under one of its names in memory): of a weight that
        torch computes from others, the one that has it."""
        path = self.parameter(name) if parameter is None else parameter
        return (
            path.rpartition(".")[0]
            .partition(".parametrizations.")[0]
            .removesuffix(".parametrizations")
        )

    def entries(self, holders: Set[str]) -> set[str]:
        """The modules that PEFT saves when `modules_to_save` names these: it compares the ends of
        names, without a dot before them. None of them lies within another."""
        paths = [self.parameter(name).split(".")[:-1] for name in self.architecture.base.tensors]
        modules = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
        found = holders | {m for m in modules if m.endswith(tuple(holders))}
        return {m for m in found if not _is_within(m, found)}

    def knows(self, name: str) -> bool:
        """Whether a tensor on disk is known to be one parameter in memory."""
        return name in self._parameters

    def is_spare(self, name: str) -> bool:
        """Whether the model is the same without a tensor: it is not loaded, or one that is tied to
        it has its values."""
        tensors = self.architecture.base.tensors
        shared = set(self.sharing(name)) if self.knows(name) else set()
        return self.is_ignored(name) or any(
            other != name and parameter in shared and _same(tensors[name], tensors[other])
            for other, parameter in self._parameters.items()
        )

    def is_ignored(self, name: str) -> bool:
        """Whether the class that the config names is known, and does not load this tensor."""
        if self.blueprint is None or name in self._parameters:
            return False
        if type(self.blueprint.model).__name__ not in self.architecture.base.architectures:
            return False
        return self.blueprint.loaded_name(name)[0] not in self.blueprint.state

    def is_whole(self, name: str) -> bool:
        """Whether a tensor on disk is a parameter in memory, not joined with others or cut."""
        return not self._origins or name in self._parameters

    def linear(self, changed: Set[str], before: Tensors, after: Tensors) -> Iterator[Module]:
        """The linear layers (the output head is none) of which a tensor changed."""
        for name, spec in before.items():
            if name in changed and self.is_whole(name):
                whole = (Rows(name, 0, spec.shape[0] if spec.shape else 1),)
                module = self._module(self.parameter(name), whole, before, after)
                if module is not None:
                    yield module
        for parameter, parts in self._origins.items():
            if any(p.tensor in changed and not self.is_whole(p.tensor) for p in parts):
                if not _differs(parts, before, after):
                    continue
                module = self._module(parameter, parts, before, after)
                if module is not None:
                    yield module
                else:
                    self.lost.update(part.tensor for part in parts)

    def _module(
        self, parameter: str, parts: tuple[Rows, ...], before: Tensors, after: Tensors
    ) -> Module | None:
        name = parameter.removesuffix(".weight")
        pairs = [(before[part.tensor], after[part.tensor]) for part in parts]
        if name == parameter or any(
            len(old.shape) != 2 or old.shape != new.shape or not {old.dtype, new.dtype} <= FLOATING
            for old, new in pairs
        ):
            return None
        if self._linear is None:
            is_linear = not self.architecture.is_embedding(name) and not name.endswith("lm_head")
        else:
            is_linear = name in self._linear
        if not is_linear:
            return None
        rows, columns = sum(part.count for part in parts), pairs[0][0].shape[1]
        transposed = self.architecture.kind(name) == "Conv1D"
        shape = (columns, rows) if transposed else (rows, columns)
        return Module(name, parts, shape, transposed, before, after)


def _is_within(name: str, modules: Set[str]) -> bool:
    """Whether a parameter or module lies within one of these modules (and is not one of them)."""
    words = name.split(".")
    return any(".".join(words[:end]) in modules for end in range(1, len(words)))


def _inseparable(name: str, holder: str) -> UnsupportedError:
    return UnsupportedError(
        "differs, and is loaded as a part of what no adapter can hold (a stack of experts, or "
        "layers joined into one)",
        where=name, hint=f"Leave it out with --exclude {holder!r}.",
    )  # fmt: skip


def _is_whole(part: Rows, tensors: Tensors) -> bool:
    shape = tensors[part.tensor].shape
    return part.order is None and part.count == (shape[0] if shape else 1)


def _differs(parts: Sequence[Rows], before: Tensors, after: Tensors) -> bool:
    """Whether the rows of one parameter differ; others of the same tensor may."""
    return not torch.equal(
        read_parameter(parts, before).double(), read_parameter(parts, after).double()
    )


def _chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


def _unmatched(
    modules: Collection[str], include: Sequence[str], exclude: Sequence[str], after: Checkpoint
) -> Iterator[str]:
    """Notes on patterns of `exclude` that match nothing; one of `include` is a refusal."""
    for pattern in (*include, *exclude):
        if fnmatch.filter(modules, pattern):
            continue
        close = near_misses(pattern.strip("*"), sorted(modules))
        if pattern in include:
            raise MisuseError(
                f"--include {pattern!r} matches no module", where=after.path,
                hint=f"A pattern matches whole names, such as '*.q_proj'. {close}".strip(),
            )  # fmt: skip
        yield f"--exclude {pattern!r} matches no module. {close}".strip()


def _same(one: TensorSpec, other: TensorSpec) -> bool:
    return one.shape == other.shape and same_values(one, other)
