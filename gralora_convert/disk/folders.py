"""Which files of a folder hold the weights of a model, and which lie beside them."""

import os
import re
from pathlib import Path, PurePosixPath

from gralora_convert.disk.files import RECEIPT_NAME, open_regular, reading
from gralora_convert.disk.strictjson import load_json
from gralora_convert.errors import UnreadableError, UnsupportedError

MAX_FOLDERS = 32  # below one another, of the files beside the weights
_INDEX_SUFFIX = ".index.json"
# diffusers puts the variant of a sharded model into the name of its index (`.index.fp16.json`)
_INDEX = re.compile(r".*\.safetensors\.index(\.\w+)?\.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The folders that sentence-transformers names in modules.json: 1_Pooling, 2_Dense
STEP = re.compile(r"\d+_[A-Za-z]\w*")
SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})(?P<end>\.safetensors|\.bin)")
# What a training run leaves beside its model: logs, and the state of its ranks
_RUN_FOLDERS = ("runs", "wandb")
_RUN_FILE = re.compile(
    r".*\.distcp|random_states_\d+\.pkl|trainer_state\.json|events\.out\.tfevents\..*"
)
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
# Weights in other formats, or of other things: never copied beside the merged weights.
_FOREIGN = {
    ".h5": "HDF5", ".msgpack": "Flax", ".onnx": "ONNX", ".ot": "rust-bert", ".npz": "NumPy",
    ".tflite": "TensorFlow Lite",
}  # fmt: skip
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", *_FOREIGN} - {".npz"}
)


def is_alone(file: Path) -> bool:
    """Whether a file of weights is the only one of its folder, which then describes its model."""
    others = {entry.name for entry in listing(file.parent) if is_weights(entry.name)}
    return others == {file.name}


def is_weights(name: str) -> bool:
    return PurePosixPath(name).suffix in _WEIGHT_SUFFIXES and name not in _NO_WEIGHTS


def weight_files(folder: Path) -> tuple[dict[str, list[str] | None], str | None]:
    """The weight files of a folder with the tensors that its index lists in each (None: all)."""
    present = {entry.name for entry in listing(folder)}
    for name in _WEIGHTS:
        if name in present:
            return {name: None}, None
        if name + _INDEX_SUFFIX in present:
            return indexed(folder, name + _INDEX_SUFFIX), name + _INDEX_SUFFIX
    indexes = sorted(n for n in present if _INDEX.fullmatch(n))
    if len(indexes) == 1:
        return indexed(folder, indexes[0]), indexes[0]
    others = sorted(
        n for n in present if n.endswith(".safetensors") and not n.startswith("adapter_model")
    )
    if others:
        require_whole(folder, others)
        return {name: None for name in others}, None
    raise no_weights(folder, present)


def require_whole_model(path: Path) -> None:
    """Refuses a file whose name says that it is no model, or a part of one."""
    if path.suffix == ".gguf":
        raise written_as_gguf(path)
    if path.suffix in _FOREIGN:
        raise of_another_format(path, f"is {_FOREIGN[path.suffix]}, which is not read here")
    part = SHARD.fullmatch(path.name)
    if path.suffix == ".json" or (part and int(part["count"]) > 1):
        what = "is one shard of a model" if part else "is no file of weights"
        raise UnsupportedError(what, where=path, hint=f"Name its folder: {path.parent}")


def require_whole(folder: Path, names: list[str]) -> None:
    """Refuses shards without an index of which some are missing."""
    for name in names:
        if found := SHARD.fullmatch(name):
            every = [f"{found['stem']}-{i:05}-of-{found['count']}{found['end']}"
                     for i in range(1, int(found["count"]) + 1)]  # fmt: skip
            missing = [n for n in every if n not in names]
            if missing:
                raise UnreadableError(
                    f"{len(missing)} of {len(every)} shards are missing, first {missing[0]}",
                    where=folder,
                    hint="Download the model again, completely.",
                )


def no_weights(folder: Path, present: set[str]) -> UnreadableError | UnsupportedError:
    """What lies there instead, and what to do with it."""

    def named(*suffixes: str) -> list[str]:
        return sorted(name for name in present if name.endswith(suffixes))

    torch_files = [n for n in named(".bin", ".pt", ".pth", ".ckpt") if n not in _NO_WEIGHTS]
    if gguf := named(".gguf"):
        return written_as_gguf(folder / gguf[0])
    if "adapter_config.json" in present:
        what, hint = "is an adapter, a dense model was needed", "Name the folder of a whole model."
    elif len(torch_files) > 1 or (torch_files and SHARD.fullmatch(torch_files[0])):
        more = " and others" if torch_files[1:] else ""
        what = f"holds {torch_files[0]}{more}, without the index that makes such files one model"
        hint = "Download the model again, completely, or save it as safetensors first."
    elif torch_files:
        what = f"holds weights only as {torch_files[0]}, a name that transformers does not load"
        hint = f"If that is the whole model, name the file: {folder / torch_files[0]}"
    elif foreign := named(*_FOREIGN):
        return of_another_format(folder, f"holds weights only as {foreign[0]}")
    else:
        inner = [e.name for e in listing(folder) if e.is_dir() and holds_a_model(e)]
        wanted = "model.safetensors, shards with an index, or pytorch_model.bin"
        what = f"holds no weights; {wanted} is needed"
        hint = f"Its folder {inner[0]} holds some: name that?" if inner else ""
    return UnreadableError(what, where=folder, hint=hint)


def of_another_format(where: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        what,
        where=where,
        hint="Load it with the library that wrote it, and save it as safetensors first.",
    )


def written_as_gguf(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "is GGUF, which is not read here",
        where=path,
        hint="Use the original safetensors model; convert the merged result to GGUF afterwards.",
    )


def listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UnreadableError(f"cannot be listed: {error.strerror}", where=folder) from error


def indexed(folder: Path, index_name: str) -> dict[str, list[str] | None]:
    where = inside(folder, index_name)
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


def inside(folder: Path, name: str) -> Path:
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


def sidecars(folder: Path) -> dict[str, Path]:
    """The files beside the weights of `folder`, by relative name; see `Checkpoint.sidecars`."""
    found: dict[str, Path] = {}
    folders = [PurePosixPath()]
    with reading(folder):
        is_pipeline = (folder / "modules.json").is_file()
        while folders:
            below = folders.pop()
            for entry in listing(folder / below):
                name = below / entry.name
                is_step = is_pipeline and STEP.fullmatch(name.parts[0]) is not None
                if entry.name.startswith("."):
                    continue
                if (is_weights_or_ours(entry.name) or is_of_a_run(entry)) and not is_step:
                    continue
                if not entry.is_dir():
                    inside(folder, str(name))
                    open_regular(entry).close()
                    found[str(name)] = entry
                elif not entry.is_symlink() and (is_step or not holds_a_model(entry)):
                    if len(name.parts) > MAX_FOLDERS:
                        raise UnreadableError(
                            f"is more than {MAX_FOLDERS} folders deep in the model", where=entry
                        )
                    folders.append(name)
    return dict(sorted(found.items()))


def is_weights_or_ours(name: str) -> bool:
    is_index = name.endswith(_INDEX_SUFFIX) or _INDEX.fullmatch(name)
    ours = (RECEIPT_NAME, "README.md", "adapter_config.json")
    return bool(is_index) or name in ours or PurePosixPath(name).suffix in _WEIGHT_SUFFIXES


def is_of_a_run(entry: Path) -> bool:
    """Whether a training run left this: no part of its model, and often larger than it."""
    if entry.is_dir():
        return entry.name in _RUN_FOLDERS
    return _RUN_FILE.fullmatch(entry.name) is not None


def holds_a_model(folder: Path) -> bool:
    """A folder with weights of its own (a training checkpoint, an adapter) is no sidecar, nor one
    with the shards of a distributed checkpoint."""
    suffixes = {PurePosixPath(entry.name).suffix for entry in listing(folder)}
    return bool(suffixes & {*_WEIGHT_SUFFIXES, ".distcp"})
