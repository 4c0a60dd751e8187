"""Which tensor comes into which file of a dense checkpoint."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from gralora_convert.disk import Checkpoint
from gralora_convert.errors import MisuseError
from gralora_convert.output.parts import OutputFile, Part

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


def lay_out(
    base: Checkpoint, parts: Mapping[str, list[Part]], shard_size: str
) -> tuple[OutputFile, ...]:
    """The files of the output: the base's own, or shards of at most `shard_size`."""
    own = base.is_of_diffusers  # its loaders ask for a variant (`.fp16`) by name
    if shard_size == "keep" and len(parts) == 1 and base.config and not own:  # a variant, too
        [(name, held)] = parts.items()
        return (OutputFile("model.safetensors", tuple(held), _metadata(base, name)),)
    if shard_size == "keep":
        return tuple(
            OutputFile(_safetensors_name(name), tuple(held), _metadata(base, name))
            for name, held in parts.items()
        )
    shards = list(_shards((p for held in parts.values() for p in held), _parse_size(shard_size)))
    if len(shards) == 1:
        return (OutputFile(f"{_stem(base)}.safetensors", tuple(shards[0])),)
    return tuple(
        OutputFile(f"{_stem(base)}-{i:05d}-of-{len(shards):05d}.safetensors", tuple(shard))
        for i, shard in enumerate(shards, 1)
    )


def _stem(base: Checkpoint) -> str:
    return "diffusion_pytorch_model" if base.is_of_diffusers else "model"


def index_name(base: Checkpoint, shard_size: str) -> str:
    """The name under which loaders look for the index of the output."""
    if shard_size == "keep" and base.is_of_diffusers and base.index_name is not None:
        return base.index_name
    return f"{_stem(base)}.safetensors.index.json"


def _shards(parts: Iterable[Part], limit: int) -> Iterator[list[Part]]:
    """Parts in order, in shards of at most `limit` bytes; a larger part is a shard of its own
    (huggingface_hub 2.4, serialization/_base.py, split_state_dict_into_shards_factory)."""
    shard: list[Part] = []
    size = 0
    for part in parts:
        if part.nbytes > limit:
            yield [part]
            continue
        if size + part.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    if shard:
        yield shard


def _parse_size(text: str) -> int:
    found = _SIZE.fullmatch(str(text).strip())
    if not found:
        raise MisuseError(f"`shard_size={text!r}` is neither keep nor a size such as 5GB or 500MB")
    number, unit, binary = found.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    if size < 1:
        raise MisuseError(f"`shard_size={text!r}` is less than a byte")
    return int(size)


def _safetensors_name(name: str) -> str:
    """A `.bin` base becomes safetensors under the names that transformers looks for."""
    path = PurePosixPath(name)
    if path.suffix == ".safetensors":
        return name
    stem = re.sub(r"^pytorch_model", "model", path.stem)
    return str(path.with_name(f"{stem}.safetensors"))


def _metadata(base: Checkpoint, name: str) -> Mapping[str, str]:
    return {**(base.layout[name].metadata or {}), "format": "pt"}


def index_json(files: Sequence[OutputFile]) -> bytes:
    """`model.safetensors.index.json` as transformers 5.23 writes it (modeling_utils.py,
    `save_pretrained`)."""
    parts = [(part, file.name) for file in files for part in file.parts]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(part.shape) for part, _ in parts),
            "total_size": sum(part.nbytes for part, _ in parts),
        },
        "weight_map": {part.name: name for part, name in parts},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
