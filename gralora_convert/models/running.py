"""Whole models in memory: loaded from a folder, run once, their outputs."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gralora_convert.disk import Checkpoint, TensorSpec, read_torch, torch_dtype
from gralora_convert.errors import MisuseError, OutOfMemoryError
from gralora_convert.models.building import on_meta
from gralora_convert.models.foreign import ForeignError, foreign
from gralora_convert.models.inputs import Inputs, inputs_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SPARE_PARAMETERS = 1 << 24  # of a new head, or a part that was never trained


def memory_needed(merged: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a model in `dtype`, of the two values that each weight may have, as stored, and a
    quarter for what is computed."""
    specs = merged.tensors.values()
    return sum(dtype.itemsize * spec.numel + 2 * spec.nbytes for spec in specs) * 5 // 4


class CannotRunError(Exception):
    """Why a whole model cannot be run; weights and modules still decide."""

    @property
    def is_for_memory(self) -> bool:
        """Whether there was no memory for it, which says nothing about the model."""
        return isinstance(self.__cause__, OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its parameters that are not on disk, and those that have another shape there."""

    model: "PreTrainedModel"
    missing: frozenset[str]
    mismatched: Mapping[str, tuple[object, object]]

    def undecided(self, known: frozenset[str]) -> str:
        """Why the model is not what is on disk; `known` parameters are not on the base's, too."""
        for name, (found, needed) in sorted(self.mismatched.items()):
            return f"{name} is {found} on disk, {needed} by its config.json{_more(self.mismatched)}"
        drawn = sorted(self.missing - known)
        if drawn:
            return f"{drawn[0]} is not on disk, so transformers draws it at random{_more(drawn)}"
        return ""


def load(
    source: Checkpoint,
    class_name: str,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    trained: Path | None = None,
    labels: int | None = None,
    tensors: Mapping[str, TensorSpec] | None = None,
) -> Loaded:
    """`source` as a model of the class `class_name` in evaluation mode, with its own config, or
    with the one in the folder `trained` and its own vocabulary, which is what can be loaded.
    `tensors`: what a model without quantisation has in place of those on disk.

    Raises:
        CannotRunError: transformers does not load it.
    """
    import transformers

    cls = getattr(transformers, class_name, None) or transformers.AutoModel
    trust = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        with foreign():
            config = transformers.AutoConfig.from_pretrained(source.folder, **trust)
            if trained is not None:
                vocabulary = config.get_text_config().vocab_size
                config = transformers.AutoConfig.from_pretrained(trained, **trust)
                config.get_text_config().vocab_size = vocabulary
            if labels is not None:
                config.num_labels = labels
            require_size(source, cls, config)
            state = None
            if tensors is not None:
                config = _without_quantisation(config)
                state = {name: read_torch(spec) for name, spec in tensors.items()}
            torch.manual_seed(0)  # a head that the source lacks is drawn at random, then replaced
            model, info = cls.from_pretrained(
                source.folder if state is None else None, config=config, dtype=dtype,
                state_dict=state, ignore_mismatched_sizes=True, output_loading_info=True, **trust,
            )  # fmt: skip
    except (ForeignError, OutOfMemoryError) as error:
        raise CannotRunError(f"transformers cannot load {source.source}: {error}") from error
    mismatched = {name: (tuple(disk), tuple(live)) for name, disk, live in info["mismatched_keys"]}
    return Loaded(model.to(device).eval(), frozenset(info["missing_keys"]), mismatched)


def _without_quantisation(config: "PretrainedConfig") -> "PretrainedConfig":
    """The config without what would make transformers quantise, or dequantise by its own rule."""
    for part in (config, *vars(config).values()):
        if hasattr(part, "model_type"):
            vars(part).pop("quantization_config", None)
    return config


def require_size(source: Checkpoint, cls: Any, config: object) -> None:
    """Refuses a config that describes far more parameters than are there: transformers would make
    room for all of them."""
    try:
        model = on_meta(cls, config)
    except ForeignError:
        return  # loading says more
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(spec.numel for spec in source.tensors.values())
    if described > 2 * held + SPARE_PARAMETERS:
        raise CannotRunError(
            f"the config.json of {source.source} describes {described:,} parameters, "
            f"{held:,} are on disk"
        )


def first_that_runs(
    model: "PreTrainedModel", merged: Checkpoint, given: Inputs | None
) -> tuple[Inputs, Tensor]:
    """The inputs of the richest kind that the model takes, and what it makes of them."""
    failed = CannotRunError("its config.json describes no input that is known here")
    for inputs in [given] if given is not None else inputs_for(model, merged.config):
        try:
            return inputs, outputs_of(model, inputs)
        except CannotRunError as reason:
            if reason.is_for_memory:
                raise
            failed = reason
    raise failed


def stored_dtype(tensors: Mapping[str, TensorSpec], names: Iterable[str]) -> torch.dtype:
    """The dtype that the tensor with one of `names` is read as; the commonest one of matrices where
    none has, as for a parameter that lies on disk in pieces."""
    spec = next((tensors[name] for name in names if name in tensors), None)
    if spec is None:
        dtypes = [s.read_as for s in tensors.values() if len(s.shape) == 2]
        return torch_dtype(max(set(dtypes), key=dtypes.count))
    return torch_dtype(spec.read_as)


def holder_of(model: nn.Module, module: str, part: str = "") -> nn.Module:
    """The part of the model in which a module has this name: the whole, the bare base model, or the
    `part` that is known."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    names: dict[str, nn.Module] = dict(model.named_modules())
    for holder in ("", prefix, part, f"{prefix}.{part}"):
        if holder in names and f"{holder}.{module}".removeprefix(".") in names:
            return names[holder]
    return model


def outputs_of(model: "PreTrainedModel", inputs: Inputs) -> Tensor:
    with torch.no_grad():
        try:
            with foreign():
                result = model(**{name: _like(value, model) for name, value in inputs.items()})
        except (ForeignError, OutOfMemoryError) as error:
            raise CannotRunError(f"it does not take {', '.join(inputs)} alone: {error}") from error
    values = result.values() if isinstance(result, Mapping) else result
    for name in ("logits", "start_logits", "last_hidden_state"):
        if isinstance(result, Mapping) and isinstance(result.get(name), Tensor):
            found: Tensor = result[name]
            return found.cpu().double()
    first = next((value for value in values if isinstance(value, Tensor)), None)
    if first is None:
        raise CannotRunError("it returns no tensor")
    return first.cpu().double()


def _like(value: Tensor, model: "PreTrainedModel") -> Tensor:
    """On the model's device, and in its dtype unless it counts or selects."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _more(names: Collection[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def tokenised(merged: Checkpoint, text: str, trust_remote_code: bool) -> Inputs:
    from transformers import AutoTokenizer

    try:
        with foreign():
            tokenizer = AutoTokenizer.from_pretrained(
                merged.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except ForeignError as error:
        raise MisuseError(
            f"`text` needs a tokenizer, and none can be loaded: {error}",
            where=merged.path,
            hint="Copy the tokenizer's files there, or leave `text` out.",
        ) from error
    encoded = tokenizer(text, return_tensors="pt")
    inputs: Inputs = {"input_ids": encoded["input_ids"]}
    if merged.config.get("is_encoder_decoder"):
        inputs = {**inputs, "decoder_input_ids": encoded["input_ids"]}
    return inputs
