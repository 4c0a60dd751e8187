"""Tiny real models of transformers, and adapters that real PEFT has trained on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import GraloraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

Inputs = Mapping[str, torch.Tensor]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
TEXT: Inputs = {"input_ids": IDS}


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model, what to adapt in it, what to feed it."""

    build: Callable[[], PreTrainedModel]
    targets: list[str] | str
    task_type: str | None = "CAUSAL_LM"
    inputs: Inputs = field(default_factory=lambda: TEXT)
    auto: str = "AutoModelForCausalLM"


def llama(cls: str, config: str, **more: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        sizes = {
            "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "head_dim": 4, "tie_word_embeddings": False, **more,
        }  # fmt: skip
        return getattr(transformers, cls)(getattr(transformers, config)(**sizes))

    return build


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert() -> PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        llama("LlamaForCausalLM", "LlamaConfig"), ["q_proj", "v_proj", "down_proj"]
    ),
    "llama-tied": Architecture(
        llama("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True), ["q_proj", "lm_head"]
    ),
    "qwen3": Architecture(llama("Qwen3ForCausalLM", "Qwen3Config"), "all-linear"),
    "gpt2": Architecture(gpt2, ["c_attn", "c_proj", "c_fc"]),
    "t5": Architecture(
        t5, ["q", "v", "wo"], "SEQ_2_SEQ_LM", {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
        "AutoModelForSeq2SeqLM",
    ),
    "bert-classifier": Architecture(
        bert, ["query", "value"], "SEQ_CLS", TEXT, "AutoModelForSequenceClassification"
    ),
}  # fmt: skip


def save_base(
    architecture: Architecture, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """The architecture's model with seeded weights, saved by transformers."""
    torch.manual_seed(0)
    model = architecture.build().to(dtype)
    with torch.no_grad():  # transformers' initial weights are tiny; trained ones are not
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **options)
    return folder


def load(folder: Path, auto: str, **options: Any) -> PreTrainedModel:
    """What `transformers` makes of a folder, in evaluation mode and the dtype on disk."""
    options.setdefault("dtype", "auto")
    return getattr(transformers, auto).from_pretrained(folder, **options).eval()


def outputs(model: torch.nn.Module, inputs: Inputs = TEXT) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head; float32."""
    with torch.no_grad():
        result = model.eval()(**inputs)
    found: torch.Tensor = (
        result.logits if "logits" in result else result.last_hidden_state
    ).float()
    return found


def train(
    base: Path,
    architecture: Architecture,
    folder: Path,
    *,
    steps: int = 3,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    **config: Any,
) -> PeftModel:
    """An adapter that PEFT trained for some steps on `base` and saved into `folder`."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"target_modules": architecture.targets, "r": 8, "alpha": 16}
    options |= {"task_type": architecture.task_type} | config
    extra = {"num_labels": 3} if architecture.task_type == "SEQ_CLS" else {}
    model = load(base, architecture.auto, **extra)
    model.name_or_path = str(base)
    adapted = get_peft_model(
        model,
        GraloraConfig(**options),
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    adapted.train()
    for _ in range(steps):
        adapted.zero_grad()
        result = adapted(**architecture.inputs)
        logits = result.logits if "logits" in result else result.last_hidden_state
        loss = (logits.float() - 1.0).pow(2).mean()
        loss.backward()
        with torch.no_grad():  # steps of fixed length: every tensor moves, whatever the gradient
            for parameter in trainable:
                if parameter.grad is not None:
                    scale = 0.05 / (parameter.grad.float().norm() + 1e-12)
                    parameter.sub_((parameter.grad.float() * scale).to(parameter.dtype))
    adapted.eval()
    adapted.save_pretrained(folder)
    return adapted


def close(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())
