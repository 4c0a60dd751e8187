"""`extract`: the difference of two dense checkpoints as an adapter, optimal for its rank.

The linear layers that differ become modules; what no adapter can hold (norms, embeddings, heads) is
saved whole through `modules_to_save`, biases through the bias mode. Each worker holds one
difference at a time.
"""

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from gralora_convert.architecture import Architecture, near_misses
from gralora_convert.assembly import (
    Kind,
    Loss,
    Shape,
    blocks_for,
    copied,
    loss_json,
    module_parts,
    relative,
    require_divisible,
    shape_of,
)
from gralora_convert.cards import CARD_NAME, adapter_card
from gralora_convert.checkpoint import Checkpoint
from gralora_convert.config import CONFIG_NAME, GraloraConfig, LoraConfig
from gralora_convert.delta import Dense, Gralora, Lora
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.factorize import smallest_rank, spectra, to_gralora, to_hybrid, to_lora
from gralora_convert.keys import key_of
from gralora_convert.plan import OutputFile, Part, Plan
from gralora_convert.quantisation import quantisation
from gralora_convert.rounding import half_ulp
from gralora_convert.tensors import FLOATING, TensorSpec, read_bytes, read_torch, torch_dtype
from gralora_convert.version import __version__

__all__ = ["extract"]

DTYPES: Mapping[str, str] = {"keep": "F32", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DEFAULT_RANK = 32
COMPARED = 16 * 1024 * 1024  # bytes of two tensors that are compared at a time


@dataclass(frozen=True, slots=True)
class _Module:
    """A linear layer that differs: its name in memory and its weights; `transposed`: (in, out)."""

    name: str
    before: TensorSpec
    after: TensorSpec
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.before.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def delta(self) -> Dense:
        difference = read_torch(self.after).double() - read_torch(self.before).double()
        return Dense(difference.T.contiguous() if self.transposed else difference)


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
    dtype: str = "keep",
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of an adapter that takes `base` to `tuned`, as nearly as its rank allows.

    Modules are the linear layers that differ; `include` and `exclude` are shell patterns on their
    names. Other differences are saved whole. A block-wise truncated SVD is optimal for GraLoRA, a
    truncated SVD for LoRA (randomised for large layers, about 0.03 % above the optimum);
    Hybrid alternates between the two.

    Arguments:
        k: default 2. r: default 32. hybrid_r: default r / 2, rounded up.
        max_error: instead of `r`, the smallest rank whose relative Frobenius error stays below.
        dtype: of the factors; `keep` is float32.

    Raises:
        MisuseError: the checkpoints are the same, or arguments that do not go together.
        UnsupportedError: tensors that no adapter can express, or a quantised checkpoint.
    """
    before = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    after = tuned if isinstance(tuned, Checkpoint) else Checkpoint.open(tuned)
    for checkpoint in (before, after):
        if method := quantisation(checkpoint):
            raise UnsupportedError(
                f"is quantised ({method}); plain weights were needed", where=checkpoint.path
            )
    if max_error is not None and (r is not None or to == "hybrid" or not 0 < max_error < 1):
        raise MisuseError(
            "--max-error takes a number between 0 and 1, excludes --r and chooses no Hybrid"
        )
    found = _Differences(before, after, include, exclude, trust_remote_code)
    shape = _shape(found.modules, to, k, r, hybrid_r, alpha, max_error)
    return _Extraction(before, after, found, shape, DTYPES[dtype]).plan()


def _shape(
    modules: Sequence[_Module],
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
        r = blocks * smallest_rank([spectra(m.delta(), blocks) for m in modules], max_error)
    r = DEFAULT_RANK if r is None else r
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
        names = _Names(Architecture(before, trust_remote_code=trust_remote_code))
        modules = {names.parameter(name).rpartition(".")[0] for name in before.tensors}
        self.notes += _unmatched(modules, include, exclude, after)
        others: list[str] = []
        for name, spec in before.tensors.items():
            tuned = after.tensors[name]
            if _same(spec, tuned):
                continue
            module = names.linear(name, spec, tuned)
            if module is None:
                others.append(name)
            elif _chosen(module.name, include, exclude):
                self.modules.append(module)
            else:
                self.notes.append(f"{name} differs and was left out")
        if not self.modules:
            raise MisuseError(
                "no linear layer differs" + (" that was chosen" if self.notes else ""),
                where=after.path,
            )
        self._save(others, names, after, exclude)

    def _save(
        self, others: Sequence[str], names: "_Names", after: Checkpoint, exclude: Sequence[str]
    ) -> None:
        """Whole tensors: all of a module's for `modules_to_save`, all biases for bias `all`."""
        holders = set()
        for name in others:
            parameter = names.parameter(name)
            if not _chosen(parameter.rpartition(".")[0], (), exclude):
                self.notes.append(f"{name} differs and was left out")
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
                self.saved[names.parameter(name)] = spec
                self.biases.pop(names.parameter(name).removesuffix(".bias"), None)

    @staticmethod
    def _is_norm(name: str, after: Checkpoint) -> bool:
        weight = after.tensors.get(name.removesuffix("bias") + "weight")
        return weight is not None and len(weight.shape) == 1


class _Names:
    """Names on disk as names in memory, by transformers where it knows the architecture."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._parameters = {
            found[0].tensor: name
            for name, found in architecture.origins.items()
            if len(found) == 1 and found[0].order is None and found[0].delta_start == 0
        }
        known = architecture.linear_modules()
        self._linear = None if known is None else set(known)
        self._moved = {o.tensor for found in architecture.origins.values() for o in found} - set(
            self._parameters
        )

    def parameter(self, name: str) -> str:
        return self._parameters.get(name, name)

    def linear(self, name: str, before: TensorSpec, after: TensorSpec) -> _Module | None:
        """The linear layer whose weight `name` is; None when it is none (or the output head)."""
        if name in self._moved:
            raise UnsupportedError(
                "is joined or cut while it is loaded; its modules cannot be told apart here",
                where=name, hint="Leave it out with --exclude, or save the model unfused.",
            )  # fmt: skip
        parameter = self.parameter(name)
        module = parameter.removesuffix(".weight")
        if module == parameter or len(before.shape) != 2 or before.shape != after.shape:
            return None
        if before.dtype not in FLOATING or after.dtype not in FLOATING:
            return None
        if self._linear is None:
            is_linear = not self.architecture.is_embedding(module) and not module.endswith(
                "lm_head"
            )
        else:
            is_linear = module in self._linear
        if not is_linear:
            return None
        return _Module(module, before, after, self.architecture.kind(module) == "Conv1D")


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
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        if one.shape != other.shape or one.dtype not in FLOATING or other.dtype not in FLOATING:
            return False
        wide = torch.promote_types(torch_dtype(one.dtype), torch_dtype(other.dtype))
        return torch.equal(read_torch(one).to(wide), read_torch(other).to(wide))
    for start in range(0, one.nbytes, COMPARED):
        stop = min(start + COMPARED, one.nbytes)
        if read_bytes(one, start, stop) != read_bytes(other, start, stop):
            return False
    return True


@dataclass
class _Extraction:
    before: Checkpoint
    after: Checkpoint
    found: _Differences
    shape: Shape
    dtype: str
    lost: dict[str, Loss] = field(default_factory=dict)
    lost_by_lora: dict[str, Loss] = field(default_factory=dict)
    floor: dict[str, Loss] = field(default_factory=dict)

    def plan(self) -> Plan:
        parts = [part for module in self.found.modules for part in self._parts(module)]
        targets = {module.name for module in self.found.modules}
        for name, spec in self.found.biases.items():
            key = key_of(name, "bias") if name in targets else key_of(f"{name}.bias", "parameter")
            parts.append(copied(key, spec))
        parts += [copied(key_of(p, "parameter"), s) for p, s in self.found.saved.items()]
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

    def _parts(self, module: _Module) -> list[Part]:
        make = partial(self._made, module)
        return module_parts(module.name, module.shape, self.shape, self.dtype, make)

    def _made(self, module: _Module) -> Gralora | Lora:
        delta, shape = module.delta(), self.shape
        budget = min(shape.r + shape.hybrid_r, *module.shape)
        fit = (
            to_lora(delta, shape.r, scaling=shape.scaling)
            if shape.kind == "lora"
            else to_gralora(delta, shape.k, shape.r, scaling=shape.scaling)
            if shape.kind == "gralora"
            else to_hybrid(delta, shape.k, shape.r, shape.hybrid_r, scaling=shape.scaling)
        )
        self.lost[module.name] = (fit.error2, fit.norm2)
        if shape.kind != "lora":
            rival = to_lora(delta, budget)
            self.lost_by_lora[module.name] = (rival.error2, rival.norm2)
        if module.after.dtype in ("BF16", "F16"):
            dtype = torch_dtype(module.after.dtype)
            unit = 2 * half_ulp(read_torch(module.after).double(), dtype)
            self.floor[module.name] = (float(unit.square().sum()) / 12, fit.norm2)
        return fit.delta

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
            **self.shape.as_json(),
            **loss_json(self.lost),
        }
        if self.lost_by_lora:
            receipt["lora_error"] = relative(self.lost_by_lora)
        if self.floor:
            receipt["rounding_floor"] = relative(self.floor)
        return receipt
