"""What differs between two checkpoints, as modules of the model in memory, and how an adapter can
hold it: linear layers by factors, the rest whole, biases by the bias mode.
"""

import fnmatch
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

from gralora_convert.adapters import group, natural
from gralora_convert.base import (
    Architecture,
    Reading,
    different_settings,
    near_misses,
    written_settings,
)
from gralora_convert.disk import (
    Checkpoint,
    Rows,
    TensorSpec,
    read_rows,
)
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.verbs.layers import Module, Tensors, linear_layers
from gralora_convert.verbs.pairing import as_tuned, paired, same

NUMBERS = 4 * 1024 * 1024  # of a tensor that are looked at together


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


@dataclass(slots=True)
class Differences:
    """What differs between two checkpoints, and how an adapter can hold it: `modules` by factors,
    `saved` whole (`entries` of modules_to_save), `biases` by the bias mode.

    `kept` are rows that keep the base's values, by name, `left_out` the relative Frobenius norm of
    what differs there. Names are those of `names`, in the class of the tuned model; `config` is the
    tuned model's where it says what the base's does not.
    """

    names: Architecture
    before: Tensors
    after: Tensors
    modules: list[Module] = field(default_factory=list)
    saved: dict[str, TensorSpec] = field(default_factory=dict)
    biases: dict[str, TensorSpec] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    entries: set[str] = field(default_factory=set)
    kept: dict[str, tuple[Rows, ...]] = field(default_factory=dict)
    left_out: float = 0.0
    config: Mapping[str, object] = field(default_factory=dict)


def differences(
    before: Checkpoint, after: Checkpoint, choice: Choice, reading: Reading
) -> Differences:
    """What differs of what `choice` wants, and what of it an adapter holds how.

    Raises:
        MisuseError: no linear layer that was chosen differs, or a pattern matches nothing.
        UnsupportedError: something differs that no adapter can hold.
    """
    names = as_tuned(before, after, reading)
    tuned = Architecture(after, reading=reading)
    pair = paired(names, tuned)
    old, new = pair.before, pair.after
    found = Differences(names, old, new, notes=pair.notes)
    changed = frozenset(n for n, spec in old.items() if not same(spec, new[n]))
    modules = {names.parameter(name).rpartition(".")[0] for name in old}
    found.notes += _unmatched(modules, choice, after)
    held: set[str] = set()
    layers, lost = linear_layers(names, changed, old, new)
    for module in layers:
        held.update(part.tensor for part in module.parts)
        if choice.has(module.name):
            found.modules.append(module)
        else:
            found.kept[module.name] = module.parts
    others = [name for name in old if name in changed - (held - lost)]
    if not found.modules:
        raise MisuseError(
            "no linear layer differs" + (" that was chosen" if found.kept else ""),
            where=after.path,
            hint=f"Is it the fine-tuned one of {before.source}?",
        )
    holders, has_biases = _holders(found, others, choice)
    _save(found, holders, has_biases=has_biases)
    _add(found, pair.added, choice)
    _give_up_layers(found)
    _compare_configs(found, tuned)
    loaded = [_whole(n, old, new) for n in sorted(changed) if not names.is_ignored(n)]
    _tell_left_out(found, loaded)
    return found


def _add(found: Differences, added: Mapping[str, tuple[str, TensorSpec]], choice: Choice) -> None:
    """What the base has no tensor of (a head) is saved whole, by the module that is new."""
    for parameter, (module, spec) in added.items():
        if choice.linear_only or not choice.has(_holder(parameter)):
            found.notes.append(f"{parameter} is new in the tuned model and was left out")
            continue
        found.saved[parameter] = spec
        found.entries.add(module)
        found.notes.append(f"{parameter} is new in the tuned model: saved whole, {spec.shape}")


def _compare_configs(found: Differences, tuned: Architecture) -> None:
    """What the tuned model's config says otherwise, as transformers reads both where it can: no
    adapter holds that."""
    names, after = found.names, tuned.base
    settings = written_settings(names.base, after)
    if settings and names.blueprint is not None and tuned.blueprint is not None:
        settings = different_settings(names.blueprint.config, tuned.blueprint.config)
    if (settings or names.class_name) and after.model_type == names.base.model_type:
        found.config = after.config
    found.notes += [
        f"{setting}, which PEFT and servers take; `merge` takes the config.json beside the adapter"
        for setting in settings
    ]


def _tell_left_out(found: Differences, every: Sequence[Rows]) -> None:
    """What keeps the base's values though it differs, and how much of `every` that is."""
    if not found.kept:
        return
    for one in group(dict.fromkeys(sorted(found.kept, key=natural), ())):
        many = one.count > 1
        what = f"{one.name} ({one.count}) differ and were" if many else None
        found.notes.append(f"{what or f'{one.name} differs and was'} left out")
    left = sum(
        _norm2(rows, found.before, found.after) for parts in found.kept.values() for rows in parts
    )
    total = sum(_norm2(rows, found.before, found.after) for rows in every)
    found.left_out = (left / total) ** 0.5 if total else 0.0
    found.notes.append(
        f"what was left out is {found.left_out:.3g} of the difference (Frobenius, relative)"
    )


def _holders(found: Differences, others: Sequence[str], choice: Choice) -> tuple[set[str], bool]:
    """The modules that must be saved whole; and whether biases alone differ, which are left to the
    bias mode."""
    names, holders, has_biases = found.names, set[str](), False
    for name in others:
        holder = _holder(names.parameter(name))
        if names.is_ignored(name):
            found.notes.append(f"{name} differs and is nothing that the model loads: left out")
        elif choice.linear_only or not choice.has(holder):
            found.kept[name] = (_whole(name, found.before, found.after),)
        elif not names.is_whole(name):
            raise _inseparable(name, holder)
        elif not holder:
            raise UnsupportedError(
                "differs, and is a parameter of the model itself, which no adapter can hold",
                where=name, hint="Leave it out with `exclude=['']`.",
            )  # fmt: skip
        elif name.endswith(".bias") and not _is_norm(name, found.after):
            has_biases = True
        else:
            holders.add(holder)
    return holders, has_biases


def _save(found: Differences, holders: Set[str], *, has_biases: bool) -> None:
    """Whole tensors: all within a holder for `modules_to_save`, all biases for bias `all`."""
    names, before, after = found.names, found.before, found.after
    found.entries = _entries(names, holders)
    left = {rows.tensor for parts in found.kept.values() for rows in parts}
    values = {name: (before if name in left else after)[name] for name in after}
    for name, spec in values.items():
        parameters = names.sharing(names.parameter(name))  # PEFT unties a saved embedding
        if names.is_ignored(name) or not any(_is_within(p, found.entries) for p in parameters):
            continue
        if not names.is_whole(name):
            raise _inseparable(name, _holder(names.parameter(name)))
        for parameter in parameters:
            found.saved[parameter] = spec
            if not _is_within(parameter, found.entries):
                found.entries.add(_holder(parameter))
            if spec.shape != before[name].shape:
                found.notes.append(
                    f"{parameter} has shape {spec.shape}, {before[name].shape} in the "
                    "base: PEFT loads the adapter into a model resized to that"
                )
    for name, spec in values.items() if has_biases else ():
        parameter = names.parameter(name)
        if name.endswith(".bias") and names.is_whole(name) and parameter not in found.saved:
            found.biases[parameter.removesuffix(".bias")] = spec


def _give_up_layers(found: Differences) -> None:
    """Linear layers within a module that is saved whole are saved with it."""
    within = [m for m in found.modules if _is_within(m.name, found.entries)]
    found.modules = [module for module in found.modules if module not in within]
    if not within:
        return
    entries = [e for e in found.entries if any(_is_within(m.name, {e}) for m in within)]
    first, others = min(entries), len(entries) - 1
    more = f" and {others} more" if others else ""
    if not found.modules:
        raise UnsupportedError(
            f"has parameters of its own that differ{more and f' ({more[5:]} have, too)'}: it "
            "would be saved whole, and no linear layer that differs is left", where=first,
            hint=f"Leave its own out with `exclude={[first]}`.",
        )  # fmt: skip
    found.notes.append(
        f"{first}{more}: saved whole, {len(within)} linear layers with it, for parameters "
        f"of its own that differ; `exclude={[first]}` leaves its own out"
    )


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


def _is_within(name: str, modules: Set[str]) -> bool:
    """Whether a parameter or module lies within one of these modules (and is not one of them)."""
    words = name.split(".")
    return any(".".join(words[:end]) in modules for end in range(1, len(words)))


def _inseparable(name: str, holder: str) -> UnsupportedError:
    pattern = "*.experts*" if ".experts" in holder else re.sub(r"\.\d+\.", ".*.", holder)
    return UnsupportedError(
        "differs, and is loaded as a part of what no adapter can hold (a stack of experts, or "
        "layers joined into one)",
        where=name, hint=f"Leave all like it out with `exclude={[pattern]}`.",
    )  # fmt: skip


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
