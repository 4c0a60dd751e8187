"""The mathematics of delta weights: forms, exact conversions, best fits, rounding. No files."""

from gralora_convert.delta.exact import (
    direct_sum,
    gralora_to_hybrid,
    gralora_to_lora,
    hybrid_to_gralora,
    lora_to_gralora,
    lora_to_hybrid,
    pad,
    pad_lora,
    permute_rows,
    with_scaling,
)
from gralora_convert.delta.fit import (
    Fit,
    exact_rank,
    smallest_rank,
    smallest_ranks,
    spectra,
    to_gralora,
    to_hybrid,
    to_lora,
)
from gralora_convert.delta.forms import (
    Delta,
    Dense,
    Gralora,
    Lora,
    device_for,
    is_finite,
    require_device,
    tensors_of,
    terms,
    to_device,
)
from gralora_convert.delta.forward import forward_path, gralora_product
from gralora_convert.delta.mistakes import BlockSums, Evidence, explain
from gralora_convert.delta.products import Stack, add_rows_, delta_weight, dense, elements, rows
from gralora_convert.delta.resizing import (
    EXACT,
    Kind,
    Loss,
    Shape,
    Wanted,
    effort,
    least_rank,
    loss_json,
    relative,
    require_divisible,
    resize,
    stored,
)
from gralora_convert.delta.rounding import (
    Addend,
    Survival,
    Verdict,
    admissible,
    compare,
    half_ulp,
    magnitude_rows,
    rounding_lengths,
    survival,
    tolerance,
    worst_ratio,
)
from gralora_convert.delta.svd import Method, block_norms, energies, squared_norm
from gralora_convert.delta.variants import Start, dora, start_of, without_start

__all__ = [
    "EXACT", "Addend", "BlockSums", "Delta", "Dense", "Evidence", "Fit", "Gralora", "Kind", "Lora",
    "Loss", "Method", "Shape", "Stack", "Start", "Survival", "Verdict", "Wanted", "add_rows_",
    "admissible", "block_norms", "compare", "delta_weight", "dense", "device_for", "direct_sum",
    "dora", "effort", "elements", "energies", "exact_rank", "explain", "forward_path",
    "gralora_product", "gralora_to_hybrid", "gralora_to_lora", "half_ulp", "hybrid_to_gralora",
    "is_finite", "least_rank", "lora_to_gralora", "lora_to_hybrid", "loss_json", "magnitude_rows",
    "pad", "pad_lora", "permute_rows", "relative", "require_device", "require_divisible", "resize",
    "rounding_lengths", "rows", "smallest_rank", "smallest_ranks", "spectra", "squared_norm",
    "start_of", "stored", "survival", "tensors_of", "terms", "to_device", "to_gralora", "to_hybrid",
    "to_lora", "tolerance", "with_scaling", "without_start", "worst_ratio",
]  # fmt: skip
