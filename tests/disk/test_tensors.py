"""Safetensors files: the official reader is the reference, for what is accepted and refused."""

import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file

from gralora_convert.disk.numbers import is_zero, same_values
from gralora_convert.disk.specs import DTYPE_BITS, DTYPE_OF_TORCH
from gralora_convert.disk.tensors import (
    encode_header,
    read_bytes,
    read_into,
    read_safetensors,
    read_tensor_file,
    read_torch,
    torch_dtype,
)
from gralora_convert.errors import (
    ChangedInputError,
    ConvertError,
    UnreadableError,
    UnsupportedError,
)

Found = dict[str, tuple[str, tuple[int, ...], bytes]]


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def official(content: bytes) -> Found | None:
    """What the official reader finds, or None when it refuses."""
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {n: (i["dtype"], tuple(i["shape"]), bytes(i["data"])) for n, i in found}


def ours(path: Path) -> Found | ConvertError:
    try:
        specs = read_safetensors(path).tensors
        return {n: (s.dtype, s.shape, bytes(read_bytes(s))) for n, s in specs.items()}
    except ConvertError as error:
        return error


def refusal(folder: Path, content: bytes) -> ConvertError:
    """The refusal of a file that the official reader refuses, too; its message is one line."""
    assert official(content) is None
    error = ours(write(folder, content))
    assert isinstance(error, ConvertError), "accepted"
    assert str(error).isprintable()
    return error


# the same verdict as the official reader ----------------------------------------------------------

NUMBERS: st.SearchStrategy[object] = st.sampled_from(
    [0, 1, 2, 3, 4, 7, 8, 16, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70,
     True, False, None, 1.0, 0.0, -0.0, 1e3, "1", [], {}, [1], "F32"]
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(["a", "b", "weight", "__metadata__", "", "é", "\u2028", "\x7f", "\U0001f600"]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, NAMES, st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...], int]]:
    names = draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), max_size=4, unique=True))
    result = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        bits = DTYPE_BITS[dtype] * int(numpy.prod(shape, dtype=numpy.int64))
        result.append((name, dtype, shape, -(-bits // 8)))
    return result


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, object], bytes]:
    """A header of the form that the format asks for, not always consistent, and the data."""
    tensors = draw(tensor_lists())
    metadata = draw(st.none() | st.dictionaries(NAMES, NAMES, max_size=2))
    raw = encode_header(tensors, metadata or {})
    header = json.loads(raw[8:])
    if metadata == {}:
        header["__metadata__"] = {}
    size = sum(nbytes for *_, nbytes in tensors)
    return header, bytes(i % 251 for i in range(size))


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, child in pairs:
        yield value, key
        yield from _places(child)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file near the border between right and wrong."""
    header, data = draw(headers())
    for _ in range(draw(st.integers(0, 2))):
        places = list(_places(header))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["set", "set", "delete", "add"]))
        if action == "delete":
            del container[key]
        elif action == "set":
            container[key] = deepcopy(draw(VALUES))
        elif isinstance(container, dict):
            container[draw(NAMES)] = deepcopy(draw(VALUES))
        else:
            container.append(deepcopy(draw(VALUES)))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    text += b" " * draw(st.integers(0, 9))
    raw = bytearray(pack(text, data))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(raw) - 1)) if raw else 0
        match draw(st.sampled_from(["none", "none", "byte", "insert", "cut", "append", "length"])):
            case "byte" if raw:
                raw[place] = draw(st.integers(0, 255))
            case "insert":
                raw[place:place] = draw(st.sampled_from([b" ", b"\n", b"0", b",", b"\x00", b"}"]))
            case "cut":
                del raw[place:]
            case "append":
                raw += draw(st.binary(min_size=1, max_size=3))
            case "length" if len(raw) >= 8:
                length = int.from_bytes(raw[:8], "little") + draw(st.integers(-2, 2))
                raw[:8] = (length % 2**64).to_bytes(8, "little")
    return bytes(raw)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_the_verdict_is_that_of_the_official_reader(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    expected, found = official(content), ours(write(tmp_path_factory.getbasetemp(), content))
    if expected is None:
        assert isinstance(found, ConvertError), found
    elif isinstance(found, ConvertError):  # stricter in two points only
        if content[8:9] != b"{":  # the format asks for it, the official reader does not
            assert "not JSON" in str(found)
        else:
            assert isinstance(found, UnreadableError), found
            assert found.reason == "duplicate-key", found
    else:
        assert found == expected
    if isinstance(found, ConvertError):
        assert str(found).isprintable()


@given(tensor_lists(), st.dictionaries(NAMES, NAMES, max_size=3))
def test_the_official_reader_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[str, str, tuple[int, ...], int]],
    metadata: dict[str, str],
) -> None:
    def whole_bytes(dtype: str, shape: tuple[int, ...]) -> bool:
        return DTYPE_BITS[dtype] * int(numpy.prod(shape, dtype=numpy.int64)) % 8 == 0

    tensors = [t for t in tensors if whole_bytes(t[1], t[2])]
    header = encode_header(tensors, metadata)
    assert len(header) % 8 == 0
    data = bytes(i % 251 for i in range(sum(t[3] for t in tensors)))
    path = write(tmp_path_factory.getbasetemp(), header + data)
    position, expected = 0, {}
    for name, dtype, shape, nbytes in tensors:
        expected[name] = (dtype, shape, data[position : position + nbytes])
        position += nbytes
    assert official(header + data) == ours(path) == expected
    with safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == metadata
    assert (read_safetensors(path).metadata or {}) == metadata


def test_a_header_is_written_byte_for_byte_as_the_official_writer_does(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, 2), "a": torch.arange(4), "é\n": torch.zeros(0, 5)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    specs = sorted(read_safetensors(path).tensors.values(), key=lambda s: (s.offset, s.nbytes))
    by_place = [(s.name, s.dtype, s.shape, s.nbytes) for s in specs]
    assert content.startswith(encode_header(by_place, {"format": "pt"}))


# hostile headers ----------------------------------------------------------------------------------

DATA = bytes(8)
HOSTILE: Mapping[str, tuple[bytes, str]] = {
    "empty file": (b"", "0"),
    "seven bytes": (bytes(7), "file of 7"),
    "length zero": (bytes(8), "not JSON"),
    "huge length": ((2**64 - 1).to_bytes(8, "little") + b"{}", str(2**64 - 1)),
    "length one too large": ((3).to_bytes(8, "little") + b"{}", "header of 3 bytes"),
    "overlap": (pack({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "same bytes twice": (pack({"a": entry(), "b": entry()}, DATA), "overlaps"),
    "hole in front": (pack({"a": entry(offsets=[1, 9])}, bytes(9)), "hole"),
    "hole between": (pack({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)), "hole"),
    "trailing bytes": (pack({"a": entry()}, bytes(9)), "describes"),
    "trailing bytes of nothing": (pack({}, bytes(1)), "describes"),
    "data cut": (pack({"a": entry()}, bytes(7)), "incomplete"),
    "bool as size": (pack({"a": entry(shape=[2, True])}, DATA), "list of sizes"),
    "float as size": (pack({"a": entry(shape=[2.0])}, DATA), "list of sizes"),
    "negative size": (pack({"a": entry(shape=[-2])}, DATA), "list of sizes"),
    "float offset": (pack({"a": entry(offsets=[0.0, 8.0])}, DATA), "two positions"),
    "three offsets": (pack({"a": entry(offsets=[0, 8, 8])}, DATA), "two positions"),
    "backwards": (pack({"a": entry(offsets=[8, 0])}, DATA), "offsets span -8"),
    "product over 64 bits": (
        pack({"a": entry(shape=[2**40, 2**40], offsets=[0, 0])}), "larger than any memory"
    ),
    "product over 64 bits before a zero": (
        pack({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}), "larger than any memory"
    ),
    "5000 digits": (
        pack(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', DATA),
        "not a finite number",
    ),
    "400 digits as offset": (
        pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + b"9" * 400 + b"]}}", DATA),
        "not a finite number",
    ),
    "deep nesting": (
        pack(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":' + b"[" * 200
             + b"]" * 200 + b"}}", DATA), "nested too deeply",
    ),
    "very deep nesting": (pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "half open": (pack(b"{" * 100_000), "not valid JSON"),
    "unknown dtype": (pack({"a": entry("F31")}, DATA), "unknown dtype"),
    "dtype in lower case": (pack({"a": entry("f32")}, DATA), "unknown dtype"),
    "dtype is a list": (pack({"a": entry(["F32"])}, DATA), "unknown dtype"),
    "half a byte": (pack({"a": entry("F4", [3], [0, 2])}, bytes(2)), "no whole bytes"),
    "entry is no object": (pack({"a": [1, 2]}), "no object"),
    "metadata is a list": (pack({"__metadata__": ["pt"]}), "__metadata__"),
    "metadata holds a number": (pack({"__metadata__": {"format": 1}}), "__metadata__"),
    "list at the top": (pack([]), "not JSON"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "not JSON"),
    "not UTF-8": (pack(b'{"\xff":' + json.dumps(entry()).encode() + b"}", DATA), "not valid JSON"),
    "overlong UTF-8": (pack(b'{"\xc0\x80":{}}'), "not valid JSON"),
    "half a surrogate": (
        pack(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", DATA), "surrogate"
    ),
    "NaN": (pack(b'{"a":NaN}'), "finite"),
    "comment": (pack(b"{}//"), "not valid JSON"),
    "two documents": (pack(b"{}{}"), "not valid JSON"),
    "control character in a name": (pack({"a\n::error::b\x1b[31m\x00": 1}), "no object"),
    "long name": (pack({"x" * 100_000: 1}), "99"),
    "zip file": (b"PK\x03\x04" + bytes(100), "header of"),
    "HTML": (b"<!DOCTYPE html>\n<html>...</html>", "header of"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, said = HOSTILE[name]
    error = refusal(tmp_path, content)
    assert said in str(error)
    assert str(tmp_path) in str(error)
    assert len(str(error)) < 3000


def test_a_key_that_stands_twice_is_refused_though_the_official_reader_takes_the_last(
    tmp_path: Path,
) -> None:
    one = json.dumps(entry()).encode()
    content = pack(b'{"a":' + one + b',"a":' + one + b"}", DATA)
    assert official(content) is not None
    error = ours(write(tmp_path, content))
    assert isinstance(error, UnreadableError)
    assert error.reason == "duplicate-key"
    assert "'a' stands twice" in str(error)


def test_an_escaped_spelling_of_a_key_is_the_same_key(tmp_path: Path) -> None:
    one = json.dumps(entry()).encode()
    content = pack(b'{"a":' + one + b',"\\u0061":' + one + b"}", DATA)
    error = ours(write(tmp_path, content))
    assert isinstance(error, UnreadableError)
    assert error.reason == "duplicate-key"


def test_space_before_the_header_is_refused_though_only_the_format_forbids_it(
    tmp_path: Path,
) -> None:
    content = pack(b" {}")
    assert official(content) == {}
    assert "not JSON" in str(ours(write(tmp_path, content)))


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    error = refusal(tmp_path, pointer)
    assert isinstance(error, UnreadableError)
    assert error.reason == "lfs-pointer"
    assert "git lfs pull" in error.hint


def test_a_header_that_claims_gigabytes_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**33).to_bytes(8, "little") + b"{")
        file.truncate(2**34)  # sparse
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UnreadableError, match="header of 8589934592"):
        read_safetensors(path)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo, folder = tmp_path / "fifo.safetensors", tmp_path / "folder.safetensors"
    os.mkfifo(fifo)
    folder.mkdir()
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path in (fifo, folder, Path("/dev/zero"), loop, tmp_path / "missing.safetensors",
                 tmp_path / "a\0b.safetensors", tmp_path / ("x" * 300 + ".safetensors"),
                 fifo / "below.safetensors"):  # fmt: skip
        with pytest.raises(UnreadableError) as caught:
            read_safetensors(path)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, pack({}))
    path.chmod(0)
    with pytest.raises(UnreadableError, match="Permission denied"):
        read_safetensors(path)


# values -------------------------------------------------------------------------------------------

TORCH_DTYPES = sorted(DTYPE_OF_TORCH)


def sample(dtype: torch.dtype, shape: tuple[int, ...] = (3, 4)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if dtype in (torch.bool, torch.complex64) or dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_dtype_of_torch_is_read_as_it_was_saved(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    if name == "float8_e8m0fnu":  # the official binding has no name for it yet
        tensor = torch.arange(12, dtype=torch.uint8).view(torch.float8_e8m0fnu).reshape(3, 4)
        header = encode_header([("t", "F8_E8M0", (3, 4), 12)], {})
        path = write(tmp_path, header + bytes(range(12)))
    else:
        tensor = sample(dtype)
        path = tmp_path / "model.safetensors"
        save_file({"pad": torch.ones(1, dtype=torch.uint8), "t": tensor}, path)
        assert torch.equal(load_file(path)["t"].view(torch.uint8), tensor.view(torch.uint8))
    spec = read_tensor_file(path).tensors["t"]
    assert spec.shape == (3, 4)
    assert spec.dtype == DTYPE_OF_TORCH[name]
    assert torch_dtype(spec.dtype) == dtype
    found = read_torch(spec)
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert bytes(read_bytes(spec)) == raw
    assert bytes(read_bytes(spec, 3, 7)) == raw[3:7]
    assert bytes(read_bytes(spec, 5)) == raw[5:]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_dtypes_are_bytes_only(dtype: str, tmp_path: Path) -> None:
    nbytes = DTYPE_BITS[dtype]
    path = write(tmp_path, encode_header([("t", dtype, (8,), nbytes)], {}) + bytes(range(nbytes)))
    spec = read_safetensors(path).tensors["t"]
    assert bytes(read_bytes(spec)) == bytes(range(nbytes))
    with pytest.raises(UnsupportedError, match=dtype):
        read_torch(spec)
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", path.read_bytes()[:-1] + b"\xff")
    assert same_values(spec, spec)
    assert not same_values(spec, read_safetensors(other).tensors["t"])
    assert not is_zero(spec)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,) * 30])
def test_unusual_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(shape)}, path)
    spec = read_safetensors(path).tensors["t"]
    assert spec.numel == (0 if 0 in shape else 1)
    assert tuple(read_torch(spec).shape) == shape


@pytest.mark.parametrize("shape", [[0] * 65, [0, 2**62], [0, 2**40, 2**40], [2**63, 0]])
def test_an_empty_tensor_of_an_absurd_shape_is_refused_when_it_is_read(
    shape: list[int], tmp_path: Path
) -> None:
    content = pack({"t": entry("U8", shape, [0, 0])})
    if official(content) is None:
        assert isinstance(ours(write(tmp_path, content)), ConvertError)
        return
    spec = read_safetensors(write(tmp_path, content)).tensors["t"]
    assert read_bytes(spec) == b""
    with pytest.raises(UnsupportedError, match="no array can have"):
        read_torch(spec)


def test_memory_is_that_of_the_reader(tmp_path: Path) -> None:
    """What is read can be written to, and the file stays as it is."""
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(4)}, path)
    before = path.read_bytes()
    spec = read_safetensors(path).tensors["t"]
    read_torch(spec).zero_()
    assert path.read_bytes() == before


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(400)}, path)
    file = read_safetensors(path)
    os.truncate(path, path.stat().st_size - 1)
    for read in (read_torch, read_bytes):
        with pytest.raises(ChangedInputError, match="shorter"):
            read(file.tensors["t"])
    with pytest.raises(ChangedInputError, match="shorter"):
        read_into(file.tensors["t"], 1599, memoryview(bytearray(1)))
    with pytest.raises(ChangedInputError, match="changed"):
        file.require_unchanged()
    path.unlink()
    with pytest.raises(ChangedInputError, match="disappeared"):
        file.require_unchanged()


def test_a_file_that_was_replaced_or_touched_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(4)}, path)
    file = read_safetensors(path)
    file.require_unchanged()
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.rename(path)
    with pytest.raises(ChangedInputError, match="changed while it was read"):
        file.require_unchanged()


def test_more_tensors_than_any_model_has_are_refused_at_once(tmp_path: Path) -> None:
    empty = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path = write(tmp_path, pack(b"{" + b",".join(empty % i for i in range(300_000)) + b"}"))
    started = time.process_time()
    with pytest.raises(UnreadableError, match="more than 250000 tensors"):
        read_safetensors(path)
    assert time.process_time() - started < 1
