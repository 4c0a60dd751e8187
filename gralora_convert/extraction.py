"""`extract`: the difference of two dense checkpoints as an adapter, optimal for its rank.

The linear layers that differ become modules; what no adapter can hold (norms, embeddings, heads) is
saved whole through `modules_to_save`, biases through the bias mode. Each worker holds one
difference at a time.
"""

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import assert_never, get_args

import torch

from gralora_convert.architecture import Architecture, near_misses
from gralora_convert.assembly import (
    Kind,
    Loss,
    Shape,
    Workshop,
    blocks_for,
    copied,
    loss_json,
    relative,
    require_divisible,
    require_same,
    require_sensible,
    rounded,
    shape_of,
)
from gralora_convert.blocks import Method
from gralora_convert.cards import CARD_NAME, adapter_card
from gralora_convert.checkpoint import Checkpoint
from gralora_convert.config import CONFIG_NAME, GraloraConfig, LoraConfig
from gralora_convert.delta import Dense, Gralora, Lora, is_finite, require_device
from gralora_convert.errors import InvalidAdapterError, MisuseError, UnsupportedError
from gralora_convert.factorize import Fit, smallest_rank, spectra, to_gralora, to_hybrid, to_lora
from gralora_convert.keys import key_of
from gralora_convert.pieces import read_parameter
from gralora_convert.plan import OutputFile, Part, Plan
from gralora_convert.quantisation import quantisation
from gralora_convert.rounding import half_ulp
from gralora_convert.serving import serving_notes
from gralora_convert.specs import FLOATING, WRITTEN, Origin, TensorSpec, written_dtype
from gralora_convert.tensors import torch_dtype
from gralora_convert.values import same_values
from gralora_convert.version import __version__
from gralora_convert.workers import one_arithmetic_thread

__all__ = ["extract"]

DEFAULT_RANK = 32
ROWS = 1024  # of a weight that are looked at together
Tensors = Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class _Module:
    """A linear layer that differs: its name in memory, where its weight lies in both checkpoints,
    and its (out, in); `transposed`: stored (in, out)."""

    name: str
    parts: tuple[Origin, ...]
    shape: tuple[int, int]
    transposed: bool
    before: Tensors = field(repr=False)
    after: Tensors = field(repr=False)

    def delta(self, device: str) -> Dense:
        difference = read_parameter(self.parts, self.after).to(device).double()
        difference -= read_parameter(self.parts, self.before).to(device)
        if not is_finite(difference):
            raise InvalidAdapterError(
                "the difference of the two weights is not finite", where=self.name,
                hint="Leave it out with --exclude.",
            )  # fmt: skip
        return Dense(difference.T if self.transposed else difference)

    @property
    def nbytes(self) -> int:
        """Bytes of the difference."""
        rows, columns = self.shape
        return 8 * rows * columns

    def rounding2(self) -> float | None:
        """The squared norm that rounding the tuned weight to 16 bits accounts for: a twelfth of
        the squared unit in the last place, element by element. None for wider weights."""
        dtype = self.after[self.parts[0].tensor].dtype
        if dtype not in ("BF16", "F16"):
            return None
        weight = read_parameter(self.parts, self.after)
        found = 0.0
        for start in range(0, len(weight), ROWS):
            unit = 2 * half_ulp(weight[start : start + ROWS].double(), torch_dtype(dtype))
            found += float(unit.square().sum()) / 12
        return found


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
        if method := quantisation(checkpoint):
            raise UnsupportedError(
                f"is quantised ({method}); plain weights were needed", where=checkpoint.path
            )
    require_device(device)
    found = _Differences(before, after, include, exclude, trust_remote_code)
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
    modules: Sequence[_Module],
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
        require_divisible(blocks, module.name, module.shape)
    if max_error is not None:
        tails = [spectra(m.delta(how.device), blocks, method=how.svd).cpu() for m in modules]
        r = blocks * smallest_rank(tails, max_error)
    r = DEFAULT_RANK if r is None else r
    if to == "hybrid" and hybrid_r == 0:
        raise MisuseError("a Hybrid has hybrid_r of at least 1", hint="Use --to gralora.")
    general = (hybrid_r or -(-r // 2)) if to == "hybrid" else 0
    return shape_of(to, blocks, r, general, alpha, 1.0)


class _Differences:
    """What differs between two checkpoints, and how an adapter can hold it."""

    def __init__(
        self,
        before: Checkpoint,
        after: Checkpoint,
        include: Sequence[str],
        exclude: Sequence[str],
        trust_remote_code: bool,
    ) -> None:
        self.modules: list[_Module] = []
        self.saved: dict[str, TensorSpec] = {}
        self.biases: dict[str, TensorSpec] = {}
        self.notes: list[str] = []
        missing = sorted(before.tensors.keys() ^ after.tensors.keys())
        if missing:
            raise UnsupportedError(
                f"{len(missing)} tensors are in one checkpoint only, first {missing[0]}",
                where=after.path,
                hint="Extract from a model with the same tensors as its base.",
            )
        changed = frozenset(
            n for n, spec in before.tensors.items() if not _same(spec, after.tensors[n])
        )
        names = _Names(Architecture(before, trust_remote_code=trust_remote_code))
        modules = {names.parameter(name).rpartition(".")[0] for name in before.tensors}
        self.notes += _unmatched(modules, include, exclude, after)
        held: set[str] = set()
        for module in names.linear(changed, before.tensors, after.tensors):
            held.update(part.tensor for part in module.parts)
            if _chosen(module.name, include, exclude):
                self.modules.append(module)
            else:
                self.notes.append(f"{module.name} differs and was left out")
        others = [name for name in before.tensors if name in changed - (held - names.lost)]
        if not self.modules:
            raise MisuseError(
                "no linear layer differs" + (" that was chosen" if self.notes else ""),
                where=after.path,
                hint=f"Is it the fine-tuned one of {before.source}?",
            )
        self._save(others, names, after, exclude)

    def _save(
        self, others: Sequence[str], names: "_Names", after: Checkpoint, exclude: Sequence[str]
    ) -> None:
        """Whole tensors: all of a module's for `modules_to_save`, all biases for bias `all`."""
        holders = set()
        for name in others:
            holder = names.parameter(name).rpartition(".")[0]
            if not _chosen(holder, (), exclude):
                self.notes.append(f"{name} differs and was left out")
            elif not names.is_whole(name):
                raise UnsupportedError(
                    "differs, and is loaded as a part of what no adapter can hold (a stack of "
                    "experts, or layers joined into one)",
                    where=name, hint=f"Leave it out with --exclude {holder!r}.",
                )  # fmt: skip
            elif name.endswith(".bias") and not self._is_norm(name, after):
                self.biases = {
                    names.parameter(n).removesuffix(".bias"): spec
                    for n, spec in after.tensors.items()
                    if n.endswith(".bias")
                }
            else:
                holders.add(name.rpartition(".")[0])
        for name, spec in after.tensors.items():
            if name.rpartition(".")[0] in holders:
                for parameter in names.sharing(name):
                    self.saved[parameter] = spec
                    self.biases.pop(parameter.removesuffix(".bias"), None)

    @staticmethod
    def _is_norm(name: str, after: Checkpoint) -> bool:
        weight = after.tensors.get(name.removesuffix("bias") + "weight")
        return weight is not None and len(weight.shape) == 1


class _Names:
    """Names on disk as names in memory, by transformers where it knows the architecture."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._origins = architecture.origins
        tensors = architecture.base.tensors
        self._parameters = {
            found[0].tensor: name
            for name, found in self._origins.items()
            if len(found) == 1 and _is_whole(found[0], tensors)
        }
        known = architecture.linear_modules()
        self._linear = None if known is None else set(known)
        self.lost: set[str] = set()  # tensors of which a changed part is no linear layer

    def parameter(self, name: str) -> str:
        return self._parameters.get(name, name)

    def sharing(self, name: str) -> tuple[str, ...]:
        """All names in memory of a tensor: PEFT unties a saved embedding from its head, so that
        both must be saved."""
        return self.architecture.sharing(self.parameter(name))

    def is_whole(self, name: str) -> bool:
        """Whether a tensor on disk is a parameter in memory, not joined with others or cut."""
        return not self._origins or name in self._parameters

    def linear(self, changed: Set[str], before: Tensors, after: Tensors) -> Iterator[_Module]:
        """The linear layers (the output head is none) of which a tensor changed."""
        for name, spec in before.items():
            if name in changed and self.is_whole(name):
                whole = (Origin(name, 0, spec.shape[0] if spec.shape else 1),)
                module = self._module(self.parameter(name), whole, before, after)
                if module is not None:
                    yield module
        for parameter, parts in self._origins.items():
            if any(p.tensor in changed and not self.is_whole(p.tensor) for p in parts):
                if not _differs(parts, before, after):
                    continue
                module = self._module(parameter, parts, before, after)
                if module is not None:
                    yield module
                else:
                    self.lost.update(part.tensor for part in parts)

    def _module(
        self, parameter: str, parts: tuple[Origin, ...], before: Tensors, after: Tensors
    ) -> _Module | None:
        name = parameter.removesuffix(".weight")
        pairs = [(before[part.tensor], after[part.tensor]) for part in parts]
        if name == parameter or any(
            len(old.shape) != 2 or old.shape != new.shape or not {old.dtype, new.dtype} <= FLOATING
            for old, new in pairs
        ):
            return None
        if self._linear is None:
            is_linear = not self.architecture.is_embedding(name) and not name.endswith("lm_head")
        else:
            is_linear = name in self._linear
        if not is_linear:
            return None
        rows, columns = sum(part.count for part in parts), pairs[0][0].shape[1]
        transposed = self.architecture.kind(name) == "Conv1D"
        shape = (columns, rows) if transposed else (rows, columns)
        return _Module(name, parts, shape, transposed, before, after)


def _is_whole(part: Origin, tensors: Tensors) -> bool:
    shape = tensors[part.tensor].shape
    return part.order is None and part.count == (shape[0] if shape else 1)


def _differs(parts: Sequence[Origin], before: Tensors, after: Tensors) -> bool:
    """Whether the rows of one parameter differ; others of the same tensor may."""
    return not torch.equal(
        read_parameter(parts, before).double(), read_parameter(parts, after).double()
    )


def _chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


def _unmatched(
    modules: Collection[str], include: Sequence[str], exclude: Sequence[str], after: Checkpoint
) -> Iterator[str]:
    """Notes on patterns of `exclude` that match nothing; one of `include` is a refusal."""
    for pattern in (*include, *exclude):
        if fnmatch.filter(modules, pattern):
            continue
        close = near_misses(pattern.strip("*"), sorted(modules))
        if pattern in include:
            raise MisuseError(
                f"--include {pattern!r} matches no module", where=after.path,
                hint=f"A pattern matches whole names, such as '*.q_proj'. {close}".strip(),
            )  # fmt: skip
        yield f"--exclude {pattern!r} matches no module. {close}".strip()


def _same(one: TensorSpec, other: TensorSpec) -> bool:
    return one.shape == other.shape and same_values(one, other)


@dataclass
class _Extraction:
    before: Checkpoint
    after: Checkpoint
    found: _Differences
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
            extras = bool(self.found.biases or self.found.saved)
            self.found.notes += serving_notes(self.shape.r, extras=extras)
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

    def _parts(self, workshop: Workshop, module: _Module) -> list[Part]:
        return workshop.parts(
            module.name, module.shape, self.shape, self.dtype, partial(self._made, module),
            module.nbytes * (2 if self.shape.kind == "hybrid" else 1),
        )  # fmt: skip

    def _made(self, module: _Module) -> Gralora | Lora:
        """The module's adapter as it is stored; what was lost is kept for the receipt."""
        delta, shape = module.delta(self.how.device), self.shape
        fit = self._fit(delta)
        dtype = torch_dtype(self.dtype)
        made = rounded(fit.delta, dtype)
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

    def _fit(self, delta: Dense) -> Fit[Gralora] | Fit[Lora]:
        shape, svd = self.shape, self.how.svd
        match shape.kind:
            case "lora":
                return to_lora(delta, shape.r, scaling=shape.scaling, method=svd)
            case "gralora":
                return to_gralora(delta, shape.k, shape.r, scaling=shape.scaling, method=svd)
            case "hybrid":
                return to_hybrid(
                    delta, shape.k, shape.r, shape.hybrid_r, scaling=shape.scaling, method=svd
                )
            case other:
                assert_never(other)

    def _config(self) -> GraloraConfig | LoraConfig:
        shape = self.shape
        saved = sorted({path.rpartition(".")[0] for path in self.found.saved}) or None
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
        if self.floor:
            receipt["rounding_floor"] = relative(self.floor)
        return receipt
