"""Dense checkpoints as they lie on disks: every layout, hostile indexes, links, special files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from peft import GraloraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gralora_convert.disk.checkpoint import Checkpoint, locate
from gralora_convert.disk.folders import sidecars
from gralora_convert.disk.tensors import read_torch
from gralora_convert.errors import ConvertError, UnreadableError, UnsupportedError
from tests.builders import write_model
from tests.command import run

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
TENSORS: Tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate("abcd")}
SHARDS = {"model-1.safetensors": "ab", "model-2.safetensors": "cd"}


def write_shards(
    folder: Path, shards: Mapping[str, str] = SHARDS, index: str = INDEX, **metadata: Any
) -> Path:
    """Files with the tensors of these (one-letter) names, and their index."""
    weight_map: dict[str, str] = {}
    for file, names in shards.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: TENSORS[name] for name in names}
        if file.endswith(".bin"):
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map, index, **metadata)
    return folder


def write_index(folder: Path, weight_map: object, index: str = INDEX, **metadata: Any) -> None:
    document = {"metadata": metadata, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(document))


def is_of_json(error: ConvertError) -> bool:
    return isinstance(error, UnreadableError) and error.reason != "unreadable"


def refused(source: str | Path, *words: str) -> ConvertError:
    """The refusal of `source`: one line that says `words`."""
    with pytest.raises(ConvertError) as caught:
        Checkpoint.open(source).sidecars()
    assert str(caught.value).isprintable()
    for word in words:
        assert word in str(caught.value)
    return caught.value


def values(checkpoint: Checkpoint) -> Tensors:
    return {name: read_torch(spec) for name, spec in checkpoint.tensors.items()}


def same(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in found)


# layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shards",
    [
        {"model.safetensors": "abcd"},
        {"weights.safetensors": "abcd"},
        {"unet-a.safetensors": "ab", "unet-b.safetensors": "cd"},
        {"pytorch_model.bin": "abcd"},
    ],
    ids=lambda shards: next(iter(shards)),
)
def test_files_without_an_index(shards: Mapping[str, str], tmp_path: Path) -> None:
    write_shards(tmp_path, shards, "unrelated.json")
    found = Checkpoint.open(tmp_path)
    assert same(values(found), TENSORS)
    assert list(found.layout) == sorted(shards)
    assert found.index_name is None


@pytest.mark.parametrize(
    ("shards", "index"),
    [
        (SHARDS, INDEX),
        ({"model-1.bin": "ab", "model-2.bin": "cd"}, "pytorch_model.bin.index.json"),
        ({"sub/one.safetensors": "ab", "two.safetensors": "cd"}, INDEX),
        ({"a.safetensors": "d", "b.safetensors": "abc"}, "diffusion.safetensors.index.json"),
    ],
)  # fmt: skip
def test_shards_with_an_index(shards: Mapping[str, str], index: str, tmp_path: Path) -> None:
    found = Checkpoint.open(write_shards(tmp_path, shards, index))
    assert same(values(found), TENSORS)
    assert list(found.layout) == sorted(shards)
    assert found.index_name == index
    files = {n: str(found.tensors[n].file.relative_to(tmp_path)) for n in "abcd"}
    assert files == {n: f for f, ns in shards.items() for n in ns}


def test_tensors_come_in_the_order_of_their_files(tmp_path: Path) -> None:
    """So that writing them in this order gives the same files again."""
    found = Checkpoint.open(write_shards(tmp_path))
    places = [(spec.file.name, spec.offset) for spec in found.tensors.values()]
    assert places == sorted(places)


def test_one_file_is_a_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = Checkpoint.open(tmp_path / "model-1.safetensors")
    assert sorted(found.tensors) == ["a", "b"]
    assert found.model_type == "llama"
    assert found.folder == tmp_path
    assert found.sidecars() == {}
    assert found.receipt is None


def test_which_weights_count_is_decided_as_transformers_does(tmp_path: Path) -> None:
    """One file before shards, safetensors before pickles (modeling_utils.py of transformers 5.23,
    `_get_resolved_checkpoint_files`)."""
    layouts = [
        {"pytorch_model-1.bin": "a"}, {"pytorch_model.bin": "ab"}, {"model-1.safetensors": "abc"},
        {"model.safetensors": "abcd"},
    ]  # fmt: skip
    indexes = ["pytorch_model.bin.index.json", "x.json", INDEX, "x.json"]
    for shards, index in zip(layouts, indexes, strict=True):
        write_shards(tmp_path, shards, index)
        assert list(Checkpoint.open(tmp_path).layout) == list(shards)


def test_the_digest_is_that_of_the_model_not_of_its_files(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    write_model(tmp_path / "one", TENSORS)
    other = {**TENSORS, "d": TENSORS["d"].half()}
    write_model(tmp_path / "other", other)
    write_model(tmp_path / "configured", TENSORS, model_type="llama")
    digests = [
        Checkpoint.open(tmp_path / n).digest() for n in ("shards", "one", "other", "configured")
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert Checkpoint.open(tmp_path / "one").nbytes == 4 * 6 * 4


# the index is not trusted -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/../../outside.safetensors", "/etc/passwd", "..", ".", "",
     "./model-1.safetensors", "sub//model.safetensors", "sub/./model.safetensors", "model-1.txt",
     ".hidden.safetensors", ".git/x.safetensors", "a\0b.safetensors", "a\nb.safetensors",
     "\u202ea.safetensors", "model-1", None, 1, ["model-1.safetensors"], {"file": "x"}],
    ids=repr,
)  # fmt: skip
def test_an_index_names_plain_files_of_its_folder(name: object, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "outside.safetensors")
    folder = write_shards(tmp_path / "model")
    write_index(folder, {**dict.fromkeys("abc", "model-1.safetensors"), "d": name})
    error = refused(folder, INDEX, "which is not a file of this folder")
    assert "'d'" in error.message


@pytest.mark.parametrize("name", ["model-9.safetensors", "x" * 300 + ".safetensors", "sub/x.bin"])
def test_missing_shards_are_counted_and_named(name: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    write_index(folder, {"a": "model-1.safetensors", "z": name, "y": "zzz.bin"})
    refused(folder, "2 of the 3 shards", f"first {name}", "Download the model again")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 1, {"a": {}}])
def test_an_index_without_a_map(weight_map: object, tmp_path: Path) -> None:
    write_index(write_shards(tmp_path), weight_map)
    refused(tmp_path, INDEX)


def test_an_index_that_is_no_json(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    for text in ("", "[]", '{"weight_map": {"a": "x.bin", "a": "y.bin"}}', '{"a":' * 200, "\0"):
        (folder / INDEX).write_text(text)
        assert is_of_json(refused(folder, INDEX))


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    write_index(folder, {"a": "model-2.safetensors", "b": "model-1.safetensors"})
    refused(folder, "model-2.safetensors", "places 'a' here", "Shards of two versions?")


def test_tensors_that_the_index_forgot_are_there(tmp_path: Path) -> None:
    """As in transformers, which loads whole files."""
    folder = write_shards(tmp_path)
    write_index(folder, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    assert same(values(Checkpoint.open(folder)), TENSORS)


def test_files_that_the_index_does_not_name_are_not_there(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    save_file({"e": torch.ones(1)}, folder / "model-3.safetensors")
    (folder / "old.safetensors").write_text("damaged")
    assert same(values(Checkpoint.open(folder)), TENSORS)


def test_the_index_decides_between_two_copies(tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    save_file({"a": torch.ones(1), **{n: TENSORS[n] for n in "cd"}}, folder / "model-2.safetensors")
    assert same(values(Checkpoint.open(folder)), TENSORS)
    (folder / INDEX).unlink()
    refused(folder, "'a' stands in two files", "model-1.safetensors")


@pytest.mark.parametrize("total", [0, -1, 10**30, "x", None, [], 1e400, float("nan")])
def test_totals_of_an_index_are_not_believed(total: object, tmp_path: Path) -> None:
    """Tools write all kinds of numbers there; sizes come from the headers."""
    folder = write_shards(tmp_path, total_size=total, total_parameters=total)
    assert Checkpoint.open(folder).nbytes == 4 * 6 * 4


NAMES = st.sampled_from(
    ["model-1.safetensors", "model-2.safetensors", "../x.safetensors", "/x.bin", "missing.bin",
     "folder.safetensors", "fifo.safetensors", "out.safetensors", ""]
) | st.text(max_size=6)  # fmt: skip
MAPS = st.dictionaries(
    st.sampled_from("abcde") | st.text(max_size=3),
    NAMES | st.none() | st.integers() | st.lists(NAMES, max_size=2),
    max_size=4,
)


@given(MAPS | st.lists(NAMES, max_size=2) | st.none(), st.binary(max_size=2))
def test_any_index_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, weight_map: object, noise: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-index"
    if not folder.exists():
        write_shards(folder)
        (folder / "folder.safetensors").mkdir()
        os.mkfifo(folder / "fifo.safetensors")
        (folder / "out.safetensors").symlink_to("/etc/passwd")
    document = json.dumps({"weight_map": weight_map}, ensure_ascii=False).encode()
    (folder / INDEX).write_bytes(document[: -len(noise) or None] + noise)
    try:
        found = Checkpoint.open(folder)
    except ConvertError as error:
        found = None
        said = str(error)
    if found is None:
        assert said.isprintable()
    else:
        assert set(found.tensors) <= set("abcd")


# links and special files --------------------------------------------------------------------------


def hub_cache(root: Path) -> tuple[Path, Path]:
    """A model of four shards as huggingface_hub 2.4 stores it: snapshots of links to blobs."""
    repository = root / "models--org--name"
    snapshot = repository / "snapshots/0123abcd"
    plain = write_shards(root / "plain", {**SHARDS, "sub/model.safetensors": "a"})
    (plain / "config.json").write_text('{"model_type": "llama"}')
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(plain.rglob("*"))):
        if path.is_file():
            blob = repository / f"blobs/{number:040x}"
            shutil.copy(path, blob)
            link = snapshot / path.relative_to(plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(plain)
    return repository, snapshot


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    _, snapshot = hub_cache(tmp_path)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/" + "0" * 40)
    found = Checkpoint.open(snapshot)
    assert found.model_type == "llama"
    assert sorted(found.sidecars()) == ["config.json", "tokenizer.json"]
    assert list(Checkpoint.open(snapshot / "sub").tensors) == ["a"]
    assert list(Checkpoint.open(snapshot / "model-1.safetensors").tensors) == ["a", "b"]


def test_a_link_of_the_hubs_cache_to_another_model_is_refused(tmp_path: Path) -> None:
    repository, snapshot = hub_cache(tmp_path)
    shutil.copytree(repository, tmp_path / "models--other", symlinks=True)
    stolen = next((tmp_path / "models--other/blobs").iterdir())
    (snapshot / "tokenizer.json").symlink_to(stolen)
    refused(snapshot, "tokenizer.json", "is a link that leaves its folder")


@pytest.mark.parametrize("name", ["model-2.safetensors", INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_that_leave_the_folder_are_refused(name: str, relative: bool, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    outside = tmp_path / f"outside-{name}"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(Path("..") / outside.name if relative else outside)
    error = refused(folder, name, "is a link that leaves its folder", str(outside))
    assert "Put the file itself into the folder" in error.hint


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    (folder / "store").mkdir()
    (folder / "model-2.safetensors").rename(folder / "store/2.safetensors")
    (folder / "model-2.safetensors").symlink_to("store/2.safetensors")
    (tmp_path / "link").symlink_to("model")
    assert same(values(Checkpoint.open(tmp_path / "link")), TENSORS)


def test_a_file_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    write_model(tmp_path / "model", TENSORS)
    (tmp_path / "link.safetensors").symlink_to("model/model.safetensors")
    assert same(values(Checkpoint.open(tmp_path / "link.safetensors")), TENSORS)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(target: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name if target == "itself" else target)

    return replace


def replace_by_text(text: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.write_text(text)

    return replace


DAMAGE: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "FIFO": (replace_by_fifo, "is not a regular file"),
    "folder": (replace_by_folder, "is not a regular file"),
    "loop": (replace_by_link("itself"), "model-2.safetensors"),
    "dangling": (replace_by_link("nowhere"), "model-2.safetensors"),
    "device": (replace_by_link("/dev/zero"), "leaves its folder"),
    "empty": (replace_by_text(""), "is no safetensors file"),
    "pointer": (replace_by_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "page": (replace_by_text("<!DOCTYPE html>" + " " * 500), "is no safetensors file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_shard_that_is_something_else(kind: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[kind]
    folder = write_shards(tmp_path)
    damage(folder / "model-2.safetensors")
    refused(folder, "model-2.safetensors" if kind not in ("loop", "dangling") else INDEX, words)


@pytest.mark.parametrize("name", [INDEX, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "loop", "dangling"])
def test_another_file_that_is_something_else(kind: str, name: str, tmp_path: Path) -> None:
    folder = write_shards(tmp_path)
    (folder / name).touch()
    DAMAGE[kind][0](folder / name)
    if (kind, name) == ("folder", "tokenizer.json"):
        assert sidecars(folder) == {}
    else:
        refused(folder, name)


# folders that are no checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words", "kind"),
    [
        ([], "holds no weights", UnreadableError),
        (["config.json", "tokenizer.json"], "holds no weights", UnreadableError),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter", UnreadableError),
        (["model.Q4.gguf", "config.json"], "is GGUF", UnsupportedError),
        (["tf_model.h5", "config.json"], "only as tf_model.h5", UnsupportedError),
        (["flax_model.msgpack"], "only as flax_model.msgpack", UnsupportedError),
        (["model.onnx"], "only as model.onnx", UnsupportedError),
        (["rust_model.ot"], "only as rust_model.ot", UnsupportedError),
        (["consolidated.00.pth"], "name the file: ", UnreadableError),
        (["model.ckpt", "training_args.bin"], "only as model.ckpt", UnreadableError),
        (["consolidated.00.pth", "consolidated.01.pth"], "without the index", UnreadableError),
        (["pytorch_model-00001-of-00002.bin"], "without the index", UnreadableError),
        (["training_args.bin", "optimizer.pt"], "holds no weights", UnreadableError),
        (["original/consolidated.00.pth"], "Its folder original holds some", UnreadableError),
        (["checkpoint-9/model.safetensors"], "folder checkpoint-9 holds some", UnreadableError),
        (["model-00001-of-00003.safetensors"], "2 of 3 shards are missing", UnreadableError),
    ],
)
def test_what_is_there_instead_is_named(
    names: list[str], words: str, kind: type, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert type(refused(tmp_path, words)) is kind


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00001-of-00002.safetensors", "is one shard of a model. Name its folder"),
        ("model.safetensors.index.json", "is no file of weights. Name its folder"),
        ("tf_model.h5", "is HDF5, which is not read here"),
        ("flax_model.msgpack", "is Flax, which is not read here"),
    ],
)
def test_a_file_that_is_no_model_is_named(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    refused(tmp_path / name, words)


def test_one_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model.txt").write_bytes(b"weights")
    refused(tmp_path / "model.gguf", "is GGUF")
    refused(tmp_path / "model.txt", "is not a file of torch.save")


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds no tensors")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":1,"a":2}', '{"a":' * 500, "\ufeff{}"])
def test_a_damaged_config_is_refused(text: str, tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text(text)
    assert is_of_json(refused(tmp_path, "config.json"))


def test_a_config_may_hold_infinities_and_odd_types(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text(
        '{"model_type": 1, "architectures": ["A", 2, null], "time_step_limit": [0, Infinity]}'
    )
    found = Checkpoint.open(tmp_path)
    assert found.model_type is None
    assert found.architectures == ("A",)
    assert len(found.digest()) == 64


def test_the_receipt_is_that_of_the_folder(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS)
    found = Checkpoint.open(tmp_path)
    assert found.receipt is None
    (tmp_path / "gralora_convert.json").write_text('{"tool": "gralora-convert"}')
    assert found.receipt == {"tool": "gralora-convert"}
    (tmp_path / "gralora_convert.json").write_text("{")
    with pytest.raises(UnreadableError, match=r"gralora_convert\.json") as caught:
        _ = found.receipt
    assert is_of_json(caught.value)


# where a model is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c", "nowhere.safetensors/", "../nowhere", "a\0b", "a b", ""])
def test_what_is_nowhere_and_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    if not name:
        refused(name, "has an empty name")
        return
    refused(name, "there is no such file or folder")
    refused(Path("name"), "there is no such file or folder")


def test_a_path_that_cannot_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("loop", "dangling", str(tmp_path / ("x" * 300))):
        refused(name)


class Hub:
    """huggingface_hub's download, without a network."""

    def __init__(self, snapshot: Path | None, online: bool, complete: Callable[[], object]) -> None:
        self.snapshot, self.online, self.complete = snapshot, online, complete
        self.asked: list[bool] = []

    def __call__(self, model: str, *, local_files_only: bool = False, **_: object) -> str:
        assert model == "org/name"
        self.asked.append(not local_files_only)
        if local_files_only:
            if self.snapshot is None:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.snapshot)
        if not self.online:
            raise LocalEntryNotFoundError("offline mode is enabled\nand more")
        self.complete()
        assert self.snapshot is not None
        return str(self.snapshot)


def test_a_model_of_the_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, snapshot = hub_cache(tmp_path)
    hub = Hub(snapshot, False, lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    found = Checkpoint.open("org/name")
    assert same(values(found), TENSORS)
    assert found.source == "org/name"
    assert hub.asked == [False]
    shutil.rmtree(snapshot)
    snapshot.mkdir()
    (snapshot / "adapter_model.safetensors").touch()
    assert locate("org/name") == snapshot
    assert hub.asked == [False, False]


def test_a_part_of_a_model_in_the_cache_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    hub = Hub(snapshot, True, lambda: write_shards(snapshot))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    assert same(values(Checkpoint.open("org/name")), TENSORS)
    assert hub.asked == [False, True]


def test_offline_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(None, False, lambda: None))
    error = refused("org/name", "org/name", "HF_HUB_OFFLINE")
    assert "Name a local folder" in error.hint
    snapshot = write_shards(tmp_path / "snapshot")
    (snapshot / "model-2.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(snapshot, False, lambda: None))
    refused("org/name", "1 of the 2 shards")


def test_a_folder_of_this_name_comes_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "org/name", TENSORS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    assert Checkpoint.open("org/name").path == Path("org/name")


# files beside the weights -------------------------------------------------------------------------


def test_sidecars_are_what_is_neither_weights_nor_ours(tmp_path: Path) -> None:
    kept = ["config.json", "tokenizer.json", "tokenizer.model", "modeling_x.py", "merges.txt",
            "chat_template.jinja", "additional/deep/notes.txt", "odd\nname.txt"]  # fmt: skip
    left = ["model.safetensors", "pytorch_model.bin", "x.gguf", INDEX, "README.md",
            ".gitattributes", ".git/config", "adapter_config.json", "gralora_convert.json",
            "optimizer.pt", "training_args.bin", "checkpoint-100/pytorch_model.bin",
            "checkpoint-100/config.json", "onnx/model.onnx", "onnx/config.json",
            "__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp", "pytorch_model_fsdp_0/.metadata",
            "optimizer.bin", "rng_state_0.pth", "random_states_0.pkl", "trainer_state.json",
            "wandb/latest-run/files/output.log", "logs/events.out.tfevents.1.host.2.0",
            ]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "runs").symlink_to("/")
    found = sidecars(tmp_path)
    assert sorted(found) == sorted(kept)
    assert all(path == tmp_path / name for name, path in found.items())


def test_folders_are_walked_to_a_reasonable_depth(tmp_path: Path) -> None:
    deep = tmp_path / Path(*["d"] * 32)
    deep.mkdir(parents=True)
    (deep / "note.txt").touch()
    assert list(sidecars(tmp_path)) == ["d/" * 32 + "note.txt"]
    (deep / "d").mkdir()
    with pytest.raises(UnreadableError, match="more than 32 folders deep"):
        sidecars(tmp_path)


def test_the_steps_of_a_sentence_transformer_are_sidecars_with_their_weights(
    tmp_path: Path,
) -> None:
    names = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    for name in [*names, "checkpoint-500/model.safetensors", "model.safetensors"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(sidecars(tmp_path)) == names[:1]
    (tmp_path / "modules.json").write_text("[]")
    assert list(sidecars(tmp_path)) == [*names, "modules.json"]


def test_the_state_dict_of_a_model_with_an_adapter_inside_is_no_model(tmp_path: Path) -> None:
    base = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
                            num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    adapted = get_peft_model(base, GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"]))
    torch.save(adapted.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="whole state dict of a PEFT model"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model_fsdp.bin", "accelerator.get_state_dict"),
        ("pytorch_model_fsdp_0", "accelerator.get_state_dict"),
        ("model.safetensors", "a whole model"),
        ("adapters.safetensors", "of another program"),
        ("lora.gguf", "of another program"),
    ],
)
def test_what_lies_in_the_place_of_an_adapter_is_named(
    name: str, advice: str, tmp_path: Path
) -> None:
    config = Path(__file__).parent.parent.parent / "fixtures/peft-0.21.2/llama-k4"
    shutil.copy(config / "adapter_config.json", tmp_path)
    (tmp_path / name).write_bytes(b"")
    outcome = run("validate", tmp_path)
    assert outcome.status == 2
    assert advice in outcome.stdout


def test_distributed_tensors_are_named(tmp_path: Path) -> None:
    """As torch.save writes them: by the function that makes a wrapper subclass again."""
    script = (
        "import torch, torch.distributed as dist, sys\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import Shard, distribute_tensor\n"
        "store = dist.HashStore()\n"
        "dist.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "mesh = init_device_mesh('cpu', (1,))\n"
        "torch.save({'a': distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])}, sys.argv[1])\n"
    )
    path = tmp_path / "pytorch_model.bin"
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True)
    with pytest.raises(UnreadableError, match="distributed tensors") as refusal:
        Checkpoint.open(tmp_path)
    assert "full_tensor()" in refusal.value.hint


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("lora_unet_down_blocks_0_to_q.lora_down.weight", "kohya"),
        ("unet.down_blocks.0.to_q.lora.down.weight", "diffusers"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "validate", "merge"])
def test_a_lora_of_another_tool_says_what_it_is(
    command: str, name: str, writer: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.zeros(4, 8), "alpha": torch.tensor(4.0)}, file)
    more = ["--base", tmp_path, "-o", tmp_path / "out"] if command == "merge" else []
    outcome = run(command, file, *more)
    assert outcome.status == 2
    assert "holds a LoRA as" in outcome.stderr
    assert writer in outcome.stderr
