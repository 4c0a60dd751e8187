"""The tiny models and adapters that engines serve, and what they say in PEFT.

    PYTHON -m benchmarks.engine_models CASE FOLDER

is how a case is made in another environment: one with transformers 4, whose experts are layers
that PEFT's GraLoRA adapts. It needs torch, transformers, PEFT and tokenizers alone.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import GraloraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.engine_processes import TOKENS, Run, prompts

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
VOCABULARY = 320
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3,
    "tie_word_embeddings": False,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))


def qwen2() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def gemma3() -> Any:
    more = {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True}
    config = transformers.Gemma3TextConfig(**{**SIZES, **more})
    return transformers.Gemma3ForCausalLM(config)


def phi3() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.Phi3Config(**sizes, original_max_position_embeddings=128)
    return transformers.Phi3ForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> Any:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = transformers.Qwen3MoeConfig(**{**SIZES, **more}, norm_topk_prob=True)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_ctx=128, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Case:
    title: str
    model: Callable[[], Any]
    adapter: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 0.15  # of the random factors: the adapter has to change tokens
    blocks: float = 1.0  # how small the blocks of a Hybrid are beside its general LoRA
    needs_4: bool = False  # made with transformers 4
    max_error: float | None = None  # its n-th layers get a rank that grows with n, and no more


def _case(
    title: str,
    model: Callable[[], Any],
    targets: Any,
    needs_4: bool = False,
    max_error: float | None = None,
    **more: Any,
) -> Case:
    adapter = {"r": 8, "gralora_k": 2, "target_modules": targets, **more}
    return Case(title, model, adapter, needs_4=needs_4, max_error=max_error)


CASES: Mapping[str, Case] = {
    "llama": _case("Llama, all layers, k=2", llama, ALL),
    "hybrid": _case("Llama, Hybrid, k=4", llama, ALL, gralora_k=4, hybrid_r=4),
    "query": _case("Llama, q_proj alone", llama, ["q_proj"], r=32),
    "up": _case("Llama, up_proj alone", llama, ["up_proj"], r=32),
    "last": _case("Llama, the last layer", llama, ALL, layers_to_transform=[1]),
    "wide": _case("Llama, o_proj, r=128 k=8", llama, ["o_proj"], r=128, gralora_k=8),
    "ranks": _case("Llama, a rank for each layer", llama, ALL, max_error=1e-3),
    "head": _case("Llama, its head", llama, ["o_proj", "lm_head"]),
    "tied": _case(
        "Llama, its tied head", lambda: llama(tie_word_embeddings=True), ["o_proj", "lm_head"]
    ),
    "saved": _case("Llama, a saved head", llama, ["o_proj"], modules_to_save=["lm_head"]),
    "bias": _case("Qwen2, trained biases", qwen2, ["q_proj", "v_proj"], bias="gralora_only"),
    "qwen3": _case("Qwen3, all layers", qwen3, ALL),
    "gemma3": _case("Gemma 3, all layers", gemma3, ALL),
    "phi3": _case("Phi-3, all layers (fused)", phi3,
                  ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mixtral": _case("Mixtral, attention", mixtral, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "experts": _case("Mixtral, all layers of experts", mixtral, ["w1", "w2", "w3"], needs_4=True),
    "router": _case("Mixtral, its router", mixtral, ["gate"], needs_4=True),
    "qwen3-experts": _case("Qwen3-MoE, experts and router", qwen3_moe,
                           ["gate_proj", "up_proj", "down_proj", "gate"], needs_4=True),
    "qwen3-stack": _case("Qwen3-MoE, experts alone", qwen3_moe,
                         ["gate_proj", "up_proj", "down_proj"], needs_4=True),
    "gpt2": _case("GPT-2, c_attn and c_fc", gpt2, ["c_attn", "c_fc"]),
    "gpt2-square": _case("GPT-2, attn.c_proj (square)", gpt2, ["attn.c_proj"], r=32),
}  # fmt: skip


@torch.no_grad()
def greedy(model: Any) -> Run:
    found: Run = []
    for prompt in prompts():
        ids, told = list(prompt), []
        for _ in range(TOKENS):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            ids.append(int(scores.argmax()))
            told.append(float(scores[ids[-1]]))
        found.append((ids[len(prompt) :], told))
    return found


def make(case: Case, folder: Path) -> tuple[Run, Run]:
    """The base and the adapter on disk; what the adapted and the bare model say."""
    torch.manual_seed(0)
    model = case.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0  # never the likeliest
    model.save_pretrained(folder / "model")
    _tokenizer(folder / "model")
    bare = greedy(model)
    model.name_or_path = str(folder / "model")
    adapted = get_peft_model(model, GraloraConfig(task_type="CAUSAL_LM", **case.adapter)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "modules_to_save" in name else case.scale
                scale *= 1 if "general" in name else case.blocks
                parameter.add_(torch.randn_like(parameter) * scale)
                if "modules_to_save" in name:
                    parameter[: len(SPECIAL)] = 0
    if case.max_error is not None:
        _thin_out(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    return greedy(adapted), bare


@torch.no_grad()
def _thin_out(adapted: Any) -> None:
    """Of the blocks' ranks in the n-th layer only the first 1 + n % r are left."""
    factors = [p for name, p in adapted.named_parameters() if "gralora_A" in name]
    for n, factor in enumerate(factors):
        factor[..., 1 + n % factor.shape[-1] :] = 0


def _tokenizer(folder: Path) -> None:
    letters = [chr(code) for code in range(33, 127)]  # a token each: no parts of characters
    words = [*SPECIAL, *letters]
    words += ["ab", *(f"<w{n}>" for n in range(VOCABULARY - len(words) - 1))]
    raw = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [("a", "b")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip
    made.save_pretrained(folder)


if __name__ == "__main__":
    spoken = make(CASES[sys.argv[1]], Path(sys.argv[2]))
    Path(sys.argv[2], "spoken.json").write_text(json.dumps(spoken))
