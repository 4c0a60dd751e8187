"""Vision language models made by hand, and the adapters that `benchmarks.stacks` puts on them."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128,
}  # fmt: skip
IMAGE, PATCHES = 39, 4  # the token of the image, and how many stand for it


def llava(vision: str, text: str, tied: bool = False) -> Any:
    t = TEXT if text == "Llama" else {k: v for k, v in TEXT.items() if k != "head_dim"}
    more = {} if vision == "CLIP" else {"vision_feature_select_strategy": "full"}
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, f"{vision}VisionConfig")(**VISION),
        text_config=getattr(transformers, f"{text}Config")(**t, tie_word_embeddings=tied),
        image_token_index=IMAGE, image_seq_length=PATCHES, tie_word_embeddings=tied, **more,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def vip_llava() -> Any:
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION | {"num_hidden_layers": 4}),
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE,
        vision_feature_layers=[-2, -3], image_seq_length=PATCHES,
    )  # fmt: skip
    return transformers.VipLlavaForConditionalGeneration(config)


def gemma3(tied: bool) -> Any:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Gemma3TextConfig(**TEXT, tie_word_embeddings=tied),
        image_token_index=IMAGE, mm_tokens_per_image=PATCHES, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma(tied: bool) -> Any:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, projection_dim=16),
        text_config=transformers.GemmaConfig(
            **TEXT, tie_word_embeddings=tied, num_image_tokens=PATCHES
        ),
        image_token_index=IMAGE, projection_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.PaliGemmaForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llava": lambda: llava("CLIP", "Llama"),
    "llava-tied": lambda: llava("CLIP", "Llama", tied=True),
    "llava-siglip": lambda: llava("Siglip", "Qwen2"),
    "vip-llava": vip_llava,
    "gemma3": lambda: gemma3(True),
    "gemma3-untied": lambda: gemma3(False),
    "paligemma": lambda: paligemma(True),
    "paligemma-untied": lambda: paligemma(False),
}
TARGETS: dict[str, str | list[str]] = {
    "vision": r".*vision_tower.*\.(q_proj|v_proj)",
    "text": r".*language_model.*\.(q_proj|v_proj)",
    "both": ["q_proj", "v_proj"],
}
SAVED: dict[str, list[str] | None] = {
    "nothing": None, "head": ["lm_head"], "embeddings": ["embed_tokens"],
    "head and embeddings": ["lm_head", "embed_tokens"], "norm": ["norm"],
    "post norm": ["post_layernorm"], "projector": ["multi_modal_projector"],
}  # fmt: skip


def build(family: str) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    draws = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data = torch.randn(parameter.shape, generator=draws) * 0.2
    model.tie_weights()
    return model


def inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(3)
    ids = torch.randint(3, IMAGE - 1, (1, 12), generator=draws)
    ids[0, 2 : 2 + PATCHES] = IMAGE
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=draws)}
    if model.config.model_type == "gemma3":  # the stacks differ in what PaliGemma's mean
        given["token_type_ids"] = (ids == IMAGE).long()
    yield given


def adapters(load: Callable[[], Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """Each adapter's name and unmerged model, after it was saved under its name in `folder`."""
    from peft import GraloraConfig, get_peft_model

    for (where, targets), (what, saved) in itertools.product(TARGETS.items(), SAVED.items()):
        config = GraloraConfig(
            r=4, gralora_k=2, alpha=8, target_modules=targets, modules_to_save=saved
        )
        adapted = get_peft_model(load(), config)
        draws = torch.Generator().manual_seed(7)
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=draws) * 0.3
        adapted.save_pretrained(folder / f"{where}, {what}")
        yield f"{where}, {what}", adapted
