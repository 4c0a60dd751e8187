"""The files of a new adapter, module by module: sizes now, factors when they are written.

What `convert`, `extract` and `Attachment.save_pretrained` write is one plan: the factors of new
modules, then biases and saved modules, the config, and a receipt.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch

from gralora_convert.adapters import (
    CONFIG_NAME,
    PEFT_VERSION,
    GraloraConfig,
    LoraConfig,
    Method,
    Role,
    key_of,
)
from gralora_convert.delta import Gralora, Lora, Shape, tensors_of
from gralora_convert.disk import DTYPE_OF_TORCH, TensorSpec, bytes_of
from gralora_convert.output.cards import CARD_NAME
from gralora_convert.output.parts import Computed, OutputFile, Part
from gralora_convert.output.plan import Plan
from gralora_convert.output.tiles import taken
from gralora_convert.version import __version__

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class New(Generic[T]):
    """The factors of a module, or a value beside them, to write: `outline` has their shapes and
    dtypes. `make` gives them where that is on the meta device, and keeps up to `nbytes` bytes
    meanwhile."""

    outline: T
    make: Callable[[], T] | None = None
    nbytes: int = 0

    def made(self) -> T:
        return self.outline if self.make is None else self.make()


def adapter_plan(
    command: str,
    modules: Mapping[str, New[Gralora | Lora]],
    values: Mapping[str, TensorSpec | New[torch.Tensor]],
    config: GraloraConfig | LoraConfig,
    receipt: Callable[[], Mapping[str, object]],
    *,
    card: bytes | None = None,
    **more: Any,
) -> Plan:
    """The plan of an adapter's folder, which PEFT 0.21.2 reads without a warning (peft_model.py,
    from_pretrained).

    `values` are biases and parameters of saved modules by path in memory; `receipt` is told after
    what wrote it; `more` are fields of the plan.
    """
    workshop, parts = Workshop(), list[Part]()
    for name, module in modules.items():
        parts += workshop.parts(name, module)
    for path, value in values.items():
        holder, _, leaf = path.rpartition(".")
        own = leaf == "bias" and holder in modules
        key = key_of(holder, "bias") if own else key_of(path, "parameter")
        if isinstance(value, TensorSpec):
            source = taken(value, value.dtype)
            parts.append(Part(key, value.dtype, value.shape, value.nbytes, source))
        else:
            parts.append(_part(key, value.outline, partial(_bytes, value), value.outline.nbytes))
    written = replace(config, inference_mode=True, peft_version=PEFT_VERSION)
    texts = {CONFIG_NAME: written.to_json()} | ({} if card is None else {CARD_NAME: card})
    said = {"tool": "gralora-convert", "version": __version__, "command": command}
    return Plan(
        command=command,
        files=(OutputFile("adapter_model.safetensors", tuple(parts)),),
        receipt=lambda: {**said, **receipt()},
        texts=texts,
        **more,
    )


def config_like(shape: Shape, dropout: float, **fields: Any) -> GraloraConfig | LoraConfig:
    """The config of modules of this shape; `fields` are those that both kinds have."""
    if shape.kind == "lora":
        return LoraConfig(r=shape.r, lora_alpha=shape.alpha, lora_dropout=dropout, **fields)
    return GraloraConfig(
        r=shape.r, hybrid_r=shape.hybrid_r, alpha=shape.alpha, gralora_k=shape.k,
        gralora_dropout=dropout, **fields,
    )  # fmt: skip


def _bytes(value: New[torch.Tensor], tile: int) -> memoryview:
    return bytes_of(value.made())


def _part(key: str, like: torch.Tensor, produce: Callable[[int], memoryview], memory: int) -> Part:
    dtype = DTYPE_OF_TORCH[str(like.dtype).removeprefix("torch.")]
    source = Computed(max(1, like.nbytes), produce, memory)
    return Part(key, dtype, tuple(like.shape), like.nbytes, source)


class Workshop:
    """The modules of a plan, each made once by the worker that needs it first.

    A worker that finds its module in the making makes the next one meanwhile, so that all workers
    are busy although the tensors of one module follow one another in the file.
    """

    def __init__(self) -> None:
        self._modules: list[New[Gralora | Lora]] = []
        self._made: dict[int, Future[Gralora | Lora]] = {}
        self._uses: list[int] = []
        self._lock = threading.Lock()

    def parts(self, name: str, module: New[Gralora | Lora]) -> list[Part]:
        """The tensors of one module under PEFT's keys."""
        factors, place = tensors_of(module.outline), len(self._modules)
        method: Method = "lora" if isinstance(module.outline, Lora) else "gralora"
        self._modules.append(module)
        self._uses.append(len(factors))
        parts: list[Part] = []
        for field, like in factors.items():
            role = cast(Role, field)
            produce = partial(self._bytes_of, place, role)
            memory = 0 if parts else module.nbytes
            parts.append(_part(key_of(name, role, method), like, produce, memory))
        return parts

    def _bytes_of(self, place: int, role: Role, tile: int) -> memoryview:
        with self._lock:
            begun = place in self._made
            cell = self._made.setdefault(place, Future())
        if not begun:
            self._make(place)
        elif not cell.done():
            self._make_next(place)
        tensor = getattr(cell.result(), role)
        assert isinstance(tensor, torch.Tensor)
        with self._lock:
            self._uses[place] -= 1
            if self._uses[place] == 0:
                del self._made[place]
        return bytes_of(tensor)

    def _make_next(self, place: int) -> None:
        with self._lock:
            others = range(place + 1, len(self._modules))
            free = next((n for n in others if n not in self._made and self._uses[n]), None)
            if free is None:
                return
            self._made[free] = Future()
        self._make(free)

    def _make(self, place: int) -> None:
        cell = self._made[place]
        try:
            cell.set_result(self._modules[place].made())
        except BaseException as problem:  # told to every worker that asks for this module
            cell.set_exception(problem)
