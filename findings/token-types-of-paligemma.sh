#!/usr/bin/env bash
# A PaliGemma given its token types has other logits under transformers 5 than under 4.
#
# transformers 4.57.6 and 5.23.0, torch 2.13.0 (CPU), Python 3.11. Same weights, same inputs.
#
# `token_type_ids` say what is prefix (0) and what is suffix (1). Without labels, 4.57.6 ignores
# them and attends to the whole input from everywhere; 5.23.0 masks by them in every forward, so
# that a suffix is attended to causally (modeling_paligemma.py: `_update_causal_mask` of the one,
# `block_sequence_ids` of the other). Without them, both give the same logits. Scores of a suffix
# that were computed under 4 are not those of 5.
#
# Expected: the same logits.
#
# Output seen:
#
#     without token types, the logits differ by 0.0000
#     with token types, the logits differ by 2.0894
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for stack in "old transformers==4.57.6" "new transformers==5.23.0"; do
    read -r name packages <<<"$stack"
    python3 -m venv "$work/$name"
    "$work/$name/bin/pip" install --quiet torch==2.13.0 "$packages"
done
cd "$work"
HF_HUB_OFFLINE=1 old/bin/python -W ignore - 2>/dev/null <<'PYTHON'
import torch
import transformers

torch.manual_seed(0)
layers = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
config = transformers.PaliGemmaConfig(
    vision_config=transformers.SiglipVisionConfig(
        **layers, num_hidden_layers=1, image_size=4, patch_size=2, projection_dim=16
    ),
    text_config=transformers.GemmaConfig(
        **layers, num_hidden_layers=2, num_key_value_heads=1, head_dim=8, vocab_size=32,
        num_image_tokens=4,
    ),
    image_token_index=31, projection_dim=16,
)
model = transformers.PaliGemmaForConditionalGeneration(config)
for parameter in model.parameters():
    parameter.data = torch.randn_like(parameter) * 0.3
model.save_pretrained("model")
PYTHON
cat >logits.py <<'PYTHON'
import sys

import torch
import transformers

model = transformers.PaliGemmaForConditionalGeneration.from_pretrained("model").eval()
inputs = {
    "input_ids": torch.tensor([[31, 31, 31, 31, 1, 3, 4, 5, 6, 7]]),
    "attention_mask": torch.ones(1, 10, dtype=torch.long),
    "pixel_values": torch.arange(48).float().sin().reshape(1, 3, 4, 4),
}
types = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1]])
with torch.no_grad():
    found = [model(**inputs).logits, model(**inputs, token_type_ids=types).logits]
torch.save(found, sys.argv[1])
PYTHON
for name in old new; do
    HF_HUB_OFFLINE=1 "$name/bin/python" -W ignore logits.py "$name.pt" 2>/dev/null
done
new/bin/python - <<'PYTHON'
import torch

gaps = [(a - b).abs().max().item() for a, b in zip(torch.load("old.pt"), torch.load("new.pt"))]
for said, gap in zip(("without", "with"), gaps):
    print(f"{said} token types, the logits differ by {gap:.4f}")
assert gaps[0] < 1e-4 < 0.01 < gaps[1], "it has changed"
PYTHON
