"""`convert`: the same update as another kind of adapter, exactly where mathematics allows.

The shape of the result is chosen first (config and tensor sizes), then each module is converted
when its tensors are written, from its factors; the dense matrix is formed only where an
approximate Hybrid is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import assert_never

import torch

from gralora_convert.adapter import Adapter
from gralora_convert.assembly import (
    EXACT,
    SERVED_RANKS,
    Kind,
    Loss,
    Made,
    Shape,
    blocks_for,
    copied,
    loss_json,
    module_parts,
    relative,
    require_divisible,
    rounded,
    shape_of,
)
from gralora_convert.cards import CARD_NAME, adapter_card
from gralora_convert.checkpoint import sidecars
from gralora_convert.config import CONFIG_NAME, PEFT_VERSION, GraloraConfig, LoraConfig
from gralora_convert.delta import (
    Gralora,
    Lora,
    gralora_to_lora,
    hybrid_to_gralora,
    kaiming,
    lora_to_hybrid,
    pad,
    pad_lora,
    with_scaling,
)
from gralora_convert.errors import CheckFailedError, InexactError, MisuseError
from gralora_convert.factorize import (
    Fit,
    exact_rank,
    smallest_rank,
    spectra,
    to_gralora,
    to_hybrid,
    to_lora,
)
from gralora_convert.keys import key_of
from gralora_convert.layer import forward_path
from gralora_convert.plan import OutputFile, Part, Plan
from gralora_convert.tensors import TensorSpec, torch_dtype
from gralora_convert.version import __version__

__all__ = ["convert"]

DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PROBES = 4


def convert(
    adapter: Adapter | str | Path,
    *,
    to: Kind,
    k: int | None = None,
    r: int | None = None,
    hybrid_r: int | None = None,
    alpha: float | None = None,
    max_error: float | None = None,
    allow_inexact: bool = False,
    dtype: str = "keep",
    verify: bool = True,
) -> Plan:
    """The plan of the adapter as a `to`; `plan.write(output)` carries it out.

    Defaults: `k` the source's, or 2; `r` the smallest at which nothing is lost; to LoRA from
    GraLoRA k*r + hybrid_r; to Hybrid from LoRA hybrid_r = the LoRA's rank with fresh blocks. The
    scaling is kept (alpha follows), but a LoRA gets lora_alpha = r, so that every server scales it
    right. Biases and saved modules are carried over.

    Arguments:
        r: the rank of the result (LoRA, or the GraLoRA part).
        max_error: instead of `r`, the smallest rank whose relative Frobenius error over all
            modules stays below.
        allow_inexact: approximate optimally where the shape cannot hold the update.

    Raises:
        InvalidAdapterError: the adapter has errors.
        UnsupportedError: a LoRA whose update is more than scaling * B @ A.
        InexactError: something would be lost, and neither `allow_inexact` nor `max_error` is given.
        MisuseError: arguments that do not go together, or do not fit the modules.

    >>> convert("fixtures/peft-0.21.2/llama-hybrid", to="lora").files[0].parts[0].shape
    (11, 24)
    """
    opened = adapter if isinstance(adapter, Adapter) else Adapter.open(adapter)
    opened.require_plain()
    if max_error is not None and (r is not None or not 0 < max_error < 1):
        raise MisuseError("--max-error takes a number between 0 and 1, and excludes --r")
    shape = _shape(opened, to, k, r, hybrid_r, alpha, max_error)
    conversion = _Conversion(opened, shape, dtype, verify)
    if not allow_inexact and max_error is None:
        conversion.require_exact()
    return conversion.plan()


def _shape(
    adapter: Adapter,
    to: Kind,
    k: int | None,
    r: int | None,
    hybrid_r: int | None,
    alpha: float | None,
    max_error: float | None,
) -> Shape:
    """The shape asked for, with defaults filled in."""
    config = adapter.config
    own = config.gralora_k if isinstance(config, GraloraConfig) else 2
    blocks = blocks_for(to, k, hybrid_r, own)
    for module in adapter.modules:
        require_divisible(blocks, module, adapter.shape(module))
    general = _general(adapter, hybrid_r) if to == "hybrid" else 0
    if r is None:
        r = _default_rank(adapter, to, blocks, general, max_error)
    kept = config.scaling if isinstance(config, GraloraConfig) else config.scaling("")
    return shape_of(to, blocks, r, general, alpha, 1.0 if to == "lora" else kept)


def _general(adapter: Adapter, hybrid_r: int | None) -> int:
    if hybrid_r is not None:
        if hybrid_r < 1:
            raise MisuseError("a Hybrid has hybrid_r of at least 1", hint="Use --to gralora.")
        return hybrid_r
    config = adapter.config
    if isinstance(config, LoraConfig):
        return max(config.rank(module) for module in adapter.modules)
    return config.hybrid_r or max(1, config.r // config.gralora_k)


def _default_rank(adapter: Adapter, to: Kind, k: int, general: int, max_error: float | None) -> int:
    if max_error is not None:
        if to == "hybrid":
            raise MisuseError("--max-error chooses the rank of a LoRA or GraLoRA, not of a Hybrid")
        tails = [spectra(adapter.delta(module), k) for module in adapter.modules]
        return k * smallest_rank(tails, max_error)
    config = adapter.config
    if to == "hybrid":
        r = config.r if isinstance(config, GraloraConfig) else general
        return -(-r // k) * k
    return max(exact_rank(adapter.delta(module), to, k) for module in adapter.modules)


@dataclass
class _Conversion:
    adapter: Adapter
    shape: Shape
    dtype: str
    verify: bool
    lost: dict[str, Loss] = field(default_factory=dict)

    def plan(self) -> Plan:
        notes = [f"{key}: {reason}; left out" for key, reason in self.adapter.ignored.items()]
        notes += _serving_notes(self.adapter, self.shape)
        parts = [part for module in self.adapter.modules for part in self._parts(module)]
        parts += [copied(name, spec) for name, spec in self._carried().items()]
        return Plan(
            command="convert",
            files=(OutputFile("adapter_model.safetensors", tuple(parts)),),
            receipt=partial(self._receipt, notes),
            texts={
                CONFIG_NAME: self._config().to_json(),
                CARD_NAME: adapter_card(
                    self.shape.kind, self.adapter.config.base_model_name_or_path, self.adapter.path
                ),
            },
            sidecars=sidecars(self.adapter.path),
            inputs=(self.adapter.file,),
            protected=(self.adapter.path,),
            notes=tuple(notes),
        )

    def require_exact(self) -> None:
        """Raises `InexactError` when the shape cannot hold some module's update."""
        short = [m for m in self.adapter.modules if self._needed(m) is not None]
        if not short:
            return
        fits = ((module, self._fit(module)) for module in self.adapter.modules)
        error = relative({module: (fit.error2, fit.norm2) for module, fit in fits})
        if error <= EXACT:
            return
        needed = max(self._needed(module) or 0 for module in short)
        raise InexactError(
            f"r={self.shape.r} cannot hold the update exactly: the relative error would be "
            f"{error:.3g}; exact from r={needed}",
            where=self.adapter.path,
            hint="Leave out --r, or accept the error with --allow-inexact.",
            exact_rank=needed,
            error=error,
        )

    def _needed(self, module: str) -> int | None:
        """The smallest exact r when the shape's is smaller, for factors of full rank."""
        delta, shape = self.adapter.delta(module), self.shape
        if shape.kind == "hybrid":
            held = delta.r if isinstance(delta, Lora) else delta.hybrid_r
            needed = exact_rank(delta, "hybrid", shape.k)
            if held > shape.hybrid_r:  # the blocks would have to take over the general part
                needed = exact_rank(delta, "gralora", shape.k)
        else:
            needed = exact_rank(delta, shape.kind, shape.k)
        return needed if shape.r < needed else None

    # one module -----------------------------------------------------------------------------------

    def _fit(self, module: str) -> Fit[Gralora] | Fit[Lora]:
        """The module as the shape, with what was lost; layouts without arithmetic come first."""
        delta, shape = self.adapter.delta(module), self.shape
        generator = torch.Generator().manual_seed(self.adapter.modules.index(module))
        match shape.kind:
            case "lora":
                return _as_lora(delta, shape)
            case "gralora":
                return _as_gralora(delta, shape, generator)
            case "hybrid":
                return _as_hybrid(delta, shape, generator)
            case other:
                assert_never(other)

    def _made(self, module: str) -> Gralora | Lora:
        """The converted module; what was lost is kept for the receipt."""
        fit = self._fit(module)
        if self.verify:
            self._check(module, fit.delta, fit.relative_error)
        self.lost[module] = (fit.error2, fit.norm2)
        return fit.delta

    def _check(self, module: str, made: Gralora | Lora, error: float) -> None:
        """The forward paths of source and result (as stored) on probe inputs, in float64."""
        dtype = torch_dtype(self._dtype_of(module))
        stored = rounded(made, dtype)
        source = self.adapter.delta(module)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(PROBES, source.in_features, dtype=torch.float64, generator=generator)
        wanted = forward_path(source, x)
        found = float((forward_path(stored, x) - wanted).norm() / (wanted.norm() + 1e-300))
        rounding = 16 * torch.finfo(dtype).eps
        if not found <= 3 * error + rounding and float(wanted.norm()) > 0:
            raise CheckFailedError(
                f"gives other outputs than its source: relative difference {found:.3g}, "
                f"{error:.3g} was expected",
                where=module,
                hint="Nothing was published. Please report this with the adapter.",
            )

    def _dtype_of(self, module: str) -> str:
        return DTYPES.get(self.dtype, self.adapter.roles[module]["A"].dtype)

    def _parts(self, module: str) -> list[Part]:
        return module_parts(
            module,
            self.adapter.shape(module),
            self.shape,
            self._dtype_of(module),
            partial(self._made, module),
        )

    # the rest of the adapter ----------------------------------------------------------------------

    def _carried(self) -> dict[str, TensorSpec]:
        """Biases and saved modules under the keys that PEFT gives them."""
        targets = set(self.adapter.modules)
        biases = {
            key_of(m, "bias") if m in targets else key_of(f"{m}.bias", "parameter"): spec
            for m, spec in self.adapter.biases.items()
        }
        saved = {key_of(path, "parameter"): spec for path, spec in self.adapter.saved.items()}
        return biases | saved

    def _config(self) -> GraloraConfig | LoraConfig:
        old, shape = self.adapter.config, self.shape
        bias = old.bias
        if bias.endswith("_only"):
            bias = "lora_only" if shape.kind == "lora" else "gralora_only"
        if isinstance(old, LoraConfig):
            dropout, excluded = old.lora_dropout, bool(old.extra.get("exclude_modules"))
        else:
            dropout, excluded = old.gralora_dropout, False
        targets = old.target_modules
        if excluded or targets is None or targets == "all-linear":
            targets = list(self.adapter.modules)  # the tensors are the truth
        if shape.kind == "lora":
            return LoraConfig(
                r=shape.r, lora_alpha=shape.alpha, lora_dropout=dropout, target_modules=targets,
                fan_in_fan_out=old.fan_in_fan_out, bias=bias, modules_to_save=old.modules_to_save,
                layers_to_transform=old.layers_to_transform, layers_pattern=old.layers_pattern,
                task_type=old.task_type, base_model_name_or_path=old.base_model_name_or_path,
                revision=old.revision, inference_mode=True, auto_mapping=old.auto_mapping,
                peft_version=PEFT_VERSION,
            )  # fmt: skip
        return GraloraConfig(
            r=shape.r, hybrid_r=shape.hybrid_r, alpha=shape.alpha, gralora_k=shape.k,
            gralora_dropout=dropout, target_modules=targets, fan_in_fan_out=old.fan_in_fan_out,
            bias=bias, modules_to_save=old.modules_to_save,
            layers_to_transform=old.layers_to_transform, layers_pattern=old.layers_pattern,
            task_type=old.task_type, base_model_name_or_path=old.base_model_name_or_path,
            revision=old.revision, inference_mode=True, auto_mapping=old.auto_mapping,
            peft_version=PEFT_VERSION,
        )  # fmt: skip

    def _receipt(self, notes: Sequence[str]) -> dict[str, object]:
        return {
            "tool": "gralora-convert",
            "version": __version__,
            "command": "convert",
            "inputs": {
                "adapter": {
                    "path": str(self.adapter.path),
                    "sha256": self.adapter.sha256(),
                    "kind": self.adapter.kind,
                }
            },
            "notes": list(notes),
            **self.shape.as_json(),
            **loss_json(self.lost),
        }


def _as_lora(delta: Gralora | Lora, shape: Shape) -> Fit[Lora]:
    lora = gralora_to_lora(delta) if isinstance(delta, Gralora) else delta
    if lora.r <= shape.r:
        return _exact(pad_lora(with_scaling(lora, shape.scaling), shape.r))
    return to_lora(delta, shape.r, scaling=shape.scaling, dtype=lora.A.dtype)


def _as_gralora(delta: Gralora | Lora, shape: Shape, generator: torch.Generator) -> Fit[Gralora]:
    if isinstance(delta, Gralora) and delta.k == shape.k:
        pure = hybrid_to_gralora(delta)
        if pure.r <= shape.r:
            return _exact(pad(with_scaling(pure, shape.scaling), shape.r, generator))
    return to_gralora(
        delta, shape.k, shape.r, scaling=shape.scaling, dtype=delta.A.dtype, generator=generator
    )


def _as_hybrid(delta: Gralora | Lora, shape: Shape, generator: torch.Generator) -> Fit[Gralora]:
    """Exact where the general part fits and the blocks are new or fit; else alternating fits."""
    h = shape.hybrid_r
    if isinstance(delta, Lora):
        if delta.r <= h:
            general = pad_lora(with_scaling(delta, shape.scaling), h, generator)
            return _exact(lora_to_hybrid(general, shape.k, shape.r, generator))
    elif delta.hybrid_r <= h:
        scaled = with_scaling(delta, shape.scaling)
        general = _padded_general(scaled, h, generator)
        blocks = replace(scaled, general_A=None, general_B=None)
        fit = _as_gralora(blocks, replace(shape, kind="gralora"), generator)
        both = replace(fit.delta, general_A=general.A, general_B=general.B)
        return Fit(both, fit.error2, fit.norm2)
    return to_hybrid(
        delta, shape.k, shape.r, h, scaling=shape.scaling, dtype=delta.A.dtype, generator=generator
    )


def _padded_general(delta: Gralora, h: int, generator: torch.Generator) -> Lora:
    if delta.general_A is not None and delta.general_B is not None:
        return pad_lora(Lora(delta.general_A, delta.general_B, delta.scaling), h, generator)
    a = kaiming(delta.A.new_empty(h, delta.in_features), delta.in_features, generator)
    return Lora(a, delta.B.new_zeros(delta.out_features, h), delta.scaling)


def _exact(delta: Made) -> Fit[Made]:
    """A layout that loses nothing, with the norm of its delta for the overall error."""
    return Fit(delta, 0.0, float(spectra(delta)[0]) if delta.scaling else 0.0)


def _serving_notes(adapter: Adapter, shape: Shape) -> list[str]:
    """Where an exported LoRA meets a server's limits."""
    if shape.kind != "lora":
        return []
    notes = []
    if shape.r > SERVED_RANKS[-1]:
        notes.append(
            f"rank {shape.r} is above vLLM's largest, {SERVED_RANKS[-1]}: give --r with "
            "--allow-inexact, or merge"
        )
    if adapter.biases or adapter.saved:
        notes.append("vLLM and SGLang do not load biases or saved modules: merge to serve those")
    return notes
