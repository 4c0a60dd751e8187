"""`extract` between models of two classes of one family: another head, none, tied or not."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from tests.command import run, run_ok
from tests.zoo import IDS, close

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
         "intermediate_size": 24, "max_position_embeddings": 48}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PAD = {"pad_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "Llama": SMALL | PAD, "Qwen3": SMALL | PAD | {"head_dim": 8, "num_key_value_heads": 2},
    "Bert": SMALL | STILL,
    "Roberta": SMALL | STILL | {"pad_token_id": 1}, "Electra": SMALL | STILL,
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 32},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 32} | PAD,
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32,
           "decoder_start_token_id": 0},
}  # fmt: skip
TIED, OPEN = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
# a family, and class and settings of the base and of the tuned model
PAIRS: tuple[tuple[str, str, dict[str, Any], str, dict[str, Any]], ...] = (
    ("Llama", "ForCausalLM", OPEN, "ForSequenceClassification", {"num_labels": 3}),
    ("Llama", "ForCausalLM", TIED, "ForTokenClassification", {"num_labels": 5}),
    ("Llama", "ForCausalLM", OPEN, "Model", {}),
    ("Llama", "Model", {}, "ForCausalLM", OPEN),
    ("Llama", "Model", {}, "ForCausalLM", TIED),
    ("Llama", "ForCausalLM", TIED, "ForCausalLM", OPEN),
    ("Llama", "ForCausalLM", OPEN, "ForCausalLM", TIED),
    ("Qwen3", "ForCausalLM", TIED, "ForSequenceClassification", {"num_labels": 1}),
    ("Bert", "ForMaskedLM", {}, "Model", {}),
    ("Bert", "ForPreTraining", {}, "ForSequenceClassification", {"num_labels": 3}),
    ("Bert", "Model", {}, "ForTokenClassification", {"num_labels": 4}),
    ("Bert", "ForMaskedLM", {}, "ForQuestionAnswering", {}),
    ("Bert", "ForSequenceClassification", {}, "Model", {}),
    ("Roberta", "ForMaskedLM", {}, "ForSequenceClassification", {"num_labels": 3}),
    ("Electra", "Model", {}, "ForSequenceClassification", {"num_labels": 3}),
    ("DistilBert", "ForMaskedLM", {}, "ForSequenceClassification", {"num_labels": 3}),
    ("GPT2", "LMHeadModel", {}, "ForSequenceClassification", {"num_labels": 3}),
    ("GPT2", "Model", {}, "LMHeadModel", {}),
    ("T5", "ForConditionalGeneration", {}, "EncoderModel", {}),
)


def first(model: torch.nn.Module) -> torch.Tensor:
    """What a model of any of these classes puts out first, with IDS put in."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS)[0]
    return found


def made(family: str, cls: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**SIZES[family] | settings)
    model: transformers.PreTrainedModel = getattr(transformers, f"{family}{cls}")(config)
    return model


def saved(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


CASES = [*((pair, True) for pair in PAIRS), *((pair, False) for pair in PAIRS[::4])]


@pytest.mark.parametrize(
    ("pair", "everything"), CASES,
    ids=[f"{p[0]} {p[1]} {p[3]} {p[2] | p[4]} {'all' if e else 'linear'}" for p, e in CASES],
)  # fmt: skip
def test_the_adapter_gives_the_tuned_model(
    pair: tuple[str, str, dict[str, Any], str, dict[str, Any]], everything: bool, tmp_path: Path
) -> None:
    family, own, settings, cls, new = pair
    torch.manual_seed(0)
    base = saved(made(family, own, settings), tmp_path / "base")
    load: Callable[..., Any] = getattr(transformers, f"{family}{cls}").from_pretrained
    labels = {name: value for name, value in new.items() if name == "num_labels"}
    start = load(base, **labels)
    if new == OPEN and settings == TIED:
        start.lm_head.weight = torch.nn.Parameter(torch.randn(32, 16))
        start.config.tie_word_embeddings = False
    elif new == TIED and settings == OPEN:
        start.lm_head.weight = start.model.embed_tokens.weight
        start.config.tie_word_embeddings = True
    with torch.no_grad():
        for parameter in start.parameters():
            if everything or parameter.ndim == 2:
                parameter += 0.05 * torch.randn_like(parameter)
    names = {i: f"name of {i}" for i in range(labels.get("num_labels", 0))}
    start.config.id2label = names or start.config.id2label
    tuned = saved(start, tmp_path / "tuned")
    expected = first(load(tuned))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    run_ok("extract", "--base", base, "--tuned", tuned, "--to", "lora", "--r", "16", "-o", adapter)
    adapted = PeftModel.from_pretrained(load(base, **labels), adapter)
    assert close(first(adapted), expected) <= 2e-5
    assert run("validate", adapter, "--base", base).status == 0
    run_ok("merge", adapter, "--base", base, "-o", merged)
    assert close(first(load(merged)), expected) <= 2e-5
    assert not names or load(merged).config.id2label == names


@pytest.mark.parametrize("setting", [
    {"rms_norm_eps": 0.01}, {"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}},
])  # fmt: skip
def test_what_the_config_alone_holds_is_told_and_taken_along(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    base = saved(made("Llama", "ForCausalLM", OPEN), tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    start = load(base, **setting)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    tuned, adapter, merged = saved(start, tmp_path / "tuned"), tmp_path / "adapter", tmp_path / "m"
    done = run_ok("extract", "--base", base, "--tuned", tuned, "--to", "lora", "-o", adapter)
    assert re.search(
        rf"note: config.json: .*{next(iter(setting))}.* is .* in the base", done.stderr
    )
    run_ok("merge", adapter, "--base", base, "-o", merged)
    assert close(first(load(merged)), first(load(tuned))) <= 2e-5
    assert close(first(load(tuned)), first(load(tuned, config=load(base).config))) > 1e-3
