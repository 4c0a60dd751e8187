"""Real model types of transformers, adapted by real PEFT, merged through the command line.

Names in memory differ from those on disk, weights are fused, cut, permuted, shared or stored the
other way round; heads and vocabularies change. What is reloaded must be PEFT's unmerged model.
The full sweep over all model types is `python -m benchmarks.architectures`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import GraloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import gralora_convert as gc
from benchmarks.adapting import Case
from benchmarks.architectures import judge
from gralora_convert.delta.forms import Gralora
from tests import oracle
from tests.builders import random_delta, write_adapter, write_model
from tests.command import run, run_ok
from tests.zoo import (
    ARCHITECTURES,
    IDS,
    Architecture,
    close,
    gpt2,
    llama,
    load,
    outputs,
    save_base,
    train,
)  # fmt: skip

CAUSAL, BARE = "AutoModelForCausalLM", "AutoModel"


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [
        ("llava", "AutoModelForImageTextToText"),  # a prefix that moved
        ("vit", "AutoModelForImageClassification"),  # every name another
        ("gpt_neox", CAUSAL),  # the head another
        ("gte", BARE),  # cut in memory, fused on disk
        ("mistral_large4", BARE),  # rows permuted
        ("minimax_m3_vl", BARE),  # fused in memory, cut on disk
        ("mixtral", CAUSAL),  # experts stacked
        ("imagegpt", BARE),  # Conv1D, square ones too
        ("openai-gpt", CAUSAL),
        ("zamba", CAUSAL),  # ties made of the config
        ("llama", "AutoModelForTokenClassification"),
        ("bert", "AutoModelForQuestionAnswering"),
        ("tipsv2_text_model", BARE),  # out_proj called, stored like that of MultiheadAttention
        ("rf_detr", BARE),
    ],
)
def test_one_of_each_group_equals_peft(model_type: str, auto: str, tmp_path: Path) -> None:
    verdict = judge(Case(model_type, auto), tmp_path)
    assert verdict.kind == "right", verdict


# adapters made here ----------------------------------------------------------------------------


def adapt(model: PreTrainedModel, folder: Path, targets: Any, **options: Any) -> PeftModel:
    """PEFT's adapter with random factors (and random trained tensors) on `model`, saved."""
    adapted = get_peft_model(model, GraloraConfig(r=4, alpha=8, target_modules=targets, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "gralora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.eval().save_pretrained(folder)
    return adapted


def merge(folder: Path, *more: object) -> Path:
    run_ok("merge", folder / "adapter", "--base", folder / "base", "-o", folder / "out", *more)
    return folder / "out"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def delta_of(delta: Gralora) -> torch.Tensor:
    """The dense delta, by the slow truth."""
    return torch.from_numpy(oracle.gralora_delta(
        delta.A.double().numpy(), delta.B.double().numpy(), delta.scaling
    )).float()  # fmt: skip


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Gives every tensor of a checkpoint or adapter another name."""
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            held = {change(key): value for key, value in load_file(folder / name).items()}
            save_file(held, folder / name, metadata={"format": "pt"})


GPT2 = Architecture(gpt2, ["c_attn", "c_proj", "c_fc"])
LLAMA = ARCHITECTURES["llama"]


# names -----------------------------------------------------------------------------------------


def test_the_layout_of_gpt2_on_the_hub_lacks_the_prefix(tmp_path: Path) -> None:
    base = save_base(GPT2, tmp_path / "base")
    adapted = train(base, GPT2, tmp_path / "adapter", bias="all")
    rename(base, lambda name: name.removeprefix("transformer."))
    merged = load(merge(tmp_path), CAUSAL)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5
    assert set(tensors_of(tmp_path / "out")) >= {"h.0.attn.c_attn.weight"}


def test_an_adapter_of_the_bare_model_fits_the_model_with_a_head(tmp_path: Path) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    bare = load(base, BARE)
    adapted = adapt(bare, tmp_path / "adapter", ["q_proj", "down_proj"])
    merged = load(merge(tmp_path), CAUSAL)
    assert close(outputs(merged.model), outputs(adapted)) <= 1e-5


OLD_NAMES: dict[str, tuple[str, str, list[str]]] = {
    "mixtral": (CAUSAL, "MixtralConfig", ["w1", "w2", "w3", "q_proj"]),
    "vit": ("AutoModelForImageClassification", "ViTConfig", ["query", "dense"]),
}


@pytest.mark.parametrize("model_type", OLD_NAMES)
def test_adapters_of_transformers_4_carry_the_names_on_disk(
    model_type: str, tmp_path: Path
) -> None:
    auto, config, targets = OLD_NAMES[model_type]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 24}  # fmt: skip
    own = {"image_size": 16, "patch_size": 8} if model_type == "vit" else {
        "vocab_size": 32, "num_key_value_heads": 2, "num_local_experts": 2
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**sizes, **own))
    model.save_pretrained(tmp_path / "base")
    before = tensors_of(tmp_path / "base")
    deltas = {
        name.removesuffix(".weight"): random_delta(*value.shape, r=4)
        for name, value in before.items()
        if value.ndim == 2 and any(name.endswith(f".{target}.weight") for target in targets)
    }
    write_adapter(tmp_path / "adapter", deltas, target_modules=targets)
    after = tensors_of(merge(tmp_path))
    for name, value in before.items():
        delta = deltas.get(name.removesuffix(".weight"))
        wanted = value if delta is None else value + delta_of(delta)
        assert torch.allclose(after[name], wanted, atol=1e-6), name
    load(tmp_path / "out", auto)


def test_legacy_gamma_and_beta_of_norms_are_replaced_in_place(tmp_path: Path) -> None:
    bert = Architecture(ARCHITECTURES["bert-classifier"].build, ["query", "value"], None,
                        auto=BARE)  # fmt: skip
    base = save_base(bert, tmp_path / "base")
    adapted = train(base, bert, tmp_path / "adapter", bias="all")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def legacy(name: str) -> str:
        for new, former in old.items():
            name = name.replace(new, former)
        return name

    rename(base, legacy)
    merged = load(merge(tmp_path), BARE)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5
    assert "embeddings.LayerNorm.gamma" in tensors_of(tmp_path / "out")


def test_near_misses_are_named_and_key_map_places_them(tmp_path: Path) -> None:
    base = save_base(LLAMA, tmp_path / "base")
    adapted = train(base, LLAMA, tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda name: name.replace(".model.layers.", ".decoder.blocks."))
    arguments = ["merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out"]
    refused = run(*arguments)
    assert refused.status == 2
    first = refused.stderr.splitlines()[0]
    assert first.startswith("error: ")
    assert "Near misses: " in refused.stderr
    assert "--key-map FROM=TO" in refused.stderr
    run_ok(*arguments, "--key-map", "decoder.blocks=model.layers")
    assert close(outputs(load(tmp_path / "out", CAUSAL)), outputs(adapted)) <= 1e-5


# ties ------------------------------------------------------------------------------------------

TIED = Architecture(llama("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True), ["q_proj"])


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_one_side_of_a_tie_that_is_trained_whole_is_untied(saved: str, tmp_path: Path) -> None:
    base = save_base(TIED, tmp_path / "base")
    adapted = train(base, TIED, tmp_path / "adapter", modules_to_save=[saved])
    expected = outputs(adapted)
    merged = load(merge(tmp_path), CAUSAL)
    assert close(outputs(merged), expected) <= 1e-5
    assert merged.config.tie_word_embeddings is False
    head, embedding = merged.lm_head.weight, merged.model.embed_tokens.weight
    assert not torch.equal(head, embedding)


def test_the_head_of_t5_leaves_the_shared_embeddings_alone(tmp_path: Path) -> None:
    t5 = ARCHITECTURES["t5"]
    base = save_base(t5, tmp_path / "base")
    adapted = adapt(load(base, t5.auto), tmp_path / "adapter", ["q", "lm_head"])
    merged = load(merge(tmp_path), t5.auto)
    assert close(outputs(merged, t5.inputs), outputs(adapted, t5.inputs)) <= 1e-5
    assert torch.equal(merged.shared.weight, load(base, t5.auto).shared.weight)


def test_a_tie_that_a_text_config_makes_is_undone_there(tmp_path: Path) -> None:
    text = transformers.Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    auto = "AutoModelForImageTextToText"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", auto)
    adapted = adapt(model, tmp_path / "adapter", r".*language_model.*q_proj|lm_head")
    merged = load(merge(tmp_path), auto)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert False in (written.get("tie_word_embeddings"), written["text_config"].get(
        "tie_word_embeddings"))  # fmt: skip


def test_a_layer_that_runs_many_times_is_one_place(tmp_path: Path) -> None:
    """ALBERT runs one layer many times: it has one name, and nothing is refused."""
    albert = transformers.AlbertModel(transformers.AlbertConfig(
        vocab_size=32, embedding_size=16, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
    ))  # fmt: skip
    albert.save_pretrained(tmp_path / "base")
    adapted = adapt(load(tmp_path / "base", BARE), tmp_path / "adapter", ["query", "ffn"])
    merged = load(merge(tmp_path), BARE)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5


# heads and vocabularies ------------------------------------------------------------------------

TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", 3),
    "TOKEN_CLS": ("AutoModelForTokenClassification", 5),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", 2),
    "reward": ("AutoModelForSequenceClassification", 1),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["llama", "bert-classifier"])
def test_a_trained_head_gives_a_model_of_its_class(name: str, task: str, tmp_path: Path) -> None:
    auto, labels = TASKS[task]
    if name == "llama" and task == "QUESTION_ANS":  # its class calls the base model otherwise
        (tmp_path / "plain").mkdir()
        load(save_base(LLAMA, tmp_path / "plain"), BARE).save_pretrained(tmp_path / "base")
    else:
        save_base(ARCHITECTURES[name], tmp_path / "base")
    torch.manual_seed(2)
    extra: dict[str, Any] = {} if task == "QUESTION_ANS" else {"num_labels": labels}
    model = load(tmp_path / "base", auto, **extra)
    model.config.pad_token_id = 0
    targets = ["q_proj", "v_proj"] if name == "llama" else ["query", "value"]
    adapted = adapt(model, tmp_path / "adapter", targets,
                    task_type="SEQ_CLS" if task == "reward" else task)  # fmt: skip
    written = json.loads((merge(tmp_path) / "config.json").read_text())
    assert written["architectures"] == [type(model).__name__]
    merged = load(tmp_path / "out", auto)
    merged.config.pad_token_id = 0

    def scores(which: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            result = which.eval()(input_ids=IDS)
        both = [result.start_logits, result.end_logits] if "start_logits" in result else None
        return torch.cat(both) if both else result.logits

    assert close(scores(merged), scores(adapted)) <= 1e-5
    if task != "QUESTION_ANS":
        assert merged.config.num_labels == labels
        assert merged.config.id2label == {i: f"LABEL_{i}" for i in range(labels)}


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_the_names_of_labels_are_kept(where: str, tmp_path: Path) -> None:
    bert = ARCHITECTURES["bert-classifier"]
    base = save_base(bert, tmp_path / "base")
    train(base, bert, tmp_path / "adapter")
    names = {"0": "bad", "1": "fair", "2": "good"}
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": names, "label2id": {v: int(k) for k, v in names.items()},
               "problem_type": "single_label_classification"}  # fmt: skip
    (tmp_path / where / "config.json").write_text(json.dumps(config))
    written = json.loads((merge(tmp_path) / "config.json").read_text())
    assert written["id2label"] == names
    assert written["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    assert written["problem_type"] == "single_label_classification"
    assert written["architectures"] == ["BertForSequenceClassification"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_resized_everywhere(tied: bool, tmp_path: Path) -> None:
    build = llama("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=tied)
    architecture = Architecture(build, ["q_proj"])
    base = save_base(architecture, tmp_path / "base")
    model = load(base, CAUSAL)
    model.resize_token_embeddings(40, mean_resizing=False)
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    adapted = adapt(model, tmp_path / "adapter", ["q_proj"], modules_to_save=saved)
    expected = outputs(adapted, {"input_ids": IDS + 20})
    written = json.loads((merge(tmp_path) / "config.json").read_text())
    assert written["vocab_size"] == 40
    merged = load(tmp_path / "out", CAUSAL)
    assert merged.get_input_embeddings().weight.shape[0] == 40
    assert merged.lm_head.weight.shape[0] == 40
    assert close(outputs(merged, {"input_ids": IDS + 20}), expected) <= 1e-5


# kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        ("embed_tokens", (32, 16), "is an embedding"),
        ("conv", (16, 16, 3, 3), "is a convolution"),
        ("experts.gate_up_proj", (4, 16, 32), "is a parameter (a stack of experts)"),
        ("attention.out_proj", (16, 16), "is the out_proj of nn.MultiheadAttention"),
    ],
)
def test_kinds_that_cannot_be_adapted_are_refused_by_name(
    module: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    stacked = module.startswith("experts")
    tensors = {
        module if stacked else f"{module}.weight": torch.randn(*shape),
        "attention.in_proj_weight": torch.randn(48, 16),
        "fc.weight": torch.randn(16, 24),
    }
    write_model(tmp_path / "base", tensors)
    deltas = {module: random_delta(16, 16, r=4), "fc": random_delta(16, 24, r=4)}
    write_adapter(tmp_path / "adapter", deltas)
    outcome = run("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "o")
    assert outcome.status == 2
    assert words in outcome.stderr
    assert module in outcome.stderr


def mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config)


def test_a_layer_that_the_model_never_calls_has_no_adapter(tmp_path: Path) -> None:
    """Mamba reads the weight of dt_proj: training leaves the adapter there at zero, and only an
    adapter that says otherwise is refused."""
    architecture = Architecture(mamba, ["in_proj", "x_proj", "dt_proj"])
    base = save_base(architecture, tmp_path / "base")
    adapted = train(base, architecture, tmp_path / "adapter")
    merged = load(merge(tmp_path), CAUSAL)
    assert close(outputs(merged), outputs(adapted)) <= 1e-5
    adapt(load(base, CAUSAL), tmp_path / "other", ["in_proj", "dt_proj"], task_type="CAUSAL_LM")
    refused = run("merge", tmp_path / "other", "--base", base, "-o", tmp_path / "no")
    assert refused.status == 2
    assert "dt_proj: [forward-ignores-adapter]" in refused.stderr


def maskformer() -> PreTrainedModel:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32,
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
            out_features=stages,
        ),
        decoder_config=transformers.DetrConfig(
            d_model=32, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
            encoder_attention_heads=2, decoder_ffn_dim=16, encoder_ffn_dim=16, num_queries=4,
        ),
    )  # fmt: skip
    return transformers.MaskFormerForInstanceSegmentation(config)


def test_a_layer_that_is_called_out_of_a_plain_list_has_no_adapter(tmp_path: Path) -> None:
    """The mask head of MaskFormer calls its first layers, whatever PEFT puts in their place."""
    auto, pixels = "AutoModelForUniversalSegmentation", torch.randn(1, 3, 64, 64)
    base = save_base(Architecture(maskformer, []), tmp_path / "base")

    def masks(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(pixel_values=pixels).masks_queries_logits
        return found

    plain = masks(load(base, auto))
    ignored = adapt(load(base, auto), tmp_path / "adapter", ["mask_embedder.0.0"])
    assert torch.equal(masks(ignored), plain)
    refused = run("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "no")
    assert refused.status == 2
    assert "mask_embedder.0.0: [forward-ignores-adapter]" in refused.stderr
    adapted = adapt(load(base, auto), tmp_path / "adapter", r".*transformer_module.*\.fc\d")
    merged = masks(load(merge(tmp_path), auto))
    assert close(merged, plain) > 1e-3
    assert close(merged, masks(adapted)) <= 1e-4


CONV1D: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_inner": 16, "n_layer": 1, "n_head": 2}),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "ImageGPTModel": ("ImageGPTConfig", {"n_embd": 16, "n_inner": 16, "n_layer": 1, "n_head": 2}),
    "DecisionTransformerModel": (
        "DecisionTransformerConfig", {"hidden_size": 16, "n_inner": 16, "n_layer": 1, "n_head": 2},
    ),
    "ClvpForCausalLM": (
        "ClvpDecoderConfig",
        {"hidden_size": 16, "n_inner": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_mel_attn_blocks": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONV1D)
def test_square_weights_of_conv1d_are_stored_the_other_way(name: str, tmp_path: Path) -> None:
    config, sizes = CONV1D[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, tmp_path / "adapter", ["c_fc", "c_proj"])
    loaded = type(model).from_pretrained(merge(tmp_path))
    square = 0
    for path, module in adapted.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight
            square += weight.shape[0] == weight.shape[1]
            wanted = weight + module.get_delta_weight("default")
            assert torch.allclose(loaded.get_submodule(path).weight, wanted, atol=1e-6), path
    assert square


# custom code -----------------------------------------------------------------------------------


def test_custom_code_is_not_run_unasked(tmp_path: Path) -> None:
    """Plain names need no code; a square weight does, and its refusal names the option."""
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
    tensors = {"fc.weight": torch.randn(16, 24), "sq.weight": torch.ones(8, 8)}
    write_model(tmp_path / "base", tensors, model_type="x", auto_map=auto_map)
    (tmp_path / "base" / "configuration_x.py").write_text("raise SystemExit(99)\n")
    write_adapter(tmp_path / "adapter", {"fc": random_delta(16, 24, r=4)}, target_modules=["fc"])
    merge(tmp_path)
    assert (tmp_path / "out" / "configuration_x.py").exists()
    write_adapter(tmp_path / "square", {"sq": random_delta(8, 8, r=4)})
    refused = run("merge", tmp_path / "square", "--base", tmp_path / "base", "-o", tmp_path / "no")
    assert refused.status == 2
    assert "or pass --trust-remote-code" in refused.stderr.splitlines()[-1]


def test_custom_code_tells_the_orientation_when_it_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
    tensors = {"linear.weight": torch.randn(8, 8), "conv.weight": torch.randn(8, 8)}
    base = write_model(tmp_path / "base", tensors, model_type="x", auto_map=auto_map)
    (base / "configuration_x.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class XConfig(PretrainedConfig):\n    model_type = 'x'\n"
    )
    (base / "modeling_x.py").write_text(
        "import torch\nfrom transformers import PreTrainedModel\n"
        "from transformers.pytorch_utils import Conv1D\n"
        "from .configuration_x import XConfig\n"
        "class XModel(PreTrainedModel):\n    config_class = XConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.linear = torch.nn.Linear(8, 8, bias=False)\n"
        "        self.conv = Conv1D(8, 8)\n        self.post_init()\n"
    )
    deltas = {"linear": random_delta(8, 8, r=4), "conv": random_delta(8, 8, r=4, seed=3)}
    write_adapter(tmp_path / "adapter", deltas)
    after = tensors_of(merge(tmp_path, "--trust-remote-code"))
    for name, delta in deltas.items():
        dense = delta_of(delta) if name == "linear" else delta_of(delta).T
        assert torch.allclose(after[f"{name}.weight"], tensors[f"{name}.weight"] + dense, atol=1e-6)


def test_a_tensor_that_the_loader_would_not_take_is_refused() -> None:
    """A saved norm under a name that means another's tensor: two tensors for one parameter."""
    fixtures = Path(__file__).parent.parent.parent / "fixtures"
    folder = fixtures / "transformers-4.57.6/llava-vision"
    named = {"model.language_model": "language_model"}  # the base says language_model.model
    found = gc.validate(folder / "adapter", folder / "base", key_map=named).errors
    assert {finding.code for finding in found} == {"tensor-not-loaded"}
    told = {finding.where: finding.message for finding in found}["language_model.norm.weight"]
    assert "language_model.model.norm.weight is loaded into as well" in told
