"""Adapters and bases of two stacks (transformers and PEFT), crossed: merged here, loaded here.

    python -m benchmarks.stacks FOLDER --other PYTHON [--table FILE] [FAMILY ...]

PYTHON is the interpreter of an environment with another transformers and PEFT. In each of the two
environments every family is built with the same weights and saved, and PEFT's GraLoRA is put on the
vision tower, the text model, or both, beside each of several `modules_to_save`, with random values,
and saved with the logits of the unmerged model. Then each adapter is merged into the base of either
stack, loaded by the transformers of this environment, and its logits are compared. A family whose
bare logits differ between the stacks cannot be judged so, and is told.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
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
CLOSE = 1e-3  # of logits of about 1; a wrong merge is off by more than 0.05


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


def logits(model: Any) -> torch.Tensor:
    draws = torch.Generator().manual_seed(3)
    ids = torch.randint(3, IMAGE - 1, (1, 12), generator=draws)
    ids[0, 2 : 2 + PATCHES] = IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=draws)}
    if "gemma" in model.config.model_type:
        inputs["token_type_ids"] = (ids == IMAGE).long()
    with torch.no_grad():
        found: torch.Tensor = model.float().eval()(**inputs).logits
    return found


def make(folder: Path, family: str) -> None:
    """Everything of one family by the stack of this environment, into `folder`."""
    from peft import GraloraConfig, get_peft_model

    folder.mkdir(parents=True)
    (folder / "stack.json").write_text(json.dumps([version("transformers"), version("peft")]))
    torch.manual_seed(0)
    model = FAMILIES[family]()
    draws = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data = torch.randn(parameter.shape, generator=draws) * 0.2
    model.tie_weights()
    model.save_pretrained(folder / "base")
    torch.save(logits(type(model).from_pretrained(folder / "base")), folder / "base.pt")
    for (where, targets), (what, saved) in itertools.product(TARGETS.items(), SAVED.items()):
        config = GraloraConfig(
            r=4, gralora_k=2, alpha=8, target_modules=targets, modules_to_save=saved
        )
        adapted = get_peft_model(type(model).from_pretrained(folder / "base").float(), config)
        draws = torch.Generator().manual_seed(7)
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=draws) * 0.3
        torch.save(logits(adapted), folder / f"{where}, {what}.pt")
        adapted.save_pretrained(folder / f"{where}, {what}")


def judge(folder: Path, family: str) -> Mapping[tuple[str, str], Counter[str]]:
    """What became of each adapter of either stack on the base of either stack, by the two."""
    import gralora_convert as gc
    from gralora_convert.errors import ConvertError

    cls = type(FAMILIES[family]())
    stacks = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "merged")
    found: dict[tuple[str, str], Counter[str]] = {}
    for trained, base in itertools.product(stacks, stacks):
        kinds = found.setdefault((_name(trained), _name(base)), Counter())
        here = logits(cls.from_pretrained(trained / "base"))
        if (here - torch.load(trained / "base.pt")).abs().max() > CLOSE:
            kinds["not judged: the bare model differs"] += len(TARGETS) * len(SAVED)
            continue
        for adapter in sorted(path for path in trained.iterdir() if (path / "README.md").exists()):
            if adapter.name == "base":
                continue
            try:
                gc.merge(adapter, base=base / "base").write(folder / "merged", overwrite=True)
            except ConvertError as refusal:
                kinds[f"refused: {refusal.message[:60]}"] += 1
                continue
            right = torch.load(trained / f"{adapter.name}.pt")
            merged = logits(cls.from_pretrained(folder / "merged"))
            kinds["right" if (merged - right).abs().max() < CLOSE else "WRONG"] += 1
    return found


def _name(stack: Path) -> str:
    return " + ".join(json.loads((stack / "stack.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--other", required=True, help="the interpreter of the other stack")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    transformers.logging.set_verbosity_error()
    if given.make:
        make(given.folder, *given.families)
        return 0
    rows, wrong = [], 0
    for family in given.families:
        for name, python in (("here", sys.executable), ("other", given.other)):
            command = [python, "-W", "ignore", __file__, str(given.folder / family / name), family]
            subprocess.run([*command, "--other", "", "--make"], check=True, capture_output=True)
        for (trained, base), kinds in judge(given.folder / family, family).items():
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            rows.append(f"| {family} | {trained} | {base} | {told} |")
            wrong += kinds["WRONG"]
            print(rows[-1], flush=True)
    if given.table:
        head = [
            "| family | adapter by (transformers + PEFT) | base by | merges |",
            "|" + " --- |" * 4,
        ]
        given.table.write_text("\n".join([*head, *rows]) + "\n")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
