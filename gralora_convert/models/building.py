"""Models of transformers without their weights, built from a config on the meta device."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gralora_convert.disk import Checkpoint
from gralora_convert.models.foreign import ForeignError, foreign, quiet, twice
from gralora_convert.models.layer import is_linear, unwrapped

_COUNTED = re.compile(r"n_layer|num_blocks|depths?|(.*_)?layers|(num|n)_(.*_)?experts")
_MOST_COUNTED = 1000  # of models without weights, of which the tensors say nothing


def has_absurd_counts(base: Checkpoint) -> bool:
    """Whether its config counts more layers or experts than its tensors could be of."""
    return absurd_count(base.config, len(base.tensors)) != ""


def absurd_count(config: Mapping[str, object], tensors: int) -> str:
    """The setting that counts more layers or experts than so many tensors could be of, '' if none
    does: building them would take hours."""
    most = max(_MOST_COUNTED, tensors)
    entries: list[tuple[str, object]] = list(config.items())
    while entries:
        name, value = entries.pop()
        if isinstance(value, dict):
            entries += value.items()
        elif isinstance(value, list):
            entries += [(name, item) for item in value]
        elif isinstance(value, int) and value > most and _COUNTED.fullmatch(name):
            return name
    return ""


def on_meta(maker: Any, config: object, **options: object) -> torch.nn.Module:
    """A model of a class, or by an auto class (with its `options`), on the meta device."""

    def built() -> torch.nn.Module:
        with torch.device("meta"):
            is_class = hasattr(maker, "config_class")
            model: torch.nn.Module = (
                maker(config) if is_class else maker.from_config(config, **options)
            )
        return model

    return twice(built)


def models(
    base: Checkpoint, class_names: Sequence[str], trust_remote_code: bool
) -> Iterator[torch.nn.Module]:
    """The models of those classes that transformers can build, and of its default class."""
    import transformers

    if has_absurd_counts(base):
        return
    try:
        config = twice(
            lambda: transformers.AutoConfig.from_pretrained(
                base.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        )
    except ForeignError:
        return
    custom = [n for n in getattr(config, "auto_map", None) or {} if n.startswith("AutoModel")]
    for name in dict.fromkeys([*class_names, *custom, "AutoModel"]):
        try:
            maker = _class(name)
            if maker is None:
                continue
            part = _own_config(maker, config)
            model = on_meta(maker, part, trust_remote_code=trust_remote_code)
        except ForeignError:
            continue
        yield model


def _class(name: str) -> Any:
    """A class of transformers; None when it has none of that name."""
    import transformers

    with foreign():
        found = getattr(transformers, name, None)
    return found if isinstance(found, type) else None


def _own_config(maker: Any, config: object) -> object:
    """The config of a class within that of the model that it is a part of (one tower, the text
    model), where there is just one such; else `config` itself."""
    wanted = getattr(maker, "config_class", None)
    if not isinstance(wanted, type) or isinstance(config, wanted):
        return config
    inner = [value for value in vars(config).values() if isinstance(value, wanted)]
    return inner[0] if len(inner) == 1 else config


def build_problem(base: Checkpoint, class_name: str) -> str:
    """Why transformers cannot build a class of its own from a model's config; '' when it can."""
    import transformers

    if class_name.startswith("Auto"):
        return ""
    try:
        maker = _class(class_name)
        if maker is None:
            return ""
        if name := absurd_count(base.config, len(base.tensors)):
            return f"{name} counts more than its tensors could be of"
        with quiet():
            on_meta(maker, twice(lambda: transformers.AutoConfig.from_pretrained(
                base.folder, local_files_only=True
            )))  # fmt: skip
    except ForeignError as error:
        return str(error)
    return ""


def bare_shapes(config: Mapping[str, object]) -> Mapping[str, tuple[int, ...]] | None:
    """The parameters of the bare model that a config describes, with their shapes; None when
    transformers cannot build it."""
    import transformers

    try:
        with quiet():
            described = twice(lambda: transformers.AutoConfig.for_model(**config))
            model = on_meta(transformers.AutoModel, described)
    except ForeignError:
        return None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def linear_modules(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], *, head: bool
) -> list[str]:
    """The names of all nn.Linear and Conv1D among `modules` of `model`; without `head`, but the
    output embedding (PEFT 0.21.2, tuners_utils.py, `_maybe_include_all_linear_layers`)."""
    excluded = None if head else _output_embedding(model)
    return [
        name
        for name, module in modules.items()
        if is_linear(module)
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and module is not excluded
    ]


def _output_embedding(model: torch.nn.Module) -> torch.nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        with foreign():
            found = getter() if getter is not None else None
    except ForeignError:
        return None
    return unwrapped(found) if isinstance(found, torch.nn.Module) else None
