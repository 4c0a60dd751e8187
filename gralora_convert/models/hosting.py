"""What attached adapters ask of the model that they are on, beside the places of their parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from gralora_convert.models.fitting import MARK
from gralora_convert.models.layer import Branch, GraloraLinear

# On a parameter of the model: how many attached adapters want it frozen.
_FROZEN = "_gralora_convert_frozen"


def frozen(model: nn.Module) -> list[nn.Parameter]:
    """Of the model's own parameters, none is trained until these are given to `thaw`."""
    adapters = {id(p) for branch in _branches(model) for p in branch.parameters()}
    found = [
        p for p in model.parameters()
        if (p.requires_grad or hasattr(p, _FROZEN))
        and id(p) not in adapters and not hasattr(p, MARK)
    ]  # fmt: skip
    for parameter in found:
        setattr(parameter, _FROZEN, getattr(parameter, _FROZEN, 0) + 1)
        parameter.requires_grad_(False)
    return found


def thaw(parameters: Sequence[nn.Parameter]) -> None:
    """Lets those be trained that no other adapter wants frozen."""
    for parameter in parameters:
        others = getattr(parameter, _FROZEN, 1) - 1  # a copy of a model has no such attributes
        if others:
            setattr(parameter, _FROZEN, others)
            continue
        parameter.requires_grad_(True)
        if hasattr(parameter, _FROZEN):
            delattr(parameter, _FROZEN)


@dataclass(frozen=True, slots=True)
class _Saving:
    """`save_pretrained` of a model of transformers, which its Trainer calls, too."""

    model: nn.Module

    def __call__(self, *args: object, **options: object) -> object:
        if any(branch.is_on for branch in _branches(self.model)):
            from transformers.utils import logging

            # In transformers' own voice: whoever silences that has heard enough of its models.
            logging.get_logger("transformers").warning(
                "save_pretrained of the model: `from_pretrained` will load it without the adapter. "
                "Save that by `save_pretrained` of what `attach` returned, and attach its folder "
                "after loading."
            )
        save: Callable[..., object] = getattr(type(self.model), "save_pretrained")  # noqa: B009
        return save(self.model, *args, **options)


def tell_when_saved(model: nn.Module) -> None:
    """From now on `model.save_pretrained` says that loading it again needs the adapter's folder;
    once no adapter is left, the model is as it was."""
    if not any(True for _ in _branches(model)):
        for module in model.modules():  # also a part to which one was attached
            if isinstance(module.__dict__.get("save_pretrained"), _Saving):
                del module.__dict__["save_pretrained"]
    elif hasattr(type(model), "save_pretrained"):
        model.__dict__["save_pretrained"] = _Saving(model)


def _branches(model: nn.Module) -> Iterator[Branch]:
    for layer in model.modules():
        if isinstance(layer, GraloraLinear):
            for branch in layer.adapters.values():
                assert isinstance(branch, Branch)
                yield branch
