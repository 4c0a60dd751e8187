"""inspect, validate, merge, convert, extract, verify: one each, and none knows another."""

from typing import TYPE_CHECKING

from gralora_convert.doors import opened

if TYPE_CHECKING:
    from gralora_convert.verbs.conversion import convert
    from gralora_convert.verbs.extraction import extract
    from gralora_convert.verbs.inspection import (
        AdapterFacts,
        CheckpointFacts,
        Inspection,
        SoundFacts,
        inspect,
    )
    from gralora_convert.verbs.merging import merge
    from gralora_convert.verbs.serving import ENGINES, RANK_LIMITS, SERVED_RANKS, served_rank
    from gralora_convert.verbs.spectra import Anatomy, Spectrum, dissect
    from gralora_convert.verbs.validation import validate
    from gralora_convert.verbs.verification.verdict import Equivalence, verify

__all__ = [
    "ENGINES", "RANK_LIMITS", "SERVED_RANKS", "AdapterFacts", "Anatomy", "CheckpointFacts",
    "Equivalence", "Inspection", "SoundFacts", "Spectrum", "convert", "dissect", "extract",
    "inspect", "merge", "served_rank", "validate", "verify",
]  # fmt: skip

__getattr__ = opened(__name__, {
    "conversion": "convert",
    "extraction": "extract",
    "inspection": "AdapterFacts CheckpointFacts Inspection SoundFacts inspect",
    "merging": "merge",
    "serving": "ENGINES RANK_LIMITS SERVED_RANKS served_rank",
    "spectra": "Anatomy Spectrum dissect",
    "validation": "validate",
    "verification.verdict": "Equivalence verify",
})  # fmt: skip
