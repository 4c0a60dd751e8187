"""The shape of a conversion: what is asked for, with defaults, and whether it holds the update."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from gralora_convert.adapters import GraloraConfig
from gralora_convert.delta import (
    EXACT,
    Lora,
    Shape,
    Wanted,
    least_rank,
    relative,
    require_divisible,
    resize,
    smallest_rank,
    smallest_ranks,
    spectra,
)
from gralora_convert.errors import InexactError, MisuseError
from gralora_convert.verbs.serving import is_expert, served_rank
from gralora_convert.verbs.updates import Source


def shape_of(source: Source, wanted: Wanted, server: str | None = None) -> Shape:
    """The shape asked for, with defaults filled in."""
    adapter, config = source.adapter, source.adapter.config
    blocks = wanted.blocks(config.gralora_k if isinstance(config, GraloraConfig) else 2)
    for module in adapter.modules:
        require_divisible(blocks, module, adapter.shape(module))
    general = _general(source, wanted.hybrid_r) if wanted.to == "hybrid" else 0
    kept = config.scaling if isinstance(config, GraloraConfig) else _usual_scaling(source)
    scaling = 1.0 if wanted.to == "lora" else kept
    if wanted.max_error is not None:
        sizes = {module: adapter.shape(module) for module in adapter.modules}
        return within_error(wanted, _tails(source, blocks), sizes, blocks, scaling, server)
    r = _default_rank(source, wanted, blocks, general) if wanted.r is None else wanted.r
    return wanted.shape(blocks, r, general, scaling)


def within_error(
    wanted: Wanted,
    tails: Mapping[str, torch.Tensor],
    sizes: Mapping[str, tuple[int, int]],
    k: int,
    scaling: float,
    server: str | None,
) -> Shape:
    """The smallest shape within the error that is asked for: of one rank, or of one for each
    module for an engine that reads those.

    vLLM reserves the largest rank for all modules: it gets none above what one rank would need.
    Experts are stacked, which takes one rank.
    """
    assert wanted.max_error is not None
    shape = wanted.shape(k, k * smallest_rank([*tails.values()], wanted.max_error), 0, scaling)
    if server in (None, "sglang") or any(map(is_expert, tails)):
        return shape
    largest = max(map(len, tails.values())) - 1
    limit = served_rank(shape.r) or shape.r if server == "vllm" else largest
    costs = [sum(sizes[module]) for module in tails]
    ranks = smallest_ranks([*tails.values()], wanted.max_error, costs, limit)
    r = max(ranks)
    shape = wanted.shape(k, r, 0, scaling)
    return replace(shape, ranks={m: n for m, n in zip(tails, ranks, strict=True) if n != r})


def _usual_scaling(source: Source) -> float:
    """The scaling of most modules of a LoRA with patterns, so that few of them change theirs."""
    found = [source.adapter.scaling(module) for module in source.adapter.modules]
    return max(dict.fromkeys(found), key=found.count) or 1.0


def _general(source: Source, hybrid_r: int | None) -> int:
    if hybrid_r is not None:
        if hybrid_r < 1:
            raise MisuseError("a Hybrid has hybrid_r of at least 1", hint='Use `to="gralora"`.')
        return hybrid_r
    config = source.adapter.config
    if isinstance(config, GraloraConfig):
        return config.hybrid_r or max(1, config.r // config.gralora_k)
    outlines = [source.outline(module) for module in source.adapter.modules]
    return max(delta.r if isinstance(delta, Lora) else config.r for delta in outlines)


def _default_rank(source: Source, wanted: Wanted, k: int, general: int) -> int:
    modules, to = source.adapter.modules, wanted.to
    least = max(least_rank(source.outline(module), to, k, general) for module in modules)
    if to == "hybrid" and source.adapter.kind == "lora":
        return max(least, -(-general // k) * k)
    return least


def _tails(source: Source, k: int) -> dict[str, torch.Tensor]:
    return {module: spectra(source.delta(module), k).cpu() for module in source.adapter.modules}


def require_exact(source: Source, shape: Shape) -> None:
    """Raises `InexactError` when the shape cannot hold some module's update."""
    modules = source.adapter.modules
    short = [needed for module in modules if (needed := needed_rank(source, shape, module))]
    if not short:
        return
    fits = {m: resize(source.delta(m), shape, draws(source, m)) for m in modules}
    error = relative({module: (fit.error2, fit.norm2) for module, fit in fits.items()})
    if error <= EXACT:
        return
    if shape.kind == "hybrid":  # a general part beside the blocks: of generic factors
        needed = max(short)
    else:  # the numerical rank of the blocks
        needed = shape.k * smallest_rank([*_tails(source, shape.k).values()], EXACT)
    whole = max(short)
    more = f" (to {EXACT:g}; {whole} hold any such factors)" if whole > needed else ""
    raise InexactError(
        f"r={shape.r} cannot hold the update exactly: the relative error would be "
        f"{error:.3g}; exact from r={needed}{more}",
        where=source.adapter.path,
        hint=f"Give `r={needed}` or leave it out, or accept the error with `allow_inexact=True`.",
        exact_rank=needed,
        error=error,
    )


def needed_rank(source: Source, shape: Shape, module: str) -> int | None:
    """The smallest exact r when the shape's is smaller, for factors of full rank."""
    needed = least_rank(source.outline(module), shape.kind, shape.k, shape.hybrid_r)
    return needed if shape.r < needed else None


def draws(source: Source, module: str) -> torch.Generator:
    return torch.Generator().manual_seed(source.adapter.modules.index(module))
