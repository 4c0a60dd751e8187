"""What will be written (a plan), and its bytes: complete or not at all."""

from typing import TYPE_CHECKING

from gralora_convert.doors import opened

if TYPE_CHECKING:
    from gralora_convert.output.adapter_files import Losses, New, adapter_plan, config_like
    from gralora_convert.output.cards import CARD_NAME, adapter_card, merged_card
    from gralora_convert.output.parts import Computed, Copied, OutputFile, Part
    from gralora_convert.output.plan import Plan
    from gralora_convert.output.ranks import Ranks, meeting
    from gralora_convert.output.receipt import adapter_receipt_findings, checkpoint_receipt_findings
    from gralora_convert.output.shards import index_json, index_name, lay_out
    from gralora_convert.output.tiles import (
        CastTensor,
        MergedTensor,
        PatchedTensor,
        are_finite,
        taken,
    )
    from gralora_convert.output.workers import one_arithmetic_thread

__all__ = [
    "CARD_NAME", "CastTensor", "Computed", "Copied", "Losses", "MergedTensor", "New", "OutputFile",
    "Part", "PatchedTensor", "Plan", "Ranks", "adapter_card", "adapter_plan",
    "adapter_receipt_findings", "are_finite", "checkpoint_receipt_findings", "config_like",
    "index_json", "index_name", "lay_out", "meeting", "merged_card", "one_arithmetic_thread",
    "taken",
]  # fmt: skip

__getattr__ = opened(__name__, {
    "adapter_files": "Losses New adapter_plan config_like",
    "cards": "CARD_NAME adapter_card merged_card",
    "plan": "Plan",
    "ranks": "Ranks meeting",
    "receipt": "adapter_receipt_findings checkpoint_receipt_findings",
    "shards": "index_json index_name lay_out",
    "tiles": "CastTensor MergedTensor PatchedTensor are_finite taken",
    "workers": "one_arithmetic_thread",
    "parts": "Computed Copied OutputFile Part",
})  # fmt: skip
