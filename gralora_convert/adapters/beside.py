"""Weight files beside that of an adapter: what was trained with it, and what is something else."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.adapters.keys import parse_key
from gralora_convert.disk import TensorFile, TensorSpec, is_weights, listing, read_tensor_file
from gralora_convert.errors import Finding, UnreadableError, error, note, warning

# The state of the training run, and what is made of the adapter.
_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states)")
_READ = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
_LOADED = ("model.safetensors", "pytorch_model.bin")
_MOVE = "Put it into the base first, or move the file away to merge the rest without it."
_VALUE_HEAD = re.compile(r"(.*\.)?(v_head|value_head)\..*")


@dataclass(frozen=True, slots=True)
class Extra:
    """A weight file beside the adapter's: what it is, and what there is to say about it."""

    path: Path
    kind: str
    said: str
    file: TensorFile | None = None

    @property
    def parameters(self) -> Mapping[str, TensorSpec]:
        """What was trained with the adapter, by the path in memory; LLaVA's trainer writes
        non_lora_trainables.bin, LongLoRA's trainable_params.bin."""
        if self.file is None or self.kind != "trained":
            return {}
        keys = {parse_key(name): spec for name, spec in self.file.tensors.items()}
        return {
            f"{key.name}.weight" if key.role == "base_weight"
            else f"{key.name}.bias" if key.role == "bias" else (key.name, *key.copy_of)[-1]: spec
            for key, spec in keys.items()
        }  # fmt: skip


def extras(adapter: Adapter) -> list[Extra]:
    return [
        _extra(path, adapter.modules)
        for path in listing(adapter.path)
        if is_weights(path.name)
        and not path.name.startswith((".", "adapter_model"))
        and not _STATE.match(path.name)
    ]


def files_of(adapter: Adapter) -> list[TensorFile]:
    """Every file that holds a part of what was trained."""
    return [adapter.file, *(e.file for e in extras(adapter) if e.file and e.parameters)]


def values_beside(adapter: Adapter) -> dict[str, TensorSpec]:
    """What was trained with an adapter and is in no file of its own, by the path in memory."""
    return {name: spec for extra in extras(adapter) for name, spec in extra.parameters.items()}


def extra_findings(adapter: Adapter) -> Iterator[Finding]:
    """What is to be known about the files beside an adapter, without its base."""
    for extra in extras(adapter):
        name = extra.path.name
        if extra.kind == "unknown":
            yield error("extra-weights", name, extra.said, _MOVE)
        elif extra.kind == "model" and name in _LOADED:
            yield warning(
                "model-beside-adapter", name,
                f"{extra.said}: transformers takes it for the base, whatever the config names, and "
                "puts the adapter on top; if it is merged already, the adapter counts twice",
                "Move one of the two into a folder of its own.",
            )  # fmt: skip
        else:
            yield note("extra-weights", name, extra.said)


def unplaced(extra: Extra, parameter: str, why: str) -> Finding:
    """That a tensor which was trained with an adapter has no place in a model."""
    return error(
        "extra-weights", extra.path.name, f"{parameter} was trained with the adapter; {why}", _MOVE
    )


def trained_files(adapter: Adapter) -> dict[str, Path]:
    """The files with what was trained with an adapter, by name."""
    kinds = ("trained", "unknown", "value head")
    return {extra.path.name: extra.path for extra in extras(adapter) if extra.kind in kinds}


def _extra(path: Path, modules: Sequence[str]) -> Extra:
    if path.suffix not in _READ:
        return Extra(path, "foreign", "is in a format that is not read here; left out")
    try:
        file = read_tensor_file(path)
    except UnreadableError as problem:
        return Extra(path, "unknown", f"{problem.message}: what was trained there is not known")
    if not file.tensors:
        return Extra(path, "empty", "holds no tensors")
    held = f"holds {len(file.tensors)} tensor(s), first {next(iter(file.tensors))!r}"
    if any(_is_of(tensor, modules) for tensor in file.tensors):
        return Extra(path, "model", f"{held}: a whole model, no part of the adapter")
    if all(_VALUE_HEAD.fullmatch(tensor) for tensor in file.tensors):
        return Extra(path, "value head", f"{held}: a value head, not used by the model")
    said = f"{held}, that were trained with the adapter: a merge puts them in the base's place"
    extra = Extra(path, "trained", said, file)
    if len(extra.parameters) < len(file.tensors):
        return Extra(path, "unknown", f"{held}: two of them mean the same parameter")
    return extra


def _is_of(tensor: str, modules: Sequence[str]) -> bool:
    """Whether a tensor is the weight of an adapted module."""
    path = tensor.removesuffix(".weight").removesuffix(".base_layer")
    return path != tensor and path.removeprefix("base_model.model.") in modules
