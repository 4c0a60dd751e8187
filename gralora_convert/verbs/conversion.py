"""`convert`: the same update as another kind of adapter, exactly where mathematics allows.

The shape of the result is chosen first (config and tensor sizes), then each module is converted
when its tensors are written, from its factors; the dense matrix is formed only where an
approximate Hybrid is asked for, or the source is a DoRA.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from gralora_convert.adapters import (
    INCOMPLETE,
    Adapter,
    AdapterLike,
    GraloraConfig,
    LoraConfig,
    chain_findings,
    model_below,
    suspicions,
    trained_files,
    values_beside,
)
from gralora_convert.base import Reading, model_at_hand, place
from gralora_convert.delta import (
    Gralora,
    Kind,
    Lora,
    Shape,
    Wanted,
    loss_json,
    require_device,
    resize,
    stored,
    tensors_of,
)
from gralora_convert.disk import (
    FLOATING,
    Checkpoint,
    TensorSpec,
    dtype_name,
    sidecars,
    torch_dtype,
    written_dtype,
)
from gralora_convert.errors import InexactError, MisuseError, UnreadableError, UnsupportedError
from gralora_convert.output import (
    Losses,
    New,
    Plan,
    adapter_card,
    adapter_plan,
    config_like,
    one_arithmetic_thread,
)
from gralora_convert.verbs.serving import (
    ENGINES,
    Exported,
    largest_rank,
    refusals,
    require_engine,
    serving_notes,
)
from gralora_convert.verbs.shaping import draws, needed_rank, require_exact, shape_of
from gralora_convert.verbs.tailoring import tailored
from gralora_convert.verbs.updates import Source


def convert(
    adapter: AdapterLike,
    *,
    to: Kind,
    base: Checkpoint | str | Path | None = None,
    k: int | None = None,
    r: int | None = None,
    hybrid_r: int | None = None,
    alpha: float | None = None,
    max_error: float | None = None,
    allow_inexact: bool = False,
    server: str | None = None,
    dtype: "str | torch.dtype" = "keep",
    device: str = "cpu",
    verify: bool = True,
    key_map: Mapping[str, str] | None = None,
    fan_in_fan_out: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of the adapter as a `to`; `plan.write(output)` carries it out.

    Defaults: `k` the source's, or 2; `r` the smallest at which nothing is lost; to LoRA from
    GraLoRA k*r + hybrid_r; to Hybrid from LoRA hybrid_r = the LoRA's rank with fresh blocks. The
    scaling is kept (alpha follows), but a LoRA gets lora_alpha = r, so that every server scales it
    right. Biases and saved modules are carried over.

    Arguments:
        base: the original model that the adapter was trained on. Only DoRA, PiSSA, OLoRA and
            `lora_bias` need it; any adapter must fit it.
        r: the rank of the result (LoRA, or the GraLoRA part).
        max_error: instead of `r`, the smallest rank whose relative Frobenius error over all
            modules stays below.
        allow_inexact: approximate optimally where the shape cannot hold the update.
        server: make a LoRA as vllm, sglang, llama.cpp or peft reads it, or refuse what it does not
            serve (`verbs/serving.py`). With `max_error` modules get ranks of their own, but for
            sglang: the fewest parameters within the error, and for vllm no `max_lora_rank` above
            that of one rank.
        device: where it is computed.
        key_map, fan_in_fan_out: as in `merge`.
        verify: compare the outputs of source and result (as stored) on probe inputs.

    Raises:
        InvalidAdapterError: the adapter has errors, or does not fit the base.
        UnsupportedError: a LoRA whose update is more than scaling * B @ A, for want of the base or
            in a way that no adapter can express.
        InexactError: something would be lost, and neither `allow_inexact` nor `max_error` is given.
        MisuseError: arguments that do not go together, or do not fit the modules; a DoRA without
            a rank or an error.

    >>> convert("fixtures/peft-0.21.2/llama-hybrid", to="lora").files[0].parts[0].shape
    (11, 24)
    """
    if server is not None:
        require_engine(server, to)
    opened = Adapter.open(adapter)
    wanted = Wanted(to, k, r, hybrid_r, alpha, max_error)
    dtype = dtype_name(dtype)
    written_dtype(dtype, "F32")
    require_device(device, torch.float64)
    reading = Reading.of(key_map, fan_in_fan_out, trust_remote_code)
    source = Source.of(opened, base, device=device, reading=reading)
    if source.is_dora and r is None and max_error is None:
        raise MisuseError(
            "a DoRA has an update of full rank, which a smaller adapter can only approximate",
            where=opened.path,
            hint="Give `r` with `allow_inexact=True`, or `max_error`.",
        )
    with one_arithmetic_thread():
        shape = shape_of(source, wanted, server)
        notes = [] if source.base else _completeness(opened, reading)
        if server is not None and r is None and max_error is None:
            shape = _within(server, source, shape)
        if not allow_inexact and max_error is None:
            require_exact(source, shape)
    plan = _plan(source, shape, dtype, verify, notes, reading)
    return plan if server is None else tailored(plan, server, _exported(source, shape))


def _within(server: str, source: Source, shape: Shape) -> Shape:
    """The shape, at the largest rank that an engine takes if that loses nothing.

    Raises:
        InexactError: it would.
    """
    largest = largest_rank(server)
    if largest is None or shape.r <= largest:
        return shape
    smaller = replace(shape, r=largest)
    try:
        require_exact(source, smaller)
    except InexactError as problem:
        raise InexactError(
            f"{ENGINES[server].title} takes ranks up to {largest}: {problem.message}",
            where=problem.where,
            hint=f"Accept the error with `r={largest}` and `allow_inexact=True`, or merge.",
            exact_rank=problem.exact_rank, error=problem.error,
        ) from None  # fmt: skip
    return smaller


def _exported(source: Source, shape: Shape) -> Exported:
    """The result, a LoRA, as engines look at it."""
    config, adapter = _config(source, shape), source.adapter
    assert isinstance(config, LoraConfig)
    values = [
        *adapter.values,
        *values_beside(adapter),
        *([f"{adapter.modules[0]}.bias"] * source.has_bias),
    ]
    return Exported(config, adapter.modules, values, source.base or _at_hand(adapter))


def _plan(
    source: Source, shape: Shape, dtype: str, verify: bool, notes: Sequence[str], reading: Reading
) -> Plan:
    adapter, base = source.adapter, source.base
    lost = {name: Losses() for name in adapter.modules}
    modules = {
        name: _new(source, shape, name, dtype, verify, lost[name]) for name in adapter.modules
    }
    exported = _exported(source, shape) if shape.kind == "lora" else None
    told = [*notes, *_left_out(adapter.ignored), *map(str, chain_findings(adapter))]
    if exported is not None:
        told += serving_notes(exported)

    def receipt() -> dict[str, object]:
        inputs: dict[str, object] = {
            "adapter": {
                "path": str(adapter.path), "sha256": adapter.sha256(), "kind": adapter.kind,
            },
        }  # fmt: skip
        if base is not None:
            inputs["base"] = {"source": base.source, "headers_sha256": base.digest()}
        return {
            "inputs": inputs, "notes": told, "dtype": dtype, **shape.as_json(),
            **loss_json(Losses.of(lost, "own")),
            "serving": None if exported is None else refusals(exported),
            "base_dtype": None if exported is None else exported.dtype,
        }  # fmt: skip

    return adapter_plan(
        "convert", modules, _values(source), _config(source, shape), receipt,
        card=adapter_card(shape.kind, adapter.config.base_model_name_or_path, adapter.path),
        sidecars=sidecars(adapter.path) | trained_files(adapter),
        inputs=(adapter.file, *(() if base is None else base.layout.values())),
        protected=(adapter.path, *(() if base is None else (base.path,))),
        notes=tuple(told),
        settings={"device": source.device, "verify": verify, "reading": repr(reading)},
        resumable=True,
    )  # fmt: skip


def _new(
    source: Source, shape: Shape, module: str, dtype: str, verify: bool, lost: Losses
) -> New[Gralora | Lora]:
    weight, shape = source.adapter.shape(module), shape.of(module)
    kept = torch_dtype(_dtype_of(source.adapter, module, dtype))
    outline = shape.outline(*weight, kept)
    nbytes = 4 * sum(factor.numel() for factor in tensors_of(outline).values())
    if shape.kind == "hybrid" and needed_rank(source, shape, module):
        nbytes += 16 * math.prod(weight)  # fitted by turns to the dense matrix

    def make() -> Gralora | Lora:
        delta = source.delta(module)
        fit = resize(delta, shape, draws(source, module))
        made = stored(module, delta, fit, kept, verify=verify)
        lost["own"] = fit.error2, fit.norm2
        return made

    return New(outline, make, source.memory(module) + nbytes, account=lost)


def _dtype_of(adapter: Adapter, module: str, wanted: str) -> str:
    """The dtype of a module's factors; where theirs differ or have 8 bits, one that holds all.

    The magnitude of a DoRA and the bias of a LoRA are none of them."""
    found = {
        spec.dtype for role, spec in adapter.roles[module].items()
        if role not in ("magnitude", "lora_bias")
    }  # fmt: skip
    kept = found.pop() if len(found) == 1 and found <= FLOATING else "F32"
    return written_dtype(wanted, "F64" if "F64" in found else kept)


def _values(source: Source) -> dict[str, TensorSpec | New[torch.Tensor]]:
    """Biases and saved modules; the bias of a layer and that of its LoRA become one, which
    replaces the base's."""
    found: dict[str, TensorSpec | New[torch.Tensor]] = {}
    for module in source.adapter.modules if source.has_bias else ():
        size = source.adapter.roles[module]["lora_bias"].numel
        outline = torch.empty(size, device="meta")
        found[f"{module}.bias"] = New(outline, partial(source.bias, module))
    return found | {p: v for p, v in source.adapter.values.items() if p not in found}


def _config(source: Source, shape: Shape) -> GraloraConfig | LoraConfig:
    old = source.adapter.config
    bias = old.bias
    if bias.endswith("_only") or (bias == "none" and source.has_bias):
        bias = "lora_only" if shape.kind == "lora" else "gralora_only"
    if isinstance(old, LoraConfig):
        dropout, excluded = old.lora_dropout, bool(old.extra.get("exclude_modules"))
    else:
        dropout, excluded = old.gralora_dropout, False
    targets = old.target_modules
    if excluded or targets is None or targets == "all-linear":
        targets = list(source.adapter.modules)  # the tensors are the truth
    # LoRA's config refuses what has no effect: layers beside a regex, a pattern without layers
    layers = None if isinstance(targets, str) else old.layers_to_transform
    pattern = None if layers in (None, []) else old.layers_pattern  # layer 0 is one
    kept = (
        "fan_in_fan_out", "modules_to_save", "task_type", "base_model_name_or_path", "revision",
        "auto_mapping",
    )  # fmt: skip
    return config_like(
        shape, dropout, target_modules=targets, bias=bias, layers_to_transform=layers,
        layers_pattern=pattern, **{name: getattr(old, name) for name in kept},
    )  # fmt: skip


def _completeness(adapter: Adapter, reading: Reading) -> list[str]:
    """What an adapter without a given base shows of being incomplete, as notes.

    Raises:
        InvalidAdapterError: the base that it names is at hand, it fits there, and says that
            tensors are missing.
    """
    base = _at_hand(adapter)
    if base is None:
        return [str(finding) for finding in suspicions(adapter)]
    _, report = place(adapter, base, reading)
    if all(finding.code in INCOMPLETE for finding in report.errors):
        report.require_ok(adapter.path)
    return []


def _at_hand(adapter: Adapter) -> Checkpoint | None:
    """The base that an adapter names, if it is here and can be read; it was not asked for."""
    try:
        return model_at_hand(model_below(adapter))
    except (UnreadableError, UnsupportedError):
        return None


def _left_out(ignored: Mapping[str, str]) -> list[str]:
    """A line for each reason for which tensors are not carried over."""
    reasons: dict[str, list[str]] = {}
    for key, reason in ignored.items():
        reasons.setdefault(reason, []).append(key)
    return [
        f"{keys[0]}{f' and {len(keys) - 1} more' if keys[1:] else ''}: {reason}; left out"
        for reason, keys in reasons.items()
    ]
