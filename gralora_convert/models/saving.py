"""What an attached adapter needs to be written down: a config, and a folder for a copy."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from gralora_convert.adapters import Adapter, GraloraConfig
from gralora_convert.delta import Gralora, Lora
from gralora_convert.errors import MisuseError
from gralora_convert.models.fitting import Slot
from gralora_convert.models.layer import GraloraLinear, bare


def copied(save: Callable[[Path], None]) -> Adapter:
    """What `save` writes, in a temporary folder that lives as long as the result."""
    folder = Path(tempfile.mkdtemp(prefix="gralora-"))
    try:
        save(folder / "adapter")
        copy = Adapter.open(folder / "adapter")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(copy, shutil.rmtree, folder, ignore_errors=True)
    return copy


def implied_config(
    deltas: Mapping[str, Gralora | Lora], slots: Sequence[Slot], layers: Iterable[GraloraLinear]
) -> GraloraConfig:
    """The config that deltas alone imply."""
    shapes = {
        (d.r, d.k, d.hybrid_r, d.scaling) if isinstance(d, Gralora) else None
        for d in deltas.values()
    }
    first = next(iter(shapes))
    if len(shapes) > 1 or first is None:
        raise MisuseError(
            "the deltas are not GraLoRAs of one r, k, hybrid_r and scaling, which a config needs",
            hint="Attach an adapter from disk, or save its parts with torch.",
        )
    r, k, hybrid_r, scaling = first
    return GraloraConfig(
        r=r, gralora_k=k, hybrid_r=hybrid_r, alpha=scaling * (r + hybrid_r),
        target_modules=list(deltas), gralora_dropout=max(slot.branch.rate for slot in slots),
        fan_in_fan_out=any(not isinstance(bare(layer), nn.Linear) for layer in layers),
    )  # fmt: skip
