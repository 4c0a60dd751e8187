"""The shape of a conversion: what is asked for, with defaults, and whether it holds the update."""

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
    spectra,
)
from gralora_convert.errors import InexactError, MisuseError
from gralora_convert.verbs.updates import Source


def shape_of(source: Source, wanted: Wanted) -> Shape:
    """The shape asked for, with defaults filled in."""
    adapter, config = source.adapter, source.adapter.config
    blocks = wanted.blocks(config.gralora_k if isinstance(config, GraloraConfig) else 2)
    for module in adapter.modules:
        require_divisible(blocks, module, adapter.shape(module))
    general = _general(source, wanted.hybrid_r) if wanted.to == "hybrid" else 0
    r = _default_rank(source, wanted, blocks, general) if wanted.r is None else wanted.r
    kept = config.scaling if isinstance(config, GraloraConfig) else _usual_scaling(source)
    return wanted.shape(blocks, r, general, 1.0 if wanted.to == "lora" else kept)


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
    if wanted.max_error is not None:
        return k * smallest_rank(_tails(source, k), wanted.max_error)
    least = max(least_rank(source.outline(module), to, k, general) for module in modules)
    if to == "hybrid" and source.adapter.kind == "lora":
        return max(least, -(-general // k) * k)
    return least


def _tails(source: Source, k: int) -> list[torch.Tensor]:
    return [spectra(source.delta(module), k).cpu() for module in source.adapter.modules]


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
        needed = shape.k * smallest_rank(_tails(source, shape.k), EXACT)
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
