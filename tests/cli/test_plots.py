"""Pictures: every format, the numbers behind them, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.cli import plots
from gralora_convert.delta.forms import Gralora, Lora
from gralora_convert.delta.products import dense
from gralora_convert.delta.svd import block_norms, energies
from gralora_convert.verbs.spectra import dissect
from tests.builders import random_delta, write_adapter
from tests.command import run, run_ok

ROOT = Path(__file__).parent.parent.parent
LLAMA, BASE = "fixtures/peft-0.21.2/llama-hybrid", "fixtures/bases/llama"
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
DELTAS = [
    random_delta(24, 16, r=8, k=4, hybrid_r=3),
    random_delta(24, 16, r=4, k=1),
    Lora(torch.randn(3, 16), torch.randn(24, 3), -0.5),
]


@pytest.mark.parametrize("delta", DELTAS)
def test_block_norms_are_those_of_the_dense_blocks(delta: Gralora | Lora) -> None:
    matrix, norms = dense(delta, torch.float64), block_norms(delta)
    k = len(norms)
    for j, rows in enumerate(matrix.chunk(k)):
        for n, block in enumerate(rows.chunk(k, dim=1)):
            assert float(norms[j, n]) == pytest.approx(float(block.norm()), rel=1e-5)


@pytest.mark.parametrize("delta", DELTAS)
def test_energies_are_the_squared_singular_values(delta: Gralora | Lora) -> None:
    values = torch.linalg.svdvals(dense(delta, torch.float64)).square()
    found = energies(delta)
    count = min(len(found), len(values))
    assert torch.allclose(found[:count], values[:count], rtol=1e-5, atol=1e-9 * float(values[0]))
    assert float(found.sum()) == pytest.approx(float(values.sum()), rel=1e-5)


def test_the_anatomy_of_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    adapter, counted = Adapter.open(LLAMA), list[int]()
    threads = torch.get_num_threads()
    found = dissect(adapter, BASE, progress=counted.append)
    assert torch.get_num_threads() == threads
    assert sum(counted) == sum(adapter.factor_bytes(m) for m in adapter.modules)
    assert found.exact_rank == 11
    assert found.is_relative
    for part in found.parts:
        assert 0 < (part.relative or 0) < 1
        ranks = [part.rank_for(energy) for energy in (0.5, 0.9, 0.99, 1.0)]
        assert ranks == sorted(ranks)
        matrix = dense(adapter.delta(part.module), torch.float64)
        assert part.norm == pytest.approx(float(matrix.norm()), rel=1e-5)


def test_a_zero_update_needs_no_rank(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"a": random_delta(8, 8, r=4, size=0.0), "b": random_delta(8, 8, r=4)})
    zero, other = dissect(tmp_path).parts
    assert (zero.norm, zero.rank_for(0.9)) == (0.0, 0)
    assert other.rank_for(0.9) > 0


@pytest.mark.parametrize("suffix", STARTS)
def test_inspect_draws(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    written = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.{suffix}"
        outcome = run_ok("inspect", LLAMA, "--base", BASE, "--plot", path)
        assert str(path) in outcome.stderr
        written.append(path.read_bytes())
    assert written[0].startswith(STARTS[suffix])
    assert written[0] == written[1], "the same numbers are the same bytes"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"one.{suffix}", f"two.{suffix}"]


def test_many_kinds_and_modules_without_layers_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [f"x.{i}.{kind}" for i in (3, 4) for kind in "abcdefghij"] + [
        "head",
        "e.0.y.1",
        "e.0.y.2",
    ]
    folder = write_adapter(tmp_path / "a", {name: random_delta(8, 8, r=4) for name in names})
    run_ok("inspect", folder, "--plot", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_what_lies_outside_of_layers_is_in_none() -> None:
    table = plots._Table(["x.0.q", "head", "x.1.q"])
    assert table.columns == ["-", "0", "1"]
    assert [table.cell(name) for name in table.places] == [(0, 1), (1, 0), (0, 2)]
    assert plots._Table(["x.3.q"]).columns == ["3"]
    assert plots._Table(["head"]).columns == ["-"]


def test_verify_draws_right_and_wrong_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    run_ok("merge", LLAMA, "--base", BASE, "-o", tmp_path / "merged")
    for merged, status in ((tmp_path / "merged", 0), (BASE, 1)):
        path = tmp_path / f"{status}.svg"
        outcome = run("verify", LLAMA, "--base", BASE, "--merged", merged, "--level", "weights",
                      "--plot", path)  # fmt: skip
        assert outcome.status == status, outcome.stderr
        assert path.exists()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    outcome = run("inspect", LLAMA, "--plot", tmp_path / "x.jpg")
    assert outcome.status == 2
    assert ".png, .svg, .pdf" in outcome.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["inspect", LLAMA], ["verify", LLAMA, "--base", BASE, "--merged", BASE]):
        outcome = run(*command, "--plot", tmp_path / "x.png")
        assert outcome.status == 2
        assert "pip install 'gralora-convert[plot]'" in outcome.stderr.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    pytest.importorskip("matplotlib")
    assert run("inspect", BASE, "--plot", tmp_path / "x.png").status == 2
    outcome = run("inspect", LLAMA, "--plot", tmp_path / "nowhere" / "x.png")
    assert outcome.status == 2
    assert "cannot be written" in outcome.stderr


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_convert_draws_the_trade_of_rank_and_error(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    monkeypatch.chdir(ROOT)
    seen: dict[str, Any] = {}
    legend = axes.Axes.legend

    def noted(self: Any, **keywords: Any) -> Any:
        for line in self.lines:
            seen[line.get_label()] = line.get_ydata()
        return legend(self, **keywords)

    monkeypatch.setattr("matplotlib.axes.Axes.legend", noted)
    path = tmp_path / "trade.png"
    options = ("--to", "lora", "--max-error", "0.05", "-o", tmp_path / "out", "--plot", path)
    run_ok("convert", LLAMA, *options, *more)
    assert path.read_bytes().startswith(STARTS["png"])
    errors = seen["all modules"]
    written = next(label for label in seen if label.startswith("written: "))
    assert written == f"written: r=5, error {errors[5]:.3g}"
    assert errors[4] > 0.05 >= errors[5], "the rank that was asked for by its error"
    if not more:
        receipt = json.loads((tmp_path / "out" / "gralora_convert.json").read_text())
        assert receipt["error"] == pytest.approx(errors[5], rel=1e-4)


def test_the_trade_shows_the_largest_ranks_of_servers(tmp_path: Path) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    labels: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axes.Axes, "legend", lambda self, **_: labels.extend(
            line.get_label() for line in self.lines))  # fmt: skip
        folder = write_adapter(tmp_path / "a", {"q": random_delta(256, 256, r=144, k=2)})
        limits = {"vLLM": 512, "LoRAX": 128}
        plots.draw_trade(dissect(folder), {"q": 64}, limits, tmp_path / "x.svg")
    assert "LoRAX: at most 128" in labels
    assert not any(label.startswith("vLLM") for label in labels), "no rank here is above 512"


def test_only_a_lora_has_a_trade(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = run("convert", LLAMA, "--to", "gralora", "-o", tmp_path / "out",
                  "--plot", tmp_path / "x.png")  # fmt: skip
    assert outcome.status == 2
    assert "--to lora" in outcome.stderr
    assert not (tmp_path / "out").exists()
