"""An adapter beside its base: names, orientation, ties, quantisation, edits. No torch."""

from typing import TYPE_CHECKING

from gralora_convert.doors import opened

if TYPE_CHECKING:
    from gralora_convert.base.architecture import Architecture
    from gralora_convert.base.edits import (
        Setting,
        class_fields,
        different_settings,
        named_labels,
        updated,
        written_settings,
    )
    from gralora_convert.base.identity import model_at_hand
    from gralora_convert.base.likeness import near_misses, spellings
    from gralora_convert.base.placement import place, place_in
    from gralora_convert.base.quantisation import quantised_by, unread_tensor
    from gralora_convert.base.reading import NOTHING_SAID, Reading
    from gralora_convert.base.recipe import (
        Kept,
        Merged,
        Patched,
        Placement,
        Recipe,
        Replaced,
        Target,
        combine,
        gathered,
        read_parameter,
    )
    from gralora_convert.base.scales import Scales, misread, plain_tensors, scales_of
    from gralora_convert.base.sets import beside, lost_steps

__all__ = [
    "NOTHING_SAID", "Architecture", "Kept", "Merged", "Patched", "Placement", "Reading",
    "Recipe", "Replaced", "Scales", "Setting", "Target", "beside", "class_fields", "combine",
    "different_settings", "gathered", "lost_steps", "misread", "model_at_hand", "named_labels",
    "near_misses", "place", "place_in", "plain_tensors", "quantised_by", "read_parameter",
    "scales_of", "spellings", "unread_tensor", "updated", "written_settings",
]  # fmt: skip

__getattr__ = opened(__name__, {
    "architecture": "Architecture",
    "edits": "Setting class_fields different_settings named_labels updated written_settings",
    "identity": "model_at_hand",
    "likeness": "near_misses spellings",
    "placement": "place place_in",
    "quantisation": "quantised_by unread_tensor",
    "reading": "NOTHING_SAID Reading",
    "recipe": (
        "Kept Merged Patched Placement Recipe Replaced Target combine gathered read_parameter"
    ),
    "scales": "Scales misread plain_tensors scales_of",
    "sets": "beside lost_steps",
})  # fmt: skip
