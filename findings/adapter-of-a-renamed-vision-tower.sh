#!/usr/bin/env bash
# A GraLoRA on the vision tower of a LLaVA, trained under transformers 4, does nothing under 5.
#
# Trained and saved: transformers 4.57.6, peft 0.19.1. Loaded: transformers 5.23.0, peft 0.21.2.
# torch 2.13.0 (CPU), Python 3.11.
#
# transformers 5 took a level out of the vision towers (`vision_tower.vision_model.encoder` became
# `vision_tower.encoder`). It renames the tensors of older checkpoints while it loads them; of
# older adapters, those of a LoRA are renamed, too, and those of a GraLoRA are not: it is loaded
# with fresh factors of no effect. No error, one warning on missing keys among others, and the
# outputs of the base.
#
# Expected: the outputs that the adapter had, or an error.
#
# Output seen:
#
#     trained under 4.57.6: LORA moves the outputs by 0.1212
#     trained under 4.57.6: GRALORA moves the outputs by 0.5881
#     loaded under 5.23.0: LORA moves the outputs by 0.1212
#     loaded under 5.23.0: GRALORA moves the outputs by 0.0000
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for stack in "old transformers==4.57.6 peft==0.19.1" "new transformers==5.23.0 peft==0.21.2"; do
    read -r name packages <<<"$stack"
    python3 -m venv "$work/$name"
    # shellcheck disable=SC2086
    "$work/$name/bin/pip" install --quiet torch==2.13.0 $packages
done
cd "$work"
cat >common.py <<'PYTHON'
import torch


def logits(model):
    ids = torch.tensor([[3, 1, *[31] * 4, 5, 9]])
    pixels = torch.arange(48).float().sin().reshape(1, 3, 4, 4)
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits
PYTHON
HF_HUB_OFFLINE=1 old/bin/python -W ignore - 2>/dev/null <<'PYTHON'
import torch
import transformers
from common import logits
from peft import GraloraConfig, LoraConfig, get_peft_model

torch.manual_seed(0)
layers = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(
        **layers, num_hidden_layers=2, image_size=4, patch_size=2
    ),
    text_config=transformers.LlamaConfig(**layers, num_hidden_layers=1, vocab_size=32),
    image_token_index=31, image_seq_length=4,
)
model = transformers.LlavaForConditionalGeneration(config)
for parameter in model.parameters():
    parameter.data = torch.randn_like(parameter) * 0.3
model.save_pretrained("base")
target = r".*vision_tower.*\.(q_proj|v_proj)"
for config in (LoraConfig(r=4, target_modules=target), GraloraConfig(r=4, target_modules=target)):
    model = transformers.LlavaForConditionalGeneration.from_pretrained("base")
    before, kind = logits(model), config.peft_type.value
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # as if trained
            parameter.data = torch.randn_like(parameter) * 0.3
    moved = (logits(adapted) - before).abs().max().item()
    print(f"trained under {transformers.__version__}: {kind} moves the outputs by {moved:.4f}")
    assert moved > 0.01
    adapted.save_pretrained(kind)
PYTHON
HF_HUB_OFFLINE=1 new/bin/python -W ignore - 2>/dev/null <<'PYTHON'
import transformers
from common import logits
from peft import PeftModel

for kind in ("LORA", "GRALORA"):
    model = transformers.LlavaForConditionalGeneration.from_pretrained("base")
    before = logits(model)
    moved = (logits(PeftModel.from_pretrained(model, kind)) - before).abs().max().item()
    print(f"loaded under {transformers.__version__}: {kind} moves the outputs by {moved:.4f}")
    assert (moved > 0.01) == (kind == "LORA"), "it has changed"
PYTHON
