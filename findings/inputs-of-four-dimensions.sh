#!/usr/bin/env bash
# A linear layer with a GraLoRA adapter takes inputs of two or three dimensions only.
#
# peft 0.21.2, torch 2.13.0 (CPU), Python 3.11.
#
# `torch.nn.Linear` takes any number of leading dimensions, none included, and so does PEFT's
# LoRA. PEFT's GraLoRA layer unpacks its input into batch, sequence and features and raises a
# ValueError from inside the forward pass for one vector, and for images in channels-last order
# (as the pointwise layers of a ConvNeXt get them): such a model cannot run with the adapter.
#
# Expected: an output of the input's shape with the last dimension exchanged, as the layer alone
# gives.
#
# Output seen:
#
#     LORA: (16,) (3, 16) (2, 3, 16) (2, 3, 3, 16)
#     GRALORA: (3, 16) (2, 3, 16)
#     GRALORA, (16,): not enough values to unpack (expected 3, got 1)
#     GRALORA, (2, 3, 3, 16): too many values to unpack (expected 3)
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import torch
from peft import GraloraConfig, LoraConfig, get_peft_model

SHAPES = [(16,), (3, 16), (2, 3, 16), (2, 3, 3, 16)]
taken, errors = {}, []
for config in (LoraConfig(r=4, target_modules=["0"]), GraloraConfig(r=4, target_modules=["0"])):
    kind = config.peft_type.value
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
    taken[kind] = []
    for shape in SHAPES:
        try:
            assert model(torch.zeros(shape)).shape == shape
            taken[kind].append(shape)
        except ValueError as error:
            errors.append(f"{kind}, {shape}: {error}")
    print(f"{kind}:", *taken[kind])
print("\n".join(errors))
assert taken == {"LORA": SHAPES, "GRALORA": [(3, 16), (2, 3, 16)]}, "other inputs are taken now"
PYTHON
