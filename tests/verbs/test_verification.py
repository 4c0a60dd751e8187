"""`verify`: right merges pass whoever made them, wrong ones are found and named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file

import gralora_convert as gc
from benchmarks import peft_merges
from gralora_convert.delta.products import dense
from gralora_convert.disk.checkpoint import Checkpoint
from gralora_convert.disk.specs import Rows
from gralora_convert.verbs.verification import audit as auditing
from gralora_convert.verbs.verification.comparison import Comparison
from gralora_convert.verbs.verification.factored import Factored
from tests.builders import random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok
from tests.merges import SHAPES, WRONG, Setting, Tensors, applies, setting, wrong_modules
from tests.zoo import ARCHITECTURES, save_base, train

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["compared", "measured"])
def compared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Small matrices are measured, element by element; `compared` is what becomes of large ones."""
    if request.param:
        monkeypatch.setattr(auditing, "WHOLE", 0)
    return bool(request.param)


def audit(setting: Setting, merged: Tensors, level: str = "modules") -> gc.Equivalence:
    setting.write(merged)
    return gc.verify(
        setting.folder / "adapter",
        base=setting.folder / "base",
        merged=setting.folder / "merged",
        level=level,
        fan_in_fan_out={"*": setting.transposed},
    )


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    written=st.sampled_from([None, *DTYPES]),
    log_rho=st.floats(-4, -0.52),
    k=st.sampled_from([1, 2, 4, 8]),
    hybrid_r=st.sampled_from([0, 4]),
    transposed=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("compared")
def test_right_merges_raise_no_alarm(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int, dtype: torch.dtype, written: torch.dtype | None, log_rho: float, k: int,
    hybrid_r: int, transposed: bool,
) -> None:  # fmt: skip
    made = setting(
        tmp_path_factory.mktemp("right"), dtype=dtype, rho=10**log_rho, k=k, hybrid_r=hybrid_r,
        seed=seed, transposed=transposed, written=written,
    )  # fmt: skip
    found = audit(made, made.right())
    assert found.ok, found.as_text()
    assert found.as_json()["weights"]["rows"]  # type: ignore[index]


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_that_was_rounded_to_the_adapters_16_bits_is_right(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """What PEFT does with adapters of 16 bits (autocast_adapter_dtype=False)."""
    made = setting(tmp_path, dtype=torch.float32, rho=0.03, factors=dtype)
    found = audit(made, made.every(lambda delta: dense(delta).to(dtype).float()))
    assert found.ok, found.as_text()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16])
def test_merges_by_other_sums_are_not_measured_element_by_element(
    stored: torch.dtype, factors: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in float64 stand for those of another order; 16-bit updates are rounded, as by PEFT."""
    monkeypatch.setattr(auditing, "WHOLE", 0)
    monkeypatch.setattr(Comparison, "_tiles", None)
    made = setting(tmp_path, dtype=stored, rho=0.03, factors=factors)
    found = audit(
        made, made.every(lambda delta: dense(delta, torch.float64).to(factors).float()), "weights"
    )
    assert found.ok, found.as_text()


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", WRONG)
def test_every_mistake_is_found_and_named(
    mistake: str, dtype: torch.dtype, transposed: bool, compared: bool, tmp_path: Path
) -> None:
    made, wrong = setting(tmp_path, dtype=dtype, transposed=transposed), WRONG[mistake]
    merged = made.write(wrong.make(made))
    arguments = ["verify", tmp_path / "adapter", "--base", tmp_path / "base", "--merged", merged]
    arguments += ["--fan-in-fan-out" if transposed else "--linear", "*"]
    outcome = run(*arguments, "--level", "weights", "--json")
    assert outcome.status == 1, outcome.stderr
    weights = outcome.json["weights"]
    assert isinstance(weights, dict)
    rows = [row for row in weights["rows"] if row["worst"] > 1]
    assert all(words in row["what"] for row in rows for words in wrong.words), rows
    modules = wrong_modules(wrong)
    assert modules is None or {row["module"] for row in rows} == modules
    assert weights["worst_module"] in {row["module"] for row in rows}
    if compared:
        return
    text = run(*arguments, "--level", "weights")
    assert text.status == 1
    assert text.stdout.endswith("NOT the same function\n")
    assert all(words in text.stdout for words in wrong.words)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_mistakes_are_named_for_other_numbers_of_blocks(k: int, tmp_path: Path) -> None:
    made = setting(tmp_path, k=k, dtype=torch.bfloat16)
    for name in ("twice", "transposed blocks", "one block missing", "no permutation"):
        wrong = WRONG[name]
        if applies(wrong, made):
            found = audit(made, wrong.make(made), "weights").wrong
            assert found, name
            assert all(words in row.what for row in found for words in wrong.words), found


def test_a_large_matrix_is_judged_by_all_and_explained_by_some_of_its_rows(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("adapter", "base", "merged")]
    shapes = {"up": (1024, 768)}
    base = write_base(tmp_path / "base", shapes, dtype=torch.bfloat16)
    delta = random_delta(1024, 768, k=4, size=0.1)
    write_adapter(tmp_path / "adapter", {"up": delta})
    weight = base["up.weight"].float()
    for scale, words in ((1.0, None), (1.05, "factor of 1.05"), (-1.0, "sign")):
        merged = base | {"up.weight": (weight + scale * dense(delta)).bfloat16()}
        write_model(tmp_path / "merged", merged)
        found = gc.verify(paths[0], base=paths[1], merged=paths[2], level="weights")
        assert found.weights_ok == (scale == 1.0)
        assert len(found.wrong) == (words is not None)
        assert all(words in row.what for row in found.wrong if words)
    right = (weight + dense(delta)).bfloat16()
    right[789, 5] *= 2
    write_model(tmp_path / "merged", base | {"up.weight": right})
    found = gc.verify(paths[0], base=paths[1], merged=paths[2], level="weights")
    assert [row.what for row in found.wrong] == [
        "1 of 786432 elements differ, the first at [789, 5]"
    ]


@pytest.mark.parametrize("shape", [(1024, 768), (24, 1 << 16)], ids=["tall", "wide"])
@pytest.mark.parametrize(
    "place", [(0, slice(None)), (slice(None), -1), (slice(-1, None), slice(-8, None)), (5, 7)],
    ids=["one row", "one column", "the last corner", "one element"],
)  # fmt: skip
def test_no_place_is_too_small(
    place: tuple[int | slice, int | slice], shape: tuple[int, int], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", {"up": shape}, dtype=torch.bfloat16)
    delta = random_delta(*shape, k=4, size=0.3)
    write_adapter(tmp_path / "adapter", {"up": delta})
    right = (base["up.weight"].float() + dense(delta)).bfloat16()
    right[place] = right[place].view(torch.int16).add(2).view(torch.bfloat16)  # two last places
    write_model(tmp_path / "merged", base | {"up.weight": right})
    found = gc.verify(
        tmp_path / "adapter", base=tmp_path / "base", merged=tmp_path / "merged", level="weights"
    )
    assert [row.module for row in found.wrong] == ["up"], found.as_text()


@pytest.mark.parametrize(
    ("model_type", "dtype", "short"),
    [
        ("llama", torch.bfloat16, True), ("gpt2", torch.float16, False),
        ("gpt_neox", torch.float32, False), ("vit", torch.float16, True),
    ],
)  # fmt: skip
def test_merges_by_peft_and_the_same_with_a_fault(
    model_type: str, dtype: torch.dtype, short: bool, tmp_path: Path
) -> None:
    made = peft_merges.merge(
        tmp_path, model_type, dtype=dtype, rho=0.05, short=short, r=8, gralora_k=2, hybrid_r=4
    )
    found = made.verdict()
    assert found.ok, found.as_text()
    assert found.model is not None
    assert found.model.dtype == torch.float64
    assert found.model.ratio < 0.5
    assert peft_merges.spoil(made, peft_merges.FAULTS["twice"], one=False)
    wrong = made.verdict("wrong")
    assert not wrong.weights_ok
    assert wrong.model is not None
    assert not wrong.model.ok


@pytest.mark.parametrize("height", [16, 512, 600, 1408])
def test_a_sample_has_rows_of_every_block_and_few_of_all(height: int) -> None:
    delta = random_delta(4 * height, 8, k=4)
    update = Factored("w", delta, Rows("w", 100, 4 * height))
    whole = [row for run in update.sampled(100, 100 + 4 * height) for row in range(*run)]
    in_tiles = [
        row
        for start in range(100, 100 + 4 * height, 7)
        for run in update.sampled(start, min(start + 7, 100 + 4 * height))
        for row in range(*run)
    ]
    assert whole == in_tiles
    assert {(row - 100) // height for row in whole} == {0, 1, 2, 3}
    assert len(whole) <= max(4, 4 * height / 40)


def test_rows_of_a_fused_matrix_are_judged_one_by_one(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"qkv": (72, 24)}, dtype=torch.float32)["qkv.weight"]
    deltas = {name: random_delta(24, 24, seed=i) for i, name in enumerate("qv")}
    weights = {"q": 0, "v": 48}
    write_model(tmp_path / "base", {"w": base})

    def found(merged: torch.Tensor) -> dict[str, str]:
        write_model(tmp_path / "merged", {"w": merged})
        before, after = (
            Checkpoint.open(tmp_path / name).tensors["w"] for name in ("base", "merged")
        )
        updates = [Factored(n, deltas[n], Rows("w", start, 24)) for n, start in weights.items()]
        return {f.module: f.what for f in Comparison(before, after, updates).found() if f.worst > 1}

    right = base.clone()
    for name, start in weights.items():
        right[start : start + 24] += dense(deltas[name])
    assert found(right) == {}
    without_v = right.clone()
    without_v[48:] = base[48:]
    assert found(without_v) == {"v": "the update is not applied"}
    changed = right.clone()
    changed[30, 0] = torch.nextafter(right[30, 0], torch.tensor(9.0))
    assert found(changed) == {"": "rows that no adapter touches were changed"}


def test_the_receipt_of_several_adapters_is_explained(tmp_path: Path) -> None:
    made = setting(tmp_path)
    write_adapter(tmp_path / "other", {"layers.0.up": random_delta(96, 48, size=0.01)})
    base, merged, linear = tmp_path / "base", tmp_path / "both", ["--linear", "*"]
    run_ok("merge", tmp_path / "adapter", tmp_path / "other", "--base", base, "-o", merged, *linear)
    outcome = run("verify", tmp_path / "adapter", "--base", base, "--merged", merged, *linear)
    assert outcome.status == 1
    assert "lists 2 adapters" in outcome.stderr
    run_ok("merge", tmp_path / "other", "--base", base, "--weight", "0.5", "-o", tmp_path / "half")
    both = [tmp_path / "adapter", tmp_path / "other"]
    told = run_ok("verify", *both, "--base", base, "--merged", merged, *linear)
    assert "same function" in told.stdout
    half = ["--base", base, "--merged", tmp_path / "half"]
    told = run_ok("verify", tmp_path / "other", *half)
    assert "receipt of the merge gives weight 0.5" in told.stderr
    outcome = run("verify", tmp_path / "other", *half, "--weight", "1")
    assert outcome.status == 1
    assert "off by a factor of 0.5" in outcome.stdout
    assert "(weight 0.5)" in outcome.stderr
    outcome = run("verify", tmp_path / "adapter", *half, *linear)
    assert "lists another adapter" in outcome.stderr
    assert made.deltas


def test_the_survival_report_names_the_module_that_lost_most(tmp_path: Path) -> None:
    made = setting(tmp_path, dtype=torch.bfloat16, rho=0.02, hybrid_r=0)
    weak = {name: replace(d, B=d.B / 30) for name, d in made.deltas.items() if name == "layers.1.q"}
    write_adapter(tmp_path / "adapter", {**made.deltas, **weak})
    faint = Setting(tmp_path, made.base, {**made.deltas, **weak}, {})
    found = audit(faint, faint.right(), "weights")
    assert found.ok, found.as_text()
    survival = found.as_json()["survival"]
    assert isinstance(survival, dict)
    assert survival["worst"]["module"] == "layers.1.q"
    assert survival["worst"]["noise"] > survival["noise"]
    assert "least kept: layers.1.q" in found.as_text()
    assert '`dtype="float32"`' in found.as_text()


@pytest.mark.parametrize(
    ("rho", "dtype", "strength"),
    [
        (0.03, torch.float32, "strong"),
        (0.03, torch.bfloat16, "strong"),
        (3e-5, torch.bfloat16, "weak"),
        (1e-9, torch.bfloat16, "none"),
    ],
)
def test_a_verdict_says_how_strong_its_evidence_is(
    rho: float, dtype: torch.dtype, strength: str, tmp_path: Path
) -> None:
    made = setting(tmp_path, dtype=dtype, rho=rho)
    merged = made.right()
    found = audit(made, merged, "weights")
    assert found.ok
    evidence = found.as_json()["evidence"]
    assert isinstance(evidence, dict)
    [(stored, told)] = evidence.items()
    assert stored == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert told["strength"] == strength
    differ = sum(int((merged[f"{n}.weight"] != made.base[f"{n}.weight"]).sum()) for n in SHAPES)
    assert round(told["changed"] * told["elements"]) == differ
    assert f"evidence in {stored}: {strength}, " in found.as_text()
    if strength == "none":
        assert all(torch.equal(merged[f"{n}.weight"], made.base[f"{n}.weight"]) for n in SHAPES)


def test_levels_leave_out_what_they_do_not_run(tmp_path: Path) -> None:
    made = setting(tmp_path)
    weights = audit(made, made.right(), "weights").as_json()
    assert weights["ok"] is True
    assert weights["modules"] is None
    assert weights["model"] is None
    modules = audit(made, made.right(), "modules").as_json()
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


def test_an_untouched_tensor_is_the_same_bit_for_bit_or_cast(tmp_path: Path) -> None:
    """A zero of another sign is another bit; what was no number stays none in another dtype."""
    tensors = write_base(tmp_path / "base")
    deltas = {"layers.0.up": random_delta(32, 24)}
    write_adapter(tmp_path / "adapter", deltas)
    tensors["norm.weight"][:3] = torch.tensor([0.0, float("nan"), float("inf")])
    write_model(tmp_path / "base", tensors)
    command = [tmp_path / "adapter", "--base", tmp_path / "base"]
    run_ok("merge", *command, "-o", tmp_path / "cast", "--dtype", "bfloat16")
    run_ok("verify", *command, "--merged", tmp_path / "cast", "--level", "weights")
    run_ok("merge", *command, "-o", tmp_path / "kept")
    run_ok("verify", *command, "--merged", tmp_path / "kept", "--level", "weights")
    merged = load_file(tmp_path / "kept/model.safetensors")
    merged["norm.weight"][0] = -0.0
    write_model(tmp_path / "kept", merged)
    outcome = run("verify", *command, "--merged", tmp_path / "kept", "--level", "weights")
    assert outcome.status == 1
    assert "norm.weight: was changed, but no adapter touches it" in outcome.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weighted_sums_are_audited(dtype: str, tmp_path: Path) -> None:
    """GraLoRA and Hybrid on one base, of whole models, at all levels."""
    adapters = ["fixtures/peft-0.21.2/llama-hybrid", "fixtures/peft-0.21.2/llama-k4"]
    base, merged = "fixtures/bases/llama", tmp_path / "merged"
    gc.merge(*adapters, base=base, weights=[0.7, -0.3], dtype=dtype).write(merged)
    found = gc.verify(*adapters, base=base, merged=merged, weights=[0.7, -0.3])
    assert found.ok, found.as_text()
    assert found.model is not None
    assert gc.verify(*adapters, base=base, merged=merged).ok  # by the receipt
    for weights in ([0.7, 0.3], [1.0, 1.0]):
        wrong = gc.verify(*adapters, base=base, merged=merged, weights=weights)
        assert not wrong.weights_ok
        assert wrong.model is not None
        assert not wrong.model.ok
    assert not gc.verify(adapters[0], base=base, merged=merged, weights=[0.7]).ok


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("apart", ["base", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_apart_and_stacked_are_one_model(
    apart: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """transformers 5 stacks experts in memory, and writes either layout."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, hidden_size=32, intermediate_size=48, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=3, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    layouts = {"base": apart == "base", "merged": apart == "merged"}
    model.save_pretrained(tmp_path / "base", save_original_format=layouts["base"])
    adapter = GraloraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapter)
    for name, parameter in adapted.named_parameters():
        if "gralora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    right = adapted.merge_and_unload()

    def found(level: str) -> gc.Equivalence:
        right.save_pretrained(tmp_path / "merged", save_original_format=layouts["merged"])
        return gc.verify(
            tmp_path / "adapter", base=tmp_path / "base", merged=tmp_path / "merged", level=level
        )

    same = found("model")
    assert same.ok, same.as_text()
    assert same.untouched > 2 * 3 * 3
    stack = right.model.layers[1].mlp.experts.gate_up_proj.data
    stack[2, 50, 7] += 1
    wrong = found("weights").wrong
    assert [row.module.rpartition("experts.2.")[2] for row in wrong] == [
        {"Mixtral": "w3", "Qwen3Moe": "up_proj"}[family]
    ]
    assert "layers.1" in wrong[0].tensor
    assert "no adapter touches it" in wrong[0].what
