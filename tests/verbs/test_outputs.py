"""The level `model`: whole models of any modality, run on inputs made from their config."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import gralora_convert as gc
from tests.builders import random_delta, write_adapter, write_model
from tests.command import run, run_ok
from tests.merges import setting
from tests.zoo import ARCHITECTURES, load, save_base, train

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
VISION = {**SIZES, "image_size": 32, "patch_size": 8, "projection_dim": 16}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 64, "projection_dim": 16}
PAIR = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_target_positions": 32,
}  # fmt: skip


def _made(cls: str, config: str, /, **options: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        model: PreTrainedModel = getattr(transformers, cls)(
            getattr(transformers, config)(**options)
        )
        return model

    return make


def _llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 2}),
        image_token_id=60, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], set[str]]] = {
    "images": (
        _made("ViTForImageClassification", "ViTConfig", **SIZES, image_size=32, patch_size=8),
        {"pixel_values"},
    ),
    "text and images": (
        _made("SiglipModel", "SiglipConfig", text_config=TEXT, vision_config=VISION),
        {"input_ids", "pixel_values"},
    ),
    "images among text": (_llava, {"input_ids", "pixel_values"}),
    "mel bins": (
        _made(
            "WhisperForConditionalGeneration", "WhisperConfig", **PAIR, num_mel_bins=16,
            max_source_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {"input_features", "decoder_input_ids"},
    ),
    "waves": (
        _made(
            "Wav2Vec2ForCTC", "Wav2Vec2Config", **SIZES, vocab_size=16, conv_dim=(32, 32),
            conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        ),
        {"input_values"},
    ),
    "spectrograms": (
        _made(
            "ASTForAudioClassification", "ASTConfig", **SIZES, patch_size=4, frequency_stride=4,
            time_stride=4, max_length=32, num_mel_bins=16,
        ),
        {"input_values"},
    ),
    "time series": (
        _made(
            "PatchTSTForPrediction", "PatchTSTConfig", num_input_channels=2, context_length=32,
            patch_length=8, patch_stride=8, prediction_length=8, d_model=32,
            num_attention_heads=4, num_hidden_layers=2, ffn_dim=48,
        ),
        {"past_values"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_every_modality_are_run(kind: str, tmp_path: Path) -> None:
    make, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "base")
    config = GraloraConfig(r=8, alpha=16, target_modules=r".*(v_proj|value)$")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "gralora" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    arguments = ["verify", tmp_path / "adapter", "--base", tmp_path / "base", "--merged"]
    found = run_ok(*arguments, tmp_path / "merged", "--json").json["model"]
    assert isinstance(found, dict)
    assert found["ok"] is True
    assert set(found["inputs"]) == inputs
    path = tmp_path / "merged" / "model.safetensors"
    wrong = {
        name: tensor.flip(0) if name.endswith(("v_proj.weight", "value.weight")) else tensor
        for name, tensor in load_file(path).items()
    }
    save_file({name: t.contiguous() for name, t in wrong.items()}, path, metadata={"format": "pt"})
    outcome = run(*arguments, tmp_path / "merged", "--json")
    assert outcome.status == 1
    assert isinstance(outcome.json["model"], dict)
    assert outcome.json["model"]["ok"] is False


def test_an_update_that_rounding_lost_is_no_difference_of_the_model(tmp_path: Path) -> None:
    """The outputs are far from base + adapter, and just where a right merge has them."""
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base", torch.bfloat16)
    adapted = train(base, architecture, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: t * 0.2 if "_B" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    merged = tmp_path / "merged"
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", merged)
    found = run_ok(
        "verify", tmp_path / "adapter", "--base", base, "--merged", merged, "--json"
    ).json
    assert isinstance(found["model"], dict)
    assert found["model"]["max_abs_diff"] == pytest.approx(found["model"]["rounding"], rel=0.1)
    assert adapted is not None


def test_right_weights_with_a_wrong_config_are_explained(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    train(base, architecture, tmp_path / "adapter")
    merged = tmp_path / "merged"
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", merged)
    config = merged / "config.json"
    changed = config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5')
    assert changed != config.read_text()
    config.write_text(changed)
    outcome = run("verify", tmp_path / "adapter", "--base", base, "--merged", merged)
    assert outcome.status == 1
    assert "weights: equal" in outcome.stdout
    assert "look at what config.json" in outcome.stdout


@pytest.mark.parametrize("broken", ["merged", "base"])
@pytest.mark.parametrize("how", ["empty", "truncated", "no weights", "not there"])
def test_checkpoints_that_cannot_be_read_are_refused(broken: str, how: str, tmp_path: Path) -> None:
    made = setting(tmp_path)
    made.write(made.right())
    path = tmp_path / broken / "model.safetensors"
    match how:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        case "no weights":
            path.unlink()
        case _:
            path.parent.rename(tmp_path / "elsewhere")
    outcome = run(
        "verify", tmp_path / "adapter", "--base", tmp_path / "base", "--merged", tmp_path / "merged"
    )
    assert outcome.status == 2
    assert outcome.stdout == ""
    assert len(outcome.stderr.splitlines()) == 1
    assert broken in outcome.stderr


def test_a_model_that_cannot_be_run_is_no_answer(tmp_path: Path) -> None:
    delta = random_delta(32, 24, size=0.1)
    weight = torch.ones(32, 24)
    write_model(tmp_path / "base", {"up.weight": weight}, model_type="unheard-of")
    write_adapter(tmp_path / "adapter", {"up": delta})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "merged")
    arguments = ["--base", tmp_path / "base", "--merged", tmp_path / "merged"]
    outcome = run("verify", tmp_path / "adapter", *arguments)
    assert outcome.status == 2
    assert "no answer: the model was not run" in outcome.stdout
    assert "--level modules" in outcome.stdout
    document = run("verify", tmp_path / "adapter", *arguments, "--json").json
    assert document["ok"] is None
    weights = run_ok("verify", tmp_path / "adapter", *arguments, "--level", "modules")
    assert weights.stdout.endswith("same function\n")


@pytest.mark.parametrize("level", [None, "model"])
def test_where_there_is_no_model_the_weights_decide_unless_it_was_asked_for(
    level: str | None, tmp_path: Path
) -> None:
    write_model(tmp_path / "base", {"up.weight": torch.ones(32, 24)})
    write_adapter(tmp_path / "adapter", {"up": random_delta(32, 24)})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "merged")
    found = gc.verify(
        tmp_path / "adapter", base=tmp_path / "base", merged=tmp_path / "merged", level=level
    )
    assert found.ok is (None if level else True)


CONFIGS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "a shape": ({"num_attention_heads": 8}, 1, ("o_proj.weight is (16, 16) on disk, (16, 32)",
                "num_attention_heads is 8, 4 in the base")),
    "another function": ({"hidden_act": "gelu"}, 1, ('hidden_act is "gelu", "silu" in the base',)),
    "no function": ({"hidden_act": "zzz"}, 1, ("transformers cannot load",)),
    "too much": ({"hidden_size": 1 << 20}, 1, ("describes", "are on disk")),
    "layers without weights": ({"num_hidden_layers": 3}, 1, ("is not on disk",)),
    "a head without weights": (
        {"architectures": ["LlamaForSequenceClassification"]}, 1, ("score.weight is not on disk",),
    ),
    "rotations far away": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}}, 1,
        ("outputs agree", 'rope_type is "dynamic", "default" in the base'),
    ),
    "another type": ({"model_type": "mistral"}, 1, ("model_type 'mistral', that of the base",)),
    "no known type": ({"model_type": "zzz"}, 1, ("model_type 'zzz'",)),
    "no name": ({"a\n::error::\x1b[31m": 1}, 0, ("is 1, null in the base; the outputs agree",)),
    "an unread class": ({"architectures": ["UnheardOf"]}, 0, ("ran as the base's Llama",)),
    "no class": ({"architectures": None}, 0, ("names no class; for the adapter both ran as",)),
    "a smaller class": ({"architectures": ["LlamaModel"]}, 0, ("ran as the base's Llama",)),
    "a token": ({"eos_token_id": 5}, 0, ("eos_token_id is 5, 2 in the base; the outputs agree",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_says_otherwise_is_named(kind: str, tmp_path: Path) -> None:
    """A merged model that transformers cannot load, or fills at random, is not the same."""
    changes, status, words = CONFIGS[kind]
    architecture = ARCHITECTURES["llama"]
    base, merged = save_base(architecture, tmp_path / "base"), tmp_path / "merged"
    train(base, architecture, tmp_path / "adapter")
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", merged)
    arguments = ["verify", tmp_path / "adapter", "--base", base, "--merged", merged]
    assert run_ok(*arguments).stderr == ""
    path = merged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    outcome = run(*arguments)
    assert outcome.status == status
    assert "weights: equal" in outcome.stdout
    for word in words:
        assert word in outcome.stdout + outcome.stderr
    assert all(map(str.isprintable, (outcome.stdout + outcome.stderr).splitlines()))
    assert "\n::error" not in outcome.stdout + outcome.stderr
    assert run(*arguments, "--level", "modules").status == 0
    model = run(*arguments, "--json").json["model"]
    assert isinstance(model, dict)
    assert model["ok"] is (status == 0)


def test_the_merge_of_another_architecture_is_not_loaded_as_the_base() -> None:
    """Sizes that a config of another type does not name would be those of a model of billions."""
    outcome = run(
        "verify", "fixtures/peft-0.21.2/llama-k4", "--base", "fixtures/bases/llama",
        "--merged", "fixtures/bases/gpt2",
    )  # fmt: skip
    assert outcome.status == 1
    assert "has model_type 'gpt2', that of the base 'llama'" in outcome.stdout


@pytest.mark.parametrize(
    ("task", "auto"),
    [
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("FEATURE_EXTRACTION", "AutoModel"),
        ("CAUSAL_LM", "AutoModelForCausalLM"),
    ],
)
def test_a_head_that_the_trained_function_does_not_use_may_be_left_out(
    task: str, auto: str, tmp_path: Path
) -> None:
    """As transformers does when it loads a language model as a classifier and saves it."""
    architecture = replace(ARCHITECTURES["llama"], task_type=task, auto=auto)
    base, merged = save_base(architecture, tmp_path / "base"), tmp_path / "merged"
    options = {} if task != "SEQ_CLS" else {"modules_to_save": ["score"]}
    model = load(base, auto, **({"num_labels": 3} if task.endswith("CLS") else {}))
    config = GraloraConfig(r=8, alpha=16, target_modules=["q_proj"], task_type=task, **options)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "gralora" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(merged)
    arguments = ["verify", tmp_path / "adapter", "--base", base, "--merged", merged]
    run_ok(*arguments, "--level", "weights")
    assert "model: outputs agree" in run_ok(*arguments).stdout
    path = merged / "model.safetensors"
    assert ("lm_head.weight" in load_file(path)) is (task == "CAUSAL_LM")
    tensors = load_file(path)
    used = "lm_head.weight" if task == "CAUSAL_LM" else next(n for n in tensors if "norm" in n)
    save_file({n: t for n, t in tensors.items() if n != used}, path, metadata={"format": "pt"})
    outcome = run(*arguments)
    assert outcome.status == 1
    assert "is missing" in outcome.stdout


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_is_run_with_its_config(tied: bool, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama-tied" if tied else "llama"]
    base, merged = save_base(architecture, tmp_path / "base"), tmp_path / "merged"
    model = load(base, architecture.auto)
    model.resize_token_embeddings(40)
    adapted = get_peft_model(
        model, GraloraConfig(r=8, alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "gralora" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapted.merge_and_unload().save_pretrained(merged)
    arguments = ["verify", tmp_path / "adapter", "--base", base, "--merged", merged]
    assert "model: outputs agree" in run_ok(*arguments).stdout
    path = merged / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 40', '"vocab_size": 32'))
    outcome = run(*arguments)
    assert outcome.status == 1
    assert " is (40, 16) on disk, (32, 16) by its config.json" in outcome.stdout


def test_an_adapter_beside_the_merged_weights_is_told(tmp_path: Path) -> None:
    """transformers with PEFT would put it onto them, a second time."""
    architecture = ARCHITECTURES["llama"]
    base, merged = save_base(architecture, tmp_path / "base"), tmp_path / "merged"
    train(base, architecture, tmp_path / "adapter")
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", merged)
    shutil.copytree(tmp_path / "adapter", merged, dirs_exist_ok=True)
    outcome = run("verify", tmp_path / "adapter", "--base", base, "--merged", merged)
    assert outcome.status == 1
    assert "holds an adapter_config.json" in outcome.stderr


@pytest.mark.parametrize("name", ["consolidated.safetensors", "pytorch_model.bin"])
def test_other_weights_beside_the_merged_ones_are_told(name: str, tmp_path: Path) -> None:
    made = setting(tmp_path)
    merged = made.write(made.right())
    (merged / name).write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    (merged / "training_args.bin").write_bytes(b"")
    arguments = ["--base", tmp_path / "base", "--merged", merged, "--level", "weights"]
    outcome = run_ok("verify", tmp_path / "adapter", *arguments, "--linear", "*")
    assert f"holds {name} beside the weights that were compared" in outcome.stderr


def test_the_config_beside_the_adapter_is_that_of_the_trained_model(tmp_path: Path) -> None:
    """`merge` takes it, so the audit runs the base with it; the base's own is another function."""
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    train(base, architecture, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 50.0, "rope_type": "default"}
    (tmp_path / "adapter/config.json").write_text(json.dumps(config))
    audited = ["verify", tmp_path / "adapter", "--base", base, "--merged", tmp_path / "out"]
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "same function" in run_ok(*audited).stdout
    shutil.copy(base / "config.json", tmp_path / "out/config.json")
    found = run(*audited)
    assert found.status == 1
    assert "rope_theta" in found.stdout
