"""The files of a new adapter, module by module: sizes now, factors when they are written.

What `convert` and `extract` share: the shape of the result, its tensors as parts of a plan, its
config, and the lines about what was lost and how to serve it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from gralora_convert.adapters import (
    CONFIG_NAME,
    PEFT_VERSION,
    GraloraConfig,
    LoraConfig,
    Role,
    key_of,
)
from gralora_convert.delta import Gralora, Lora, Shape
from gralora_convert.disk import DTYPE_OF_TORCH, TensorSpec, bytes_of, nbytes_of
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.output.plan import Plan
from gralora_convert.output.tiles import taken
from gralora_convert.output.writing import Computed, OutputFile, Part
from gralora_convert.version import __version__


class Workshop:
    """The modules of a plan, each made once by the worker that needs it first.

    A worker that finds its module in the making makes the next one meanwhile, so that all workers
    are busy although the tensors of one module follow one another in the file.
    """

    def __init__(self) -> None:
        self._makers: list[Callable[[], Gralora | Lora]] = []
        self._made: dict[int, Future[Gralora | Lora]] = {}
        self._uses: list[int] = []
        self._lock = threading.Lock()

    def parts(
        self,
        module: str,
        weight: tuple[int, int],
        shape: Shape,
        dtype: str,
        make: Callable[[], Gralora | Lora],
        memory: int,
    ) -> list[Part]:
        """The tensors of one module under PEFT's keys; `make` gives the factors in the dtype
        written, and keeps up to `memory` bytes meanwhile."""
        method: Literal["gralora", "lora"] = "lora" if shape.kind == "lora" else "gralora"
        sizes, place = shape.sizes(*weight), len(self._makers)
        self._makers.append(make)
        self._uses.append(len(sizes))
        parts: list[Part] = []
        for role, size in sizes.items():
            nbytes = nbytes_of(dtype, size)
            produce = partial(self._bytes_of, place, role)
            source = Computed(nbytes, produce, 0 if parts else memory)
            parts.append(Part(key_of(module, role, method), dtype, size, nbytes, source))
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
            others = range(place + 1, len(self._makers))
            free = next((n for n in others if n not in self._made and self._uses[n]), None)
            if free is None:
                return
            self._made[free] = Future()
        self._make(free)

    def _make(self, place: int) -> None:
        cell = self._made[place]
        try:
            cell.set_result(self._makers[place]())
        except BaseException as problem:  # told to every worker that asks for this module
            cell.set_exception(problem)


def copied(name: str, spec: TensorSpec) -> Part:
    """A tensor of an input under another key, with the same bytes; its values must be finite."""
    return Part(name, spec.dtype, spec.shape, spec.nbytes, taken(spec, spec.dtype))


_ROLES: tuple[Role, ...] = ("A", "B", "general_A", "general_B")


def folder_of(
    config: GraloraConfig | LoraConfig,
    deltas: Mapping[str, Gralora | Lora],
    values: Mapping[str, torch.Tensor],
) -> Plan:
    """The plan of an adapter's folder; `values` are trained biases and saved modules by path.

    PEFT 0.21.2 reads it without a warning (peft_model.py, from_pretrained).

    Raises:
        UnsupportedError: a LoRA whose factors PEFT stores in pieces.
    """
    if isinstance(config, LoraConfig) and config.extra.get("use_bdlora"):
        raise UnsupportedError("a BD-LoRA stores blocks of its factors, and is not written here")
    parts = [*_factors(deltas), *_values(values, deltas)]
    written = replace(config, inference_mode=True, peft_version=PEFT_VERSION)
    receipt = {"tool": "gralora-convert", "version": __version__, "command": "save"}
    return Plan(
        command="save",
        files=(OutputFile("adapter_model.safetensors", tuple(parts)),),
        receipt=lambda: dict(receipt),
        texts={CONFIG_NAME: written.to_json()},
    )


def _factors(deltas: Mapping[str, Gralora | Lora]) -> Iterator[Part]:
    for module, delta in deltas.items():
        method: Literal["gralora", "lora"] = "gralora" if isinstance(delta, Gralora) else "lora"
        for role in _ROLES:
            factor = getattr(delta, role, None)
            if factor is not None:
                yield _part(key_of(module, role, method), factor)


def _values(values: Mapping[str, torch.Tensor], deltas: Mapping[str, object]) -> Iterator[Part]:
    for path, value in values.items():
        module, _, leaf = path.rpartition(".")
        own = leaf == "bias" and module in deltas
        yield _part(key_of(module, "bias") if own else key_of(path, "parameter"), value)


def _part(key: str, value: torch.Tensor) -> Part:
    source = Computed(max(1, value.nbytes), lambda tile: bytes_of(value), value.nbytes)
    dtype = DTYPE_OF_TORCH[str(value.dtype).removeprefix("torch.")]
    return Part(key, dtype, tuple(value.shape), value.nbytes, source)


def config_of(
    deltas: Mapping[str, Gralora | Lora], *, dropout: float, fan_in_fan_out: bool
) -> GraloraConfig:
    """The config that deltas alone imply.

    Raises:
        MisuseError: one config cannot describe them all.
    """
    shapes = {
        (delta.r, delta.k, delta.hybrid_r, delta.scaling) if isinstance(delta, Gralora) else None
        for delta in deltas.values()
    }
    first = next(iter(shapes))
    if len(shapes) > 1 or first is None:
        raise MisuseError(
            "the deltas are not GraLoRAs of one r, k, hybrid_r and scaling, which a config needs",
            hint="Attach an adapter from disk, or save its parts with torch.",
        )
    r, k, hybrid_r, scaling = first
    return GraloraConfig(
        r=r, gralora_k=k, hybrid_r=hybrid_r, alpha=scaling * (r + hybrid_r),
        target_modules=list(deltas), gralora_dropout=dropout, fan_in_fan_out=fan_in_fan_out,
    )  # fmt: skip
