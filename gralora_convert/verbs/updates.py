"""An adapter as plain updates: what a LoRA has beyond factors becomes part of them, or of a bias.

DoRA, PiSSA, OLoRA and `lora_bias` need the base that they were trained on; every other adapter is
its factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from gralora_convert.adapters import NEEDS_BASE, Adapter, LoraConfig
from gralora_convert.base import NOTHING_SAID, Placement, Reading, Target, place, read_parameter
from gralora_convert.delta import (
    Delta,
    Dense,
    Gralora,
    Lora,
    Start,
    dora,
    is_finite,
    start_of,
    tensors_of,
    to_device,
    without_start,
)
from gralora_convert.disk import Checkpoint, read_torch
from gralora_convert.errors import InvalidAdapterError, UnsupportedError


@dataclass(frozen=True)
class Source:
    """The updates and biases of `adapter`; `placement` is None where no base was given."""

    adapter: Adapter
    base: Checkpoint | None
    placement: Placement | None
    device: str

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        base: Checkpoint | str | Path | None,
        *,
        device: str = "cpu",
        reading: Reading = NOTHING_SAID,
    ) -> "Source":
        """The adapter, with the base (if one is given) that it must fit."""
        adapter.require_plain(allowed=NEEDS_BASE)
        if base is None:
            if adapter.unsupported:
                raise UnsupportedError(
                    f"is a LoRA with {', '.join(adapter.unsupported)}: its update is not "
                    "scaling * B @ A, and the model that it was trained on was not given",
                    where=adapter.path, hint="Give `base`, the original one.",
                )  # fmt: skip
            return cls(adapter, None, None, device)
        opened = Checkpoint.open(base)
        placement, report = place(adapter, opened, reading)
        report.require_ok(adapter.path)
        return cls(adapter, opened, placement, device)

    @property
    def is_dora(self) -> bool:
        return "use_dora" in self.adapter.unsupported

    @property
    def has_bias(self) -> bool:
        """Whether each module adds a bias of its own (`lora_bias`)."""
        return "lora_bias" in self.adapter.unsupported

    @cached_property
    def _start(self) -> Start | None:
        config = self.adapter.config
        init = config.init_lora_weights if isinstance(config, LoraConfig) else None
        if init == "pissa":
            return "pissa"
        return "olora" if init == "olora" else None

    @cached_property
    def _targets(self) -> Mapping[str, Target]:
        assert self.placement is not None
        return {target.module: target for target in self.placement.targets}

    # updates --------------------------------------------------------------------------------------

    def outline(self, module: str) -> Delta:
        """The update of one module on the meta device: its kind and shapes, no values."""
        roles = {role: spec.shape for role, spec in self.adapter.roles[module].items()}
        rows, columns = self.adapter.shape(module)
        if self.is_dora:
            return Dense(torch.empty(rows, columns, device="meta"))
        meta = {
            role: torch.empty(shape, device="meta")
            for role, shape in roles.items() if role != "lora_bias"
        }  # fmt: skip
        scaling = self.adapter.scaling(module)
        if self.adapter.kind != "lora":
            general = meta.get("general_A"), meta.get("general_B")
            return Gralora(meta["A"], meta["B"], scaling, *general)
        r = roles["A"][0]
        if self._start is not None:
            r = min(2 * r, rows, columns)
        a, b = (torch.empty(size, device="meta") for size in ((r, columns), (rows, r)))
        return Lora(a, b, scaling)

    def delta(self, module: str) -> Delta:
        """The update of one module, on the device: factors in float32 or wider, or dense for a
        DoRA.
        """
        found = self._delta(module)
        if self.base is not None and not all(
            map(is_finite, tensors_of(found).values())
        ):  # factors were looked at
            raise InvalidAdapterError(
                "has values that are not finite", where=module,
                hint="`gralora-convert validate` says where.",
            )  # fmt: skip
        return found

    def _delta(self, module: str) -> Delta:
        factors = to_device(self.adapter.factors(module), self.device)
        if isinstance(factors, Lora) and (self._start or self.is_dora):
            weight, transposed = self._weight(module)
            if self._start is not None:
                start = start_of(
                    weight, self._start, factors.r, factors.scaling, transposed=transposed
                )
                factors = without_start(factors, start)
            if self.is_dora:
                magnitude = read_torch(self.adapter.roles[module]["magnitude"])
                return dora(weight, factors, magnitude.to(self.device))
        return factors

    def memory(self, module: str) -> int:
        """Bytes of what `delta` reads and makes."""
        rows, columns = self.adapter.shape(module)
        dense = rows * columns * (8 if self.is_dora else 4 if self._start else 0)
        return self.adapter.factor_bytes(module) + dense

    def _weight(self, module: str) -> tuple[torch.Tensor, bool]:
        """The base's weight (out, in), and whether it is stored the other way round."""
        assert self.base is not None
        target = self._targets[module]
        parts = [(rows, target.frozen or stored) for rows, stored in target.parts]
        weight = read_parameter(parts, self.base.tensors).to(self.device)
        return weight.T if target.transposed else weight, target.transposed

    # biases ---------------------------------------------------------------------------------------

    def bias(self, module: str) -> torch.Tensor:
        """The bias of the base (or the trained one that replaces it) + its own, float32."""
        assert self.base is not None
        assert self.placement is not None
        own = self.adapter.biases.get(module)
        found = self.placement.architecture.locate(f"{module}.bias")
        if own is None and not found:
            raise InvalidAdapterError(
                "has a trained lora_bias, but the base has no bias there", where=module,
                hint="Is this the model that it was trained on?",
            )  # fmt: skip
        before = read_torch(own) if own else read_parameter(found, self.base.tensors)
        added = read_torch(self.adapter.roles[module]["lora_bias"]).double()
        return (before.double() + self.adapter.scaling(module) * added).float()
