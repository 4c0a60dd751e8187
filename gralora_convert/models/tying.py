"""The settings of a model that make parameters share their values."""

import contextlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gralora_convert.models.foreign import ForeignError, foreign

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class TieFlag:
    """A `tie_word_embeddings` of the config: its path in `config.json`, and the parameters that it
    makes others share."""

    path: tuple[str, ...]
    tied: tuple[str, ...]
    embeddings: frozenset[str]


def tie_flag(model: torch.nn.Module, wanted: Set[str]) -> TieFlag | None:
    """The flag that ties these parameters, if one alone does and its place is known."""
    for name, module in model.named_modules():
        getter = getattr(module, "get_expanded_tied_weights_keys", None)
        if getter is None:
            continue
        dot = f"{name}." if name else ""
        tied = tuple(f"{dot}{target}" for target in getter(all_submodels=False))
        if wanted and wanted <= set(tied):
            path = _config_path(model.config, module.config)
            embeddings = frozenset(_embeddings(module, dot))
            return None if path is None else TieFlag(path, tied, embeddings)
    return None


def _config_path(root: "PretrainedConfig", wanted: object) -> tuple[str, ...] | None:
    """The names that lead from a config to one of its sub-configs; () for itself."""
    if root is wanted:
        return ()
    for name, value in vars(root).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            inner = _config_path(value, wanted)
            if inner is not None:
                return (name, *inner)
    return None


def _embeddings(module: torch.nn.Module, dot: str) -> Iterator[str]:
    """Names of the weights of a model's input and output embeddings."""
    names = {id(part): name for name, part in module.named_modules()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(ForeignError), foreign():
            part = getattr(module, getter)()
            if id(part) in names:
                yield f"{dot}{names[id(part)]}.weight"
