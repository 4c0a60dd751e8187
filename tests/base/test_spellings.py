"""Names that tools put in an adapter's way, pairs of models, and bases under other names."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks import tiny
from tests.command import run, run_ok

IDS = torch.tensor([[1, 2, 3, 4]])
PIXELS = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2}  # fmt: skip


def trained(model: Any, folder: Path, targets: list[str] | str, **more: Any) -> Any:
    adapted = get_peft_model(model, GraloraConfig(r=4, gralora_k=2, target_modules=targets, **more))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    adapted.save_pretrained(folder)
    return adapted.eval()


# compiled layers ----------------------------------------------------------------------------------


def llama(folder: Path) -> Any:
    torch.manual_seed(0)
    sizes = TINY | {"num_hidden_layers": 11, "vocab_size": 32}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_layers_that_were_compiled_one_by_one(saved: list[str] | None, tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    adapted = trained(model, tmp_path / "adapter", ["q_proj"], modules_to_save=saved)
    wanted = adapted(IDS).logits
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("layers.10._orig_mod." in key for key in keys)
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    assert "warning[key-wrapper-prefix]" in run_ok("validate", *arguments).stdout
    run_ok("merge", *arguments, "-o", tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=1e-4)
    run_ok("verify", *arguments, "--merged", tmp_path / "out")


# pairs of models ----------------------------------------------------------------------------------


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_inner=16, n_positions=32,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip


def with_vit() -> Any:
    vit = transformers.ViTConfig(**TINY, image_size=8, patch_size=4)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2())
    return transformers.VisionEncoderDecoderModel(config)


def with_bert() -> Any:
    bert = transformers.BertConfig(**TINY, vocab_size=32, max_position_embeddings=32)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2())
    return transformers.EncoderDecoderModel(config)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_proj"]])
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (with_vit, {"pixel_values": PIXELS}),
        (with_bert, {"input_ids": IDS}),
    ],
)
def test_each_half_of_a_pair_has_its_own_kind_of_layer(
    build: Callable[[], Any], inputs: dict[str, Any], targets: Any, tmp_path: Path
) -> None:
    """nn.Linear in the encoder, Conv1D in the decoder, all of them square."""
    torch.manual_seed(0)
    model = build()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    fed = inputs | {"decoder_input_ids": IDS}
    wanted = trained(model, tmp_path / "adapter", targets)(**fed).logits
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(**fed).logits, wanted, rtol=0, atol=1e-5)


# a base under other names -------------------------------------------------------------------------


def test_a_base_that_its_own_class_loads_in_part_is_told(tmp_path: Path) -> None:
    """A tensor under a name of nobody's: transformers draws the parameter at random."""
    sizes = TINY | {"num_hidden_layers": 1, "vocab_size": 32, "num_experts": 2}
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **sizes, moe_intermediate_size=8, num_key_value_heads=1, head_dim=8, num_experts_per_tok=1,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", ["q_proj"], task_type="CAUSAL_LM")
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    assert "base-misnamed" not in run_ok("validate", *arguments).stdout
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.norm_before.weight"] = tensors.pop(
        "model.layers.0.input_layernorm.weight"
    )
    save_file(tensors, file, metadata={"format": "pt"})
    told = run_ok("validate", *arguments).stdout
    assert "warning[base-misnamed]" in told
    assert "model.layers.0.input_layernorm.weight" in told
    assert "model.layers.0.norm_before.weight is no parameter" in told


@pytest.mark.parametrize("renamed", [True, False])
def test_the_model_is_built_where_a_name_is_none_of_its_source_text(
    renamed: bool, tmp_path: Path
) -> None:
    trained(llama(tmp_path / "base"), tmp_path / "adapter", ["q_proj"], task_type="CAUSAL_LM")
    if renamed:
        file = tmp_path / "base/model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.3.norm_before.weight"] = tensors.pop(
            "model.layers.3.input_layernorm.weight"
        )
        save_file(tensors, file, metadata={"format": "pt"})
    script = (
        "import sys; from gralora_convert import validate; report = validate(*sys.argv[1:])\n"
        "print([f.code for f in report.findings], 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "adapter"), str(tmp_path / "base")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert ("base-misnamed" in told) == renamed
    assert told.endswith(f"{renamed}\n")


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (
            "inner.model.",
            "Another base? If only its names are others: --key-map model=inner.model",
        ),
        ("backbone.", "Another base, or --key-map FROM=TO?"),  # another word may be another tower
    ],
)
def test_a_base_under_other_names_is_refused_with_the_command(
    start: str, said: str, tmp_path: Path
) -> None:
    adapted = trained(llama(tmp_path / "base"), tmp_path / "adapter", ["q_proj", "down_proj"])
    file = tmp_path / "base/model.safetensors"
    tensors = {
        f"{start}{name.removeprefix('model.')}": tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base"]
    told = run(*arguments, "-o", tmp_path / "out").stderr
    assert told.rstrip().endswith(said)
    if "FROM" in said:
        return
    option = said.split()[-2:]
    run_ok(*arguments, option[0], option[1].rstrip("."), "-o", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    layer = adapted.base_model.model.model.layers[10].self_attn.q_proj
    found = merged[f"{start}layers.10.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, layer.weight + layer.get_delta_weight("default"))


class Wrapper(torch.nn.Module):
    """As trainers of rewards write them: one level more before every name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def test_a_saved_head_that_a_key_map_forgets_is_no_new_one(tmp_path: Path) -> None:
    model = Wrapper(llama(tmp_path / "base"))
    adapted = trained(model, tmp_path / "adapter", ["q_proj"], modules_to_save=["lm_head"])
    arguments = ["merge", tmp_path / "adapter", "--base", tmp_path / "base"]
    half = ["--key-map", "model.model=model"]
    told = run(*arguments, *half, "-o", tmp_path / "out").stderr
    assert "model.lm_head.weight: [module-not-in-base]" in told
    assert told.rstrip().endswith("--key-map model.lm_head=lm_head")
    whole = [*half, "--key-map", "model.lm_head=lm_head"]
    for number, options in enumerate([[], whole]):
        run_ok(*arguments, *options, "-o", tmp_path / f"out{number}")
        merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / f"out{number}").eval()
        wanted = adapted.base_model.model.model(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, wanted, rtol=0, atol=1e-5)


def bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.0,
        max_position_embeddings=16,
    ))  # fmt: skip


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TINY, image_size=4, patch_size=2),
        text_config=transformers.LlamaConfig(**TINY, vocab_size=32),
        image_token_index=31, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


TEXT = {"input_ids": IDS, "decoder_input_ids": IDS}
IMAGE = {"input_ids": torch.tensor([[3, 31, 31, 31, 31, 5]]),
         "pixel_values": torch.arange(48).float().sin().reshape(1, 3, 4, 4)}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "part", "saved", "inputs"),
    [
        (bart, "model.encoder", None, TEXT),
        (bart, "model.decoder", None, TEXT),
        (with_vit, "decoder", None, {"pixel_values": PIXELS, "decoder_input_ids": IDS}),
        (llava, "model.language_model", ["norm"], IMAGE),
        (llava, "model.vision_tower", ["pre_layrnorm"], IMAGE),
    ],
)
def test_an_adapter_of_a_part_goes_into_that_part(
    build: Callable[[], Any], part: str, saved: list[str] | None, inputs: Any, tmp_path: Path
) -> None:
    """The part alone was adapted: its names lack the way to it, its class says which it is."""
    torch.manual_seed(0)
    model = build()
    if build is with_vit:
        model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.save_pretrained(tmp_path / "base")
    whole = type(model).from_pretrained(tmp_path / "base").eval()
    adapted = trained(
        whole.get_submodule(part), tmp_path / "adapter", "all-linear", modules_to_save=saved
    )
    whole.set_submodule(part, adapted.base_model.model)
    wanted = whole(**inputs).logits
    told = run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert "target" not in told.stderr
    merged = type(model).from_pretrained(tmp_path / "o").eval()
    torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=0, atol=1e-5)
    before = type(model).from_pretrained(tmp_path / "base").eval()
    assert (before(**inputs).logits - wanted).abs().max() > 1e-3


def test_modules_that_only_one_release_renamed_are_all_selected(tmp_path: Path) -> None:
    """DeepSeek-VL of transformers 4.57: its vision tower had a level more, its aligner had not."""
    tiny.build("AutoModel", "deepseek_vl").save_pretrained(tmp_path / "base")
    model = transformers.AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = trained(model, tmp_path / "adapter", ["fc1", "linear1", "q_proj"])
    file = tmp_path / "adapter/adapter_model.safetensors"
    old = {
        key.replace(".vision_model.encoder.", ".vision_model.vision_model.encoder."): tensor
        for key, tensor in load_file(file).items()
    }
    assert old.keys() != load_file(file).keys()
    save_file(old, file, metadata={"format": "pt"})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    merged = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor)
