"""`convert`: every result loads in real PEFT without a warning and computes what it should."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from gralora_convert.adapters.keys import key_of
from gralora_convert.delta.forms import Gralora, Lora
from gralora_convert.delta.products import dense
from gralora_convert.errors import CheckFailedError, InexactError, MisuseError
from tests import oracle
from tests.builders import SHAPES, random_delta, write_adapter, write_base
from tests.command import run, run_ok
from tests.zoo import ARCHITECTURES, Architecture, close, load, outputs, save_base, train

LLAMA = Architecture(ARCHITECTURES["llama"].build, ["q_proj", "down_proj"])
GPT2 = Architecture(ARCHITECTURES["gpt2"].build, ["c_attn", "c_proj"])


def step(model: torch.nn.Module, steps: int) -> list[float]:
    """A few steps of gradient descent on all that is trainable; the losses on the way."""
    losses = []
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=5e-3)
    model.train()
    for _ in range(steps):
        logits = model(**LLAMA.inputs).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), LLAMA.inputs["input_ids"][:, 1:].flatten()
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def slow(delta: Gralora | Lora) -> oracle.Array:
    """The delta weight by the oracle."""
    if isinstance(delta, Lora):
        return oracle.lora_delta(delta.A.numpy(), delta.B.numpy(), delta.scaling)
    general = (t if t is None else t.numpy() for t in (delta.general_A, delta.general_B))
    return oracle.gralora_delta(delta.A.numpy(), delta.B.numpy(), delta.scaling, *general)


def write_lora(folder: Path, delta: Lora, module: str = "a") -> Path:
    gc.LoraConfig(
        r=delta.r, lora_alpha=delta.scaling * delta.r, target_modules=[module]
    ).save_pretrained(folder)
    factors = {key_of(module, "A", "lora"): delta.A, key_of(module, "B", "lora"): delta.B}
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def lora(base: Path, architecture: Architecture, folder: Path, **config: Any) -> PeftModel:
    """A LoRA that PEFT trained for some steps and saved."""
    torch.manual_seed(2)
    options: dict[str, Any] = {"target_modules": architecture.targets, "r": 4, "lora_alpha": 6}
    model = load(base, architecture.auto)
    adapted = get_peft_model(model, LoraConfig(**(options | config), task_type="CAUSAL_LM"))
    step(adapted, 8)
    adapted.save_pretrained(folder)
    return adapted


def in_peft(base: Path, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """The adapter in real PEFT; any warning fails."""
    model = load(base, "AutoModelForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval()


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda f: next(iter(f), "plain"),
)
@pytest.mark.parametrize("to", ["gralora", "hybrid"])
def test_a_lora_goes_on_as_gralora_from_where_it_was(
    to: str, features: dict[str, Any], tmp_path: Path
) -> None:
    architecture = GPT2 if "bias" in features else LLAMA
    base = save_base(architecture, tmp_path / "base")
    source = lora(base, architecture, tmp_path / "lora", **features)
    expected = outputs(source)
    out = run_ok("convert", tmp_path / "lora", "--to", to, "-o", tmp_path / "new")
    assert "exact" in out.stdout
    converted = in_peft(base, tmp_path / "new", trainable=True)
    assert close(outputs(converted), expected) <= 1e-5
    before = {n: p.detach().clone() for n, p in converted.named_parameters() if p.requires_grad}
    losses = step(converted, 6)
    assert losses[0] == pytest.approx(step(source, 1)[0], rel=1e-4)  # no worse a start
    assert losses[-1] < losses[0]
    moved = [n for n, p in converted.named_parameters() if n in before and (p != before[n]).any()]
    assert len(moved) == len(before)  # every factor learns
    assert run("validate", tmp_path / "new", "--base", base).status == 0


SOURCES: dict[str, dict[str, Any]] = {
    "plain": {"gralora_k": 2},
    "hybrid": {"gralora_k": 4, "hybrid_r": 3, "alpha": 10.5},
    "biased": {"bias": "gralora_only"},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_gralora_to_lora_is_the_same_function_merged_or_not(
    architecture: Architecture, source: str, tmp_path: Path
) -> None:
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter", **SOURCES[source])
    expected = outputs(adapted)
    run_ok("convert", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "lora")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    k, h = SOURCES[source].get("gralora_k", 2), SOURCES[source].get("hybrid_r", 0)
    assert config["r"] == config["lora_alpha"] == min(k * 8 + h, 16)
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    as_lora = in_peft(base, tmp_path / "lora")
    assert close(outputs(as_lora), expected) <= 1e-5
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    ours = dict(load(tmp_path / "merged", architecture.auto).named_parameters())
    for name, parameter in as_lora.merge_and_unload().named_parameters():
        assert torch.allclose(parameter, ours[name], atol=2e-6), name


@pytest.mark.parametrize(
    ("arguments", "exact"),
    [
        (["--to", "gralora", "--k", "4"], True),
        (["--to", "gralora", "--r", "16"], True),
        (["--to", "hybrid", "--hybrid-r", "2"], True),
        (["--to", "gralora", "--alpha", "5"], True),
        (["--to", "gralora", "--k", "4", "--r", "8", "--allow-inexact"], False),
        (["--to", "gralora", "--r", "4", "--allow-inexact"], False),
        (["--to", "lora", "--r", "6", "--allow-inexact"], False),
        (["--to", "lora", "--max-error", "0.3"], False),
        (["--to", "gralora", "--max-error", "0.3"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_within_the_family(arguments: list[str], exact: bool, tmp_path: Path) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    adapted = train(base, LLAMA, tmp_path / "adapter", gralora_k=2, steps=20)
    receipt = run_ok(
        "convert", tmp_path / "adapter", *arguments, "-o", tmp_path / "new", "--json"
    ).json
    error = receipt["error"]
    assert isinstance(error, float)
    source, result = gc.Adapter.open(tmp_path / "adapter"), gc.Adapter.open(tmp_path / "new")
    pairs = [(dense(source.delta(m)).double(), dense(result.delta(m)).double())
             for m in source.modules]  # fmt: skip
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    total = sum(float(a.square().sum()) for a, _ in pairs)
    measured = (lost / total) ** 0.5
    assert measured == pytest.approx(error, rel=0.01, abs=1e-6)
    assert (error < 1e-6) is exact
    if "--max-error" in arguments:
        assert error <= 0.3
    in_peft(base, tmp_path / "new")
    if exact:
        assert close(outputs(in_peft(base, tmp_path / "new")), outputs(adapted)) <= 1e-5


def test_what_would_be_lost_is_refused_with_the_rank_that_loses_nothing(tmp_path: Path) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    train(base, LLAMA, tmp_path / "adapter", gralora_k=2, steps=20)
    refused = run("convert", tmp_path / "adapter", "--to", "lora", "--r", "6", "-o", tmp_path / "x")
    assert refused.status == 2
    assert "exact from r=16" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


SHAPE = {"out_features": 48, "in_features": 24}
FAMILY: dict[str, Gralora | Lora] = {
    "gralora k=2": random_delta(**SHAPE, r=4, k=2),
    "gralora k=4": random_delta(**SHAPE, r=4, k=4, alpha=7),
    "hybrid k=2": random_delta(**SHAPE, r=4, k=2, hybrid_r=3),
    "hybrid k=4": random_delta(**SHAPE, r=8, k=4, hybrid_r=1),
    "lora": Lora(torch.randn(5, 24), torch.randn(48, 5), 1.25),
}
WANTED: list[dict[str, Any]] = [
    {"to": "gralora"},
    {"to": "gralora", "hybrid_r": 0},
    {"to": "gralora", "k": 1},
    {"to": "gralora", "k": 2, "alpha": 3},
    {"to": "gralora", "k": 3},
    {"to": "gralora", "k": 4, "r": 24, "alpha": 10.5},
    {"to": "gralora", "k": 6, "r": 24},
    {"to": "hybrid"},
    {"to": "hybrid", "k": 1, "hybrid_r": 2},
    {"to": "hybrid", "k": 2, "hybrid_r": 1},
    {"to": "hybrid", "k": 3, "hybrid_r": 3},
    {"to": "hybrid", "k": 4, "hybrid_r": 2, "alpha": 3},
    {"to": "hybrid", "k": 4, "r": 24, "hybrid_r": 6},
    {"to": "lora"},
    {"to": "lora", "r": 24},
    {"to": "lora", "r": 30, "alpha": 12},
]


def write_source(folder: Path, delta: Gralora | Lora) -> Path:
    return write_lora(folder, delta) if isinstance(delta, Lora) else write_adapter(
        folder, {"a": delta}
    )  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("source", FAMILY)
def test_every_shape_that_can_hold_an_update_holds_it(
    source: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    adapter = write_source(tmp_path / "adapter", FAMILY[source])
    gc.convert(adapter, **wanted).write(tmp_path / "new")  # refuses if anything would be lost
    result = gc.Adapter.open(tmp_path / "new")
    before = slow(gc.Adapter.open(adapter).delta("a"))
    after = slow(result.delta("a"))
    assert np.abs(after - before).max() <= 2e-6 * np.abs(before).max()
    config = result.config
    assert result.kind == wanted["to"]
    if isinstance(config, gc.GraloraConfig):
        assert config.gralora_k == wanted.get("k", config.gralora_k)
        assert config.hybrid_r == wanted.get("hybrid_r", config.hybrid_r)
        if "alpha" not in wanted:  # the scaling is kept
            assert config.scaling == pytest.approx(gc.Adapter.open(adapter).scaling("a"))
    else:
        assert config.lora_alpha == wanted.get("alpha", config.r)
    if "r" in wanted:
        assert config.r == wanted["r"]
    if "alpha" in wanted and isinstance(config, gc.GraloraConfig):
        assert config.alpha == wanted["alpha"]


@settings(max_examples=30, deadline=None)
@given(
    k=st.sampled_from([1, 2, 3]), s=st.integers(1, 2), h=st.integers(0, 2),
    wanted=st.sampled_from(WANTED[:6] + WANTED[7:12] + WANTED[13:14]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_whole_numbers_stay_as_they_are(
    k: int, s: int, h: int, wanted: dict[str, Any], seed: int, tmp_path_factory: Any
) -> None:
    """Integer factors and a scaling that is a power of two: where nothing but the layout changes,
    not a bit does."""
    folder = tmp_path_factory.mktemp("whole")
    g = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=g).float()

    general = (whole(h, 24), whole(48, h)) if h else (None, None)
    delta = Gralora(whole(k, 24 // k, k * s), whole(k, k * s, 48 // k), 2.0, *general)
    adapter = write_adapter(folder / "adapter", {"a": delta})
    gc.convert(adapter, **wanted).write(folder / "new")
    before, after = slow(delta), slow(gc.Adapter.open(folder / "new").delta("a"))
    if wanted == {"to": "lora"} and k * k * s + h <= 24:
        assert np.array_equal(before, after)
    assert np.abs(after - before).max() <= 2e-6 * max(1, np.abs(before).max())


def test_the_rank_that_loses_nothing_is_that_of_the_values(tmp_path: Path) -> None:
    """Factors with dependent columns need less than their shapes say."""
    full = random_delta(48, 24, r=8, k=2)
    half = Gralora(full.A.clone(), full.B.clone(), full.scaling)
    half.B.view(2, 2, 4, 24)[:, :, 1:] = 0  # one live slot in each block
    adapter = write_adapter(tmp_path / "adapter", {"a": half})
    with pytest.raises(InexactError) as refused:
        gc.convert(adapter, to="lora", r=3)
    assert refused.value.exact_rank == 4
    assert 0 < refused.value.error < 1
    plan = gc.convert(adapter, to="lora", r=4)
    plan.write(tmp_path / "new")
    assert gc.Adapter.open(tmp_path / "new").config.r == 4
    assert gc.convert(adapter, to="gralora", r=2).files[0].parts[0].shape == (2, 12, 2)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("to", ["lora", "gralora"])
def test_the_rank_for_an_error_is_the_smallest(to: str, k: int, tmp_path: Path) -> None:
    deltas = {name: random_delta(48, 24, r=8, k=2, seed=i) for i, name in enumerate("ab")}
    adapter = write_adapter(tmp_path / "adapter", deltas)
    options: dict[str, Any] = {"to": to} if to == "lora" else {"to": to, "k": k}
    width = 1 if to == "lora" else k
    gc.convert(adapter, max_error=0.4, **options).write(tmp_path / "new")
    r = gc.Adapter.open(tmp_path / "new").config.r
    tails = sum(oracle.tails(slow(delta), width) for delta in deltas.values())
    assert isinstance(tails, np.ndarray)
    errors = np.sqrt(tails / tails[0])
    assert errors[r // width] <= 0.4 < errors[r // width - 1]
    receipt = json.loads((tmp_path / "new/gralora_convert.json").read_text())
    assert receipt["error"] == pytest.approx(errors[r // width], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "hybrid", "hybrid_r": 0}, "at least 1"),
        ({"to": "lora", "k": 2}, "neither k nor hybrid_r"),
        ({"to": "gralora", "hybrid_r": 2}, "no hybrid_r"),
        ({"to": "gralora", "k": 5}, "k=5 does not divide"),
        ({"to": "gralora", "r": 3}, "not a positive multiple"),
        ({"to": "gralora", "alpha": 0}, "cannot carry an update"),
        ({"to": "lora", "r": 4, "max_error": 0.1}, "excludes `r`"),
        ({"to": "lora", "max_error": 1.5}, "between 0 and 1"),
        ({"to": "lora", "device": "nowhere"}, "`device='nowhere'`"),
        ({"to": "lora", "device": "meta"}, "`device='meta'`"),
    ],
    ids=str,
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"a": random_delta(48, 24)})
    with pytest.raises(MisuseError, match=words):
        gc.convert(adapter, **arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    delta = random_delta(48, 24)
    delta.A[1, 2, 3] = bad
    adapter = write_adapter(tmp_path / "adapter", {"a": delta})
    for options in ([], ["--r", "4", "--allow-inexact"], ["--max-error", "0.1"]):
        refused = run("convert", adapter, "--to", "lora", "-o", tmp_path / "new", *options)
        assert refused.status == 2
        assert "NaN or infinity" in refused.stderr
        assert not (tmp_path / "new").exists()


def test_an_update_of_zero_is_converted(tmp_path: Path) -> None:
    delta = random_delta(48, 24, size=0.0)
    adapter = write_adapter(tmp_path / "adapter", {"a": delta})
    for to in ("lora", "gralora", "hybrid"):
        gc.convert(adapter, to=to).write(tmp_path / to)
        assert not gc.dense(gc.Adapter.open(tmp_path / to).delta("a")).any()


def test_the_closing_lines_say_how_to_serve(tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", {"layers.0.o_proj": random_delta(96, 96, r=24, k=2)}
    )
    done = run_ok("convert", adapter, "--to", "lora", "-o", tmp_path / "new")
    assert "--max-lora-rank 64" in done.stdout  # vLLM's next choice after 48
    assert "--max-lora-rank 48" in done.stdout  # SGLang takes any
    assert "--max-loras" in done.stdout
    large = write_adapter(
        tmp_path / "large", {"layers.0.o_proj": random_delta(1100, 1100, r=260, k=4)}
    )
    done = run_ok("convert", large, "--to", "lora", "-o", tmp_path / "served")
    assert "above vLLM's largest, 512" in done.stderr
    assert "LoRAX" in done.stderr
    assert "vllm serve" not in done.stdout


def test_bytes_do_not_depend_on_jobs(tmp_path: Path) -> None:
    deltas = {
        name: random_delta(*shape, r=8, k=2, hybrid_r=2, seed=i)
        for i, (name, shape) in enumerate({"a": (24, 32), "b": (32, 24), "c": (16, 16)}.items())
    }
    adapter = write_adapter(tmp_path / "adapter", deltas)
    write_base(tmp_path / "base")
    made = []
    for jobs in (1, 3):
        gc.convert(adapter, to="lora", r=5, allow_inexact=True).write(
            tmp_path / f"out{jobs}", jobs=jobs
        )
        made.append((tmp_path / f"out{jobs}" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_bfloat16_adapters_stay_bfloat16(tmp_path: Path) -> None:
    deltas = {"a": random_delta(24, 32, r=8, k=2)}
    short = {n: Gralora(d.A.bfloat16(), d.B.bfloat16(), d.scaling) for n, d in deltas.items()}
    adapter = write_adapter(tmp_path / "adapter", short)
    gc.convert(adapter, to="lora").write(tmp_path / "lora")
    result = gc.Adapter.open(tmp_path / "lora")
    assert {spec.dtype for spec in result.tensors.values()} == {"BF16"}
    assert torch.equal(dense(result.delta("a")), dense(gc.Adapter.open(adapter).delta("a")))


@pytest.mark.parametrize(
    ("dtypes", "written"),
    [
        ((torch.bfloat16, torch.float32), "F32"),
        ((torch.float16, torch.bfloat16), "F32"),
        ((torch.float32, torch.float64), "F64"),
        ((torch.float8_e4m3fn, torch.float8_e4m3fn), "F32"),
        ((torch.float16, torch.float16), "F16"),
    ],
    ids=str,
)
def test_factors_of_any_dtypes_are_merged_and_kept(
    dtypes: tuple[torch.dtype, torch.dtype], written: str, tmp_path: Path
) -> None:
    deltas = {name: random_delta(*shape, r=8, k=2) for name, shape in SHAPES.items()}
    adapter = write_adapter(tmp_path / "adapter", deltas)
    path = adapter / "adapter_model.safetensors"
    stored = {
        name: tensor.to(dtypes["gralora_B" in name]) for name, tensor in load_file(path).items()
    }
    save_file(stored, path, metadata={"format": "pt"})
    run_ok("convert", adapter, "--to", "lora", "-o", tmp_path / "lora")
    result, source = gc.Adapter.open(tmp_path / "lora"), gc.Adapter.open(adapter)
    assert {spec.dtype for spec in result.tensors.values()} == {written}
    for name in deltas:
        assert torch.equal(dense(result.delta(name)), dense(source.delta(name)))
    write_base(tmp_path / "base")
    run_ok("merge", adapter, "--base", tmp_path / "base", "-o", tmp_path / "merged")
    pair = ["--base", tmp_path / "base", "--merged", tmp_path / "merged", "--level", "modules"]
    run_ok("verify", adapter, *pair)


@pytest.mark.parametrize("alpha", [1e8, 1e-4], ids=["too large", "too small"])
def test_factors_that_float16_cannot_hold_are_refused(alpha: float, tmp_path: Path) -> None:
    deltas = {"a": random_delta(24, 32, r=8, k=2, alpha=alpha)}
    adapter = write_adapter(tmp_path / "adapter", deltas)
    arguments = ["convert", adapter, "--to", "lora", "-o", tmp_path / "lora"]
    for more in ([], ["--no-verify"]):
        refused = run(*arguments, "--dtype", "float16", *more)
        assert refused.status == 2
        assert "a: float16 cannot hold its factors" in refused.stderr
        assert not (tmp_path / "lora").exists()
    with pytest.raises(CheckFailedError, match='`dtype="float32"`'):
        gc.convert(adapter, to="lora", dtype="float16").write(tmp_path / "lora")
    run_ok(*arguments, "--dtype", "bfloat16")


@pytest.mark.parametrize("to", ["gralora", "lora"])
@pytest.mark.parametrize("layers", [0, [0]], ids=str)
def test_layer_0_keeps_its_pattern(layers: int | list[int], to: Any, tmp_path: Path) -> None:
    deltas = {"model.layer.0.q": random_delta(48, 24)}
    chosen = {"target_modules": ["q"], "layers_to_transform": layers, "layers_pattern": "layer"}
    adapter = write_adapter(tmp_path / "adapter", deltas, **chosen)
    gc.convert(adapter, to=to).write(tmp_path / "new")
    config = gc.Adapter.open(tmp_path / "new").config
    assert (config.layers_to_transform, config.layers_pattern) == (layers, "layer")
