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

from gralora_convert.adapters import CONFIG_NAME, GraloraConfig, LoraConfig, key_of
from gralora_convert.base import Reading, quantised_by
from gralora_convert.delta import (
    Gralora,
    Kind,
    Lora,
    Loss,
    Method,
    Shape,
    blocks_for,
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
    to_lora,
)
from gralora_convert.disk import WRITTEN, Checkpoint, torch_dtype, written_dtype
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.output import (
    CARD_NAME,
    OutputFile,
    Part,
    Plan,
    Workshop,
    adapter_card,
    copied,
    one_arithmetic_thread,
)
from gralora_convert.verbs.differences import Differences, Module
from gralora_convert.verbs.serving import Exported, refusals, serving_notes
from gralora_convert.version import __version__

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
    require_sensible(to, k, r, hybrid_r, alpha, max_error)
    stored = written_dtype(dtype, "F32")
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
    how = _How(svd, device, verify)
    with one_arithmetic_thread():
        shape = _shape(found.modules, how, to, k, r, hybrid_r, alpha, max_error)
    return _Extraction(before, after, found, shape, stored, how).plan()


@dataclass(frozen=True, slots=True)
class _How:
    svd: Method
    device: str
    verify: bool


def _shape(
    modules: Sequence[Module],
    how: _How,
    to: Kind,
    k: int | None,
    r: int | None,
    hybrid_r: int | None,
    alpha: float | None,
    max_error: float | None,
) -> Shape:
    blocks = blocks_for(to, k, hybrid_r, 2)
    for module in modules:
        way = f', leave this one out with `exclude={[module.name]}`, or take `to="lora"`'
        require_divisible(blocks, module.name, module.shape, way)
    if max_error is not None:
        tails = [spectra(m.delta(how.device), blocks, method=how.svd).cpu() for m in modules]
        r = blocks * smallest_rank(tails, max_error)
    r = DEFAULT_RANK if r is None else r
    if to == "hybrid" and hybrid_r == 0:
        raise MisuseError("a Hybrid has hybrid_r of at least 1", hint='Use `to="gralora"`.')
    general = (hybrid_r or -(-r // 2)) if to == "hybrid" else 0
    return shape_of(to, blocks, r, general, alpha, 1.0)


@dataclass
class _Extraction:
    before: Checkpoint
    after: Checkpoint
    found: Differences
    shape: Shape
    dtype: str
    how: _How
    lost: dict[str, Loss] = field(default_factory=dict)
    lost_by_lora: dict[str, Loss] = field(default_factory=dict)
    floor: dict[str, Loss] = field(default_factory=dict)

    def plan(self) -> Plan:
        workshop = Workshop()
        parts = [part for module in self.found.modules for part in self._parts(workshop, module)]
        targets = {module.name for module in self.found.modules}
        for name, spec in self.found.biases.items():
            key = key_of(name, "bias") if name in targets else key_of(f"{name}.bias", "parameter")
            parts.append(copied(key, spec))
        parts += [copied(key_of(p, "parameter"), s) for p, s in self.found.saved.items()]
        if self.shape.kind == "lora":
            self.found.notes += serving_notes(self._exported())
        return Plan(
            command="extract",
            files=(OutputFile("adapter_model.safetensors", tuple(parts)),),
            receipt=self._receipt,
            texts={
                CONFIG_NAME: self._config().to_json(),
                CARD_NAME: adapter_card(self.shape.kind, self.before.source),
            },
            inputs=(*self.before.layout.values(), *self.after.layout.values()),
            protected=(self.before.path, self.after.path),
            notes=tuple(self.found.notes),
        )

    def _parts(self, workshop: Workshop, module: Module) -> list[Part]:
        return workshop.parts(
            module.name, module.shape, self.shape, self.dtype, partial(self._made, module),
            module.nbytes * (2 if self.shape.kind == "hybrid" else 1),
        )  # fmt: skip

    def _made(self, module: Module) -> Gralora | Lora:
        """The module's adapter as it is stored; what was lost is kept for the receipt."""
        delta, shape = module.delta(self.how.device), self.shape
        fit = resize(delta, shape, method=self.how.svd)
        dtype = torch_dtype(self.dtype)
        made = rounded(module.name, fit.delta, dtype)
        if self.how.verify:
            require_same(module.name, delta, made, fit.error2, dtype)
        self.lost[module.name] = (fit.error2, fit.norm2)
        if shape.kind != "lora":
            budget = min(shape.r + shape.hybrid_r, *module.shape)
            rival = to_lora(delta, budget, method=self.how.svd)
            self.lost_by_lora[module.name] = (rival.error2, rival.norm2)
        rounding2 = module.rounding2()
        if rounding2 is not None:
            self.floor[module.name] = (rounding2, fit.norm2)
        return made

    def _exported(self) -> Exported:
        """The result, a LoRA, as engines look at it."""
        config, found = self._config(), self.found
        assert isinstance(config, LoraConfig)
        values = [*(f"{name}.bias" for name in found.biases), *found.saved]
        return Exported(config, [m.name for m in found.modules], values, self.before)

    def _config(self) -> GraloraConfig | LoraConfig:
        shape = self.shape
        saved = sorted(self.found.entries) or None
        bias = "all" if self.found.biases else "none"
        targets = [module.name for module in self.found.modules]
        flat = any(module.transposed for module in self.found.modules)
        name = self.before.source
        if shape.kind == "lora":
            return LoraConfig(
                r=shape.r, lora_alpha=shape.alpha, target_modules=targets, bias=bias,
                modules_to_save=saved, fan_in_fan_out=flat, base_model_name_or_path=name,
                inference_mode=True,
            )  # fmt: skip
        return GraloraConfig(
            r=shape.r, hybrid_r=shape.hybrid_r, alpha=shape.alpha, gralora_k=shape.k,
            target_modules=targets, bias=bias, modules_to_save=saved, fan_in_fan_out=flat,
            base_model_name_or_path=name, inference_mode=True,
        )  # fmt: skip

    def _receipt(self) -> dict[str, object]:
        receipt: dict[str, object] = {
            "tool": "gralora-convert",
            "version": __version__,
            "command": "extract",
            "inputs": {
                "base": {"source": self.before.source, "headers_sha256": self.before.digest()},
                "tuned": {"source": self.after.source, "headers_sha256": self.after.digest()},
            },
            "saved": sorted(self.found.saved),
            "biases": sorted(self.found.biases),
            "notes": self.found.notes,
            "dtype": next(name for name, stored in WRITTEN.items() if stored == self.dtype),
            **self.shape.as_json(),
            **loss_json(self.lost),
        }
        if self.lost_by_lora:
            receipt["lora_error"] = relative(self.lost_by_lora)
        if self.shape.kind == "lora":
            receipt["serving"] = refusals(self._exported())
            receipt["base_dtype"] = self._exported().dtype
        if self.floor:
            receipt["rounding_floor"] = relative(self.floor)
        return receipt
