"""Parameters that are one and the same in the base, of which an adapter changes some.

PEFT's own merge changes all of them (0.21.2: a targeted `lm_head` changes the embeddings, too).
Here the changed ones get tensors of their own, and every other keeps the base's values. A tie that
transformers makes by name while it loads gives way to a tensor on disk that differs (5.23,
`PreTrainedModel.tie_weights`); the flag in the config says so to older loaders as well. A module
that sits in two places of the model can hold one value only: that is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gralora_convert.base.architecture import Architecture
from gralora_convert.base.recipe import Patched, Replaced, Target
from gralora_convert.base.replacements import Trained
from gralora_convert.disk import TensorSpec, same_values
from gralora_convert.errors import Finding, error, note


@dataclass(slots=True)
class Claims:
    """What an adapter does to parameters in memory, by their names.

    `targets` get a delta, `trained` a value of their own; `frozen` are copies of base values that
    PEFT loads over the base, for all names that share the parameter. So are the trained values of
    `in_place`: biases, which PEFT trains where they are, and not in a copy of the module.
    """

    targets: dict[str, Target] = field(default_factory=dict)
    trained: dict[str, Trained] = field(default_factory=dict)
    frozen: dict[str, TensorSpec] = field(default_factory=dict)
    in_place: frozenset[str] = frozenset()

    def names(self) -> Iterator[str]:
        yield from dict.fromkeys((*self.targets, *self.trained, *self.frozen))


@dataclass(slots=True)
class Settlement:
    """The claims as they are carried out; `flags` are paths of configs in `config.json` whose
    `tie_word_embeddings` becomes false, `untied` the other parameters that lose their tie by it."""

    targets: list[Target] = field(default_factory=list)
    replacements: list[tuple[str, Replaced | Patched]] = field(default_factory=list)
    flags: list[tuple[str, ...]] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def settle(claims: Claims, architecture: Architecture) -> Settlement:
    """Gives each claim its tensor in the output, and copies to those that lose a shared one."""
    settlement = Settlement()
    done: set[str] = set()
    for name in claims.names():
        if name in done:
            continue
        group = architecture.sharing(name)
        done.update(group)
        _Group(group, claims, architecture, settlement).settle()
    for name in dict.fromkeys(settlement.untied):
        _Group(architecture.sharing(name), claims, architecture, settlement).keep(name)
    _require_separate(settlement)
    _require_unaliased(settlement, architecture)
    return settlement


class _Group:
    """All names of one parameter, in places of the model: names in one place change together."""

    def __init__(
        self, names: Sequence[str], claims: Claims, architecture: Architecture,
        settlement: Settlement,
    ) -> None:  # fmt: skip
        self.names, self.claims, self.settlement = names, claims, settlement
        self.architecture, self.base = architecture, architecture.base
        self.places: dict[object, list[str]] = {}
        for name in names:
            place = architecture.place(name) if len(names) > 1 else name
            self.places.setdefault(place, []).append(name)
        self.stored = {
            name: origins[0].tensor
            for name in names
            if len(origins := architecture.locate(name)) == 1
        }

    def settle(self) -> None:
        self._settle_frozen()
        claimed = [names for names in self.places.values() if self._claim(names) is not None]
        if not claimed:
            return
        if (name := self._undecided()) is not None:
            return self._refuse_undecided(name)
        if len(self.places) > 1 and not self._is_one_value():
            if not self._is_separable():
                return self._refuse(claimed)
            for names in claimed:
                name = self._claim(names)
                self.settlement.findings.append(note(
                    "tied-target", name, "shares its values in the base; the output unties it",
                ))  # fmt: skip
            self._keep_others(self._untie_flag())
        if self._is_one_value():
            claimed = [list(self.names)]
        for names in claimed:
            self._emit(names)

    def keep(self, name: str) -> None:
        """Gives `name`, which is no longer tied, the value that it has in the adapted model."""
        place = next(names for names in self.places.values() if name in names)
        if self._is_one_value():
            parts = self.claims.trained[self._claim(self.names) or ""]
            self._add(_value(parts[0][1]), name)
        elif self._claim(place) is None:
            self._copy(name)

    def _claim(self, names: Sequence[str]) -> str | None:
        """The one of these names that has a delta or a trained value."""
        every = {**self.claims.targets, **self.claims.trained}
        return next((name for name in names if name in every), None)

    def _is_one_value(self) -> bool:
        """Whether the trained values of all places are the same, so that they may stay shared."""
        given = [name for name in self.names if name in self.claims.trained]
        if given and self.claims.in_place.issuperset(given) and not self._has_target():
            values = [_value(part) for name in given for _, part in self.claims.trained[name]]
            return all(same_values(values[0], value) for value in values[1:])
        found = [self.claims.trained.get(self._claim(n) or "", ()) for n in self.places.values()]
        if not all(len(parts) == 1 for parts in found):
            return False
        values = [_value(parts[0][1]) for parts in found]
        return all(same_values(values[0], value) for value in values[1:])

    def _has_target(self) -> bool:
        return any(name in self.claims.targets for name in self.names)

    def _settle_frozen(self) -> None:
        """A frozen copy that differs from the base becomes the value of all its names."""
        given = [self.claims.frozen[name] for name in self.names if name in self.claims.frozen]
        if not given:
            return
        kept = [] if self._claim(self.names) is None else [self._claim(self.names)]
        for tensor in dict.fromkeys(self.stored.values()):
            if not any(self.stored.get(name) == tensor for name in kept if name):
                self._put(given[0], tensor)

    def _is_separable(self) -> bool:
        """Whether every place but one is tied while loading only."""
        fixed = [
            names for names in self.places.values()
            if not any(self.architecture.is_tied_by_loader(name) for name in names)
        ]  # fmt: skip
        return len(fixed) <= 1

    def _refuse(self, claimed: Sequence[Sequence[str]]) -> None:
        others = [names[0] for names in self.places.values() if names not in claimed]
        first = self._claim(claimed[0]) or ""
        other = others[0] if others else self._claim(claimed[1]) or ""
        self.settlement.findings.append(error(
            "shared-parameter", first, f"is one and the same with {other} in the base, and only "
            "one of them is adapted" if others else f"is one and the same with {other} in the "
            "base, and both are adapted",
            "A dense checkpoint cannot hold two values of one weight: serve the adapter unmerged.",
        ))  # fmt: skip

    def _undecided(self) -> str | None:
        """One of several targets that has no tensor, while those that share its values differ:
        another release may have tied it to another of them (MM Grounding DINO, 4.57 and 5)."""
        targets = [name for name in self.names if name in self.claims.targets]
        lost = [name for name in targets if name not in self.stored]
        stored = [self.base.tensors[tensor] for tensor in dict.fromkeys(self.stored.values())]
        if len(targets) < 2 or not lost:
            return None
        return None if all(same_values(stored[0], one) for one in stored[1:]) else lost[0]

    def _refuse_undecided(self, name: str) -> None:
        first, *others = (held for held in self.names if held in self.stored)
        self.settlement.findings.append(error(
            "shared-parameter", name,
            f"has no tensor in the base, and {first} and {others[0]}, which this release ties it "
            "to, differ there: which of them it was in training cannot be told",
            "Serve the adapter unmerged, with the release that it was trained with.",
        ))  # fmt: skip

    def _untie_flag(self) -> bool:
        """Whether the config is told; it is not where its flag means more than these ties."""
        if self.architecture.text.tie_flag_means_more:
            return False
        flag = self.architecture.tie_flag(self.names)
        if flag is None or flag.embeddings.isdisjoint(self.names):
            return False
        self.settlement.flags.append(flag.path)
        for name in flag.tied:  # a false flag unties these, too
            if name not in self.names and not self.architecture.locate(name):
                self.settlement.untied.append(name)
        return True

    def _keep_others(self, flag_is_off: bool) -> None:
        """Copies of the base's values for places that would lose them."""
        for names in self.places.values():
            if self._claim(names) is not None or any(name in self.stored for name in names):
                continue
            sources = {self.architecture.tie_source(name) for name in names}
            followed = [n for n in self.places.values() if not sources.isdisjoint(n)]
            kept = followed and all(
                self._claim(n) is None and any(name in self.stored for name in n) for n in followed
            )
            if flag_is_off or not kept:
                self._copy(names[0])

    def _copy(self, name: str) -> None:
        """Gives `name` a tensor of its own, with the value that it shares."""
        source = self._shared_value(self.architecture.sharing(name))
        if source is not None:
            self._add(source, name)

    def _add(self, source: TensorSpec, name: str) -> None:
        output = self.architecture.disk_name(name)
        if all(output != held for held, _ in self.settlement.replacements):
            self._put(source, output)

    def _put(self, source: TensorSpec, output: str) -> None:
        self.settlement.replacements.append((output, Replaced(source, source.dtype)))

    def _shared_value(self, names: Sequence[str]) -> TensorSpec | None:
        """The adapter's copy of a value (its vocabulary may be resized), else the base's."""
        for name in names:
            if name in self.claims.frozen:
                return self.claims.frozen[name]
        for name in names:
            origins = self.architecture.locate(name)
            if len(origins) == 1 and origins[0].order is None:
                return self.base.tensors[origins[0].tensor]
        return None

    def _emit(self, names: Sequence[str]) -> None:
        """Carries out the claim on one place, in every tensor on disk that holds it."""
        name = self._claim(names)
        assert name is not None
        stored = list(dict.fromkeys(self.stored[n] for n in names if n in self.stored))
        if name in self.claims.targets:
            target = self.claims.targets[name]
            first, parts = target.parts[0][0], target.parts
            if not target.untied:
                others = [tensor for tensor in stored if tensor != first.tensor]
                parts += tuple((replace(first, tensor=t), self.base.tensors[t]) for t in others)
            self.settlement.targets.append(replace(target, parts=parts))
            return
        (output, value), *more = trained = self.claims.trained[name]
        self.settlement.replacements += trained
        if not more and isinstance(value, Replaced):
            self.settlement.replacements += [(t, value) for t in stored if t != output]


def _value(entry: Replaced | Patched) -> TensorSpec:
    """The trained tensor that replaces another, or rows of it."""
    return entry.spec if isinstance(entry, Replaced) else entry.parts[0][1]


def _require_unaliased(settlement: Settlement, architecture: Architecture) -> None:
    """A model that nobody knows, saved with one tensor under two names, has it in two places: it
    loads one value for both, whatever the file holds."""
    changed = {rows.tensor for target in settlement.targets for rows, _ in target.parts}
    changed |= {name for name, _ in settlement.replacements}
    for name in sorted(changed & architecture.base.tensors.keys()):
        others = architecture.base.aliases(name)
        if others and architecture.blueprint is None:
            settlement.findings.append(error(
                "shared-parameter", name,
                f"is the same tensor as {others[0]} in this base, and what ties them is not known: "
                "a model that loads the merge gives both one value",
                "Untie them in the model and save it again, or serve the adapter unmerged.",
            ))  # fmt: skip


def _require_separate(settlement: Settlement) -> None:
    """Two modules must not add to the same rows: they would share a weight."""
    users: dict[tuple[str, int], str] = {}
    for target in settlement.targets:
        for rows, stored in target.parts:
            first = users.setdefault((rows.tensor, rows.start), target.module)
            if first != target.module:
                settlement.findings.append(error(
                    "shared-parameter", target.module,
                    f"has the weight {stored.name} on disk, and so has {first}; both are adapted",
                    "A dense checkpoint cannot hold two values of one weight.",
                ))  # fmt: skip
