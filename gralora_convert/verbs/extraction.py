"""`extract`: the difference of two dense checkpoints as an adapter, optimal for its rank.

The linear layers that differ become modules; what no adapter can hold (norms, embeddings, heads) is
saved whole through `modules_to_save`, biases through the bias mode. Each worker holds one
difference at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from gralora_convert.base import Reading, quantised_by
from gralora_convert.delta import (
    Gralora,
    Kind,
    Lora,
    Loss,
    Method,
    Shape,
    Wanted,
    loss_json,
    relative,
    require_device,
    require_divisible,
    resize,
    smallest_rank,
    spectra,
    stored,
    to_lora,
)
from gralora_convert.disk import Checkpoint, torch_dtype, written_dtype
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.output import (
    New,
    Plan,
    adapter_card,
    adapter_plan,
    config_like,
    one_arithmetic_thread,
)
from gralora_convert.verbs.differences import Differences, Module
from gralora_convert.verbs.serving import refusals, serving_notes

DEFAULT_RANK = 32


def extract(
    *,
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    to: Kind,
    k: int | None = None,
    r: int | None = None,
    hybrid_r: int | None = None,
    alpha: float | None = None,
    max_error: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    svd: Method = "auto",
    dtype: str = "keep",
    device: str = "cpu",
    verify: bool = True,
    fan_in_fan_out: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of an adapter that takes `base` to `tuned`, as nearly as its rank allows.

    Modules are the linear layers that differ; `include` and `exclude` are shell patterns on their
    names. Other differences are saved whole. A block-wise truncated SVD is optimal for GraLoRA, a
    truncated SVD for LoRA; Hybrid alternates between the two.

    Arguments:
        k: default 2. r: default 32. hybrid_r: default r / 2, rounded up.
        max_error: instead of `r`, the smallest rank whose relative Frobenius error stays below.
        svd: of blocks with sides above 512 a randomised SVD is taken, about 0.03 % above the
            optimum; `exact` takes the full one, 25 times slower.
        dtype: of the factors; `keep` is float32.
        device: where it is computed.
        fan_in_fan_out: as in `merge`.
        verify: compare the outputs of difference and result (as stored) on probe inputs.

    Raises:
        MisuseError: the checkpoints are the same, or arguments that do not go together.
        UnsupportedError: tensors that no adapter can express, or a quantised checkpoint.
        InvalidAdapterError: a difference that is not finite.
    """
    wanted = Wanted(to, k, r, hybrid_r, alpha, max_error)
    written_dtype(dtype, "F32")
    if svd not in get_args(Method):
        raise MisuseError(f"svd {svd!r} is none of {', '.join(get_args(Method))}")
    if isinstance(include, str) or isinstance(exclude, str):
        raise TypeError("include and exclude are lists of patterns, not one text")
    before = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    after = tuned if isinstance(tuned, Checkpoint) else Checkpoint.open(tuned)
    for checkpoint in (before, after):
        if method := quantised_by(checkpoint):
            raise UnsupportedError(
                f"is quantised ({method}); plain weights were needed", where=checkpoint.path
            )
    require_device(device)
    found = Differences(
        before, after, include, exclude, Reading.of(None, fan_in_fan_out, trust_remote_code)
    )
    with one_arithmetic_thread():
        shape = _shape(found.modules, wanted, svd, device)
    made = "float32" if dtype == "keep" else dtype
    return _plan(before, after, found, _Extraction(shape, made, svd, device, verify))


def _shape(modules: Sequence[Module], wanted: Wanted, svd: Method, device: str) -> Shape:
    blocks, r, hybrid_r = wanted.blocks(2), wanted.r, wanted.hybrid_r
    for module in modules:
        way = f', leave this one out with `exclude={[module.name]}`, or take `to="lora"`'
        require_divisible(blocks, module.name, module.shape, way)
    if wanted.max_error is not None:
        tails = [spectra(m.delta(device), blocks, method=svd).cpu() for m in modules]
        r = blocks * smallest_rank(tails, wanted.max_error)
    r = DEFAULT_RANK if r is None else r
    if wanted.to == "hybrid" and hybrid_r == 0:
        raise MisuseError("a Hybrid has hybrid_r of at least 1", hint='Use `to="gralora"`.')
    general = (hybrid_r or -(-r // 2)) if wanted.to == "hybrid" else 0
    return wanted.shape(blocks, r, general, 1.0)


@dataclass(frozen=True)
class _Extraction:
    """How modules are made, and what each lost: as made, as a LoRA of as many parameters, and by
    the rounding of the tuned model."""

    shape: Shape
    dtype: str
    svd: Method
    device: str
    verify: bool
    lost: dict[str, Loss] = field(default_factory=dict)
    lost_by_lora: dict[str, Loss] = field(default_factory=dict)
    floor: dict[str, Loss] = field(default_factory=dict)

    def new(self, module: Module) -> New[Gralora | Lora]:
        dtype = torch_dtype(written_dtype(self.dtype, ""))
        nbytes = module.nbytes * (2 if self.shape.kind == "hybrid" else 1)
        outline = self.shape.outline(*module.shape, dtype)
        return New(outline, partial(self._made, module, dtype), nbytes)

    def _made(self, module: Module, dtype: torch.dtype) -> Gralora | Lora:
        delta, shape = module.delta(self.device), self.shape
        fit = resize(delta, shape, method=self.svd)
        made = stored(module.name, delta, fit, dtype, verify=self.verify)
        self.lost[module.name] = fit.error2, fit.norm2
        if shape.kind != "lora":
            budget = min(shape.r + shape.hybrid_r, *module.shape)
            rival = to_lora(delta, budget, method=self.svd)
            self.lost_by_lora[module.name] = rival.error2, rival.norm2
        rounding2 = module.rounding2()
        if rounding2 is not None:
            self.floor[module.name] = rounding2, fit.norm2
        return made


def _plan(before: Checkpoint, after: Checkpoint, found: Differences, how: _Extraction) -> Plan:
    shape, extras = how.shape, bool(found.biases or found.saved)
    names = [module.name for module in found.modules]
    if shape.kind == "lora":
        found.notes += serving_notes(shape.r, extras=extras)

    def receipt() -> dict[str, object]:
        inputs = {"base": before, "tuned": after}
        said: dict[str, object] = {
            "inputs": {
                name: {"source": read.source, "headers_sha256": read.digest()}
                for name, read in inputs.items()
            },
            "saved": sorted(found.saved), "biases": sorted(found.biases), "notes": found.notes,
            "dtype": how.dtype, **shape.as_json(), **loss_json(how.lost),
        }  # fmt: skip
        if how.lost_by_lora:
            said["lora_error"] = relative(how.lost_by_lora)
        if shape.kind == "lora":
            said["serving"] = refusals(shape.r, names, extras=extras)
        if how.floor:
            said["rounding_floor"] = relative(how.floor)
        return said

    biases = {f"{module}.bias": spec for module, spec in found.biases.items()}
    config = config_like(
        shape, 0.0, target_modules=names, bias="all" if biases else "none",
        modules_to_save=sorted(found.entries) or None,
        fan_in_fan_out=any(module.transposed for module in found.modules),
        base_model_name_or_path=before.source,
    )  # fmt: skip
    return adapter_plan(
        "extract", {module.name: how.new(module) for module in found.modules},
        biases | found.saved, config, receipt,
        card=adapter_card(shape.kind, before.source),
        inputs=(*before.layout.values(), *after.layout.values()),
        protected=(before.path, after.path),
        notes=tuple(found.notes),
    )  # fmt: skip
