"""`extract`: the difference of two dense checkpoints as an adapter, optimal for its rank.

The linear layers that differ become modules; what no adapter can hold (norms, embeddings, heads) is
saved whole through `modules_to_save`, biases through the bias mode. Each worker holds one
difference at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from gralora_convert.adapters import LoraConfig
from gralora_convert.base import Reading, class_fields, quantised_by
from gralora_convert.delta import (
    Gralora,
    Kind,
    Lora,
    Method,
    Shape,
    Wanted,
    effort,
    loss_json,
    relative,
    require_device,
    require_divisible,
    resize,
    spectra,
    stored,
    to_lora,
)
from gralora_convert.disk import Checkpoint, dtype_name, torch_dtype, written_dtype
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.output import (
    Losses,
    New,
    Plan,
    adapter_card,
    adapter_plan,
    config_like,
    one_arithmetic_thread,
)
from gralora_convert.verbs.differences import Choice, Differences, differences
from gralora_convert.verbs.layers import Module
from gralora_convert.verbs.serving import Exported, refusals, require_engine, serving_notes
from gralora_convert.verbs.shaping import within_error
from gralora_convert.verbs.tailoring import tailored

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
    linear_only: bool = False,
    server: str | None = None,
    svd: Method = "auto",
    dtype: "str | torch.dtype" = "keep",
    device: str = "cpu",
    verify: bool = True,
    fan_in_fan_out: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of an adapter that takes `base` to `tuned`, as nearly as its rank allows.

    Modules are the linear layers that differ; other differences are saved whole. A block-wise
    truncated SVD is optimal for GraLoRA, a truncated SVD for LoRA; Hybrid alternates between the
    two.

    Arguments:
        include, exclude: shell patterns on names of modules: only what is like these, nothing that
            is like those, be it a linear layer or saved whole.
        linear_only: nothing is saved whole: embeddings, output head, norms and biases keep the
            base's values, so that servers take the LoRA. `plan.notes` say what was left out, and
            how much of the difference that is.
        k: default 2. r: default 32. hybrid_r: default r / 2, rounded up.
        max_error: instead of `r`, the smallest rank whose relative Frobenius error stays below.
        server: a LoRA as one engine reads it, as in `convert`.
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
    if server is not None:
        require_engine(server, to)
    wanted = Wanted(to, k, r, hybrid_r, alpha, max_error)
    written = written_dtype(dtype_name(dtype), "F32")
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
    require_device(device, torch.float64)
    choice = Choice(include, exclude, linear_only)
    reading = Reading.of(None, fan_in_fan_out, trust_remote_code)
    found = differences(before, after, choice, reading)
    with one_arithmetic_thread():
        shape = _shape(found.modules, wanted, svd, device, server)
    how = _How(shape, torch_dtype(written), svd, device, verify, server)
    return _plan(before, after, found, how)


def _shape(
    modules: Sequence[Module], wanted: Wanted, svd: Method, device: str, server: str | None
) -> Shape:
    blocks, r, hybrid_r = wanted.blocks(2), wanted.r, wanted.hybrid_r
    for module in modules:
        way = f', leave this one out with `exclude={[module.name]}`, or take `to="lora"`'
        require_divisible(blocks, module.name, module.shape, way)
    if wanted.max_error is not None:
        tails = {m.name: spectra(m.delta(device), blocks, method=svd).cpu() for m in modules}
        sizes = {module.name: module.shape for module in modules}
        return within_error(wanted, tails, sizes, blocks, 1.0, server)
    r = DEFAULT_RANK if r is None else r
    if wanted.to == "hybrid" and hybrid_r == 0:
        raise MisuseError("a Hybrid has hybrid_r of at least 1", hint='Use `to="gralora"`.')
    general = (hybrid_r or -(-r // 2)) if wanted.to == "hybrid" else 0
    return wanted.shape(blocks, r, general, 1.0)


@dataclass(frozen=True, slots=True)
class _How:
    """How modules are made: their shape, the dtype of factors, and what `extract` was told."""

    shape: Shape
    dtype: torch.dtype
    svd: Method
    device: str
    verify: bool
    server: str | None


def _made(module: Module, how: _How, lost: Losses) -> Gralora | Lora:
    """Also finds out what a LoRA of as many parameters would have lost, and what the rounding of
    the tuned model alone accounts for."""
    delta, shape = module.delta(how.device), how.shape.of(module.name)
    fit = resize(delta, shape, method=how.svd)
    made = stored(module.name, delta, fit, how.dtype, verify=how.verify)
    found = {"own": (fit.error2, fit.norm2)}
    if shape.kind != "lora":
        budget = min(shape.r + shape.hybrid_r, *module.shape)
        rival = to_lora(delta, budget, method=how.svd)
        found["lora"] = rival.error2, rival.norm2
    rounding2 = module.rounding2()
    if rounding2 is not None:
        found["rounding"] = rounding2, fit.norm2
    lost.update(found)
    return made


def _plan(before: Checkpoint, after: Checkpoint, found: Differences, how: _How) -> Plan:
    losses, shape = {module.name: Losses() for module in found.modules}, how.shape
    factor = 2 if shape.kind == "hybrid" else 1  # beside the difference, what is fitted by turns
    modules = {
        module.name: New(
            shape.of(module.name).outline(*module.shape, how.dtype),
            partial(_made, module, how, losses[module.name]),
            factor * module.nbytes, effort(shape, module.shape, how.svd), losses[module.name],
        )
        for module in found.modules
    }  # fmt: skip
    biases = {f"{module}.bias": spec for module, spec in found.biases.items()}
    values = biases | found.saved
    config = config_like(
        shape, 0.0, target_modules=list(modules), bias="all" if biases else "none",
        modules_to_save=sorted(found.entries) or None,
        fan_in_fan_out=any(module.transposed for module in found.modules),
        base_model_name_or_path=before.source, **class_fields(found.names),
    )  # fmt: skip
    exported = None
    if isinstance(config, LoraConfig):
        exported = Exported(config, list(modules), list(values), before)
        found.notes += serving_notes(exported)
    inputs = {"base": before, "tuned": after}
    plan = adapter_plan(
        "extract", modules, values, config,
        partial(_receipt, inputs, found, how, losses, exported),
        settings={"svd": how.svd, "device": how.device, "verify": how.verify},
        resumable=True,
        card=adapter_card(shape.kind, before.source), model_config=found.config,
        inputs=(*before.layout.values(), *after.layout.values()),
        protected=(before.path, after.path),
        notes=tuple(found.notes),
    )  # fmt: skip
    if how.server is None or exported is None:
        return plan
    return tailored(plan, how.server, exported)


def _receipt(
    inputs: Mapping[str, Checkpoint],
    found: Differences,
    how: _How,
    losses: Mapping[str, Losses],
    exported: Exported | None,
) -> dict[str, object]:
    receipt: dict[str, object] = {
        "inputs": {
            name: {"source": read.source, "headers_sha256": read.digest()}
            for name, read in inputs.items()
        },
        "saved": sorted(found.saved), "biases": sorted(found.biases), "notes": found.notes,
        "left_out": found.left_out,
        "dtype": str(how.dtype).removeprefix("torch."), **how.shape.as_json(),
        **loss_json(Losses.of(losses, "own")),
    }  # fmt: skip
    if rival := Losses.of(losses, "lora"):
        receipt["lora_error"] = relative(rival)
    if exported is not None:
        receipt |= {"serving": refusals(exported), "base_dtype": exported.dtype}
    if rounding := Losses.of(losses, "rounding"):
        receipt["rounding_floor"] = relative(rounding)
    return receipt
