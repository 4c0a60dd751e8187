"""Models in memory: on the meta device, with an adapter attached, run."""

from gralora_convert.models.attachment import Attachment, attach, put_on
from gralora_convert.models.building import (
    absurd_count,
    bare_shapes,
    build_problem,
    has_absurd_counts,
)
from gralora_convert.models.fitting import Parts
from gralora_convert.models.foreign import quiet
from gralora_convert.models.inputs import Inputs
from gralora_convert.models.layer import GraloraLinear
from gralora_convert.models.meta import Blueprint
from gralora_convert.models.running import (
    CannotRunError,
    Loaded,
    first_that_runs,
    holder_of,
    load,
    memory_needed,
    outputs_of,
    stored_dtype,
    tokenised,
)
from gralora_convert.models.tying import TieFlag

__all__ = [
    "Attachment", "Blueprint", "CannotRunError", "GraloraLinear", "Inputs", "Loaded", "Parts",
    "TieFlag", "absurd_count", "attach", "bare_shapes", "build_problem",
    "first_that_runs", "has_absurd_counts", "holder_of", "load", "memory_needed", "outputs_of",
    "put_on", "quiet", "stored_dtype", "tokenised",
]  # fmt: skip
