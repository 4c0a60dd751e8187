"""A dense model on disk, lazily: its tensors by name, its files, its configuration. Headers only.

Which files hold the weights is decided as transformers 5.23 does (modeling_utils.py,
`_get_resolved_checkpoint_files`): one safetensors file, its shards, one `.bin` file, its shards;
folders that transformers did not write may hold safetensors files under other names.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gralora_convert.disk.files import RECEIPT_NAME, meant
from gralora_convert.disk.folders import (
    inside,
    is_alone,
    is_weights,
    listing,
    require_whole_model,
    sidecars,
    weight_files,
)
from gralora_convert.disk.hub import fetch, parse_name
from gralora_convert.disk.specs import TensorFile, TensorSpec
from gralora_convert.disk.strictjson import load_json
from gralora_convert.disk.tensors import read_tensor_file
from gralora_convert.errors import UnreadableError, UnsupportedError

# What ends the names of LoRAs that are no PEFT adapters, and who writes them.
_OTHER_LORAS = {
    ".lora_down.weight": "the trainers of kohya write", ".lora.down.weight": "diffusers once wrote",
    ".lora_a": "mlx-lm writes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A dense checkpoint: a transformers folder, one tensor file, or a model of the Hub's cache.

    `layout` names the weight files relative to `path` in order; `tensors` are in file order, so
    that writing them back in this order reproduces the layout. `config` is the parsed
    `config.json` ({} when there is none).
    """

    path: Path
    source: str
    layout: Mapping[str, TensorFile]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, object] = field(default_factory=dict)
    index_name: str | None = None

    @classmethod
    def open(cls, source: "Checkpoint | str | Path") -> "Checkpoint":
        """The checkpoint at `source`: a folder, a tensor file, or a Hub id (cache first). An open
        checkpoint is itself.

        Raises:
            UnreadableError: nothing there, a damaged file, an index that disagrees with its shards
                or leaves its folder.
            UnsupportedError: weights in a format that is not read here (GGUF, TensorFlow, Flax), or
                the state dict of a model with an adapter inside.

        >>> Checkpoint.open("fixtures/bases/llama").config["model_type"]  # doctest: +SKIP
        'llama'
        """
        if isinstance(source, Checkpoint):
            return source
        path = locate(source)
        names: Mapping[str, list[str] | None]
        if path.is_dir():
            folder = path
            names, index_name = weight_files(path)
            layout = {name: read_tensor_file(inside(folder, name)) for name in names}
        else:
            folder = path.parent
            names, index_name = {path.name: None}, None
            require_whole_model(path)
            layout = {path.name: read_tensor_file(path)}
        config = {}
        if os.path.lexists(folder / "config.json"):
            config = load_json(inside(folder, "config.json"), allow_non_finite=True)
        return cls(path, str(source), layout, _gather(layout, names, path), config, index_name)

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self.tensors)} tensors, {self.nbytes:,} bytes)"

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def other_weights(self) -> list[str]:
        """Files of weights beside those that are read: other formats, variants, leftovers."""
        if not self.path.is_dir():
            return []
        names = {entry.name for entry in listing(self.path)} - self.layout.keys()
        return sorted(n for n in names if is_weights(n) and not n.startswith("adapter_"))

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        value = self.config.get("architectures")
        return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()

    @property
    def is_of_diffusers(self) -> bool:
        """Whether diffusers saved it (0.42, configuration_utils.py): its loaders look for the names
        of files that it has."""
        return "_diffusers_version" in self.config

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def receipt(self) -> Mapping[str, object] | None:
        """What this tool wrote beside a checkpoint that it made, or None."""
        if not self.path.is_dir() or not os.path.lexists(self.path / RECEIPT_NAME):
            return None
        return load_json(inside(self.path, RECEIPT_NAME))

    @property
    def merged_adapters(self) -> list[str]:
        """sha256 of the adapters that its receipt says it holds, by this merge and earlier ones."""
        listed = (self.receipt or {}).get("merged_adapters")
        return [v for v in listed if isinstance(v, str)] if isinstance(listed, list) else []

    def digest(self) -> str:
        """A digest of all names, dtypes and shapes, and of the configuration: the same for copies
        of a model in any layout of files."""
        names = sorted((n, s.dtype, s.shape) for n, s in self.tensors.items())
        text = json.dumps([names, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def aliases(self, name: str) -> list[str]:
        """Other names of the same tensor in memory, as far as the file tells: those that share its
        bytes in a `.bin`, those that safetensors left out as copies (0.8, torch.py, `save_model`
        writes `copy: kept` into the metadata)."""
        own = self.tensors[name]
        file = next(held for held in self.layout.values() if held.path == own.file)
        specs = file.tensors.items() if file.pickled else ()
        same = [n for n, spec in specs if spec.offset == own.offset and spec.nbytes]
        left = [copy for copy, kept in (file.metadata or {}).items() if kept == name]
        return [other for other in (*same, *left) if other != name]

    def sidecars(self) -> dict[str, Path]:
        """Every other file of the folder that belongs to the model, by relative name: config,
        tokenizer, templates, code, and whole folders of the later steps of a model of
        sentence-transformers. Weights in any format, indexes, adapters, the receipt, the model
        card, hidden files and links to folders are left out. A single file has those of its folder
        when that holds no other weights.

        Raises:
            UnreadableError: a link that leaves the folder, or a special file.
        """
        alone = self.path.is_dir() or is_alone(self.path)
        return sidecars(self.folder) if alone else {}


def locate(source: str | Path) -> Path:
    """The local path of a folder, file or Hub id (`hub.parse_name`).

    Raises:
        UnreadableError: nothing of that name here, in the Hub's cache, or (online) on the Hub.
    """
    if not str(source):
        raise UnreadableError("a model has an empty name", hint="Is a variable of a script unset?")
    path = Path(source)
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"is not a usable path: {reason}", where=source) from error
    name = parse_name(source) if isinstance(source, str) and not path.is_symlink() else None
    if name is None:
        raise UnreadableError(
            "there is no such file or folder", where=source,
            hint=meant(path, "Name a folder, a file of weights, or org/name on the Hub."),
        )  # fmt: skip
    return fetch(name, _holds_weights)


def _holds_weights(folder: Path) -> bool:
    """Whether a folder of the Hub's cache is more than the few files that others asked it for."""
    try:
        weight_files(folder)
    except (UnreadableError, UnsupportedError):
        return any(folder.glob("adapter_model*"))
    return True


def _gather(
    layout: Mapping[str, TensorFile], names: Mapping[str, list[str] | None], path: Path
) -> dict[str, TensorSpec]:
    owner = {tensor: name for name, listed in names.items() for tensor in listed or ()}
    tensors: dict[str, TensorSpec] = {}
    for name, file in layout.items():
        for wanted in names[name] or ():
            if wanted not in file.tensors:
                raise UnreadableError(
                    f"the index places {wanted!r} here, but the file does not hold it",
                    where=file.path,
                    hint="Shards of two versions? Download the model again.",
                )
        for tensor, spec in sorted(file.tensors.items(), key=lambda item: item[1].offset):
            if owner.get(tensor, name) != name:
                continue  # a second copy; the index says which one counts
            if tensor in tensors:
                raise UnreadableError(
                    f"the tensor {tensor!r} stands in two files, also in "
                    f"{tensors[tensor].file.name}",
                    where=file.path,
                )
            tensors[tensor] = spec
    if not tensors:
        raise UnreadableError("holds no tensors", where=path)
    for ending, writer in _OTHER_LORAS.items():
        if any(name.endswith(ending) for name in tensors):
            raise UnsupportedError(
                f"holds a LoRA as {writer} it, and no model or adapter of PEFT", where=path,
                hint="Load it with the library that it is for; what that can save as a PEFT "
                "adapter is read here.",
            )  # fmt: skip
    if all(name.startswith("base_model.model.") for name in tensors):
        raise UnsupportedError(
            "holds the whole state dict of a PEFT model, base and adapter in one, and no model",
            where=path,
            hint="Save the adapter with save_pretrained of the PEFT model; its base is the folder "
            "that was trained from.",
        )
    return tensors
