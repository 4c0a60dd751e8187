"""A dense model on disk, lazily: its tensors by name, its files, its configuration. Headers only.

Which files hold the weights is decided as transformers 5.23 does (modeling_utils.py,
`_get_resolved_checkpoint_files`): one safetensors file, its shards, one `.bin` file, its shards;
folders that transformers did not write may hold safetensors files under other names.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from gralora_convert.errors import UnreadableError, UnsupportedError
from gralora_convert.files import open_regular, reading
from gralora_convert.hub import fetch, parse_name
from gralora_convert.specs import DTYPE_BITS, TensorFile, TensorFileError, TensorSpec
from gralora_convert.strictjson import JsonError, load_json, parse_json
from gralora_convert.tensors import read_array, read_bytes, read_tensor_file, read_torch

__all__ = [
    "DTYPE_BITS",
    "RECEIPT_NAME",
    "Checkpoint",
    "JsonError",
    "TensorFile",
    "TensorFileError",
    "TensorSpec",
    "load_json",
    "locate",
    "open_regular",
    "parse_json",
    "read_array",
    "read_bytes",
    "read_tensor_file",
    "read_torch",
]

RECEIPT_NAME = "gralora_convert.json"
MAX_FOLDERS = 32  # below one another, of the files beside the weights
_INDEX_SUFFIX = ".index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The folders that sentence-transformers names in modules.json: 1_Pooling, 2_Dense
_STEP = re.compile(r"\d+_[A-Za-z]\w*")
_SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})(?P<end>\.safetensors|\.bin)")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
# Weights in other formats, or of other things: never copied beside the merged weights.
_FOREIGN = {
    ".h5": "HDF5", ".msgpack": "Flax", ".onnx": "ONNX", ".ot": "rust-bert", ".npz": "NumPy",
    ".tflite": "TensorFlow Lite",
}  # fmt: skip
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", *_FOREIGN} - {".npz"}
)


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
    def open(cls, source: str | Path) -> "Checkpoint":
        """The checkpoint at `source`: a folder, a tensor file, or a Hub id (cache first).

        Raises:
            UnreadableError: nothing there, a damaged file, an index that disagrees with its shards
                or leaves its folder.
            UnsupportedError: weights in a format that is not read here (GGUF, TensorFlow, Flax).

        >>> Checkpoint.open("fixtures/bases/llama").config["model_type"]  # doctest: +SKIP
        'llama'
        """
        path = locate(source)
        names: Mapping[str, list[str] | None]
        if path.is_dir():
            folder = path
            names, index_name = _weight_files(path)
            layout = {name: read_tensor_file(_inside(folder, name)) for name in names}
        else:
            folder = path.parent
            names, index_name = {path.name: None}, None
            _require_whole_model(path)
            layout = {path.name: read_tensor_file(path)}
        config = {}
        if os.path.lexists(folder / "config.json"):
            config = load_json(_inside(folder, "config.json"), allow_non_finite=True)
        return cls(path, str(source), layout, _gather(layout, names, path), config, index_name)

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def other_weights(self) -> list[str]:
        """Files of weights beside those that are read: other formats, variants, leftovers."""
        if not self.path.is_dir():
            return []
        names = {entry.name for entry in _listing(self.path)} - self.layout.keys()
        return sorted(n for n in names if _is_weights(n) and not n.startswith("adapter_"))

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architectures(self) -> tuple[str, ...]:
        value = self.config.get("architectures")
        return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def receipt(self) -> Mapping[str, object] | None:
        """What this tool wrote beside a checkpoint that it made, or None."""
        if not self.path.is_dir() or not os.path.lexists(self.path / RECEIPT_NAME):
            return None
        return load_json(_inside(self.path, RECEIPT_NAME))

    def digest(self) -> str:
        """A digest of all names, dtypes and shapes, and of the configuration: the same for copies
        of a model in any layout of files."""
        names = sorted((n, s.dtype, s.shape) for n, s in self.tensors.items())
        text = json.dumps([names, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def file_of(self, name: str) -> str:
        """The weight file, relative to the folder, that holds the tensor `name`."""
        file = self.tensors[name].file
        return next(entry for entry, held in self.layout.items() if held.path == file)

    def sidecars(self) -> dict[str, Path]:
        """Every other file of the folder that belongs to the model, by relative name: config,
        tokenizer, templates, code, and whole folders of the later steps of a model of
        sentence-transformers. Weights in any format, indexes, adapters, the receipt, the model
        card, hidden files and links to folders are left out. A single file has those of its folder
        when that holds no other weights.

        Raises:
            UnreadableError: a link that leaves the folder, or a special file.
        """
        alone = self.path.is_dir() or _is_alone(self.path)
        return sidecars(self.folder) if alone else {}


def _is_alone(file: Path) -> bool:
    """Whether a file of weights is the only one of its folder, which then describes its model."""
    others = {entry.name for entry in _listing(file.parent) if _is_weights(entry.name)}
    return others == {file.name}


def _is_weights(name: str) -> bool:
    return PurePosixPath(name).suffix in _WEIGHT_SUFFIXES and name not in _NO_WEIGHTS


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
            hint="Name a folder, a file of weights, or org/name on the Hub.",
        )  # fmt: skip
    return fetch(name, _holds_weights)


def _holds_weights(folder: Path) -> bool:
    """Whether a folder of the Hub's cache is more than the few files that others asked it for."""
    try:
        _weight_files(folder)
    except (UnreadableError, UnsupportedError):
        return any(folder.glob("adapter_model*"))
    return True


def _weight_files(folder: Path) -> tuple[dict[str, list[str] | None], str | None]:
    """The weight files of a folder with the tensors that its index lists in each (None: all)."""
    present = {entry.name for entry in _listing(folder)}
    for name in _WEIGHTS:
        if name in present:
            return {name: None}, None
        if name + _INDEX_SUFFIX in present:
            return _indexed(folder, name + _INDEX_SUFFIX), name + _INDEX_SUFFIX
    indexes = sorted(n for n in present if n.endswith(".safetensors" + _INDEX_SUFFIX))
    if len(indexes) == 1:
        return _indexed(folder, indexes[0]), indexes[0]
    others = sorted(
        n for n in present if n.endswith(".safetensors") and not n.startswith("adapter_model")
    )
    if others:
        _require_whole(folder, others)
        return {name: None for name in others}, None
    raise _no_weights(folder, present)


def _require_whole_model(path: Path) -> None:
    """Refuses a file whose name says that it is no model, or a part of one."""
    if path.suffix == ".gguf":
        raise _gguf(path)
    if path.suffix in _FOREIGN:
        raise _foreign(path, f"is {_FOREIGN[path.suffix]}, which is not read here")
    part = _SHARD.fullmatch(path.name)
    if path.suffix == ".json" or (part and int(part["count"]) > 1):
        what = "is one shard of a model" if part else "is no file of weights"
        raise UnsupportedError(what, where=path, hint=f"Name its folder: {path.parent}")


def _require_whole(folder: Path, names: list[str]) -> None:
    """Refuses shards without an index of which some are missing."""
    for name in names:
        found = _SHARD.fullmatch(name)
        if found:
            every = [f"{found['stem']}-{i:05}-of-{found['count']}{found['end']}"
                     for i in range(1, int(found["count"]) + 1)]  # fmt: skip
            missing = [n for n in every if n not in names]
            if missing:
                raise UnreadableError(
                    f"{len(missing)} of {len(every)} shards are missing, first {missing[0]}",
                    where=folder,
                    hint="Download the model again, completely.",
                )


def _no_weights(folder: Path, present: set[str]) -> UnreadableError | UnsupportedError:
    """What lies there instead, and what to do with it."""

    def named(*suffixes: str) -> list[str]:
        return sorted(name for name in present if name.endswith(suffixes))

    if gguf := named(".gguf"):
        return _gguf(folder / gguf[0])
    if "adapter_config.json" in present:
        return UnreadableError(
            "is an adapter, a dense model was needed",
            where=folder,
            hint="Name the folder of a whole model.",
        )
    torch_files = [n for n in named(".bin", ".pt", ".pth", ".ckpt") if n not in _NO_WEIGHTS]
    if len(torch_files) > 1 or (torch_files and _SHARD.fullmatch(torch_files[0])):
        return UnreadableError(
            f"holds {torch_files[0]}{' and others' if torch_files[1:] else ''}, without the index "
            "that makes such files one model",
            where=folder,
            hint="Download the model again, completely, or save it as safetensors first.",
        )
    if torch_files:
        return UnreadableError(
            f"holds weights only as {torch_files[0]}, a name that transformers does not load",
            where=folder,
            hint=f"If that is the whole model, name the file: {folder / torch_files[0]}",
        )
    if foreign := named(*_FOREIGN):
        return _foreign(folder, f"holds weights only as {foreign[0]}")
    inner = [e.name for e in _listing(folder) if e.is_dir() and _holds_a_model(e)]
    return UnreadableError(
        "holds no weights; model.safetensors, shards with an index, or pytorch_model.bin is needed",
        where=folder,
        hint=f"Its folder {inner[0]} holds some: name that?" if inner else "",
    )


def _foreign(where: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        what,
        where=where,
        hint="Load it with the library that wrote it, and save it as safetensors first.",
    )


def _gguf(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "is GGUF, which is not read here",
        where=path,
        hint="Use the original safetensors model; convert the merged result to GGUF afterwards.",
    )


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UnreadableError(f"cannot be listed: {error.strerror}", where=folder) from error


def _indexed(folder: Path, index_name: str) -> dict[str, list[str] | None]:
    where = _inside(folder, index_name)
    weight_map = load_json(where, allow_non_finite=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableError("has no weight_map from tensor names to files", where=where)
    files: dict[str, list[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_relative(name):
            raise UnreadableError(
                f"maps {tensor!r} to {name!r}, which is not a file of this folder", where=where
            )
        listed = files.setdefault(name, [])
        assert listed is not None
        listed.append(tensor)
    missing = [name for name in sorted(files) if not os.path.exists(folder / name)]  # noqa: PTH110
    if missing:
        raise UnreadableError(
            f"{len(missing)} of the {len(files)} shards that the index names are missing, "
            f"first {missing[0]}",
            where=where,
            hint="Download the model again, completely.",
        )
    return dict(sorted(files.items()))


def _is_plain_relative(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        name == str(path)  # one file has one name
        and not path.is_absolute()
        and not any(part.startswith(".") for part in path.parts)
        and name.isprintable()
        and path.suffix in (".safetensors", ".bin")
    )


def _inside(folder: Path, name: str) -> Path:
    """`folder/name`, if it stays in the folder when links are followed.

    The Hub's cache links snapshots/<revision>/<file> to the blobs beside it: that is inside, too.
    """
    path = folder / name
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots"]
    if any(real.is_relative_to(allowed) for allowed in (root, *blobs)):
        return path
    raise UnreadableError(
        f"is a link that leaves its folder (to {real})",
        where=path,
        hint="Put the file itself into the folder, or name the folder that it lies in.",
    )


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
    return tensors


def sidecars(folder: Path) -> dict[str, Path]:
    """The files beside the weights of `folder`, by relative name; see `Checkpoint.sidecars`."""
    found: dict[str, Path] = {}
    folders = [PurePosixPath()]
    with reading(folder):
        is_pipeline = (folder / "modules.json").is_file()
        while folders:
            below = folders.pop()
            for entry in _listing(folder / below):
                name = below / entry.name
                is_step = is_pipeline and _STEP.fullmatch(name.parts[0]) is not None
                if entry.name.startswith("."):
                    continue
                if _is_weights_or_ours(entry.name) and not is_step:
                    continue
                if not entry.is_dir():
                    _inside(folder, str(name))
                    open_regular(entry).close()
                    found[str(name)] = entry
                elif not entry.is_symlink() and (is_step or not _holds_a_model(entry)):
                    if len(name.parts) > MAX_FOLDERS:
                        raise UnreadableError(
                            f"is more than {MAX_FOLDERS} folders deep in the model", where=entry
                        )
                    folders.append(name)
    return dict(sorted(found.items()))


def _is_weights_or_ours(name: str) -> bool:
    if name.endswith(_INDEX_SUFFIX) or name in (RECEIPT_NAME, "README.md", "adapter_config.json"):
        return True
    return PurePosixPath(name).suffix in _WEIGHT_SUFFIXES or name == "training_args.bin"


def _holds_a_model(folder: Path) -> bool:
    """A folder with weights of its own (a training checkpoint, an adapter) is no sidecar."""
    return any(PurePosixPath(entry.name).suffix in _WEIGHT_SUFFIXES for entry in _listing(folder))
