"""An adapter beside its base: names, orientation, ties, quantisation, edits. No torch."""

from gralora_convert.base.architecture import Architecture, near_misses
from gralora_convert.base.edits import Setting, different_settings, updated, written_settings
from gralora_convert.base.placement import place
from gralora_convert.base.quantisation import quantisation
from gralora_convert.base.recipe import (
    Kept,
    Merged,
    Patched,
    Placement,
    Recipe,
    Replaced,
    Target,
    combine,
    read_parameter,
)
from gralora_convert.base.replacements import bias_missing

__all__ = [
    "Architecture", "Kept", "Merged", "Patched", "Placement", "Recipe", "Replaced", "Setting",
    "Target", "bias_missing", "combine", "different_settings", "near_misses", "place",
    "quantisation", "read_parameter", "updated", "written_settings",
]  # fmt: skip
