"""What an update looks like: norms, blocks and spectra of every module; the numbers of a plot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gralora_convert.adapters import Adapter, AdapterLike
from gralora_convert.base import place
from gralora_convert.delta import block_norms, energies
from gralora_convert.disk import Checkpoint, is_folder, read_torch
from gralora_convert.output import one_arithmetic_thread


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One module: ||dW||_F, the same over ||W||_F where the base is known, the norms of its k x k
    blocks, and `tails`: the squared error of the best LoRA of rank 0, 1, ..."""

    module: str
    norm: float
    relative: float | None
    blocks: Tensor
    tails: Tensor

    def rank_for(self, energy: float) -> int:
        """The smallest rank of a LoRA that holds this share of ||dW||_F^2."""
        # what the tails of a zero update leave is zero, too: rank 0
        return int((self.tails > (1 - energy) * self.tails[0]).sum())


@dataclass(frozen=True, eq=False)
class Anatomy:
    """All modules of an adapter, in its order."""

    name: str
    exact_rank: int
    parts: tuple[Spectrum, ...]
    title: str = ""  # kind, r, k and alpha

    @property
    def is_relative(self) -> bool:
        """Whether the norms of all base weights are known."""
        return all(part.relative is not None for part in self.parts)


def dissect(
    adapter: AdapterLike,
    base: Checkpoint | str | Path | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Anatomy:
    """Norms, block norms and spectra of every module, in float64, from the factors.

    Without `base` the model that the adapter names is taken if it is a local folder. `progress` is
    called with the bytes of the factors of each module.

    Raises:
        InvalidAdapterError: the adapter has errors, or does not fit the given base.
        UnsupportedError: a LoRA whose update is more than scaling * B @ A.
        UnreadableError: the given base.

    >>> parts = dissect("fixtures/peft-0.21.2/llama-hybrid").parts
    >>> len(parts), parts[0].blocks.shape, parts[0].rank_for(1.0)
    (4, torch.Size([2, 2]), 11)
    """
    opened = Adapter.open(adapter)
    opened.require_plain()
    named = opened.config.base_model_name_or_path
    if base is None and named and is_folder(named):
        base = named
    norms = {} if base is None else _base_norms(opened, base)
    parts = []
    with one_arithmetic_thread():
        for module in opened.modules:
            parts.append(_part(opened, module, norms.get(module)))
            if progress is not None:
                progress(opened.factor_bytes(module))
    ranks = [int((part.tails > 1e-12 * part.tails[0]).sum()) for part in parts]
    name = str(adapter if isinstance(adapter, str) else opened.path)
    return Anatomy(name, max(ranks), (*parts,), opened.title)


def _part(adapter: Adapter, module: str, base_norm: float | None) -> Spectrum:
    delta = adapter.delta(module)
    tails = _tails(energies(delta))
    norm = float(tails[0].sqrt())
    return Spectrum(
        module, norm, norm / base_norm if base_norm else None, block_norms(delta), tails
    )


def _tails(squares: Tensor) -> Tensor:
    """What is left out at rank 0, 1, ..., r (Eckart-Young)."""
    left = torch.zeros(len(squares) + 1, dtype=squares.dtype)
    left[:-1] = squares.flip(0).cumsum(0).flip(0)
    return left


def _base_norms(adapter: Adapter, base: Checkpoint | str | Path) -> dict[str, float]:
    """||W||_F of every module, also of those that are parts of a fused weight."""
    opened = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    placement, report = place(adapter, opened)
    report.require_ok(adapter.path)
    assert placement is not None
    squares: dict[str, float] = {}
    for target in placement.targets:
        for rows, stored in target.parts:
            weight = read_torch(target.frozen or stored)[rows.start : rows.stop].double()
            squares[target.module] = squares.get(target.module, 0.0) + float(weight.square().sum())
    return {module: square**0.5 for module, square in squares.items()}
