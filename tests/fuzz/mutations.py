"""What strangers do to files: one folder of a model or an adapter, changed at random places.

Every change is drawn from a `random.Random`, so that a seed repeats it, and says what it did.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from gralora_convert.disk.tensors import encode_header

Mutation = Callable[[Random, Path], str]
Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data

# Names that hide, break out of a line, leave a folder or blow a parser up.
NAMES = (
    "", ".", "..", "../../etc/passwd", "/etc/passwd", "a/b", "\x00", "\n::error::x", "\x1b[31m\x07",
    "\u202egnp.exe", "\ud800", "a" * 5000, "x" * 1_000_000, "%0A%0D", "(a+)+$",
    "(((((.*)*)*)*)*)*b", "[", "*", "all-linear", "weight", "base_model.model.",
    "base_model.model.gralora_A", "lm_head",
    "model.layers.0.self_attn.q_proj", "q_proj", "default", "__metadata__", "GRALORA", "LORA",
)  # fmt: skip
# JSON texts of values, among them some that no Python value gives.
VALUES = (
    "null", "true", "false", "0", "-0", "-0.0", "-1", "1", "2", "3", "8", "7.5", "1e400", "-1e400",
    "1e308", "1e-320", "NaN", "Infinity", "9" * 40, "9" * 5000, "18446744073709551616",
    "9223372036854775807", "[]", "{}", '[""]', "[null]", "[[]]", "[0, 0]", '{"a": 1}',
    "[" * 90 + "]" * 90, "[" * 100_000 + "]" * 100_000, '{"a":' * 200 + "1" + "}" * 200,
    '["q_proj", "q_proj"]', json.dumps(["q_proj"] * 1000), '"keep"', '"float32"', '"all"',
    json.dumps({str(i): i for i in range(1000)}),
)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -1)


def mutate(random: Random, folder: Path, count: int) -> list[str]:
    """`count` changes of the files in `folder`; what they were."""
    return [random.choice(MUTATIONS)(random, folder) for _ in range(count)]


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size]


# bytes --------------------------------------------------------------------------------------------


def mutate_bytes(random: Random, folder: Path) -> str:
    path = _any(random, files(folder))
    if path is None:
        return "nothing"
    data = bytearray(_start(path))
    at = random.randrange(min(len(data), random.choice((16, 400, 1 << 20))))
    match random.randrange(5):
        case 0:
            data[at] ^= 1 << random.randrange(8)
        case 1:
            data[at:at] = random.randbytes(random.randrange(1, 9))
        case 2:
            del data[at : at + random.randrange(1, 40)]
        case 3:
            del data[at:]
        case _:
            data[at : at + 8] = random.choice(SIZES).to_bytes(17, "little", signed=True)[:8]
    path.write_bytes(data)
    return f"bytes of {path.name} at {at}"


# JSON ---------------------------------------------------------------------------------------------


def mutate_json(random: Random, folder: Path) -> str:
    paths = [path for path in files(folder) if path.suffix == ".json"]
    path = _any(random, [p for p in paths if path_is_read(p)] or paths)
    document = _document(path)
    if path is None or document is None:
        return "nothing"
    what = _edit_json(random, document)
    path.write_bytes(_json_bytes(document))
    return f"{path.name}: {what}"


def path_is_read(path: Path) -> bool:
    return path.name.startswith(("adapter_config", "config", "model"))


def _document(path: Path | None) -> dict[str, Any] | None:
    try:
        value = json.loads(_start(path)) if path else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value else None


def _edit_json(random: Random, document: dict[str, Any]) -> str:
    """Changes one value, or one key, somewhere in the document."""
    holder: Any = document
    key: Any = random.choice(list(document))
    while isinstance(holder[key], (dict, list)) and holder[key] and random.random() < 0.7:
        holder = holder[key]
        key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    value = holder[key]
    match random.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
            return f"without {key!r}"
        case 1 if isinstance(holder, dict):
            name = random.choice(NAMES)
            holder[name] = holder.pop(key)
            return f"{key!r} is called {name[:40]!r}"
        case 2:
            holder[key] = random.choice(NAMES)
        case 3 if type(value) is int:
            holder[key] = random.choice((value + 1, value - 1, 2 * value, -value, value / 2))
        case 4 if isinstance(value, list) and value:
            holder[key] = value[:-1] if random.random() < 0.5 else value + value[:1]
        case _:
            holder[key] = _Raw(random.choice(VALUES))
    return f"{key!r:.60} is {holder[key]!r:.60}"


class _Raw(str):
    """JSON text that stands for itself."""


def _json_bytes(document: object) -> bytes:
    raws: list[str] = []

    def marked(value: object) -> object:
        match value:
            case _Raw():
                raws.append(str(value))
                return f"@raw{len(raws) - 1}@"
            case dict():
                return {key: marked(inner) for key, inner in value.items()}
            case list():
                return [marked(inner) for inner in value]
        return value

    text = json.dumps(marked(document))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode()


# safetensors --------------------------------------------------------------------------------------


def mutate_header(random: Random, folder: Path) -> str:
    """The header alone: it then disagrees with the data, or with itself."""
    path = _any(random, [path for path in files(folder) if path.suffix == ".safetensors"])
    if path is None or (held := _split(path)) is None:
        return "nothing"
    header, data = held
    what = _edit_json(random, header)
    text = _json_bytes(header)
    length = len(text) if random.random() < 0.9 else random.choice(SIZES) % 2**64
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return f"header of {path.name}: {what}"


def mutate_tensors(random: Random, folder: Path) -> str:
    """A well-formed file of other tensors."""
    path = _any(random, [path for path in files(folder) if path.suffix == ".safetensors"])
    tensors = _tensors(path)
    if path is None or not tensors:
        return "nothing"
    at = random.randrange(len(tensors))
    tensors[at : at + 1] = list(_edited(random, tensors[at], random.choice(tensors)))
    held = {tensor[0]: tensor for tensor in tensors}  # names are unique
    entries = [(name, dtype, shape, len(data)) for name, dtype, shape, data in held.values()]
    try:
        header = encode_header(entries, {"format": "pt"} if random.random() < 0.9 else {})
    except (UnicodeEncodeError, AssertionError):
        return "nothing"
    path.write_bytes(header + b"".join(tensor[3] for tensor in held.values()))
    return f"tensors of {path.name} at {at}"


def _edited(random: Random, tensor: Tensor, other: Tensor) -> Sequence[Tensor]:
    """What stands in the place of `tensor`."""
    name, dtype, shape, data = tensor
    match random.randrange(10):
        case 0:
            return []
        case 1:
            return [(random.choice(NAMES), dtype, shape, data)]
        case 2:
            return [(_other_word(random, name), dtype, shape, data)]
        case 3:
            return [(name, dtype, shape[::-1], data)]
        case 4:
            return [(name, *other[1:])]
        case 5:
            return [(name, dtype, (*shape, 1) if random.random() < 0.5 else (1, *shape), data)]
        case 6:
            return [tensor, (_other_word(random, name), dtype, shape, data)]
        case 7:
            return [(name, dtype, (0, *shape[1:]), b"")]
        case 8:
            value = random.choice((b"\x00", b"\xff", b"\x7f", b"\x01"))
            return [(name, dtype, shape, value * len(data))]
    bits = {"F32": 32, "BF16": 16}.get(dtype, 32)
    found = [d for d, b in (("I32", 32), ("F16", 16), ("BF16", 16), ("I16", 16)) if b == bits]
    return [(name, random.choice(found or [dtype]), shape, data)]


def _other_word(random: Random, name: str) -> str:
    words = name.split(".")
    words[random.randrange(len(words))] = random.choice(
        ("0", "1", "7", "module", "_orig_mod", "gralora_A", "gralora_B", "lora_A", "weight", "bias",
         "default", "q_proj", "base_layer", "modules_to_save", "lm_head", "model", "", "é")
    )  # fmt: skip
    return ".".join(words)


def _split(path: Path) -> tuple[dict[str, Any], bytes] | None:
    raw = _start(path)
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError, OverflowError, MemoryError):
        return None
    return (header, raw[8 + length :]) if isinstance(header, dict) and header else None


def _tensors(path: Path | None) -> list[Tensor]:
    held = _split(path) if path else None
    if held is None:
        return []
    header, data = held
    header.pop("__metadata__", None)
    try:
        return [
            (name, e["dtype"], tuple(e["shape"]), data[e["data_offsets"][0] : e["data_offsets"][1]])
            for name, e in header.items()
        ]
    except (KeyError, TypeError, IndexError):
        return []


# pickles ------------------------------------------------------------------------------------------


class Touches:
    """A pickle that would leave a file behind if it were run."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (os.mkdir, ("executed",))


def mutate_into_pickle(random: Random, folder: Path) -> str:
    """The weights as `torch.save` writes them, in one of its forms."""
    path = _any(random, [path for path in files(folder) if path.suffix == ".safetensors"])
    held = [t for t in _tensors(path) if t[1] in ("F32", "BF16")]
    if path is None or not held:
        return "nothing"
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors: dict[Any, Any] = {}
    for name, dtype, shape, data in held:
        try:
            tensors[name] = torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape)
        except (RuntimeError, ValueError, TypeError):
            return "nothing"
    first = next(iter(tensors))
    form = random.randrange(7)
    match form:
        case 0:
            tensors = {"state_dict": tensors}
        case 1:
            tensors[first] = torch.nn.Parameter(tensors[first])
        case 2:
            tensors[first] = tensors[first].T.contiguous().T if tensors[first].ndim == 2 else 1
        case 3:
            tensors[first] = tensors[first].flatten()[:1].expand(10, 10)
        case 4:
            tensors[random.choice(NAMES[:-1]) or 1] = Touches()
    name = path.name.replace("model.safetensors", "model.bin")
    torch.save(tensors, folder / (name if "adapter" in name else "pytorch_model.bin"))
    path.unlink()
    return f"{path.name} as a pickle, form {form}"


# files --------------------------------------------------------------------------------------------


def mutate_files(random: Random, folder: Path) -> str:
    """One entry of the folder becomes something else."""
    path = _any(random, files(folder))
    if path is None:
        return "nothing"
    kind = random.randrange(10)
    data = _start(path)
    path.unlink()
    match kind:
        case 0:
            path.write_bytes(b"")
        case 1:
            path.mkdir()
        case 2:
            os.mkfifo(path)
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/etc/passwd", "/", "..")))
        case 5:
            with path.open("wb") as file:
                file.write(data)
                file.truncate(random.choice((1 << 20, 1 << 40)))
        case 6:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        case 7:
            (folder / "sub").mkdir(exist_ok=True)
            (folder / "sub" / path.name).write_bytes(data)
        case 8:
            others = [other for other in files(folder) if other != path]
            shutil.copy(_any(random, others) or "/etc/hostname", path)
        case _:
            pass
    return f"{path.name}: another kind of file ({kind})"


def add_file(random: Random, folder: Path) -> str:
    """A file that the tool reads if it is there, with anything in it."""
    name = random.choice(
        ("gralora_convert.json", "generation_config.json", "config.json", "tokenizer.json",
         "model.safetensors.index.json", "adapter_config.json", "adapter_model.bin",
         "pytorch_model.bin", "chat_template.jinja", "extra.safetensors")
    )  # fmt: skip
    key = random.choice(("inputs", "merged_adapters", "outputs", "weight_map", "model_type"))
    text = random.choice((*VALUES, "", "{", f'{{"{key}": {random.choice(VALUES)}}}'))
    path = folder / name
    if path.exists() or path.is_symlink():
        return "nothing"
    path.write_text(text)
    return f"new {name}: {text[:60]}"


def _start(path: Path) -> bytes:
    """All of a file of the fixtures; the start of one that was made huge."""
    with path.open("rb") as file:
        return file.read(1 << 20)


def _any(random: Random, paths: Sequence[Path]) -> Path | None:
    return random.choice(paths) if paths else None


MUTATIONS: Sequence[Mutation] = (
    mutate_bytes, mutate_bytes, mutate_json, mutate_json, mutate_json, mutate_header, mutate_header,
    mutate_tensors, mutate_tensors, mutate_tensors, mutate_into_pickle, mutate_files, add_file,
)  # fmt: skip
