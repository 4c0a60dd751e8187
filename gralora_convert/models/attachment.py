"""Adapters on a live model: the forward path of every adapted layer, put on and taken off.

An adapter says which delta belongs to which module; no file format is known here.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gralora_convert.adapters import Adapter, AdapterLike, GraloraConfig, LoraConfig
from gralora_convert.delta import Delta, Gralora, Lora
from gralora_convert.errors import MisuseError, UnsupportedError, is_number
from gralora_convert.models.fitting import (
    MARK,
    Held,
    Parts,
    Replacement,
    Slot,
    fitted,
    merged,
    parts_of,
    require_trainable,
)
from gralora_convert.models.hosting import frozen, tell_when_saved, thaw
from gralora_convert.models.layer import GraloraLinear, require_name, unwrapped, whole
from gralora_convert.models.saving import copied, implied_config
from gralora_convert.output import New, adapter_plan


class Attachment:
    """An adapter on a live model, until `detach`; as a context manager it detaches at the end.

    `layers` are the adapted layers by module name, `replaced` the parameters and buffers by path
    whose values the adapter brought along (biases, modules_to_save). `config` is the adapter's
    own; None where deltas were attached.
    """

    def __init__(
        self,
        name: str,
        layers: Mapping[str, GraloraLinear],
        slots: Sequence[Slot],
        replacements: Sequence[Replacement],
        model: nn.Module,
        config: GraloraConfig | LoraConfig | None = None,
    ) -> None:
        self.name, self.layers, self.config = name, layers, config
        self._slots, self._replacements, self._model = slots, replacements, model
        self._attached = self._is_on = True
        self._merged: list[Replacement] = []
        self._aside: dict[str, Tensor] = {}  # the adapter's values while it is off
        self._frozen: list[nn.Parameter] = []
        self._check: RemovableHandle | None = None
        self._switch()

    @property
    def replaced(self) -> Mapping[str, Tensor]:
        return {change.path: self._now(change) for change in self._replacements}

    @property
    def _changes(self) -> list[Replacement]:
        return [*self._replacements, *self._merged]

    def _now(self, change: Replacement) -> Tensor:
        """The value as the model has it: moving a model makes new buffers."""
        found = getattr(change.owner, change.leaf) if self._is_on else self._aside[change.path]
        assert isinstance(found, Tensor)
        return change.value if found is change.original else found  # tied back meanwhile

    def deltas(self) -> dict[str, Gralora | Lora]:
        """The delta weights by module as they are now (after training), copies."""
        return {slot.module: slot.branch.value() for slot in self._slots}

    def parameters(self) -> list[nn.Parameter]:
        """All that this adapter put there, once each: what an optimiser should train."""
        factors = (slot.branch.parameters() for slot in self._slots)
        values = self.replaced.values()
        found = [*chain.from_iterable(factors), *(v for v in values if isinstance(v, nn.Parameter))]
        return list({id(parameter): parameter for parameter in found}.values())

    def __repr__(self) -> str:
        values = f", {len(self._replacements)} values" if self._replacements else ""
        state = "" if self._attached else ", detached"
        return f"Attachment({self.name!r}, {len(self.layers)} modules{values}{state})"

    def adapter(self) -> Adapter:
        """A copy as it is now, in a temporary folder that lives as long as the copy: what `merge`,
        `convert`, `verify` and `validate` work on when they are given this object.

        Raises:
            MisuseError: it is weighed by `set_scale`, which no file says; or as `save_pretrained`.
            OutputError: the temporary folder cannot be written.

        >>> delta = Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), scaling=0.5)
        >>> attach(nn.Sequential(nn.Linear(4, 6)), {"0": delta}).adapter().modules
        ('0',)
        """
        scales = {slot.branch.scale for slot in self._slots}
        if scales - {1.0}:
            raise MisuseError(
                f"the adapter {self.name!r} counts {min(scales - {1.0}):g} times here, which no "
                "file says",
                hint="Use `set_scale(1)`, and give `merge` the `weights`.",
            )
        return copied(self.save_pretrained)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapter as it is now (after training) into `folder`, complete or not at all,
        as PEFT 0.21.2 reads it.

        The config is the adapter's own. For deltas it is made from them: it needs all of one shape
        and scaling, and names neither a task nor a base model.

        Raises:
            MisuseError: deltas that one config cannot describe; values that FSDP 1 has in pieces.
            OutputError: the folder exists (and not `overwrite`), or cannot be written.
            UnsupportedError: a LoRA whose factors PEFT stores in pieces.

        >>> from tempfile import TemporaryDirectory
        >>> from gralora_convert.adapters import Adapter
        >>> delta = Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), scaling=0.5)
        >>> with TemporaryDirectory() as folder:
        ...     attached = attach(nn.Sequential(nn.Linear(4, 6)), {"0": delta})
        ...     attached.save_pretrained(f"{folder}/adapter")
        ...     Adapter.open(f"{folder}/adapter").kind
        'gralora'
        """
        deltas = self.deltas()
        config = self.config or implied_config(deltas, self._slots, self.layers.values())
        if isinstance(config, LoraConfig) and config.extra.get("use_bdlora"):
            raise UnsupportedError(
                "a BD-LoRA stores blocks of its factors, and is not written here"
            )
        modules = {name: New(delta) for name, delta in deltas.items()}
        values = {
            change.path: New(whole(self._now(change), change.original.shape))
            for change in self._replacements
        }
        adapter_plan("save", modules, values, config, dict).write(folder, overwrite=overwrite)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes as without this adapter; the others stay.

        >>> model = nn.Sequential(nn.Linear(4, 6))
        >>> before = model(torch.ones(4))
        >>> handle = attach(model, {"0": Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), 0.5)})
        >>> with handle.disabled():
        ...     bool((model(torch.ones(4)) == before).all())
        True
        """
        was_on = self._is_on
        self.set_active(False)
        try:
            yield
        finally:
            self.set_active(was_on and self._attached)

    def set_active(self, active: bool) -> None:
        """Switches this adapter on or off; values that it brought (biases, heads) come and go.

        Raises:
            MisuseError: it was detached, or another adapter or FSDP changed its values since.

        >>> model = nn.Sequential(nn.Linear(4, 6))
        >>> deltas = {"0": Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), 0.5)}
        >>> one, two = (attach(model, deltas, name=name) for name in ("one", "two"))
        >>> one.set_active(False)  # two alone computes
        """
        if active == self._is_on:
            return
        if not self._attached:
            raise MisuseError(f"the adapter {self.name!r} was detached", hint="Attach it again.")
        changes = self._changes
        self._require_place(changes)
        if active:
            for change in changes:
                change.put(self._aside[change.path])
        else:
            self._aside = {change.path: self._now(change) for change in changes}
            for change in reversed(changes):
                change.put(change.original)
        self._is_on = active
        self._switch()

    def _switch(self) -> None:
        """Lets the branches compute when they have to, and the model, while this adapter is on,
        with its values only."""
        for slot in self._slots:
            slot.branch.is_on = self._is_on and not self._merged
        if self._check is not None:
            self._check.remove()
        self._check = None
        if self._is_on and self._changes:
            held = Held(self._model, self._changes)
            self._check = self._model.register_forward_pre_hook(held)

    def _require_place(self, changes: Sequence[Replacement]) -> None:
        """Raises `MisuseError` when the model has in a place of ours what another put there; a new
        object for our value (of `load_state_dict(assign=True)`, `to_empty`) is ours."""
        own = {id(change.value) for change in changes}
        for change in changes:
            now = getattr(change.owner, change.leaf)
            known = id(now) in own or now is change.original
            foreign = hasattr(now, MARK) or hasattr(now, "full_tensor") or change in self._merged
            if isinstance(now, nn.Parameter) and foreign and not known:
                raise MisuseError(
                    "was changed after this adapter put its value there", where=change.path,
                    hint="Take off first what did it: another adapter. What FSDP shards stays.",
                )  # fmt: skip

    def set_scale(self, scale: float) -> None:
        """Weighs this adapter beside others: its part counts `scale` times. What it saves stays.

        Raises:
            MisuseError: not a finite number; it is merged, or brings values that have no weight.

        PEFT 0.21.2, tuners/lora/layer.py, set_scale.
        """
        if not is_number(scale):
            raise MisuseError(f"the scale {scale!r} is not a finite number")
        if self._merged or self._replacements:
            what = "is merged: unmerge it" if self._merged else "brings biases or heads"
            raise MisuseError(f"the adapter {self.name!r} {what}, and cannot be weighed")
        for slot in self._slots:
            slot.branch.scale = float(scale)

    def merge(self) -> None:
        """Puts the update into the weights of the live model, which then costs what it did without.

        Each adapted layer gets a new weight, the sum in float32 or wider, rounded once to its
        dtype; its own is put aside for `unmerge`, and whatever shares it (a tied embedding) keeps
        it. Nothing is changed when an error is raised. Merged already: does nothing.

        Raises:
            MisuseError: the adapter is off, a weight is not its layer's own, or a sum overflows.
            UnsupportedError: a weight is quantised, sharded or offloaded.

        >>> model = nn.Sequential(nn.Linear(4, 6))
        >>> weight = model[0].weight
        >>> handle = attach(model, {"0": Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), 0.5)})
        >>> handle.merge()
        >>> handle.unmerge()
        >>> model[0].weight is weight
        True
        """
        if not self._is_on:
            raise MisuseError(f"the adapter {self.name!r} is off", hint="Use `set_active(True)`.")
        if not self._merged:
            changes = [merged(self.layers[slot.module], slot) for slot in self._slots]
            for change in changes:
                change.install()
            self._merged = changes
            self._switch()

    def unmerge(self) -> None:
        """Gives the layers their own weights back, the very objects.

        Raises:
            MisuseError: another adapter was merged after this one, and still is.
        """
        if self._is_on:
            self._require_place(self._merged)
            for change in self._merged:
                change.put(change.original)
        self._merged = []
        self._switch()

    def detach(self) -> None:
        """Takes the adapter off: the model has its own modules and parameters again.

        They are the very objects that were there, bit for bit as they were left. Other adapters on
        the same layers stay. Calling it again does nothing.

        Raises:
            MisuseError: another adapter or FSDP changed its values since, or what it merged.
        """
        if not self._attached:
            return
        self.set_active(False)
        self._attached, self._merged = False, []
        for slot in self._slots:
            layer = self.layers[slot.module]
            if self.name in layer.adapters:
                layer.remove(self.name)
            if not layer.adapters and slot.parent._modules.get(slot.leaf) is layer:
                setattr(slot.parent, slot.leaf, layer.base_layer)
        thaw(self._frozen)
        tell_when_saved(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def attach(
    model: nn.Module,
    adapter: AdapterLike | Mapping[str, Delta],
    *,
    name: str = "default",
    dropout: float | None = None,
    trainable: bool = False,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> Attachment:
    """Puts an adapter on a live model: the complete forward path, until `detach`.

    `adapter` is an `Adapter`, its folder or Hub id, or the deltas by module name. Each adapted
    layer is replaced in its parent by a `GraloraLinear` around it (see there for numerics, dtypes
    and `state_dict`). Biases and saved modules of the adapter replace the model's values; the
    model's own parameters are put aside, not written to, so whatever shares them (tied weights)
    keeps its values. A tied `lm_head` that is adapted changes the head only.

    * `dropout` None means the adapter's own (0 for deltas); it acts in training mode only.
    * `trainable` lets factors, biases and saved modules require gradients, and as in PEFT nothing
      else of the model, until `detach`; `freeze=False` leaves the rest as it is.
    * A model that `torch.compile`, DataParallel or DistributedDataParallel wraps is taken for what
      it wraps, and modules that are compiled one by one by their own names.
    * Several adapters: attach each under its own `name`; their parts are summed. Only one of them
      may bring a value for the same bias or saved parameter.

    Nothing is changed when an error is raised.

    Raises:
        InvalidAdapterError: a module is missing or not one that can be adapted, shapes disagree, or
            a bias or head has no place; carries a finding for each.
        MisuseError: the name is taken or cannot be one, there is nothing to attach, or `trainable`
            in a model that DistributedDataParallel wraps already.
        UnreadableError: a folder that is not there.
        UnsupportedError: a dense delta; `trainable` of a LoRA that PEFT trains in another way
            (MiCA, BD-LoRA, VeLoRA, MonteCLoRA).

    >>> model = nn.Sequential(nn.Linear(4, 6))
    >>> delta = Gralora(torch.ones(2, 2, 2), torch.ones(2, 2, 3), scaling=0.5)
    >>> before = model(torch.ones(4))
    >>> with attach(model, {"0": delta}):
    ...     (model(torch.ones(4)) - before).detach().round()
    tensor([2., 2., 2., 2., 2., 2.])
    >>> bool((model(torch.ones(4)) == before).all())
    True

    After PEFT 0.21.2, tuners/gralora/model.py, which also takes the `out_proj` of an
    nn.MultiheadAttention (without effect) and writes biases into the base for good.
    """
    require_name(name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r:.99} is not a torch.nn.Module")
    parts = parts_of(adapter if isinstance(adapter, Mapping) else Adapter.open(adapter))
    if trainable:
        require_trainable(parts)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise MisuseError(
                "DistributedDataParallel knows only the parameters that it was made with",
                hint="Attach the adapter to the model first, then wrap it.",
            )
    handle = put_on(model, parts, name=name, dropout=dropout, trainable=trainable, dtype=dtype)
    if trainable and freeze:
        handle._frozen = frozen(handle._model)
    return handle


def put_on(
    model: nn.Module,
    source: Parts,
    *,
    name: str,
    dropout: float | None = None,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> Attachment:
    """What `attach` does, for parts that are named as the model is.

    Raises:
        InvalidAdapterError, MisuseError, UnsupportedError: as `attach`.
    """
    model = unwrapped(model)
    slots, changes = fitted(model, source, name, dropout=dropout, trainable=trainable, dtype=dtype)
    if not slots and not changes:
        raise MisuseError("there is nothing to attach: no modules", where=source.where)
    for change in changes:
        change.install()
    layers = {slot.module: slot.install(name) for slot in slots}
    config = None if source.adapter is None else source.adapter.config
    tell_when_saved(model)
    return Attachment(name, layers, slots, changes, model, config)
