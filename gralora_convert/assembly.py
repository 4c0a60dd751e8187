"""The files of a new adapter, module by module: sizes now, factors when they are written.

What `convert` and `extract` share: the shape of the result, its tensors as parts of a plan, its
config, and the lines about what was lost and how to serve it.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import torch

from gralora_convert.delta import Gralora, Lora
from gralora_convert.errors import MisuseError
from gralora_convert.keys import Role, key_of
from gralora_convert.plan import Computed, Copied, Part
from gralora_convert.serving import SERVED_RANKS, served_rank
from gralora_convert.tensors import DTYPE_BITS, TensorSpec, torch_dtype

__all__ = [
    "SERVED_RANKS",
    "Kind",
    "Loss",
    "Shape",
    "copied",
    "loss_json",
    "module_parts",
    "rounded",
    "summary",
]

Made = TypeVar("Made", Gralora, Lora)
Kind = Literal["gralora", "hybrid", "lora"]
NAMES: Mapping[Kind, str] = {"gralora": "GraLoRA", "hybrid": "Hybrid GraLoRA", "lora": "LoRA"}
EXACT = 1e-6  # relative errors below it are those of float32 factors

# What one module lost: squared error and squared norm (Frobenius).
Loss = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """What every module of the result looks like; `k` is 1 for LoRA."""

    kind: Kind
    k: int
    r: int
    hybrid_r: int
    scaling: float

    @property
    def alpha(self) -> float:
        """scaling * (r + hybrid_r), whole where it can be."""
        alpha = self.scaling * (self.r + self.hybrid_r)
        return int(alpha) if float(alpha).is_integer() else alpha

    def sizes(self, rows: int, columns: int) -> dict[Role, tuple[int, ...]]:
        """The shapes of a module's tensors by role, for a weight (rows, columns) = (out, in)."""
        if self.kind == "lora":
            return {"A": (self.r, columns), "B": (rows, self.r)}
        blocks: dict[Role, tuple[int, ...]] = {
            "A": (self.k, columns // self.k, self.r),
            "B": (self.k, self.r, rows // self.k),
        }
        if not self.hybrid_r:
            return blocks
        return blocks | {"general_A": (self.hybrid_r, columns), "general_B": (rows, self.hybrid_r)}

    def as_json(self) -> dict[str, object]:
        return {
            "to": self.kind,
            "r": self.r,
            "k": self.k,
            "hybrid_r": self.hybrid_r,
            "alpha": self.alpha,
            "scaling": self.scaling,
        }


def blocks_for(to: Kind, k: int | None, hybrid_r: int | None, default: int) -> int:
    """k of the result, when the options go together.

    Raises:
        MisuseError: they do not.
    """
    if to == "lora" and (k is not None or hybrid_r):
        raise MisuseError("a LoRA has neither k nor hybrid_r", hint="Leave them out.")
    if to == "gralora" and hybrid_r:
        raise MisuseError("a pure GraLoRA has no hybrid_r", hint="Use --to hybrid.")
    return 1 if to == "lora" else k or default


def shape_of(to: Kind, k: int, r: int, hybrid_r: int, alpha: float | None, scaling: float) -> Shape:
    """The shape of the result, with `alpha` in place of `scaling` where it is given.

    Raises:
        MisuseError: k does not divide r, or the scaling is zero or not finite.
    """
    if r < 1 or r % k:
        raise MisuseError(f"r={r} is not a positive multiple of k={k}")
    scaling = scaling if alpha is None else alpha / (r + hybrid_r)
    if not math.isfinite(scaling) or scaling == 0:
        raise MisuseError(f"a scaling of {scaling} cannot carry an update")
    return Shape(to, k, r, hybrid_r, scaling)


def require_divisible(k: int, module: str, weight: tuple[int, int]) -> None:
    """Raises `MisuseError` unless k divides both sides of a module's weight."""
    if k < 1 or any(size % k for size in weight):
        raise MisuseError(
            f"k={k} does not divide its {weight[0]} x {weight[1]} weight",
            where=module,
            hint="Choose a k that divides every adapted layer.",
        )


class _Shared:
    """The tensors of one module, made when the first is asked for, dropped after the last."""

    def __init__(self, make: Callable[[], Gralora | Lora], dtype: str, uses: int) -> None:
        self._make, self._dtype, self._uses = make, dtype, uses
        self._value: Gralora | Lora | None = None
        self._lock = threading.Lock()

    def bytes_of(self, role: Role, tile: int) -> memoryview:
        with self._lock:
            if self._value is None:
                self._value = rounded(self._make(), torch_dtype(self._dtype))
            tensor = getattr(self._value, role)
            assert isinstance(tensor, torch.Tensor)
            self._uses -= 1
            if self._uses == 0:
                self._value = None
        return memoryview(tensor.contiguous().view(torch.uint8).numpy().data).cast("B")


def module_parts(
    module: str,
    weight: tuple[int, int],
    shape: Shape,
    dtype: str,
    make: Callable[[], Gralora | Lora],
) -> list[Part]:
    """The tensors of one module under PEFT's keys; `make` is called once, when they are written."""
    method: Literal["gralora", "lora"] = "lora" if shape.kind == "lora" else "gralora"
    sizes = shape.sizes(*weight)
    shared = _Shared(make, dtype, len(sizes))
    parts = []
    for role, size in sizes.items():
        nbytes = math.prod(size) * DTYPE_BITS[dtype] // 8
        source = Computed(nbytes, partial(shared.bytes_of, role), nbytes)
        parts.append(Part(key_of(module, role, method), dtype, size, nbytes, source))
    return parts


def rounded(delta: Gralora | Lora, dtype: torch.dtype) -> Gralora | Lora:
    """The factors in the dtype that is written."""
    if isinstance(delta, Lora):
        return replace(delta, A=delta.A.to(dtype), B=delta.B.to(dtype))
    a, b = (None if t is None else t.to(dtype) for t in (delta.general_A, delta.general_B))
    return replace(delta, A=delta.A.to(dtype), B=delta.B.to(dtype), general_A=a, general_B=b)


def copied(name: str, spec: TensorSpec) -> Part:
    """A tensor of an input under another key, byte for byte."""
    return Part(name, spec.dtype, spec.shape, spec.nbytes, Copied(spec))


def relative(losses: Mapping[str, Loss]) -> float:
    """The relative error of several modules together, summed in the order of their names, so that
    it does not depend on which thread was first."""
    error2, norm2 = (sum(losses[module][i] for module in sorted(losses)) for i in (0, 1))
    return math.sqrt(error2 / norm2) if norm2 else 0.0


def loss_json(losses: Mapping[str, Loss]) -> dict[str, object]:
    """Overall error, worst module and a row for each, for a receipt."""
    errors = {module: relative({module: losses[module]}) for module in sorted(losses)}
    return {
        "error": relative(losses),
        "worst_module": max(errors, key=errors.__getitem__, default=""),
        "modules": [{"module": module, "error": error} for module, error in errors.items()],
    }


def summary(receipt: Mapping[str, object], output: str) -> str:
    """The closing lines: what was written, what was lost, how to serve a LoRA."""
    kind, r, error = receipt["to"], receipt["r"], receipt["error"]
    modules, k, h = receipt["modules"], receipt["k"], receipt["hybrid_r"]
    assert isinstance(modules, list)
    assert isinstance(error, float)
    assert isinstance(r, int)
    assert kind == "gralora" or kind == "hybrid" or kind == "lora"
    shape = f"r={r}" + ("" if kind == "lora" else f" k={k} hybrid_r={h}")
    lines = [f"wrote {len(modules)} modules as {NAMES[kind]} {shape} to {output}"]
    if error <= EXACT:
        lines.append("exact: the update is the same, up to the rounding of stored factors")
    else:
        worst = max(modules, key=lambda row: row["error"])
        lines.append(
            f"approximate: relative error {error:.3g} (Frobenius), worst module "
            f"{worst['module']} {worst['error']:.3g}"
        )
    for key, what in (
        ("lora_error", "a LoRA of the same number of parameters would have relative error"),
        ("rounding_floor", "rounding of the tuned model alone accounts for"),
    ):
        value = receipt.get(key)
        if isinstance(value, float):
            lines.append(f"{what} {value:.3g}")
    if kind == "lora":
        served = served_rank(r)
        if served is not None:
            lines.append(f"to serve: vllm --enable-lora --max-lora-rank {served}")
    return "\n".join(lines)
