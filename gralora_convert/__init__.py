"""Model surgery on GraLoRA adapters: validate, merge, convert, verify, from file to file.

>>> import gralora_convert as gc
>>> adapter = gc.Adapter.open("fixtures/peft-0.21.2/llama-gralora")
>>> adapter.kind, len(adapter.modules), adapter.config.scaling
('gralora', 4, 2.0)

Names are imported when they are first used, so that reading and validating never import torch.
"""

from typing import TYPE_CHECKING

from gralora_convert.doors import opened
from gralora_convert.version import __version__

if TYPE_CHECKING:
    from gralora_convert.adapters import Adapter, GraloraConfig, LoraConfig
    from gralora_convert.delta import (
        Delta,
        Dense,
        Fit,
        Gralora,
        Lora,
        delta_weight,
        dense,
        exact_rank,
        gralora_to_hybrid,
        gralora_to_lora,
        hybrid_to_gralora,
        lora_to_gralora,
        lora_to_hybrid,
        pad,
        pad_lora,
        smallest_rank,
        spectra,
        to_gralora,
        to_hybrid,
        to_lora,
        with_scaling,
    )
    from gralora_convert.disk import Checkpoint
    from gralora_convert.errors import ConvertError, Finding, Report
    from gralora_convert.models import GraloraLinear, attach
    from gralora_convert.output import Plan
    from gralora_convert.verbs import (
        Equivalence,
        convert,
        extract,
        inspect,
        merge,
        validate,
        verify,
    )

__all__ = [
    "Adapter", "Checkpoint", "ConvertError", "Delta", "Dense", "Equivalence", "Finding", "Fit",
    "Gralora", "GraloraConfig", "GraloraLinear", "Lora", "LoraConfig", "Plan", "Report",
    "__version__", "attach", "convert", "delta_weight", "dense", "exact_rank", "extract",
    "gralora_to_hybrid", "gralora_to_lora", "hybrid_to_gralora", "inspect", "lora_to_gralora",
    "lora_to_hybrid", "merge", "pad", "pad_lora", "smallest_rank", "spectra", "to_gralora",
    "to_hybrid", "to_lora", "validate", "verify", "with_scaling",
]  # fmt: skip

__getattr__ = opened(__name__, {
    "adapters": "Adapter GraloraConfig LoraConfig",
    "delta": (
        "Delta Dense Fit Gralora Lora delta_weight dense exact_rank gralora_to_hybrid "
        "gralora_to_lora hybrid_to_gralora lora_to_gralora lora_to_hybrid pad pad_lora "
        "smallest_rank spectra to_gralora to_hybrid to_lora with_scaling"
    ),
    "disk": "Checkpoint",
    "errors": "ConvertError Finding Report",
    "models": "GraloraLinear attach",
    "output": "Plan",
    "verbs": "Equivalence convert extract inspect merge validate verify",
})  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
