"""What every tensor of a right merge is, as values: made by placing, carried out by `merge`, held
against by `verify`.

Names of outputs are those of the base where a tensor exists there; `final_name` says how the output
spells them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_convert.adapters import (
    Adapter,
    AdapterLike,
    Update,
    is_on_adapter,
    values_beside,
    whole_chains,
)
from gralora_convert.base.architecture import Architecture
from gralora_convert.base.edits import updated
from gralora_convert.base.scales import Scales, plain_dtype, requantised
from gralora_convert.disk import FLOATING, Checkpoint, Rows, TensorSpec, read_rows, written_dtype
from gralora_convert.errors import (
    MisuseError,
    UnreadableError,
    UnsupportedError,
    is_number,
    sentences,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of the base as it is, in `dtype`."""

    spec: TensorSpec
    dtype: str


@dataclass(frozen=True, slots=True)
class Merged:
    """`spec` plus the updates, rounded once to `dtype`. It is a tensor of the base, or the
    adapter's copy of one (PEFT saves the frozen weight beside a targeted head, and loads it over
    the base). `untied`: the base has no tensor of this name, but shares another's."""

    spec: TensorSpec
    dtype: str
    updates: tuple[Update, ...]
    untied: bool = False


@dataclass(frozen=True, slots=True)
class Replaced:
    """`spec` in place of the base's tensor, or beside those of the base: one of the adapter's, or
    of the base's when a shared weight needs a second copy."""

    spec: TensorSpec
    dtype: str


@dataclass(frozen=True, slots=True)
class Patched:
    """`spec`, of the base, with rows of other tensors in place of its own (a bias that is fused on
    disk)."""

    spec: TensorSpec
    dtype: str
    parts: tuple[tuple[Rows, TensorSpec], ...]


Entry = Kept | Merged | Replaced | Patched


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted module: rows of the output and the base's tensor there, mostly one pair, several
    where it is cut or fused on disk.

    `transposed`: stored (in, out), as Conv1D does. `untied`: the output gets a tensor of its own.
    `frozen` is the adapter's copy of the base's tensor, if it has one.
    """

    module: str
    parts: tuple[tuple[Rows, TensorSpec], ...]
    transposed: bool = False
    untied: bool = False
    frozen: TensorSpec | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one adapter goes, and what the merged `config.json` must say differently.

    `edits` are known edits; `config_edits` gives them with the class and labels of a trained head
    (and may import transformers for it); an object among them goes into the object of that name.
    `outer_names` gives base tensors another name in the output: a bare model that gets a head is
    written with the prefix of its architecture. `scales` are those of the base.
    """

    adapter: Adapter = field(repr=False)
    architecture: Architecture = field(repr=False)
    targets: tuple[Target, ...]
    replacements: tuple[tuple[str, Replaced | Patched], ...]
    edits: Mapping[str, object]
    config_edits: Callable[[], Mapping[str, object]] = field(repr=False)
    outer_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    scales: Scales = field(default_factory=Scales, repr=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every tensor of the output by its name: what is merged, replaced, and kept, in this order.

    `plain` are the tensors of codes in the base that are none in the output, `quantised` makes the
    output's config of one that says nothing of that. The other fields are those of its placements,
    taken together.
    """

    base: Checkpoint = field(repr=False)
    weighted: tuple[tuple[Adapter, float], ...] = field(repr=False)
    tensors: Mapping[str, Entry]
    edits: Mapping[str, object]
    config_edits: Callable[[], Mapping[str, object]] = field(repr=False)
    outer_names: Mapping[str, str] = field(repr=False)
    architectures: tuple[Architecture, ...] = field(repr=False)
    notes: tuple[str, ...]
    scales: Scales = field(repr=False)
    plain: frozenset[str]

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        return tuple(adapter for adapter, _ in self.weighted)

    @property
    def merged(self) -> dict[str, Merged]:
        return {name: entry for name, entry in self.tensors.items() if isinstance(entry, Merged)}

    @property
    def replaced(self) -> dict[str, Replaced | Patched]:
        return {
            name: entry
            for name, entry in self.tensors.items()
            if isinstance(entry, Replaced | Patched)
        }

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Base-model prefixes that names of the output may have or lack."""
        return tuple(dict.fromkeys(p for one in self.architectures for p in one.text.prefixes))

    def quantised(self, config: Mapping[str, object]) -> dict[str, object]:
        """`config` as the output's must be, which has these weights `plain`."""
        linear = self.architectures[0].linear_weights
        return requantised(config, self.scales, self.plain, linear)

    def final_name(self, name: str) -> str:
        """The name in the output of a tensor that the base has; other names stay."""
        return self.outer_names.get(name, name)


def combine(
    placements: Sequence[Placement],
    weights: Sequence[float] | None = None,
    dtype: str = "keep",
    plain: Collection[str] = (),
) -> Recipe:
    """The recipe of base + sum of weight * delta over the placements, all in one base; floating
    tensors in `dtype`.

    Of a base in fp8, the weights that are added to or replaced become plain, those that are fused
    with them, the `plain` ones, and all where `dtype` is not `keep`.

    Raises:
        MisuseError: two adapters replace the same tensor, or one replaces what another adapts.
    """
    base = placements[0].architecture.base
    adapters = [placement.adapter for placement in placements]
    factors = weights_for(adapters, weights)
    merged = _merged(placements, factors)
    replaced = _replaced(placements)
    if both := sorted(merged.keys() & replaced.keys()):
        raise MisuseError(
            f"{both[0]!r} is adapted by one adapter and replaced whole by another",
            where=placements[0].adapter.path,
            hint="Merge one of them, and train the other on the result.",
        )
    entries: dict[str, Entry] = {**merged, **replaced}
    scales = placements[0].scales
    touched = {name: base.tensors[name] for name in entries if name in base.tensors}
    decoded = scales.fused(touched) | scales.specs.keys() & plain
    if dtype != "keep":
        decoded = frozenset(scales.specs)
    if shared := [n for n, e in replaced.items() if e.spec.dtype.startswith("F8_")]:
        raise UnsupportedError(
            f"{shared[0]!r} would be a second copy of fp8 codes, without their scales",
            where=base.path, hint="Leave the tied weight out of the adapter.",
        )  # fmt: skip
    left = scales.companions(decoded, base.tensors)
    kept_dtype = plain_dtype(base.config)
    for name, spec in base.tensors.items():
        if name in decoded:
            entries.setdefault(name, Kept(scales.specs[name], kept_dtype))
        elif name not in left:
            entries.setdefault(name, Kept(spec, spec.dtype))
    return Recipe(
        base,
        tuple(zip(adapters, factors, strict=True)),
        {
            name: replace(entry, dtype=written_dtype(dtype, entry.dtype))
            if entry.dtype in FLOATING
            else entry
            for name, entry in entries.items()
        },
        _together(placement.edits for placement in placements),
        lambda: _together(placement.config_edits() for placement in placements),
        next((p.outer_names for p in placements if p.outer_names), {}),
        tuple(placement.architecture for placement in placements),
        tuple(note for placement in placements for note in placement.notes),
        scales,
        decoded,
    )


def weights_for(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """One weight for each adapter, 1 where none are given.

    Raises:
        MisuseError: weights that the adapters cannot have, or an adapter that is named twice.
    """
    if not adapters:
        raise MisuseError("no adapter was given")
    if len(adapters) > 1 and len({adapter.sha256() for adapter in adapters}) < len(adapters):
        raise MisuseError("an adapter is named twice", hint="Use `weights=[2]` to apply it twice.")
    if weights is None:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise MisuseError(
            f"{len(weights)} weights for {len(adapters)} adapters; one each was needed",
            hint="Repeat `weights`, in the order of the adapters.",
        )
    for weight, adapter in zip(weights, adapters, strict=True):
        if not is_number(weight):
            raise MisuseError(f"the weight {weight!r} is not a finite number")
        if weight == 0:
            raise MisuseError(
                "weight 0 was given, which would leave the adapter out", where=adapter.path,
                hint="Leave out the adapter itself.",
            )  # fmt: skip
        if weight != 1.0 and (adapter.values or values_beside(adapter)):
            raise MisuseError(
                f"weight {weight:g} was given, but trained biases and saved modules replace those "
                "of the base and cannot be weighted",
                where=adapter.path,
                hint="Use weight 1.",
            )
    return list(weights)


def gathered(
    adapters: Sequence[AdapterLike],
    base: Checkpoint | str | Path | None,
    weights: Sequence[float] | None,
    *,
    insist: bool = False,
) -> tuple[list[tuple[Adapter, float]], Checkpoint, list[str]]:
    """The adapters with their weights, each behind those that it was trained on (weight 1), their
    base, and a note for each adapter that was put in.

    `base` None means the one that they agree on. `insist`: a given base is taken to hold what an
    adapter was trained on, without a look.

    Raises:
        MisuseError: weights that the adapters cannot have, no base that they agree on, or an
            adapter that another was trained on is missing.
        InvalidAdapterError, UnreadableError, UnsupportedError: an adapter, or the base.
    """
    given = list(map(Adapter.open, adapters))
    for adapter in given:
        adapter.require_plain()
    factors = weights_for(given, weights)
    target = base if isinstance(base, Checkpoint) or base is None else Checkpoint.open(base)
    if target is None:
        with _named_only():
            chain, notes = whole_chains(given, None)
            target = Checkpoint.open(_base_name(chain))
    else:
        chain, notes = (given, []) if insist else whole_chains(given, target.merged_adapters)
    weight_of = {id(adapter): weight for adapter, weight in zip(given, factors, strict=True)}
    return [(adapter, weight_of.get(id(adapter), 1.0)) for adapter in chain], target, notes


@contextmanager
def _named_only() -> Iterator[None]:
    """Says of a base that cannot be read where its name comes from, when nobody gave it."""
    try:
        yield
    except UnreadableError as problem:
        raise UnreadableError(
            f"{problem.message}; this base is named in adapter_config.json",
            where=problem.where, reason=problem.reason,
            hint=sentences(problem.hint, "To name another one give `base`."),
        ) from problem  # fmt: skip


def _base_name(adapters: Sequence[Adapter]) -> str:
    """The base that the adapters agree on; those that were trained on another adapter have that."""
    names = {adapter.base_source for adapter in adapters if not is_on_adapter(adapter)}
    name = names.pop() if names else None
    if names or not name:
        found = "different base models" if names else "no base model"
        raise MisuseError(
            f"adapter_config.json names {found}", where=adapters[0].path, hint="Give `base`."
        )
    return name


def _together(edits: Iterator[Mapping[str, object]]) -> dict[str, object]:
    return reduce(updated, edits, dict[str, object]())


def _merged(placements: Sequence[Placement], weights: Sequence[float]) -> dict[str, Merged]:
    found: dict[str, Merged] = {}
    base = placements[0].architecture.base
    for placement, weight in zip(placements, weights, strict=True):
        for target in placement.targets:
            for rows, stored in target.parts:
                update = Update(placement.adapter, target.module, rows, target.transposed, weight)
                held = found.get(rows.tensor)
                found[rows.tensor] = Merged(
                    target.frozen or stored,
                    plain_dtype(base.config) if stored.scale else stored.dtype,
                    (*(held.updates if held else ()), update),
                    target.untied or (held is not None and held.untied),
                )
    return found


def _replaced(placements: Sequence[Placement]) -> dict[str, Replaced | Patched]:
    """What replaces a tensor of the output, or rows of it; in the dtype of the base's tensor (a
    float32 head of a bfloat16 model stays bfloat16)."""
    found: dict[str, Replaced | Patched] = {}
    owners: dict[str, Adapter] = {}
    for placement in placements:
        for name, entry in placement.replacements:
            held = found.setdefault(name, entry)
            owner = owners.setdefault(name, placement.adapter)
            parts = held.parts if isinstance(held, Patched) else ()
            more = [p for p in entry.parts if p not in parts] if isinstance(entry, Patched) else []
            if held == entry or (parts and isinstance(entry, Patched) and not more):
                continue
            if owner is not placement.adapter:
                raise MisuseError(
                    f"replaces {name!r}, as another of the adapters does",
                    where=placement.adapter.path,
                    hint="Only one adapter can carry a bias or saved module.",
                )
            if isinstance(held, Patched):
                found[name] = replace(held, parts=(*parts, *more))
    base = placements[0].architecture.base.tensors
    return {
        name: replace(entry, dtype=base[name].dtype)
        if name in base and base[name].dtype in FLOATING
        else entry
        for name, entry in found.items()
    }


def read_parameter(
    parts: "Sequence[Rows | tuple[Rows, TensorSpec]]", tensors: Mapping[str, TensorSpec]
) -> "torch.Tensor":
    """A parameter as it is in memory, put together from where it lies on disk (in `tensors`, or in
    the tensor beside the rows); only its own rows are read."""
    import torch

    pairs = [(part, tensors[part.tensor]) if isinstance(part, Rows) else part for part in parts]
    read = [read_rows(spec, rows.start, rows.stop) for rows, spec in pairs]
    if len(pairs) == 1 and pairs[0][0].order is None:
        return read[0]
    size = max(1 + max(rows.order) if rows.order else rows.first + rows.count for rows, _ in pairs)
    result = torch.empty((size, *read[0].shape[1:]), dtype=read[0].dtype)
    for (rows, _), values in zip(pairs, read, strict=True):
        place = slice(rows.first, rows.first + rows.count)
        result[place if rows.order is None else list(rows.order)] = values
    return result
