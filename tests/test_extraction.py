"""`extract`: the adapter between two checkpoints, in real PEFT and against the dense optimum."""

from pathlib import Path

import pytest
import torch

import gralora_convert as gc
from gralora_convert.delta import dense
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok
from tests.models import ARCHITECTURES, Architecture, close, load, outputs, save_base, train
from tests.test_conversion import in_peft


def tune(base: Path, auto: str, folder: Path, *, everything: bool) -> None:
    """A full fine-tune of a few steps (of the linear layers, or of all parameters)."""
    model = load(base, auto)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if everything or (parameter.ndim == 2 and "embed" not in name and "wte" not in name
                              and "wpe" not in name and "lm_head" not in name):  # fmt: skip
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("to", "shape"),
    [("lora", ["--r", "16"]), ("gralora", ["--k", "2", "--r", "16"])],
    ids=["lora", "gralora"],
)
@pytest.mark.parametrize("everything", [False, True], ids=["linear", "everything"])
def test_a_full_rank_extract_is_the_tuned_model_in_peft(
    everything: bool, to: str, shape: list[str], name: str, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base")
    tune(base, architecture.auto, tmp_path / "tuned", everything=everything)
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", to, *shape]
    run_ok("extract", *pair, "-o", tmp_path / "adapter")
    expected = outputs(load(tmp_path / "tuned", architecture.auto))
    if name == "gpt2" and everything:  # its head is tied to the embedding that is saved whole
        merged = tmp_path / "merged"
        run_ok("merge", tmp_path / "adapter", "--base", base, "-o", merged)
        assert (merged / "model.safetensors").exists()
        return
    assert close(outputs(in_peft(base, tmp_path / "adapter")), expected) <= 2e-5
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    assert close(outputs(load(tmp_path / "merged", architecture.auto)), expected) <= 2e-5


def test_what_was_merged_is_found_again(tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    chosen = Architecture(ARCHITECTURES["llama"].build, ["q_proj", "down_proj"])
    train(base, chosen, tmp_path / "adapter", gralora_k=2, r=4, alpha=8)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "tuned")
    found = run_ok(
        "extract", "--base", base, "--tuned", tmp_path / "tuned", "--to", "gralora", "--r", "4",
        "-o", tmp_path / "again", "--json",
    ).json  # fmt: skip
    assert isinstance(found["error"], float)
    assert found["error"] < 1e-5
    source, again = gc.Adapter.open(tmp_path / "adapter"), gc.Adapter.open(tmp_path / "again")
    assert source.modules == again.modules
    for module in source.modules:
        assert torch.allclose(dense(source.delta(module)), dense(again.delta(module)), atol=1e-6)


def test_the_error_is_the_optimum_of_each_block(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base")
    torch.manual_seed(5)
    moved = {f"{n}.weight": torch.randn(s) * 0.1 for n, s in SHAPES.items()}
    write_model(tmp_path / "tuned", tensors | {n: tensors[n] + d for n, d in moved.items()})
    receipt = run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned",
        "--to", "gralora", "--k", "2", "--r", "8", "-o", tmp_path / "out", "--json",
    ).json  # fmt: skip
    lost = total = 0.0
    for delta in moved.values():
        rows, columns = delta.shape
        blocks = delta.view(2, rows // 2, 2, columns // 2).transpose(1, 2)
        values = torch.linalg.svdvals(blocks.double()).square()
        lost, total = lost + float(values[..., 4:].sum()), total + float(values.sum())
    assert receipt["error"] == pytest.approx((lost / total) ** 0.5, rel=0.01)
    assert isinstance(receipt["lora_error"], float)


def test_include_exclude_and_nothing_to_do(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base")
    write_model(tmp_path / "tuned", {n: t + 0.01 * torch.randn_like(t) for n, t in tensors.items()})
    pair = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "4"]
    receipt = run_ok(
        "extract", *pair, "--include", "*.up", "--exclude", "embed*", "--exclude", "norm",
        "-o", tmp_path / "out", "--json",
    ).json  # fmt: skip
    assert [row["module"] for row in receipt["modules"]] == ["layers.0.up", "layers.1.up"]  # type: ignore[attr-defined]
    assert len(receipt["notes"]) == 3  # type: ignore[arg-type]
    same = ["--base", tmp_path / "base", "--tuned", tmp_path / "base", "--to", "lora"]
    refused = run("extract", *same, "-o", tmp_path / "none")
    assert refused.status == 2
    assert "no linear layer differs" in refused.stderr


def test_a_sixteen_bit_model_tells_its_rounding_floor(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base", dtype=torch.bfloat16)
    deltas = {n: random_delta(*s, size=0.05, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    write_adapter(tmp_path / "adapter", deltas)
    gc.merge(tmp_path / "adapter", base=tmp_path / "base").write(tmp_path / "tuned")
    receipt = run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "gralora",
        "--r", "8", "-o", tmp_path / "out", "--json",
    ).json  # fmt: skip
    merged = gc.Checkpoint.open(tmp_path / "tuned")
    assert merged.tensors["layers.0.up.weight"].dtype == "BF16"
    assert isinstance(receipt["rounding_floor"], float)
    assert 0 < receipt["rounding_floor"] < 1
    assert tensors
