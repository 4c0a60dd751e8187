"""Files of `torch.save`: real ones read as torch reads them; nothing in a hostile one is run."""

import io
import os
import pickle
import resource
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gralora_convert.disk.pickles import read_pickle
from gralora_convert.disk.specs import DTYPE_OF_TORCH
from gralora_convert.disk.tensors import read_bytes, read_tensor_file, read_torch
from gralora_convert.errors import ConvertError, UnreadableError

Tensors = Mapping[str, torch.Tensor]


def save(folder: Path, value: object, **options: Any) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path


def require_same(path: Path, expected: Tensors) -> None:
    """Our reading is torch's: names in order, dtypes, shapes, bits."""
    loaded = torch.load(path, weights_only=False)
    file = read_tensor_file(path)
    assert file.pickled
    assert list(file.tensors) == list(loaded) == list(expected)
    for name, spec in file.tensors.items():
        right, found = loaded[name].detach(), read_torch(spec)
        assert found.dtype == right.dtype == expected[name].dtype
        assert found.shape == right.shape
        assert spec.nbytes == right.numel() * right.element_size()
        raw = torch.empty(right.numel(), dtype=right.dtype).copy_(right.reshape(-1))
        raw = raw.view(torch.uint8)
        assert torch.equal(found.flatten().view(torch.uint8), raw)
        data = raw.numpy().tobytes()
        assert bytes(read_bytes(spec)) == data
        third = len(data) // 3
        assert bytes(read_bytes(spec, third, 2 * third)) == data[third : 2 * third]


def refusal(path: Path, reason: str = "unreadable") -> UnreadableError:
    with pytest.raises(UnreadableError) as caught:
        read_pickle(path)
    assert str(caught.value).isprintable()
    assert caught.value.reason == reason, caught.value
    return caught.value


# what torch saves ---------------------------------------------------------------------------------


def sample(dtype: torch.dtype) -> torch.Tensor:
    if dtype in (torch.bool, torch.complex64) or dtype.is_floating_point:
        if dtype == torch.float8_e8m0fnu:
            return torch.arange(12, dtype=torch.uint8).view(dtype).reshape(3, 4)
        return torch.randn((3, 4), generator=torch.Generator().manual_seed(1)).to(dtype)
    return torch.arange(12).reshape(3, 4).to(dtype)


@pytest.mark.parametrize("name", sorted(DTYPE_OF_TORCH))
def test_every_dtype_in_and_out_of_order(name: str, tmp_path: Path) -> None:
    tensor = sample(getattr(torch, name))
    held = {"t": tensor, "transposed": tensor.T, "row": tensor[1], "column": tensor[:, 2]}
    path = save(tmp_path, held)
    require_same(path, held)
    assert {spec.dtype for spec in read_pickle(path).tensors.values()} == {DTYPE_OF_TORCH[name]}


def shapes_and_views() -> dict[str, Tensors]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    linear = torch.nn.Linear(3, 2)
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.note = "trained"  # type: ignore[attr-defined]
    noted = torch.ones(3)
    noted.origin = (1, "x", None)  # type: ignore[attr-defined]
    return {
        "scalar": {"t": torch.tensor(3.5)},
        "empty": {"t": torch.empty(0), "u": torch.empty(3, 0, 2), "v": torch.ones(1)},
        "none at all": {},
        "parameters": {"t": torch.nn.Parameter(base), "u": torch.nn.Parameter(base[0], False)},
        "parameter with attributes": {"t": tagged},
        "tensor with attributes": {"t": noted},
        "state dict with _metadata": linear.state_dict(),
        "state dict with tied weights": tied.state_dict(),
        "state dict keeping variables": linear.state_dict(keep_vars=True),
        "ordered": OrderedDict(b=base, a=base + 1),
        "shared storage": {"t": base, "u": base[1], "v": base.view(6, 4)[2:4]},
        "views": {
            "permuted": base.permute(2, 0, 1), "step": base[:, ::2, 1::2], "narrow": base[:, 1:],
            "single": base[:1, :1, :1].transpose(0, 2), "diagonal": base[0, :, :3].diagonal(),
        },
        "unfold": {"t": torch.arange(7).unfold(0, 2, 2)},
        "names": {"": torch.ones(1), "a b": torch.ones(1), "é\n": torch.ones(1), "x" * 300: base},
        "many": {f"t{i}": torch.full((2,), i) for i in range(2000)},
        "requires gradient": {"t": torch.ones(2, requires_grad=True)},
    }  # fmt: skip


@pytest.mark.parametrize("name", list(shapes_and_views()))
def test_a_dictionary_of_tensors_is_read_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    held = shapes_and_views()[name]
    require_same(save(tmp_path, held), held)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(protocol: int, tmp_path: Path) -> None:
    held = shapes_and_views()
    both = {**held["views"], **held["parameters"], **held["names"]}
    require_same(save(tmp_path, both, pickle_protocol=protocol), both)


def test_a_file_under_any_name_and_written_to_a_stream(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"t": torch.ones(3)}, buffer)
    for name in ("adapter_model.bin", "x.pt", "y.pth", "z"):
        (tmp_path / name).write_bytes(buffer.getvalue())
        require_same(tmp_path / name, {"t": torch.ones(3)})


# what is refused ----------------------------------------------------------------------------------


class Hostile:
    """Pickled, it calls `function` when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("function", [os.mkdir, eval, exec, getattr, torch.load, pickle.loads])
@pytest.mark.parametrize("place", ["top", "value", "key", "attribute"])
def test_nothing_is_called(function: Callable[..., object], place: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    argument = str(made) if function is os.mkdir else f"__import__('os').mkdir({str(made)!r})"
    hostile = Hostile(function, argument)
    value: object = {
        "top": hostile,
        "value": {"t": torch.ones(1), "x": hostile},
        "key": {(1, hostile): torch.ones(1)},
        "attribute": OrderedDict(t=torch.ones(1)),
    }[place]
    if place == "attribute":
        assert isinstance(value, OrderedDict)
        value._metadata = hostile  # type: ignore[attr-defined]
    error = refusal(save(tmp_path, value), "unsafe-pickle")
    assert "it was not run" in str(error)
    assert function.__name__ in str(error)
    assert "safetensors" in error.hint
    assert not made.exists()


def test_the_hostile_file_is_really_hostile(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.load(save(tmp_path, {"x": Hostile(os.mkdir, str(made))}), weights_only=False)
    assert made.exists()


class Custom:
    def __init__(self) -> None:
        self.value = 1


UNSAFE: Mapping[str, Callable[[], object]] = {
    "object": lambda: {"t": Custom()},
    "module": lambda: torch.nn.Linear(2, 2),
    "sparse": lambda: {"t": torch.eye(3).to_sparse()},
    "quantized": lambda: {"t": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    "conjugated": lambda: {"t": torch.ones(2, dtype=torch.complex64).conj()},
    "negated": lambda: {"t": torch.ones(2, dtype=torch.complex64).conj().imag},
    "meta": lambda: {"t": torch.ones(2, device="meta")},
    "complex128": lambda: {"t": torch.ones(2, dtype=torch.complex128)},
    "generator": lambda: {"t": torch.ones(1), "g": {1, 2}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSAFE)
def test_what_is_no_dense_tensor_is_refused(name: str, tmp_path: Path) -> None:
    refusal(save(tmp_path, UNSAFE[name]()), "unsafe-pickle")


NESTED: Mapping[str, tuple[object, str]] = {
    "a trainer's checkpoint": (
        {"model": {"t": torch.ones(1)}, "epoch": 3}, "the entry 'model' is of type dict"
    ),
    "a number beside tensors": ({"t": torch.ones(1), "step": 7}, "the entry 'step' is of type int"),
    "a list": ([torch.ones(1)], "one list"),
    "a tensor": (torch.ones(1), "one tensor"),
    "a number as name": ({1: torch.ones(1)}, "the key 1 is of type int"),
    "nothing": (None, "NoneType"),
    "a string": ("x", "one str"),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_what_is_no_flat_dictionary_is_said(name: str, tmp_path: Path) -> None:
    value, said = NESTED[name]
    assert said in str(refusal(save(tmp_path, value), "nested"))


def test_the_format_before_torch_1_6_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, {"t": torch.ones(2)}, _use_new_zipfile_serialization=False)
    error = refusal(path, "legacy-pickle")
    assert "before 1.6" in str(error)
    assert "safetensors" in error.hint


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refusal(path, "lfs-pointer")


def test_an_expanded_view_is_refused(tmp_path: Path) -> None:
    """A file of 1 KB must not become a tensor of any size."""
    path = save(tmp_path, {"t": torch.ones(1).expand(1 << 40)})
    assert "expanded" in str(refusal(path))


def test_views_that_overlap_a_little_are_read(tmp_path: Path) -> None:
    held = {"t": torch.arange(4.0).as_strided((3, 2), (1, 1)), "u": torch.ones(1).expand(2)}
    require_same(save(tmp_path, held), held)


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {"t": torch.ones(100)})
    with zipfile.ZipFile(path) as archive:
        held = [(name, archive.read(name)) for name in archive.namelist()]

    def rewritten(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
        made = tmp_path / "other.bin"
        with zipfile.ZipFile(made, "w", method) as archive:
            for name, data in entries:
                archive.writestr(name, data)
        return made

    require_same(rewritten(held), {"t": torch.ones(100)})
    assert "compressed" in str(refusal(rewritten(held, zipfile.ZIP_DEFLATED)))
    assert "no single data.pkl" in str(refusal(rewritten([("a.txt", b"")])))
    assert "no single data.pkl" in str(refusal(rewritten([*held, ("b/data.pkl", b"N.")])))
    big = [(n, b"big" if n.endswith("byteorder") else d) for n, d in held]
    assert "big-endian" in str(refusal(rewritten(big)))
    without = [(n, d) for n, d in held if not n.endswith("data/0")]
    assert "'t'" in str(refusal(rewritten(without)))
    short = [(n, d[:-1] if n.endswith("data/0") else d) for n, d in held]
    assert "beyond its storage" in str(refusal(rewritten(short)))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = rewritten([*held, held[-1]])
    assert "twice" in str(refusal(twice))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, said in (
        ("missing.bin", "cannot be opened"), ("fifo", "a regular file"), (".", "a regular file"),
    ):  # fmt: skip
        with pytest.raises(UnreadableError, match=said):
            read_pickle(tmp_path / name)
    for content in (b"", b"PK\x03\x04", b"x" * 100, b"PK\x03\x04" + bytes(1000)):
        (tmp_path / "x.bin").write_bytes(content)
        refusal(tmp_path / "x.bin")


# damage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    base = torch.arange(24.0).reshape(4, 6)
    held = {"a": base, "b": torch.nn.Parameter(base.T), "c": torch.ones(3, dtype=torch.float16),
            "d": torch.zeros(0), "e": sample(torch.float8_e4m3fn)}  # fmt: skip
    return save(tmp_path_factory.mktemp("whole"), OrderedDict(held)).read_bytes()


def read_all(path: Path, content: bytes) -> None:
    """Reads everything; only a `ConvertError` may come out."""
    path.write_bytes(content)
    try:
        for spec in read_pickle(path).tensors.values():
            assert len(read_bytes(spec)) == spec.nbytes <= 8 * len(content)
    except ConvertError as error:
        refused = str(error)
    else:
        refused = ""
    assert refused == "" or refused.isprintable()


def test_every_truncation_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableError):
            read_pickle(path)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changed_bytes_never_crash(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    read_all(tmp_path_factory.getbasetemp() / "x.bin", bytes(changed))


def with_pickle(path: Path, description: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", description)
        archive.writestr("x/data/0", bytes(96))


@settings(max_examples=600, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changed_descriptions_never_crash(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The checksums of the zip are right here, so that damage reaches the unpickler."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        changed = bytearray(archive.read(name))
    operations = st.sampled_from([bytes([b]) for b in b"}](ltuse.0123NIRbhqrQ\x85\x86\x87\x93\x94"])
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(changed)))
        width = data.draw(st.integers(0, 3))
        changed[place : place + width] = data.draw(st.binary(max_size=3) | operations)
    path = tmp_path_factory.getbasetemp() / "y.bin"
    with_pickle(path, bytes(changed))
    read_all(path, path.read_bytes())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60))
def test_any_bytes_as_description(
    tmp_path_factory: pytest.TempPathFactory, description: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "z.bin"
    with_pickle(path, description)
    read_all(path, path.read_bytes())


BOMBS: Mapping[str, bytes] = {
    "a list in itself": b"]q\x00h\x00a.",
    "a dictionary in itself": b"}q\x00X\x01\x00\x00\x00xh\x00s.",
    "deep nesting": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"N" + b"\x85" * 200_000 + b".",
    "deep marks": b"(" * 200_000 + b".",
    "doubling": b"N" + b"q\x00h\x00\x86" * 100_000 + b".",
    "doubling as a key": b"}N" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "doubling as a name": b"N" + b"q\x00h\x00\x86" * 60 + b"q\x00h\x00\x93.",
    "doubling as a persistent id": b"N" + b"q\x00h\x00\x86" * 60 + b"Q.",
    "doubling of a list": b"]q\x00" + b"(h\x00h\x00e" * 60 + b".",
    "huge string": b"X\xff\xff\xff\xffabc.",
    "huge memo": b"Nr\xff\xff\xff\xff.",
    "huge long": b"\x8b\xff\xff\xff\x7f1.",
    "8-byte string": b"\x8d" + b"\xff" * 8 + b".",
    "no stop": b"N" * 1000,
    "empty": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_description_costs_little(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with_pickle(path, BOMBS[name])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UnreadableError) as caught:
        read_pickle(path)
    assert len(str(caught.value)) < 3000
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_numbers_that_could_be_made_to_collide_are_no_keys(tmp_path: Path) -> None:
    """All multiples of 2**61 - 1 have the hash 0: a dictionary of them takes quadratic time."""
    path = save(tmp_path, {(2**61 - 1) * i: 0 for i in range(1, 40)})
    assert "more than 64 bits" in str(refusal(path, "unsafe-pickle"))


def test_a_directory_of_an_archive_is_not_read_at_any_length(tmp_path: Path) -> None:
    path = save(tmp_path, {"a": torch.zeros(2)})
    data = bytearray(path.read_bytes()[: 1 << 16])
    end = data[-22:]  # the record that says where the directory lies
    end[12:20] = (1 << 30).to_bytes(4, "little") + (0).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(data[:100])
        file.truncate(1 << 30)
        file.seek(0, os.SEEK_END)
        file.write(end)
    assert "a directory of 1073741824 bytes" in str(refusal(path))
