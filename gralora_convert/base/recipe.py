"""Where the parts of an adapter go, as values: pieces of deltas, full tensors, edits of the config.

Names of outputs are those of the base where a tensor exists there; `Placement.final_name` says how
the output spells them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gralora_convert.base.architecture import Architecture
from gralora_convert.disk import Origin, TensorSpec, read_rows

if TYPE_CHECKING:
    import torch

__all__ = [
    "Piece",
    "Placement",
    "Replacement",
    "Target",
    "read_parameter",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a module's delta and the rows of the tensor on disk that they are added to.

    Rows `[start, start + count)` of `tensor` get delta rows `[delta_start, ...)`, or, with `order`,
    the delta rows that it lists. `output` is the tensor's name in the output; `source`, if any, is
    the tensor to add to instead of the base's (PEFT saves the frozen weight beside a targeted head,
    and loads it over the base).
    """

    tensor: str
    output: str
    start: int
    count: int
    delta_start: int = 0
    order: tuple[int, ...] | None = None
    source: TensorSpec | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted module: mostly one piece, several where it is cut or fused on disk.

    `transposed`: stored (in, out), as Conv1D does. `untied`: the output gets a tensor of its own.
    """

    module: str
    pieces: tuple[Piece, ...]
    transposed: bool = False
    untied: bool = False


@dataclass(frozen=True, slots=True)
class Replacement:
    """A full tensor that takes the place of (or is added to) one of the output; `source` is one of
    the adapter's, or of the base's when a shared weight needs a second copy.

    With `start`, it takes the place of rows `[start, start + count)` of the output's tensor only:
    with its rows `[source_start, ...)`, or, with `order`, those that it lists.
    """

    source: TensorSpec
    output: str
    start: int | None = None
    count: int = 0
    source_start: int = 0
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the adapter goes, and what the merged `config.json` must say differently.

    `edits` are known edits; `head_rows` is the number of labels of a trained head, if there is one,
    whose class and labels `config_edits` adds. `outer_names` gives base tensors another name in the
    output: a bare model that gets a head is written with the prefix of its architecture.
    """

    targets: tuple[Target, ...]
    replacements: tuple[Replacement, ...]
    edits: Mapping[str, object]
    architecture: Architecture = field(repr=False)
    outer_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    head_edits: Callable[[], dict[str, object]] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def config_edits(self) -> dict[str, object]:
        """The edits of `config.json`; an object among them goes into the object of that name (may
        import transformers, for the class of a new head)."""
        return dict(self.edits) | (self.head_edits() if self.head_edits is not None else {})

    def final_name(self, name: str) -> str:
        """The name in the output of a tensor that the base has; other names stay."""
        return self.outer_names.get(name, name)


def read_parameter(
    parts: "Sequence[Origin | Piece]", tensors: Mapping[str, TensorSpec]
) -> "torch.Tensor":
    """A parameter as it is in memory, put together from where it lies on disk; only its own rows
    are read."""
    import torch

    rows = [
        read_rows(_source(part, tensors), part.start, part.start + part.count) for part in parts
    ]
    if len(parts) == 1 and parts[0].order is None:
        return rows[0]
    result = torch.empty(
        (sum(part.count for part in parts), *rows[0].shape[1:]), dtype=rows[0].dtype
    )
    for part, read in zip(parts, rows, strict=True):
        if part.order is None:
            result[part.delta_start : part.delta_start + part.count] = read
        else:
            result[torch.tensor(part.order)] = read
    return result


def _source(part: "Origin | Piece", tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    own = part.source if isinstance(part, Piece) else None
    return own or tensors[part.tensor]
