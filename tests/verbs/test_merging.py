"""`merge`: layouts, dtypes, what lies beside the weights, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from gralora_convert.delta.products import dense
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok
from tests.zoo import ARCHITECTURES, close, load, outputs, save_base, train

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Tensors]:
    """adapter, base and the merged tensors that are right, float32."""
    base = write_base(tmp_path / "base", model_type="plain", dtype_note="x")
    deltas = {
        name: random_delta(*shape, hybrid_r=2, seed=i)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    write_adapter(tmp_path / "adapter", deltas, base_model_name_or_path=str(tmp_path / "base"))
    right = base | {f"{n}.weight": base[f"{n}.weight"] + dense(d) for n, d in deltas.items()}
    return tmp_path / "adapter", tmp_path / "base", right


def test_the_base_is_the_one_that_the_adapter_names(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    adapter, _, right = pair
    run_ok("merge", adapter, "-o", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert merged.keys() == right.keys()
    assert all(torch.allclose(merged[n], right[n], atol=1e-6) for n in right)
    assert torch.equal(merged["norm.weight"], right["norm.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_every_floating_tensor_and_the_config(dtype: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base", torch.bfloat16)
    train(base, architecture, tmp_path / "adapter")
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out", "--dtype", dtype)
    merged = load_file(tmp_path / "out/model.safetensors")
    assert {str(t.dtype) for t in merged.values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    original = load_file(base / "model.safetensors")
    name = "model.norm.weight"
    assert torch.equal(merged[name], original[name].to(merged[name].dtype))
    run_ok(
        "verify", tmp_path / "adapter", "--base", base, "--merged", tmp_path / "out",
        "--level", "modules",
    )  # fmt: skip


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    base["norm.weight"][0] = 1e6
    write_model(tmp_path / "base", base)
    deltas = {name: random_delta(*shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o"]
    refused = run(*arguments, tmp_path / "out", "--dtype", "float16")
    assert refused.status == 2
    assert "exceeds" in refused.stderr
    assert not (tmp_path / "out").exists()
    run_ok(*arguments, tmp_path / "out", "--dtype", "bfloat16")


def test_shards_and_index_are_those_that_transformers_would_write(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base", max_shard_size="6KB")
    adapted = train(base, architecture, tmp_path / "adapter")
    expected = outputs(adapted)
    arguments = ["merge", tmp_path / "adapter", "--base", base, "-o"]
    run_ok(*arguments, tmp_path / "keep")
    name = "model.safetensors.index.json"
    assert (tmp_path / "keep" / name).read_bytes() == (base / name).read_bytes()
    run_ok(*arguments, tmp_path / "sized", "--shard-size", "10KB")
    run_ok(*arguments, tmp_path / "whole", "--shard-size", "5GB")
    assert not (tmp_path / "whole" / name).exists()
    for folder in ("keep", "sized", "whole"):
        assert close(outputs(load(tmp_path / folder, architecture.auto)), expected) <= 1e-5
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert len(files) > 1 or folder == "whole"
        for file in files:
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickled_base_becomes_safetensors(sharded: bool, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if sharded:
        names = list(tensors)
        shards = {"pytorch_model-00001-of-00002.bin": names[:9],
                  "pytorch_model-00002-of-00002.bin": names[9:]}  # fmt: skip
        for file, held in shards.items():
            torch.save({n: tensors[n] for n in held}, base / file)
        weight_map = {n: file for file, held in shards.items() for n in held}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, base / "pytorch_model.bin")
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    merged = load(tmp_path / "out", architecture.auto)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5


def test_tokenizer_beside_the_adapter_wins_and_the_rest_is_copied(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    adapter, base, _ = pair
    (base / "tokenizer.json").write_text("base")
    (base / "chat_template.jinja").write_text("base")
    (base / "code.py").write_text("print()")
    (base / "README.md").write_text("the base's card")
    (base / "sub").mkdir()
    (base / "sub/data.json").write_text("{}")
    (adapter / "tokenizer.json").write_text("adapter")
    (adapter / "optimizer.pt").write_text("no")
    (adapter / "trainer_state.json").write_text("{}")
    before = (base / "config.json").read_bytes()
    run_ok("merge", adapter, "--base", base, "-o", tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == "adapter"
    assert not (out / "chat_template.jinja").exists(), "half a tokenizer of each"
    assert (out / "sub/data.json").exists()
    assert (out / "code.py").exists()
    assert (out / "config.json").read_bytes() == before
    assert not (out / "optimizer.pt").exists()
    assert not (out / "trainer_state.json").exists()
    assert not (out / "adapter_config.json").exists()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    adapter, base, right = pair
    planned = run_ok(
        "merge", adapter, "--base", base, "-o", tmp_path / "out", "--dry-run", "--json"
    )
    assert not (tmp_path / "out").exists()
    run_ok("merge", adapter, "--base", base, "-o", tmp_path / "out")
    written = sum(p.stat().st_size for p in (tmp_path / "out").iterdir()
                  if p.name != "gralora_convert.json")  # fmt: skip
    assert planned.json["total_bytes"] == written
    assert planned.json["tensors"] == len(right)
    assert planned.json["computed"] == len(SHAPES)
    text = run_ok("merge", adapter, "--base", base, "-o", tmp_path / "x", "--dry-run").stdout
    assert "Nothing was written" in text


def test_an_output_is_replaced_only_when_asked(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    adapter, base, _ = pair
    arguments = ["merge", adapter, "--base", base, "-o", tmp_path / "out"]
    run_ok(*arguments)
    before = (tmp_path / "out/model.safetensors").stat().st_ino
    refused = run(*arguments)
    assert refused.status == 2
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "out/model.safetensors").stat().st_ino == before
    run_ok(*arguments, "--overwrite")
    assert (tmp_path / "out/model.safetensors").stat().st_ino != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_bytes_do_not_depend_on_jobs_or_run(
    pair: tuple[Path, Path, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, base, _ = pair
    monkeypatch.setattr("gralora_convert.output.tiles.TILE_BYTES", 512)
    made = set()
    for jobs in (1, 2, 5, 1):
        run_ok("merge", adapter, "--base", base, "-o", tmp_path / "out", "--overwrite",
               "--jobs", jobs)  # fmt: skip
        made.add((tmp_path / "out/model.safetensors").read_bytes())
        made.add((tmp_path / "out/gralora_convert.json").read_bytes())
    assert len(made) == 2


def test_the_receipt_keeps_an_adapter_from_being_merged_twice(
    pair: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    adapter, base, _ = pair
    receipt = run_ok("merge", adapter, "--base", base, "-o", tmp_path / "out", "--json").json
    assert receipt == json.loads((tmp_path / "out/gralora_convert.json").read_text())
    shown = run_ok("inspect", tmp_path / "out", "--json").json
    assert shown["provenance"] == receipt
    refused = run("merge", adapter, "--base", tmp_path / "out", "-o", tmp_path / "twice")
    assert refused.status == 2
    assert "already holds this adapter" in refused.stderr


def test_a_merge_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    deltas = {name: random_delta(*shape, size=0.0) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    refused = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert refused.status == 2
    assert "would change nothing" in refused.stderr
    assert not (tmp_path / "o").exists()


def test_a_square_weight_of_an_unknown_architecture_is_not_guessed(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"a.weight": torch.randn(8, 8)})
    write_adapter(tmp_path / "adapter", {"a": random_delta(8, 8)})
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o"]
    refused = run(*arguments)
    assert refused.status == 2
    assert "fan-in-fan-out-ambiguous" in refused.stderr


def test_a_quantised_base_is_refused_by_name(tmp_path: Path) -> None:
    write_base(tmp_path / "base", model_type="llama", quantization_config={"quant_method": "gptq"})
    deltas = {name: random_delta(*shape) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    refused = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert refused.status == 2
    assert "gptq" in refused.stderr


def test_key_map_places_modules_under_other_names(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    deltas = {f"inner.{n}": random_delta(*shape, seed=3) for n, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o"]
    refused = run(*arguments)
    assert refused.status == 2
    assert "--key-map" in refused.stderr
    run_ok(*arguments, "--key-map", "inner.layers=layers")
    merged = load_file(tmp_path / "o/model.safetensors")
    for name in SHAPES:
        wanted = base[f"{name}.weight"] + dense(deltas[f"inner.{name}"])
        assert torch.allclose(merged[f"{name}.weight"], wanted, atol=1e-6)


PEAK = """
import sys, threading
from gralora_convert.cli.entry import main
peak = 0
def watch():
    global peak
    while not done.wait(0.005):
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]))
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    assert not exit_.code, exit_.code
finally:
    done.set()
    watcher.join()
    print("PEAK", peak)
"""


def peak_memory(*arguments: object) -> float:
    """Peak anonymous memory of one command in a process of its own, MB."""
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(found.stdout.rpartition("PEAK")[2]) / 1024


def test_memory_depends_neither_on_depth_nor_on_the_layout(tmp_path: Path) -> None:
    peaks = {}
    for layers, shards in ((16, 1), (32, 1), (32, 8)):
        shapes = {f"layers.{i}.up": (1024, 1536) for i in range(layers)}
        base = tmp_path / f"base{layers}-{shards}"
        tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        base.mkdir()
        names = list(tensors)
        for shard in range(shards):
            held = names[shard::shards]
            (base / f"part{shard}").mkdir()
            write_model(base / f"part{shard}", {n: tensors[n] for n in held})
            shutil.move(base / f"part{shard}/model.safetensors", base / f"part{shard}.safetensors")
            (base / f"part{shard}").rmdir()
        deltas = {name: random_delta(*shape, r=16, k=2) for name, shape in shapes.items()}
        adapter = write_adapter(tmp_path / f"adapter{layers}-{shards}", deltas)
        peaks[layers, shards] = peak_memory(
            "merge", adapter, "--base", base, "-o", tmp_path / f"out{layers}-{shards}"
        )
    assert max(peaks.values()) <= 1.1 * min(peaks.values()), peaks
    assert max(peaks.values()) < 400


def test_the_library_returns_a_plan(pair: tuple[Path, Path, Tensors], tmp_path: Path) -> None:
    adapter, base, _ = pair
    plan = gc.merge(gc.Adapter.open(adapter), base=gc.Checkpoint.open(base))
    written: list[int] = []
    receipt = plan.write(tmp_path / "out", progress=written.append)
    assert sum(written) == sum(part.nbytes for file in plan.files for part in file.parts)
    assert receipt["command"] == "merge"


def test_the_check_of_a_merge_shares_no_indexing_with_its_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the blocks of either side is a difference, whichever side makes it."""
    from gralora_convert.delta import products

    write_base(tmp_path / "base")
    deltas = {name: random_delta(*shape, hybrid_r=2) for name, shape in SHAPES.items()}
    write_adapter(tmp_path / "adapter", deltas)
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out"]
    row_blocks = products.row_blocks

    def reversed_columns(*given: Any, **options: Any) -> Any:
        return ((left.flip(1), right) for left, right in row_blocks(*given, **options))

    monkeypatch.setattr(products, "row_blocks", reversed_columns)
    outcome = run(*arguments)
    assert outcome.status == 2
    assert "differs from base + delta" in outcome.stderr


DIFFUSION = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ([f"{DIFFUSION}.safetensors"], None),
        ([f"{DIFFUSION}.fp16.safetensors"], None),
        ([f"{DIFFUSION}-0000{i}-of-00002.safetensors" for i in (1, 2)],
         f"{DIFFUSION}.safetensors.index.json"),
        ([f"{DIFFUSION}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
         f"{DIFFUSION}.safetensors.index.fp16.json"),
    ],
)  # fmt: skip
def test_a_model_of_diffusers_keeps_the_names_of_its_files(
    files: list[str], index: str | None, tmp_path: Path
) -> None:
    """As diffusers 0.42.1 saves them, with its layers, all of them nn.Linear and some square."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"blocks.{i}.to_{n}.weight": torch.randn(16, 16) for i in (0, 1) for n in "qk"}
    shares = [dict(list(tensors.items())[i :: len(files)]) for i in range(len(files))]
    for name, share in zip(files, shares, strict=True):
        save_file(share, base / name, {"format": "pt"})
    if index is not None:
        weight_map = {n: f for f, share in zip(files, shares, strict=True) for n in share}
        (base / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    kind = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42.1"}
    (base / "config.json").write_text(json.dumps(kind))
    deltas = {name.removesuffix(".weight"): random_delta(16, 16) for name in tensors}
    write_adapter(tmp_path / "adapter", deltas)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {*files, *filter(None, [index]), "config.json", "README.md",
                       "gralora_convert.json"}  # fmt: skip
    found = {k: v for f in files for k, v in load_file(tmp_path / "out" / f).items()}
    for name, delta in deltas.items():
        right = tensors[f"{name}.weight"] + dense(delta)
        torch.testing.assert_close(found[f"{name}.weight"], right, rtol=0, atol=1e-5)
    if index is not None:
        listed = json.loads((tmp_path / "out" / index).read_text())["weight_map"]
        assert listed == weight_map
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "s", "--shard-size",
           "2KB")  # fmt: skip
    assert f"{DIFFUSION}.safetensors.index.json" in {p.name for p in (tmp_path / "s").iterdir()}
