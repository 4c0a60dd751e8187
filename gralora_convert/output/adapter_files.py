"""The files of a new adapter, module by module: sizes now, factors when they are written.

What `convert`, `extract` and `Attachment.save_pretrained` write is one plan: the factors of new
modules, then biases and saved modules, the config, and a receipt.
"""

import json
from collections.abc import Callable, Mapping
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
from gralora_convert.delta import Gralora, Lora, Loss, Shape, tensors_of
from gralora_convert.disk import DTYPE_OF_TORCH, TensorSpec, bytes_of
from gralora_convert.output.cards import CARD_NAME
from gralora_convert.output.parts import Account, Computed, OutputFile, Part
from gralora_convert.output.plan import Plan
from gralora_convert.output.tiles import taken
from gralora_convert.version import __version__

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class New(Generic[T]):
    """The factors of a module, or a value beside them, to write: `outline` has their shapes and
    dtypes. `make` gives them where that is on the meta device, keeps up to `nbytes` bytes
    meanwhile, takes `effort` (at least these, in bytes copied), and leaves in `account` what it
    finds out."""

    outline: T
    make: Callable[[], T] | None = None
    nbytes: int = 0
    effort: int = 0
    account: Account | None = None

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
    model_config: Mapping[str, object] | None = None,
    **more: Any,
) -> Plan:
    """The plan of an adapter's folder, which PEFT 0.21.2 reads without a warning (peft_model.py,
    from_pretrained).

    `values` are biases and parameters of saved modules by path in memory; `receipt` is told after
    what wrote it; `model_config` lies beside the adapter; `more` are fields of the plan.
    """
    parts = [part for name, module in modules.items() for part in _Module(module).parts(name)]
    for path, value in values.items():
        holder, _, leaf = path.rpartition(".")
        own = leaf == "bias" and holder in modules
        key = key_of(holder, "bias") if own else key_of(path, "parameter")
        if isinstance(value, TensorSpec):
            source = taken(value, value.dtype)
            parts.append(Part(key, value.dtype, value.shape, value.nbytes, source))
        else:
            memory = value.outline.nbytes
            parts.append(_part(key, value.outline, partial(_bytes, value), memory=memory))
    written = replace(config, inference_mode=True, peft_version=PEFT_VERSION)
    texts = {CONFIG_NAME: written.to_json()} | ({} if card is None else {CARD_NAME: card})
    if model_config:
        texts["config.json"] = json.dumps(model_config, indent=2).encode()
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
        # the longest first: PEFT takes the first key that a name ends with
        ranks = dict(sorted(shape.ranks.items(), key=lambda item: -len(item[0])))
        return LoraConfig(
            r=shape.r, lora_alpha=shape.alpha, lora_dropout=dropout, rank_pattern=ranks, **fields
        )
    return GraloraConfig(
        r=shape.r, hybrid_r=shape.hybrid_r, alpha=shape.alpha, gralora_k=shape.k,
        gralora_dropout=dropout, **fields,
    )  # fmt: skip


def _bytes(value: New[torch.Tensor], tile: int) -> memoryview:
    return bytes_of(value.made())


def _part(key: str, like: torch.Tensor, produce: Callable[[int], memoryview], **more: Any) -> Part:
    dtype = DTYPE_OF_TORCH[str(like.dtype).removeprefix("torch.")]
    source = Computed(max(1, like.nbytes), produce, **more)
    return Part(key, dtype, tuple(like.shape), like.nbytes, source)


class Losses(dict[str, Loss]):
    """What making a module lost, by what is compared: an account of its tensors."""

    def save(self) -> dict[str, Loss]:
        return dict(self)

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.update({name: (loss[0], loss[1]) for name, loss in saved.items()})

    @staticmethod
    def of(modules: Mapping[str, "Losses"], name: str) -> dict[str, Loss]:
        """One comparison, of all modules that have it."""
        return {module: losses[name] for module, losses in modules.items() if name in losses}


class _Module:
    """The factors of one module: made when the first is asked for, dropped after the last."""

    def __init__(self, module: New[Gralora | Lora]) -> None:
        self._module = module
        self._factors: dict[str, torch.Tensor] = {}

    def parts(self, name: str) -> list[Part]:
        """Its tensors under PEFT's keys, one unit: no two runs or ranks, whose arithmetic may
        differ, make a part each."""
        module, parts = self._module, list[Part]()
        method: Method = "lora" if isinstance(module.outline, Lora) else "gralora"
        effort = max(module.effort, module.nbytes)
        said: dict[str, Any] = {
            "memory": module.nbytes, "account": module.account, "effort": effort,
        }  # fmt: skip
        for role, like in tensors_of(module.outline).items():
            key = key_of(name, cast(Role, role), method)
            parts.append(_part(key, like, partial(self._bytes_of, role), unit=self, **said))
            said = {}  # of the module, so once
        return parts

    def _bytes_of(self, role: str, tile: int) -> memoryview:
        if role not in self._factors:
            self._factors = tensors_of(self._module.made())
        return bytes_of(self._factors.pop(role))
