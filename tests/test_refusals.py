"""Damaged values and configs beside good ones: each is refused on one line, by name, and nothing is
written. What is merely unusual is carried out."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.base import combine, near_misses, place_in
from gralora_convert.delta.forms import Gralora
from gralora_convert.disk.checkpoint import Checkpoint
from gralora_convert.models import Blueprint, has_absurd_counts
from gralora_convert.verbs.verification.agreement import NotRun
from gralora_convert.verbs.verification.outputs import compare_models
from tests.base.test_architectures import CAUSAL
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok
from tests.zoo import ARCHITECTURES, Architecture, close, llama, load, outputs, save_base, train

FIXTURES = Path(__file__).parent.parent / "fixtures"
DELTAS = {name: random_delta(*shape, r=4) for name, shape in SHAPES.items()}


def refusal(*arguments: object) -> str:
    outcome = run(*arguments)
    assert outcome.status == 2, (outcome.status, outcome.stderr)
    return outcome.stderr.splitlines()[-1]


def add(adapter: Path, **tensors: torch.Tensor) -> None:
    path = adapter / "adapter_model.safetensors"
    named = {f"base_model.model.{name.replace('__', '.')}": t for name, t in tensors.items()}
    save_file(load_file(path) | named, path, metadata={"format": "pt"})


def change(config: Path, **fields: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


# values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["saved", "bias"])
def test_trained_values_that_are_no_numbers_are_refused(
    kind: str, value: float, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base")
    write_model(tmp_path / "base", base | {"layers.0.up.bias": torch.zeros(32)})
    if kind == "saved":
        write_adapter(tmp_path / "adapter", DELTAS, modules_to_save=["norm"])
        add(tmp_path / "adapter", norm__weight=torch.tensor([1.0] * 23 + [value]))
    else:
        deltas = {"layers.0.up": DELTAS["layers.0.up"]}
        write_adapter(tmp_path / "adapter", deltas, bias="gralora_only")
        bias = torch.tensor([1.0] * 31 + [value])
        add(tmp_path / "adapter", layers__0__up__base_layer__bias=bias)
    merging = ["merge", tmp_path / "adapter", "--base", tmp_path / "base"]
    assert "holds NaN or infinity" in refusal(*merging, "-o", tmp_path / "out")
    converting = ["convert", tmp_path / "adapter", "--to", "lora"]
    assert "holds NaN or infinity" in refusal(*converting, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_whose_adapted_weight_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    base["layers.0.up.weight"][3, 4] = value
    write_model(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", DELTAS)
    merging = ["merge", tmp_path / "adapter", "--base", tmp_path / "base"]
    assert "NaN or infin" in refusal(*merging, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [1e308, 3.5e38, -1e39])
def test_an_alpha_beyond_float32_is_refused(alpha: float, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", DELTAS)
    change(tmp_path / "adapter" / "adapter_config.json", alpha=alpha)
    said = refusal("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert "[config-value-range] alpha is too large" in said


@pytest.mark.parametrize(
    "shape", [["lora"], ["gralora", "--r", "4", "--k", "4", "--allow-inexact"]], ids=lambda s: s[0]
)
def test_factors_whose_product_is_no_number_are_refused(shape: list[str], tmp_path: Path) -> None:
    huge = {
        name: Gralora(delta.A.double() * 1e200, delta.B.double() * 1e200, delta.scaling)
        for name, delta in DELTAS.items()
    }
    write_adapter(tmp_path / "adapter", huge)
    said = refusal("convert", tmp_path / "adapter", "--to", *shape, "-o", tmp_path / "out")
    assert "the product of its factors is up to inf" in said


# configs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_beside_the_adapter_that_is_no_object_is_named(name: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base", model_type="x")
    write_adapter(tmp_path / "adapter", DELTAS)
    (tmp_path / "adapter" / name).write_text("[1]")
    said = refusal("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert f"{name}: holds a JSON list" in said


@pytest.mark.parametrize("name", ["x" * 10**6, "/" + "y" * 5000, "a/\0b"])
@pytest.mark.parametrize("revision", [None, "main"])
def test_a_base_whose_name_can_be_none_of_a_file_stops_nothing_that_needs_no_base(
    revision: str | None, name: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", DELTAS)
    change(adapter / "adapter_config.json", base_model_name_or_path=name, revision=revision)
    for command in (
        ["validate", adapter],
        ["inspect", adapter, "--plot", tmp_path / "plot.svg"],
        ["convert", adapter, "--to", "lora", "-o", tmp_path / "out"],
    ):
        printed = run_ok(*command)
        assert max(map(len, (printed.stdout + printed.stderr).splitlines())) < 5000
    assert len(refusal("merge", adapter, "-o", tmp_path / "merged")) < 5000


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("vocab_size", 40, "embed_tokens.weight"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("attention_bias", True, "q_proj.bias"), ("num_key_value_heads", 4, "k_proj.weight"),
        ("max_position_embeddings", 128, None), ("eos_token_id", 5, None),
        ("rms_norm_eps", 1e-5, None),
    ],
)  # fmt: skip
def test_a_config_beside_the_adapter_must_describe_the_tensors_that_are_there(
    setting: str, value: object, found: str | None, tmp_path: Path
) -> None:
    """A merge takes it, so the merged model must be one that transformers loads."""
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    train(base, architecture, tmp_path / "adapter")
    shutil.copy(base / "config.json", tmp_path / "adapter/config.json")
    change(tmp_path / "adapter/config.json", **{setting: value})
    merging = ["merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out"]
    if found is None:
        run_ok(*merging)
        assert json.loads((tmp_path / "out/config.json").read_text())[setting] == value
        load(tmp_path / "out", CAUSAL)
        return
    refused = refusal(*merging)
    assert "[config-other-model]" in refused
    assert found in refused


def test_a_base_config_of_wrong_types_is_no_crash(tmp_path: Path) -> None:
    """The square weight needs the model, which transformers cannot build of this config."""
    tensors = {"sq.weight": torch.randn(8, 8), "up.weight": torch.randn(16, 8)}
    write_model(tmp_path / "base", tensors, model_type="clvp_decoder", hidden_size="many")
    write_adapter(tmp_path / "adapter", {"sq": random_delta(8, 8, r=4)})
    arguments = ["--base", tmp_path / "base"]
    said = refusal("merge", tmp_path / "adapter", *arguments, "-o", tmp_path / "out")
    assert "[fan-in-fan-out-ambiguous]" in said
    assert run("validate", tmp_path / "adapter", *arguments).status == 1


def test_a_base_config_with_numbers_beyond_torch_is_no_crash(tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    tuned = save_base(ARCHITECTURES["llama"], tmp_path / "tuned")
    held = load_file(tuned / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(held, tuned / "model.safetensors", metadata={"format": "pt"})
    for folder in (base, tuned):
        change(
            folder / "config.json", rope_parameters={"rope_theta": 2**64, "rope_type": "default"}
        )
    outcome = run("extract", "--base", base, "--tuned", tuned, "--to", "lora", "--r", 4,
                  "-o", tmp_path / "out")  # fmt: skip
    assert outcome.status in (0, 2), outcome.stderr


def test_layers_beside_a_pattern_of_modules_are_left_out_of_a_lora(tmp_path: Path) -> None:
    write_adapter(
        tmp_path / "adapter", DELTAS, target_modules=r"layers\..*", layers_to_transform=[0]
    )
    run_ok("convert", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out")
    assert LoraConfig.from_pretrained(tmp_path / "out").layers_to_transform is None


def test_a_negative_zero_in_a_config_stays_what_transformers_takes(tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama-tied"], tmp_path / "base")
    train(base, ARCHITECTURES["llama-tied"], tmp_path / "adapter")
    text = (base / "config.json").read_text()
    (base / "config.json").write_text(text.replace("{", '{"bos_token_id": -0,', 1).replace(
        '"bos_token_id": 1,', ""))  # fmt: skip
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert load(tmp_path / "out", CAUSAL).config.bos_token_id == 0


def test_a_layers_pattern_without_layers_is_left_out_of_a_lora(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", DELTAS, layers_pattern=["layers"])
    run_ok("convert", tmp_path / "adapter", "--to", "lora", "-o", tmp_path / "out")
    assert LoraConfig.from_pretrained(tmp_path / "out").layers_pattern is None


# heads -----------------------------------------------------------------------------------------


def _without_bias(held: dict[str, torch.Tensor], head: str) -> None:
    del held[f"{head}.bias"]


def _column(held: dict[str, torch.Tensor], head: str) -> None:
    held[f"{head}.bias"] = held[f"{head}.bias"][:, None].contiguous()


def _deep(held: dict[str, torch.Tensor], head: str) -> None:
    held[f"{head}.weight"] = held[f"{head}.weight"][:, :, None].contiguous()


def _narrow(held: dict[str, torch.Tensor], head: str) -> None:
    held[f"{head}.weight"] = held[f"{head}.weight"][:, :-1].contiguous()


def _stranger(held: dict[str, torch.Tensor], head: str) -> None:
    held[f"{head}.default"] = torch.ones(3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without_bias, "classifier.bias: [head-incomplete]"),
        (_column, "classifier.bias: [modules-to-save-shape] has shape (3, 1)"),
        (
            _deep,
            "classifier.weight: [modules-to-save-shape] has shape (3, 16, 1), one like (2,",
        ),
        (_narrow, "classifier.weight: [modules-to-save-shape] has shape (3, 15), one like (2, 16)"),
        (_stranger, "classifier.default: [tensor-unclaimed]"),
        (None, "neither task_type nor auto_mapping says"),
    ],
)
def test_a_head_that_does_not_fit_its_class_is_refused(
    damage: Callable[[dict[str, torch.Tensor], str], None] | None, words: str, tmp_path: Path
) -> None:
    base = save_base(ARCHITECTURES["bert-classifier"], tmp_path / "base")
    train(base, ARCHITECTURES["bert-classifier"], tmp_path / "adapter", steps=1)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(path)
    if damage is None:
        change(tmp_path / "adapter" / "adapter_config.json", task_type=None)
    else:
        damage(held, "base_model.model.classifier")
    save_file(held, path, metadata={"format": "pt"})
    assert words in refusal("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")


def test_a_head_whose_class_the_config_does_not_make_is_refused(tmp_path: Path) -> None:
    """The base's own class never reads this setting; the merged model would not load."""
    base = save_base(ARCHITECTURES["bert-classifier"], tmp_path / "base")
    train(base, ARCHITECTURES["bert-classifier"], tmp_path / "adapter", steps=1)
    change(base / "config.json", classifier_dropout=7.0)
    refused = refusal("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "[head-class-unbuildable]" in refused
    assert "dropout probability" in refused


# single files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors"])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_one_file_gives_a_folder_that_transformers_loads(
    by: str, name: str, tmp_path: Path
) -> None:
    architecture = Architecture(llama("LlamaForCausalLM", "LlamaConfig"), ["q_proj"])
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter")
    (base / "model.safetensors").rename(base / name)
    source = base / name if by == "file" else base
    run_ok("merge", tmp_path / "adapter", "--base", source, "-o", tmp_path / "out")
    assert close(outputs(load(tmp_path / "out", CAUSAL)), outputs(adapted)) <= 1e-5
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out")


def test_one_of_several_files_takes_nothing_from_beside_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type="x")
    save_file(base, tmp_path / "base" / "other.safetensors")
    write_adapter(tmp_path / "adapter", DELTAS)
    source = tmp_path / "base" / "model.safetensors"
    run_ok("merge", tmp_path / "adapter", "--base", source, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer"])
def test_more_layers_than_tensors_are_not_built(name: str, tmp_path: Path) -> None:
    """Which transformers would do, layer by layer, for hours."""
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "bases/llama-tied", base)
    change(base / "config.json", **{name: 10**9})
    opened = Checkpoint.open(base)
    started = time.process_time()
    assert has_absurd_counts(opened)
    assert Blueprint.build(opened, ("LlamaForCausalLM",), ()) is None
    adapter = Adapter.open(FIXTURES / "peft-0.21.2/llama-tied-head")
    recipe = combine([place_in(adapter, Checkpoint.open(FIXTURES / "bases/llama-tied"))])
    model, _ = compare_models(replace(recipe, base=opened), opened)
    assert isinstance(model, NotRun)
    assert "more layers" in model.reason
    assert time.process_time() - started < 5
    assert not has_absurd_counts(Checkpoint.open(FIXTURES / "bases/llama-tied"))


def test_near_misses_among_many_names_take_no_time() -> None:
    names = [f"model.layers.{i}.{leaf}" for i in range(50_000) for leaf in ("q_proj", "up", "down")]
    started = time.process_time()
    assert "model.layers.1.up" in near_misses("model.layer.1.up", names)
    assert time.process_time() - started < 2
