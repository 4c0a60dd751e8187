"""`verify`: right merges pass whoever made them, wrong ones are found and named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import gralora_convert as gc
from gralora_convert.delta import Gralora, dense
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok
from tests.models import ARCHITECTURES, save_base, train

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def setting(
    folder: Path, *, dtype: torch.dtype, rho: float, k: int = 2, hybrid_r: int = 4, seed: int = 0
) -> tuple[Tensors, dict[str, Gralora]]:
    """A base and an adapter on disk with |delta| / |W| = rho; returns tensors and deltas."""
    base = write_base(folder / "base", dtype=dtype, seed=seed)
    deltas = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        delta = random_delta(*shape, k=k, hybrid_r=hybrid_r, seed=seed * 10 + i)
        size = rho * float(base[f"{name}.weight"].double().norm() / dense(delta).double().norm())
        b = None if delta.general_B is None else delta.general_B * size
        deltas[name] = Gralora(delta.A, delta.B * size, delta.scaling, delta.general_A, b)
    write_adapter(folder / "adapter", deltas)
    return base, deltas


def added(base: Tensors, deltas: dict[str, torch.Tensor]) -> Tensors:
    """base + deltas in float32, rounded once."""
    merged = dict(base)
    for name, delta in deltas.items():
        weight = base[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return merged


def audit(folder: Path, merged: Tensors, level: str = "modules") -> gc.Equivalence:
    write_model(folder / "merged", merged)
    return gc.verify(
        folder / "adapter", base=folder / "base", merged=folder / "merged", level=level
    )


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    log_rho=st.floats(-4, -0.52),
    k=st.sampled_from([1, 2, 4]),
    hybrid_r=st.sampled_from([0, 4]),
)
def test_right_merges_raise_no_alarm(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int, dtype: torch.dtype, log_rho: float, k: int, hybrid_r: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("right")
    base, deltas = setting(folder, dtype=dtype, rho=10**log_rho, k=k, hybrid_r=hybrid_r, seed=seed)
    found = audit(folder, added(base, {name: dense(delta) for name, delta in deltas.items()}))
    assert found.ok, found.as_text()
    if any((added(base, {n: dense(d)})[f"{n}.weight"] != base[f"{n}.weight"]).any()
           for n, d in deltas.items()):  # fmt: skip
        plan = gc.merge(folder / "adapter", base=folder / "base")
        plan.write(folder / "ours")
        ours = gc.verify(
            folder / "adapter", base=folder / "base", merged=folder / "ours", level="modules"
        )
        assert ours.ok, ours.as_text()


def _blocks(delta: Gralora) -> torch.Tensor:
    """The blocks [j, n, o, i] of a delta without its general part."""
    plain = dense(Gralora(delta.A, delta.B, delta.scaling))
    k = delta.k
    return plain.view(k, plain.shape[0] // k, k, -1).permute(0, 2, 1, 3).clone()


def _from_blocks(blocks: torch.Tensor, delta: Gralora) -> torch.Tensor:
    general = dense(delta) - dense(Gralora(delta.A, delta.B, delta.scaling))
    return blocks.permute(0, 2, 1, 3).reshape_as(general) + general


def transposed(delta: Gralora) -> torch.Tensor:
    return _from_blocks(_blocks(delta).transpose(0, 1), delta)


def slot_order(delta: Gralora) -> torch.Tensor:
    k, m, r = delta.A.shape
    a = delta.A.view(k, m, r // k, k).transpose(2, 3).reshape(k, m, r)
    return dense(Gralora(a, delta.B, delta.scaling, delta.general_A, delta.general_B))


def reversed_k(delta: Gralora) -> torch.Tensor:
    return dense(Gralora(delta.A.flip(0), delta.B, delta.scaling, delta.general_A, delta.general_B))


def one_block_missing(delta: Gralora) -> torch.Tensor:
    blocks = _blocks(delta)
    blocks[1, 0] = 0
    general = dense(delta) - dense(Gralora(delta.A, delta.B, delta.scaling))
    p, m = blocks.shape[2:]
    general[p : 2 * p, :m] = 0
    return _from_blocks(blocks, Gralora(delta.A, delta.B, delta.scaling)) + general


def without_hybrid(delta: Gralora) -> torch.Tensor:
    return dense(Gralora(delta.A, delta.B, delta.scaling))


def alpha_over_r(delta: Gralora) -> torch.Tensor:
    return dense(delta) * (delta.r + delta.hybrid_r) / delta.r


MISTAKES: dict[str, tuple[Callable[[Gralora], torch.Tensor], str]] = {
    "transposed blocks": (transposed, "transposed"),
    "slot order": (slot_order, "rank slots of A"),
    "reversed k": (reversed_k, "reversed"),
    "one block missing": (one_block_missing, "(1, 0) is missing"),
    "alpha / r": (alpha_over_r, "alpha / r"),
    "one percent": (lambda d: dense(d) * 1.01, "scaling is off by a factor of 1.0"),
    "hybrid missing": (without_hybrid, "hybrid part is missing"),
    "twice": (lambda d: dense(d) * 2, "applied twice"),
    "nothing": (lambda d: dense(d) * 0, "not applied"),
    "sign": (lambda d: -dense(d), "sign"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found_and_named(mistake: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, deltas = setting(tmp_path, dtype=dtype, rho=0.03)
    make, words = MISTAKES[mistake]
    found = audit(tmp_path, added(base, {name: make(delta) for name, delta in deltas.items()}))
    assert not found.ok
    assert {row.module for row in found.wrong} == set(deltas)
    assert all(words in row.what for row in found.wrong), found.as_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_else_can_be_wrong_is_found_and_named(dtype: torch.dtype, tmp_path: Path) -> None:
    base, deltas = setting(tmp_path, dtype=dtype, rho=0.01)
    right = added(base, {name: dense(delta) for name, delta in deltas.items()})
    left_out = right | {"layers.1.up.weight": base["layers.1.up.weight"]}
    found = audit(tmp_path, left_out)
    assert [row.module for row in found.wrong] == ["layers.1.up"]
    assert found.as_json()["weights"]["worst_module"] == "layers.1.up"  # type: ignore[index]

    changed = right | {"norm.weight": right["norm.weight"] * 1.01}
    assert [row.tensor for row in audit(tmp_path, changed).wrong] == ["norm.weight"]

    missing = {name: tensor for name, tensor in right.items() if name != "norm.weight"}
    assert "is missing" in audit(tmp_path, missing).wrong[0].what

    extra = right | {"more.weight": torch.ones(3, 4)}
    assert "neither in base nor adapter" in audit(tmp_path, extra).wrong[0].what

    other = write_base(tmp_path / "other", dtype=dtype, seed=9)
    wrong_base = added(other, {name: dense(delta) for name, delta in deltas.items()})
    assert "another base" in audit(tmp_path, wrong_base).wrong[0].what

    weight = right["layers.0.up.weight"].clone()
    weight[3, 4] = float("nan")
    found = audit(tmp_path, right | {"layers.0.up.weight": weight})
    assert "NaN" in found.wrong[0].what
    found.as_json()


def test_levels_leave_out_what_they_do_not_run(tmp_path: Path) -> None:
    base, deltas = setting(tmp_path, dtype=torch.float32, rho=0.01)
    right = added(base, {name: dense(delta) for name, delta in deltas.items()})
    weights = audit(tmp_path, right, "weights").as_json()
    assert weights["ok"] is True
    assert weights["modules"] is None
    assert weights["model"] is None
    modules = audit(tmp_path, right, "modules").as_json()
    assert isinstance(modules["modules"], dict)
    assert modules["model"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merges_written_by_peft_are_audited_from_their_files(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base", dtype)
    adapted = train(base, architecture, tmp_path / "adapter", hybrid_r=2)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    outcome = run(
        "verify", tmp_path / "adapter", "--base", base, "--merged", tmp_path / "merged", "--json"
    )
    found = outcome.json
    if name == "llama-tied":  # PEFT's merge changes the embeddings, too
        assert outcome.status == 1
        assert "embed_tokens" in outcome.stdout
        return
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    assert isinstance(found["model"], dict)
    assert found["model"]["ok"] is True


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_whole_model_tells_a_wrong_merge_from_a_right_one(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base")
    train(base, architecture, tmp_path / "adapter", hybrid_r=2, bias="all")
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    arguments = ["verify", tmp_path / "adapter", "--base", base, "--merged"]
    right = run_ok(*arguments, tmp_path / "merged", "--json").json
    assert isinstance(right["model"], dict)
    assert right["model"]["ok"] is True
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    target = next(n for n in tensors if n.endswith((".q.weight", "q_proj.weight", "query.weight",
                                                    "c_attn.weight")))  # fmt: skip
    write_model(tmp_path / "merged", tensors | {target: tensors[target].flip(0)})
    wrong = run(*arguments, tmp_path / "merged", "--json")
    assert wrong.status == 1
    assert isinstance(wrong.json["model"], dict)
    assert wrong.json["model"]["ok"] is False
