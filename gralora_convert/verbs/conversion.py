"""`convert`: the same update as another kind of adapter, exactly where mathematics allows.

The shape of the result is chosen first (config and tensor sizes), then each module is converted
when its tensors are written, from its factors; the dense matrix is formed only where an
approximate Hybrid is asked for, or the source is a DoRA.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from gralora_convert.adapters import (
    CONFIG_NAME,
    INCOMPLETE,
    PEFT_VERSION,
    Adapter,
    GraloraConfig,
    LoraConfig,
    chain_findings,
    key_of,
    model_below,
    suspicions,
)
from gralora_convert.base import Reading, model_at_hand, place, trained_beside
from gralora_convert.delta import (
    EXACT,
    Gralora,
    Kind,
    Lora,
    Loss,
    Shape,
    blocks_for,
    least_rank,
    loss_json,
    relative,
    require_device,
    require_divisible,
    require_same,
    require_sensible,
    resize,
    rounded,
    shape_of,
    smallest_rank,
    spectra,
)
from gralora_convert.disk import (
    FLOATING,
    Checkpoint,
    bytes_of,
    sidecars,
    torch_dtype,
    written_dtype,
)
from gralora_convert.errors import (
    InexactError,
    MisuseError,
    UnreadableError,
    UnsupportedError,
)
from gralora_convert.output import (
    CARD_NAME,
    Computed,
    OutputFile,
    Part,
    Plan,
    Workshop,
    adapter_card,
    copied,
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
from gralora_convert.verbs.tailoring import tailored
from gralora_convert.verbs.updates import Source
from gralora_convert.version import __version__


def convert(
    adapter: Adapter | str | Path,
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
    dtype: str = "keep",
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
            serve (`verbs/serving.py`).
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
        require_engine(server)
        if to != "lora":
            raise MisuseError(f'`server={server!r}` goes with `to="lora"`, not {to!r}')
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    require_sensible(to, k, r, hybrid_r, alpha, max_error)
    written_dtype(dtype, "F32")
    require_device(device)
    reading = Reading.of(key_map, fan_in_fan_out, trust_remote_code)
    source = Source.of(opened, base, device=device, reading=reading)
    if source.is_dora and r is None and max_error is None:
        raise MisuseError(
            "a DoRA has an update of full rank, which a smaller adapter can only approximate",
            where=opened.path,
            hint="Give `r` with `allow_inexact=True`, or `max_error`.",
        )
    with one_arithmetic_thread():
        shape = _shape(source, to, k, r, hybrid_r, alpha, max_error)
        notes = [] if source.base else _completeness(opened, reading)
        conversion = _Conversion(source, shape, dtype, verify, tuple(notes))
        if server is not None and r is None and max_error is None:
            conversion = conversion.within(server)
        if not allow_inexact and max_error is None:
            conversion.require_exact()
    plan = conversion.plan()
    return plan if server is None else tailored(plan, server, conversion.exported())


def _shape(
    source: Source,
    to: Kind,
    k: int | None,
    r: int | None,
    hybrid_r: int | None,
    alpha: float | None,
    max_error: float | None,
) -> Shape:
    """The shape asked for, with defaults filled in."""
    adapter, config = source.adapter, source.adapter.config
    own = config.gralora_k if isinstance(config, GraloraConfig) else 2
    blocks = blocks_for(to, k, hybrid_r, own)
    for module in adapter.modules:
        require_divisible(blocks, module, adapter.shape(module))
    general = _general(source, hybrid_r) if to == "hybrid" else 0
    if r is None:
        r = _default_rank(source, to, blocks, general, max_error)
    kept = config.scaling if isinstance(config, GraloraConfig) else _usual_scaling(source)
    return shape_of(to, blocks, r, general, alpha, 1.0 if to == "lora" else kept)


def _usual_scaling(source: Source) -> float:
    """The scaling of most modules of a LoRA with patterns, so that few of them change theirs."""
    found = [source.adapter.scaling(module) for module in source.adapter.modules]
    return max(dict.fromkeys(found), key=found.count) or 1.0


def _general(source: Source, hybrid_r: int | None) -> int:
    if hybrid_r is not None:
        if hybrid_r < 1:
            raise MisuseError("a Hybrid has hybrid_r of at least 1", hint='Use `to="gralora"`.')
        return hybrid_r
    config = source.adapter.config
    if isinstance(config, GraloraConfig):
        return config.hybrid_r or max(1, config.r // config.gralora_k)
    outlines = [source.outline(module) for module in source.adapter.modules]
    return max(delta.r if isinstance(delta, Lora) else config.r for delta in outlines)


def _default_rank(source: Source, to: Kind, k: int, general: int, max_error: float | None) -> int:
    modules = source.adapter.modules
    if max_error is not None:
        return k * smallest_rank([spectra(source.delta(m), k).cpu() for m in modules], max_error)
    least = max(least_rank(source.outline(module), to, k, general) for module in modules)
    if to == "hybrid" and source.adapter.kind == "lora":
        return max(least, -(-general // k) * k)
    return least


@dataclass
class _Conversion:
    source: Source
    shape: Shape
    dtype: str
    verify: bool
    notes: tuple[str, ...] = ()
    lost: dict[str, Loss] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        return self.source.adapter

    def plan(self) -> Plan:
        adapter = self.adapter
        notes = [*self.notes, *_left_out(adapter.ignored), *map(str, chain_findings(adapter))]
        if self.shape.kind == "lora":
            notes += serving_notes(self.exported())
        workshop = Workshop()
        parts = [part for module in adapter.modules for part in self._parts(workshop, module)]
        parts += self._carried()
        base = self.source.base
        return Plan(
            command="convert",
            files=(OutputFile("adapter_model.safetensors", tuple(parts)),),
            receipt=partial(self._receipt, notes),
            texts={
                CONFIG_NAME: self._config().to_json(),
                CARD_NAME: adapter_card(
                    self.shape.kind, adapter.config.base_model_name_or_path, adapter.path
                ),
            },
            sidecars=sidecars(adapter.path) | trained_beside(adapter),
            inputs=(adapter.file, *(() if base is None else base.layout.values())),
            protected=(adapter.path, *(() if base is None else (base.path,))),
            notes=tuple(notes),
        )

    def require_exact(self) -> None:
        """Raises `InexactError` when the shape cannot hold some module's update."""
        modules = self.adapter.modules
        short = [m for m in modules if self._needed(m) is not None]
        if not short:
            return
        fits = {m: resize(self.source.delta(m), self.shape, self._draws(m)) for m in modules}
        error = relative({module: (fit.error2, fit.norm2) for module, fit in fits.items()})
        if error <= EXACT:
            return
        needed = self._exact_from(short)
        whole = max(self._needed(module) or 0 for module in short)
        more = f" (to {EXACT:g}; {whole} hold any such factors)" if whole > needed else ""
        raise InexactError(
            f"r={self.shape.r} cannot hold the update exactly: the relative error would be "
            f"{error:.3g}; exact from r={needed}{more}",
            where=self.adapter.path,
            hint=f"Give `r={needed}` or leave it out, or accept the error with "
            "`allow_inexact=True`.",
            exact_rank=needed,
            error=error,
        )

    def within(self, server: str) -> "_Conversion":
        """This, at the largest rank that an engine takes if that loses nothing.

        Raises:
            InexactError: it would.
        """
        largest = largest_rank(server)
        if largest is None or self.shape.r <= largest:
            return self
        smaller = replace(self, shape=shape_of("lora", 1, largest, 0, None, self.shape.scaling))
        try:
            smaller.require_exact()
        except InexactError as problem:
            raise InexactError(
                f"{ENGINES[server].title} takes ranks up to {largest}: {problem.message}",
                where=problem.where,
                hint=f"Accept the error with `r={largest}` and `allow_inexact=True`, or merge.",
                exact_rank=problem.exact_rank, error=problem.error,
            ) from None  # fmt: skip
        return smaller

    def _exact_from(self, short: Sequence[str]) -> int:
        """The smallest r at which nothing is lost: the numerical rank of the blocks."""
        shape = self.shape
        if shape.kind == "hybrid":  # a general part beside the blocks: of generic factors
            return max(self._needed(module) or 0 for module in short)
        tails = [spectra(self.source.delta(m), shape.k).cpu() for m in self.adapter.modules]
        return shape.k * smallest_rank(tails, EXACT)

    def _needed(self, module: str) -> int | None:
        """The smallest exact r when the shape's is smaller, for factors of full rank."""
        shape = self.shape
        needed = least_rank(self.source.outline(module), shape.kind, shape.k, shape.hybrid_r)
        return needed if shape.r < needed else None

    # one module -----------------------------------------------------------------------------------

    def _draws(self, module: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.adapter.modules.index(module))

    def _made(self, module: str) -> Gralora | Lora:
        """The converted module as it is stored; what was lost is kept for the receipt."""
        delta = self.source.delta(module)
        fit = resize(delta, self.shape, self._draws(module))
        dtype = torch_dtype(self._dtype_of(module))
        made = rounded(module, fit.delta, dtype)
        if self.verify:
            require_same(module, delta, made, fit.error2, dtype)
        self.lost[module] = (fit.error2, fit.norm2)
        return made

    def _dtype_of(self, module: str) -> str:
        """The dtype of a module's factors; where theirs differ or have 8 bits, one that holds all.

        The magnitude of a DoRA and the bias of a LoRA are none of them."""
        found = {
            spec.dtype for role, spec in self.adapter.roles[module].items()
            if role not in ("magnitude", "lora_bias")
        }  # fmt: skip
        kept = found.pop() if len(found) == 1 and found <= FLOATING else "F32"
        return written_dtype(self.dtype, "F64" if "F64" in found else kept)

    def _parts(self, workshop: Workshop, module: str) -> list[Part]:
        weight = self.adapter.shape(module)
        made = 4 * sum(math.prod(size) for size in self.shape.sizes(*weight).values())
        if self.shape.kind == "hybrid" and self._needed(module) is not None:
            made += 16 * math.prod(weight)  # fitted by turns to the dense matrix
        return workshop.parts(
            module, weight, self.shape, self._dtype_of(module), partial(self._made, module),
            self.source.memory(module) + made,
        )  # fmt: skip

    # the rest of the adapter ----------------------------------------------------------------------

    def _carried(self) -> list[Part]:
        """Biases and saved modules under the keys that PEFT gives them."""
        targets = self.adapter.modules
        own = targets if self.source.has_bias else ()
        parts = [self._bias(module) for module in own]
        for module, spec in self.adapter.biases.items():
            if module not in own:
                inner = key_of(module, "bias")
                key = inner if module in targets else key_of(f"{module}.bias", "parameter")
                parts.append(copied(key, spec))
        saved = self.adapter.saved.items()
        return parts + [copied(key_of(path, "parameter"), spec) for path, spec in saved]

    def _bias(self, module: str) -> Part:
        """The bias of a layer and that of its LoRA in one, which replaces the base's."""
        size = self.adapter.roles[module]["lora_bias"].numel

        def produce(tile: int) -> memoryview:
            return bytes_of(self.source.bias(module))

        source = Computed(4 * size, produce, 4 * size)
        return Part(key_of(module, "bias"), "F32", (size,), 4 * size, source)

    def _config(self) -> GraloraConfig | LoraConfig:
        old, shape = self.adapter.config, self.shape
        bias = old.bias
        if bias.endswith("_only") or (bias == "none" and self.source.has_bias):
            bias = "lora_only" if shape.kind == "lora" else "gralora_only"
        if isinstance(old, LoraConfig):
            dropout, excluded = old.lora_dropout, bool(old.extra.get("exclude_modules"))
        else:
            dropout, excluded = old.gralora_dropout, False
        targets = old.target_modules
        if excluded or targets is None or targets == "all-linear":
            targets = list(self.adapter.modules)  # the tensors are the truth
        # LoRA's config refuses what has no effect: layers beside a regex, a pattern without layers
        layers = None if isinstance(targets, str) else old.layers_to_transform
        pattern = None if layers in (None, []) else old.layers_pattern  # layer 0 is one
        if shape.kind == "lora":
            return LoraConfig(
                r=shape.r, lora_alpha=shape.alpha, lora_dropout=dropout, target_modules=targets,
                fan_in_fan_out=old.fan_in_fan_out, bias=bias, modules_to_save=old.modules_to_save,
                layers_to_transform=layers, layers_pattern=pattern,
                task_type=old.task_type, base_model_name_or_path=old.base_model_name_or_path,
                revision=old.revision, inference_mode=True, auto_mapping=old.auto_mapping,
                peft_version=PEFT_VERSION,
            )  # fmt: skip
        return GraloraConfig(
            r=shape.r, hybrid_r=shape.hybrid_r, alpha=shape.alpha, gralora_k=shape.k,
            gralora_dropout=dropout, target_modules=targets, fan_in_fan_out=old.fan_in_fan_out,
            bias=bias, modules_to_save=old.modules_to_save,
            layers_to_transform=layers, layers_pattern=pattern,
            task_type=old.task_type, base_model_name_or_path=old.base_model_name_or_path,
            revision=old.revision, inference_mode=True, auto_mapping=old.auto_mapping,
            peft_version=PEFT_VERSION,
        )  # fmt: skip

    def _base_json(self) -> dict[str, object]:
        base = self.source.base
        if base is None:
            return {}
        return {"base": {"source": base.source, "headers_sha256": base.digest()}}

    def exported(self) -> Exported:
        """The result, a LoRA, as engines look at it."""
        config, adapter = self._config(), self.adapter
        assert isinstance(config, LoraConfig)
        values = [*adapter.values, *([f"{adapter.modules[0]}.bias"] * self.source.has_bias)]
        return Exported(config, adapter.modules, values, self.source.base or at_hand(adapter))

    def _receipt(self, notes: Sequence[str]) -> dict[str, object]:
        is_lora = self.shape.kind == "lora"
        return {
            "tool": "gralora-convert",
            "version": __version__,
            "command": "convert",
            "inputs": {
                "adapter": {
                    "path": str(self.adapter.path),
                    "sha256": self.adapter.sha256(),
                    "kind": self.adapter.kind,
                },
                **self._base_json(),
            },
            "notes": list(notes),
            "dtype": self.dtype,
            **self.shape.as_json(),
            **loss_json(self.lost),
            "serving": refusals(self.exported()) if is_lora else None,
            "base_dtype": self.exported().dtype if is_lora else None,
        }


def _completeness(adapter: Adapter, reading: Reading) -> list[str]:
    """What an adapter without a given base shows of being incomplete, as notes.

    Raises:
        InvalidAdapterError: the base that it names is at hand, it fits there, and says that
            tensors are missing.
    """
    base = at_hand(adapter)
    if base is None:
        return [str(finding) for finding in suspicions(adapter)]
    _, report = place(adapter, base, reading)
    if all(finding.code in INCOMPLETE for finding in report.errors):
        report.require_ok(adapter.path)
    return []


def at_hand(adapter: Adapter) -> Checkpoint | None:
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
