"""Model surgery on GraLoRA adapters: validate, merge, convert, verify, from file to file.

>>> import gralora_convert as gc
>>> adapter = gc.Adapter.open("fixtures/peft-0.21.2/llama-gralora")
>>> adapter.kind, len(adapter.modules), adapter.config.scaling
('gralora', 4, 2.0)

Names are imported when they are first used, so that reading and validating never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from gralora_convert.version import __version__

if TYPE_CHECKING:
    from gralora_convert.adapter import Adapter
    from gralora_convert.checkpoint import Checkpoint
    from gralora_convert.checks import validate
    from gralora_convert.config import GraloraConfig, LoraConfig
    from gralora_convert.conversion import convert
    from gralora_convert.delta import (
        Delta,
        Dense,
        Gralora,
        Lora,
        gralora_to_hybrid,
        gralora_to_lora,
        hybrid_to_gralora,
        lora_to_gralora,
        lora_to_hybrid,
        pad,
        pad_lora,
        with_scaling,
    )
    from gralora_convert.equivalence import Equivalence, verify
    from gralora_convert.errors import ConvertError
    from gralora_convert.extraction import extract
    from gralora_convert.factorize import (
        Fit,
        exact_rank,
        smallest_rank,
        spectra,
        to_gralora,
        to_hybrid,
        to_lora,
    )
    from gralora_convert.forward import GraloraLinear, attach
    from gralora_convert.merging import merge
    from gralora_convert.plan import Plan
    from gralora_convert.products import delta_weight, dense
    from gralora_convert.report import Finding, Report

_HOMES = {
    "adapter": ("Adapter",),
    "checkpoint": ("Checkpoint",),
    "checks": ("validate",),
    "config": ("GraloraConfig", "LoraConfig"),
    "conversion": ("convert",),
    "delta": (
        "Delta",
        "Dense",
        "Gralora",
        "Lora",
        "gralora_to_hybrid",
        "gralora_to_lora",
        "hybrid_to_gralora",
        "lora_to_gralora",
        "lora_to_hybrid",
        "pad",
        "pad_lora",
        "with_scaling",
    ),
    "equivalence": ("Equivalence", "verify"),
    "errors": ("ConvertError",),
    "extraction": ("extract",),
    "factorize": (
        "Fit",
        "exact_rank",
        "smallest_rank",
        "spectra",
        "to_gralora",
        "to_hybrid",
        "to_lora",
    ),
    "forward": ("GraloraLinear", "attach"),
    "merging": ("merge",),
    "plan": ("Plan",),
    "products": ("delta_weight", "dense"),
    "report": ("Finding", "Report"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "Checkpoint",
    "ConvertError",
    "Delta",
    "Dense",
    "Equivalence",
    "Finding",
    "Fit",
    "Gralora",
    "GraloraConfig",
    "GraloraLinear",
    "Lora",
    "LoraConfig",
    "Plan",
    "Report",
    "__version__",
    "attach",
    "convert",
    "delta_weight",
    "dense",
    "exact_rank",
    "extract",
    "gralora_to_hybrid",
    "gralora_to_lora",
    "hybrid_to_gralora",
    "lora_to_gralora",
    "lora_to_hybrid",
    "merge",
    "pad",
    "pad_lora",
    "smallest_rank",
    "spectra",
    "to_gralora",
    "to_hybrid",
    "to_lora",
    "validate",
    "verify",
    "with_scaling",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
