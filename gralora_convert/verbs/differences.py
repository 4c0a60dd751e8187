"""What differs between two checkpoints, as modules of the model in memory, and how an adapter can
hold it: linear layers by factors, the rest whole, biases by the bias mode.
"""

import fnmatch
import math
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from gralora_convert.adapters import group, natural
from gralora_convert.base import Architecture, Reading, near_misses, read_parameter
from gralora_convert.delta import Dense, half_ulp, is_finite
from gralora_convert.disk import (
    FLOATING,
    Checkpoint,
    Rows,
    TensorSpec,
    read_rows,
    same_values,
    torch_dtype,
)
from gralora_convert.errors import InvalidAdapterError, MisuseError, UnsupportedError

ROWS = 1024  # of a weight that are looked at together
NUMBERS = 4 * 1024 * 1024  # of a tensor of any shape that are
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

    @property
    def dtype(self) -> torch.dtype:
        """float32 holds the difference of two weights of 16 bits far below their rounding."""
        specs = [held[part.tensor] for part in self.parts for held in (self.before, self.after)]
        short = all(spec.dtype in ("BF16", "F16") for spec in specs)
        return torch.float32 if short else torch.float64

    def delta(self, device: str) -> Dense:
        difference = read_parameter(self.parts, self.after).to(device, self.dtype)
        difference -= read_parameter(self.parts, self.before).to(device)
        if not is_finite(difference):
            raise InvalidAdapterError(
                "the difference of the two weights is not finite", where=self.name,
                hint="Leave it out with `exclude`.",
            )  # fmt: skip
        return Dense(difference.T if self.transposed else difference)

    @property
    def nbytes(self) -> int:
        """Bytes of the difference."""
        rows, columns = self.shape
        return self.dtype.itemsize * rows * columns

    def rounding2(self) -> float | None:
        """The squared norm that rounding the tuned weight to 16 bits accounts for: a twelfth of
        the squared unit in the last place, element by element. None for wider weights."""
        dtype = self.after[self.parts[0].tensor].dtype
        if dtype not in ("BF16", "F16"):
            return None
        weight = read_parameter(self.parts, self.after)
        found = 0.0
        for start in range(0, len(weight), ROWS):
            unit = 2 * half_ulp(weight[start : start + ROWS].float(), torch_dtype(dtype))
            found += float(unit.square_().sum()) / 12
        return found


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of the modules that differ are wanted, by patterns of names; `linear_only`: as linear
    layers without their biases."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    linear_only: bool = False

    def has(self, module: str) -> bool:
        wanted = not self.include or any(fnmatch.fnmatchcase(module, p) for p in self.include)
        return wanted and not any(fnmatch.fnmatchcase(module, p) for p in self.exclude)


class Differences:
    """What differs between two checkpoints, and how an adapter can hold it. `left_out` is the
    relative Frobenius norm of what keeps the base's values."""

    def __init__(
        self, before: Checkpoint, after: Checkpoint, choice: Choice, reading: Reading
    ) -> None:
        self.modules: list[Module] = []
        self.saved: dict[str, TensorSpec] = {}
        self.biases: dict[str, TensorSpec] = {}
        self.notes: list[str] = []
        self.entries: set[str] = set()  # of modules_to_save
        self.left_out = 0.0
        self._left: dict[str, tuple[Rows, ...]] = {}  # that keep the base's values, by name
        self._has_biases = False
        names = Architecture(before, reading=reading)
        old, new = self._paired(before, after, names)
        changed = frozenset(n for n, spec in old.items() if not _same(spec, new[n]))
        modules = {names.parameter(name).rpartition(".")[0] for name in old}
        self.notes += _unmatched(modules, choice, after)
        held: set[str] = set()
        layers, lost = _linear(names, changed, old, new)
        for module in layers:
            held.update(part.tensor for part in module.parts)
            if choice.has(module.name):
                self.modules.append(module)
            else:
                self._left[module.name] = module.parts
        others = [name for name in old if name in changed - (held - lost)]
        if not self.modules:
            raise MisuseError(
                "no linear layer differs" + (" that was chosen" if self._left else ""),
                where=after.path,
                hint=f"Is it the fine-tuned one of {before.source}?",
            )
        self._save(self._holders(others, names, old, new, choice), names, old, new)
        loaded = [_whole(n, old, new) for n in sorted(changed) if not names.is_ignored(n)]
        self._tell_left_out(loaded, old, new)

    def _paired(
        self, before: Checkpoint, after: Checkpoint, names: Architecture
    ) -> tuple[Tensors, Tensors]:
        """The tensors of both checkpoints under the names of the first. Where names differ, those
        are one that are loaded as one; what is not loaded, or a copy that ties make, is no matter.

        Raises:
            UnsupportedError: one of them has more.
        """
        alone = before.tensors.keys() ^ after.tensors.keys()
        if not alone:
            return before.tensors, after.tensors
        others = Architecture(after, reading=names.reading)
        there = {p: name for name, p in others.parameters.items() if name in alone}
        renamed = {
            name: there[parameter]
            for name, parameter in names.parameters.items()
            if name in alone and parameter in there
        }
        matched = {*renamed, *renamed.values()}
        single = [
            (name, held) for held in (names, others) for name in held.base.tensors
            if name in alone and name not in matched
        ]  # fmt: skip
        lost = [name for name, held in single if not _is_spare(held, name)]
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

    def _tell_left_out(self, every: Sequence[Rows], before: Tensors, after: Tensors) -> None:
        """What keeps the base's values though it differs, and how much of `every` that is."""
        if not self._left:
            return
        for found in group(dict.fromkeys(sorted(self._left, key=natural), ())):
            many = found.count > 1
            what = f"{found.name} ({found.count}) differ and were" if many else None
            self.notes.append(f"{what or f'{found.name} differs and was'} left out")
        left = sum(_norm2(rows, before, after) for parts in self._left.values() for rows in parts)
        total = sum(_norm2(rows, before, after) for rows in every)
        self.left_out = (left / total) ** 0.5 if total else 0.0
        self.notes.append(
            f"what was left out is {self.left_out:.3g} of the difference (Frobenius, relative)"
        )

    def _holders(
        self,
        others: Sequence[str],
        names: Architecture,
        before: Tensors,
        after: Tensors,
        choice: Choice,
    ) -> set[str]:
        """The modules that must be saved whole; biases alone are left to the bias mode."""
        holders = set()
        for name in others:
            holder = _holder(names.parameter(name))
            if names.is_ignored(name):
                self.notes.append(f"{name} differs and is nothing that the model loads: left out")
            elif choice.linear_only or not choice.has(holder):
                self._left[name] = (_whole(name, before, after),)
            elif not names.is_whole(name):
                raise _inseparable(name, holder)
            elif not holder:
                raise UnsupportedError(
                    "differs, and is a parameter of the model itself, which no adapter can hold",
                    where=name, hint="Leave it out with `exclude=['']`.",
                )  # fmt: skip
            elif name.endswith(".bias") and not self._is_norm(name, after):
                self._has_biases = True
            else:
                holders.add(holder)
        return holders

    def _save(
        self, holders: Set[str], names: Architecture, before: Tensors, after: Tensors
    ) -> None:
        """Whole tensors: all within a holder for `modules_to_save`, all biases for bias `all`."""
        self.entries = _entries(names, holders)
        left = {rows.tensor for parts in self._left.values() for rows in parts}
        values = {name: (before if name in left else after)[name] for name in after}
        for name, spec in values.items():
            parameters = names.sharing(names.parameter(name))  # PEFT unties a saved embedding
            if names.is_ignored(name) or not any(_is_within(p, self.entries) for p in parameters):
                continue
            if not names.is_whole(name):
                raise _inseparable(name, _holder(names.parameter(name)))
            for parameter in parameters:
                self.saved[parameter] = spec
                if not _is_within(parameter, self.entries):
                    self.entries.add(_holder(parameter))
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
                hint=f"Leave its own out with `exclude={found[:1]}`.",
            )  # fmt: skip
        self.notes.append(
            f"{found[0]}{more}: saved whole, {len(within)} linear layers with it, for parameters "
            f"of its own that differ; `exclude={found[:1]}` leaves its own out"
        )

    @staticmethod
    def _is_norm(name: str, after: Tensors) -> bool:
        weight = after.get(name.removesuffix("bias") + "weight")
        return weight is not None and len(weight.shape) == 1


def _holder(parameter: str) -> str:
    """The module that a parameter in memory belongs to: of a weight that torch computes from
    others, the one that has it."""
    module = parameter.rpartition(".")[0]
    return module.partition(".parametrizations.")[0].removesuffix(".parametrizations")


def _entries(names: Architecture, holders: Set[str]) -> set[str]:
    """The modules that PEFT saves when `modules_to_save` names these: it compares the ends of
    names, without a dot before them. None of them lies within another."""
    paths = [names.parameter(name).split(".")[:-1] for name in names.base.tensors]
    modules = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    found = holders | {m for m in modules if m.endswith(tuple(holders))}
    return {m for m in found if not _is_within(m, found)}


def _is_spare(names: Architecture, tensor: str) -> bool:
    """Whether the model is the same without a tensor: it is not loaded, or one that is tied to it
    has its values."""
    tensors, known = names.base.tensors, names.parameters
    shared = set(names.sharing(known[tensor])) if tensor in known else set()
    return names.is_ignored(tensor) or any(
        other != tensor and parameter in shared and _same(tensors[tensor], tensors[other])
        for other, parameter in known.items()
    )


def _linear(
    names: Architecture, changed: Set[str], before: Tensors, after: Tensors
) -> tuple[list[Module], set[str]]:
    """The linear layers (the output head is none) of which a tensor changed; and the tensors of
    which a changed part is no linear layer."""
    listed = names.linear_modules()
    known, found, lost = None if listed is None else set(listed), list[Module](), set[str]()

    def add(parameter: str, parts: tuple[Rows, ...]) -> bool:
        module = _module(names, known, parameter, parts, before, after)
        found.extend([module] if module else [])
        return module is not None

    for name, spec in before.items():
        if name in changed and names.is_whole(name):
            add(names.parameter(name), (Rows(name, 0, spec.shape[0] if spec.shape else 1),))
    for parameter, parts in names.origins.items():
        if not any(p.tensor in changed and not names.is_whole(p.tensor) for p in parts):
            continue
        if _differs(parts, before, after) and not add(parameter, parts):
            lost.update(part.tensor for part in parts)
    return found, lost


def _module(
    names: Architecture,
    linear: Set[str] | None,
    parameter: str,
    parts: tuple[Rows, ...],
    before: Tensors,
    after: Tensors,
) -> Module | None:
    """A parameter as a linear layer; None when it is none. `linear` are the known ones."""
    name = parameter.removesuffix(".weight")
    pairs = [(before[part.tensor], after[part.tensor]) for part in parts]
    if name == parameter or any(
        len(old.shape) != 2 or old.shape != new.shape or not {old.dtype, new.dtype} <= FLOATING
        for old, new in pairs
    ):
        return None
    if linear is None:
        if names.is_embedding(name) or name.endswith("lm_head"):
            return None
        transposed = names.reading.is_transposed(name) or False
        # one that is not square fits its module only as it is stored: PEFT loads it, or says no
        is_unsaid = names.reading.is_transposed(name) is None and names.may_hold_conv1d
        if is_unsaid and _is_square(pairs[0][0], parts):
            raise UnsupportedError(
                "differs and is square, and whether it is an nn.Linear, a Conv1D or none of them "
                "cannot be told without the architecture", where=name,
                hint="Put the model's config.json beside its weights, or say it: "
                f"`fan_in_fan_out={ {name: False} }` for nn.Linear, "
                f"`fan_in_fan_out={ {name: True} }` for Conv1D, `exclude={[name]}` to leave it "
                "out; * stands for any part of a name.",
            )  # fmt: skip
    elif name not in linear:
        return None
    else:
        transposed = names.kind(name) == "Conv1D"
    rows, columns = sum(part.count for part in parts), pairs[0][0].shape[1]
    return Module(name, parts, (columns, rows) if transposed else (rows, columns), transposed,
                  before, after)  # fmt: skip


def _is_square(spec: TensorSpec, parts: Sequence[Rows]) -> bool:
    return sum(part.count for part in parts) == spec.shape[1]


def _is_within(name: str, modules: Set[str]) -> bool:
    """Whether a parameter or module lies within one of these modules (and is not one of them)."""
    words = name.split(".")
    return any(".".join(words[:end]) in modules for end in range(1, len(words)))


def _inseparable(name: str, holder: str) -> UnsupportedError:
    return UnsupportedError(
        "differs, and is loaded as a part of what no adapter can hold (a stack of experts, or "
        "layers joined into one)",
        where=name, hint=f"Leave it out with `exclude={[holder]}`.",
    )  # fmt: skip


def _differs(parts: Sequence[Rows], before: Tensors, after: Tensors) -> bool:
    """Whether the rows of one parameter differ; others of the same tensor may."""
    return not torch.equal(
        read_parameter(parts, before).double(), read_parameter(parts, after).double()
    )


def _whole(name: str, before: Tensors, after: Tensors) -> Rows:
    """All rows of a tensor, also those that only one has (a resized vocabulary)."""
    return Rows(name, 0, max(_rows(before[name]), _rows(after[name])))


def _rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1


def _norm2(rows: Rows, before: Tensors, after: Tensors) -> float:
    """The squared Frobenius norm of the difference of some rows; those that only one has count
    whole, as do all where the two have nothing in common but the name."""

    def read(spec: TensorSpec, start: int) -> torch.Tensor:
        first, end = (min(place, rows.stop, _rows(spec)) for place in (start, start + step))
        return read_rows(spec, first, end).double().reshape(end - first, *spec.shape[1:])

    old, new = before[rows.tensor], after[rows.tensor]
    step, found = max(1, NUMBERS // max(1, math.prod(new.shape[1:]))), 0.0
    for start in range(rows.start, rows.stop, step):
        a, b = read(old, start), read(new, start)
        common = min(len(a), len(b)) if a.shape[1:] == b.shape[1:] else 0
        parts = b[:common] - a[:common] if common else b[:0], a[common:], b[common:]
        found += sum(float(part.square().sum()) for part in parts)
    return found


def _unmatched(modules: Collection[str], choice: Choice, after: Checkpoint) -> Iterator[str]:
    """Notes on patterns of `exclude` that match nothing; one of `include` is a refusal."""
    for pattern in (*choice.include, *choice.exclude):
        if fnmatch.filter(modules, pattern):
            continue
        close = near_misses(pattern.strip("*"), sorted(modules))
        if pattern in choice.include:
            raise MisuseError(
                f"`include={[pattern]}` matches no module", where=after.path,
                hint=f"A pattern matches whole names, such as '*.q_proj'. {close}".strip(),
            )  # fmt: skip
        yield f"`exclude={[pattern]}` matches no module. {close}".strip()


def _same(one: TensorSpec, other: TensorSpec) -> bool:
    return one.shape == other.shape and same_values(one, other)
