"""One parser at a time: bytes in, a value or a refusal out; nothing else may happen.

Under atheris (`python -m tests.fuzz parser NAME`) the inputs follow the branches that they reach;
in the tests they are the seeds, changed at random.
"""

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, deserialize

from gralora_convert.adapters.config import GraloraConfig, LoraConfig, parse_config
from gralora_convert.adapters.keys import PREFIX, key_of, parse_key
from gralora_convert.disk.checkpoint import Checkpoint
from gralora_convert.disk.files import RECEIPT_NAME
from gralora_convert.disk.pickles import read_pickle
from gralora_convert.disk.specs import TensorFileError
from gralora_convert.disk.strictjson import parse_json
from gralora_convert.disk.tensors import encode_header, read_bytes, read_safetensors
from gralora_convert.disk.unpickling import unpickle
from gralora_convert.errors import ConvertError
from gralora_convert.output.receipt import checkpoint_receipt_findings

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
LLAMA = FIXTURES / "peft-0.21.2/llama-hybrid"
SHARDED = FIXTURES / "bases/llama-sharded"


def header(data: bytes) -> None:
    """What is accepted, the official reader accepts too, with the same tensors."""
    path = _file("model.safetensors", data)
    try:
        found = read_safetensors(path).tensors
    except ConvertError as refusal:
        _require_line(refusal)
        return
    try:
        official = dict(deserialize(data))  # type: ignore[no-untyped-call]
    except SafetensorError as problem:
        if "F4" in str(found) or "F6" in str(found):  # older readers do not have them
            return
        raise AssertionError(f"accepted, but: {problem}") from problem
    assert official.keys() == found.keys()
    for name, spec in found.items():
        assert list(spec.shape) == official[name]["shape"]
        assert bytes(read_bytes(spec)) == bytes(official[name]["data"])


def index(data: bytes) -> None:
    """An index opens as it is, or is refused; no file outside the folder is opened."""
    folder = _file("sharded/model.safetensors.index.json", data).parent
    if not (folder / "model-00001-of-00003.safetensors").exists():
        for path in SHARDED.glob("*.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    try:
        opened = Checkpoint.open(folder)
    except ConvertError as refusal:
        _require_line(refusal)
        return
    assert all(file.path.parent == folder for file in opened.layout.values())


def config(data: bytes) -> None:
    """Findings, or a config that survives being written and read again."""
    try:
        values = parse_json(data, where="adapter_config.json")
    except ConvertError as refusal:
        _require_line(refusal)
        return
    found = parse_config(values, "adapter_config.json")
    for finding in found.findings:
        assert str(finding).isprintable()
    if found.config is not None:
        cls = GraloraConfig if isinstance(found.config, GraloraConfig) else LoraConfig
        assert cls.from_dict(json.loads(found.config.to_json())) == found.config


def key(data: bytes) -> None:
    """Every text is some key; a factor's key is spelled back as it was."""
    text = data.decode(errors="replace")
    found = parse_key(text)
    if found.method and found.prefixed and not found.wrappers and found.adapter_name is None:
        spelled = key_of(found.name, found.role, found.method)
        assert spelled == text or "magnitude" in text
        assert parse_key(spelled).name == found.name
    assert found.key == text
    assert found.prefixed == text.startswith(PREFIX) or found.wrappers


def pickle(data: bytes) -> None:
    """The machine alone, on the bytes of `data.pkl`."""
    with contextlib.suppress(TensorFileError):
        unpickle(data, where="")


def archive(data: bytes) -> None:
    """A whole file of `torch.save`."""
    try:
        found = read_pickle(_file("model.bin", data)).tensors
    except ConvertError as refusal:
        _require_line(refusal)
        return
    for spec in found.values():
        if spec.nbytes <= 1 << 20:
            assert len(read_bytes(spec)) == spec.nbytes


def receipt(data: bytes) -> None:
    """Findings about the files of a folder, whatever its receipt says."""
    path = _file(f"merged/{RECEIPT_NAME}", data)
    weights = path.parent / "model.safetensors"
    if not weights.exists():
        weights.write_bytes((FIXTURES / "bases/llama/model.safetensors").read_bytes())
    for finding in checkpoint_receipt_findings(path.parent, None):
        assert str(finding).isprintable()


PARSERS: Mapping[str, Callable[[bytes], None]] = {
    "header": header, "index": index, "config": config, "key": key, "pickle": pickle,
    "archive": archive, "receipt": receipt,
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Small right inputs of a parser, from what other programs wrote."""
    match name:
        case "header":
            tensors = [("a", "F32", (2, 2), 16), ("b", "BF16", (0,), 0), ("c", "U8", (3,), 3)]
            small = encode_header(tensors, {"format": "pt"}) + bytes(range(19))
            return [small, (LLAMA / "adapter_model.safetensors").read_bytes()]
        case "index":
            return [(SHARDED / "model.safetensors.index.json").read_bytes()]
        case "config":
            return [p.read_bytes() for p in sorted(FIXTURES.glob("peft-*/*/adapter_config.json"))]
        case "key":
            keys = read_safetensors(LLAMA / "adapter_model.safetensors").tensors
            return [name.encode() for name in keys]
        case "pickle":
            with zipfile.ZipFile(_pickled()) as file:
                return [file.read(n) for n in file.namelist() if n.endswith("data.pkl")]
        case "archive":
            return [_pickled().read_bytes()]
    stated = {"a": {"bytes": 1, "sha256": "0"}, "model.safetensors": {"bytes": 2, "sha256": ""}}
    rows = [{"tensor": "lm_head.weight"}]
    inputs = {"base": {"source": "x", "headers_sha256": "0"}}
    return [json.dumps({"inputs": inputs, "modules": rows, "outputs": stated}).encode()]


def _pickled() -> Path:
    return FIXTURES / "peft-0.21.2/llama-pickle/adapter_model.bin"


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []  # one folder, gone when the process ends


def _file(name: str, data: bytes) -> Path:
    """A file of these bytes, in memory if possible."""
    if not _SCRATCH:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        _SCRATCH.append(tempfile.TemporaryDirectory(dir=memory))
    path = Path(_SCRATCH[0].name) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def _require_line(refusal: ConvertError) -> None:
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 5000
