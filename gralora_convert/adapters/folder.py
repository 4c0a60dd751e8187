"""The folder that an adapter is in, wherever it is, and the weights file in it."""

import os
import re
from pathlib import Path

from gralora_convert.adapters.config import CONFIG_NAME
from gralora_convert.disk import (
    Checkpoint,
    TensorFile,
    fetch,
    is_file,
    is_folder,
    meant,
    parse_name,
    read_tensor_file,
)
from gralora_convert.errors import Finding, UnreadableError, error, note, warning

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SHARDED = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model.*\.index\.json")
_FOREIGN = (".gguf", ".npz", "adapters.safetensors", "pytorch_adapter.bin", "adapter.safetensors")
_REASONS = {
    "lfs-pointer": "weights-lfs-pointer",
    "unsafe-pickle": "weights-unsafe-pickle",
    "nested": "weights-nested",
}


def folder_of(source: str | Path) -> Path:
    """The folder that `source` names: by itself, by one of the adapter's two files, on the Hub."""
    if not str(source):
        raise UnreadableError(
            "an adapter has an empty name", hint="Is a variable of a script unset?"
        )
    path = Path(source)
    if path.name in (CONFIG_NAME, *WEIGHTS) and is_file(path):
        return path.parent
    if is_folder(path):
        return path
    if isinstance(source, str) and not os.path.lexists(path):
        name = parse_name(source)
        if name is not None:
            return fetch(name, _is_adapter)
    if is_file(path) and path.suffix in (".safetensors", ".bin", ".gguf"):
        Checkpoint.open(path)  # refuses by name what is another tool's
    content = f"It holds {CONFIG_NAME} and {WEIGHTS[0]}."
    raise UnreadableError(
        "is not a folder; the folder of an adapter was needed", where=path,
        hint=content if os.path.lexists(path) else meant(path, content),
    )  # fmt: skip


def _is_adapter(folder: Path) -> bool:
    """Whether a folder of the Hub's cache holds both files of an adapter."""
    return (folder / CONFIG_NAME).exists() and any((folder / name).exists() for name in WEIGHTS)


def _what_is_there(folder: Path) -> str:
    """What another program left in the place of the adapter's tensors, and how to get at them."""
    names = {entry.name for entry in folder.iterdir()}
    if any(name.startswith("pytorch_model_fsdp") for name in names):  # accelerate 1.11, fsdp_utils
        return (
            "It holds what accelerate saves of FSDP: gather that in the run with "
            "accelerator.get_state_dict(model), and give it to model.save_pretrained."
        )
    if names & {"model.safetensors", "pytorch_model.bin"}:
        return "It holds a whole model: save the adapter alone, by save_pretrained."
    foreign = sorted(n for n in names if n.endswith(_FOREIGN))
    if foreign:
        return (
            f"{foreign[0]} is of another program; PEFT's own save_pretrained writes what is read."
        )
    return "Is the save complete?"


def read_weights(folder: Path, findings: list[Finding]) -> TensorFile | None:
    """The header of the weights file; None, and a finding, where none can be read."""
    present = [name for name in WEIGHTS if (folder / name).exists()]
    if not present:
        shards = sorted(entry.name for entry in folder.iterdir() if _SHARDED.fullmatch(entry.name))
        if shards:
            findings.append(error(
                "weights-sharded", folder / shards[0], "PEFT does not read sharded adapters",
                f"Save all tensors in one {WEIGHTS[0]}.",
            ))  # fmt: skip
        else:
            findings.append(error(
                "weights-missing", folder, f"{WEIGHTS[0]} is missing", _what_is_there(folder)
            ))  # fmt: skip
        return None
    if len(present) > 1:
        both = " and ".join(present)
        findings.append(warning(
            "weights-ambiguous", folder, f"holds {both}; PEFT reads the first", "Remove the other."
        ))  # fmt: skip
    path = folder / present[0]
    try:
        file = read_tensor_file(path)
    except UnreadableError as problem:
        code = _REASONS.get(problem.reason, "weights-unreadable")
        findings.append(error(code, path.name, problem.message, problem.hint))
        return None
    if file.pickled:
        findings.append(
            note("weights-pickle", path.name, "is a pickle; safetensors is read by every tool")
        )
    elif file.metadata is None:
        findings.append(note("metadata-missing", path.name, "has no __metadata__"))
    elif file.metadata.get("format") != "pt":
        found = file.metadata.get("format")
        findings.append(
            note("metadata-format", path.name, f"says format {found!r}, PEFT writes 'pt'")
        )
    if not file.tensors:
        findings.append(error("weights-empty", path.name, "holds no tensors"))
        return None
    return file
