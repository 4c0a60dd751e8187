#!/usr/bin/env bash
# Merging an adapter into a layer under weight_norm or spectral_norm loses the adapter in silence.
#
# peft 0.21.2 (GraLoRA and LoRA), torch 2.13.0 (CPU), Python 3.11.
#
# `torch.nn.utils.parametrizations` computes `layer.weight` from other parameters at each access.
# PEFT adds the adapter to `layer.weight.data`, that is, to a temporary: after `merge_adapter()`
# the layer counts as merged and computes what it computed without the adapter. Nothing is raised
# or warned.
#
# Expected: the outputs with the adapter, or an error that this layer cannot be merged.
#
# Output seen:
#
#     weight_norm, LORA: moves the outputs; merged, moves them by 0.0
#     weight_norm, GRALORA: moves the outputs; merged, moves them by 0.0
#     spectral_norm, LORA: moves the outputs; merged, moves them by 0.0
#     spectral_norm, GRALORA: moves the outputs; merged, moves them by 0.0
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import warnings
from collections import OrderedDict

import torch
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

torch.manual_seed(0)
x = torch.randn(5, 16)
for norm in (weight_norm, spectral_norm):
    for config in (
        LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False),
        GraloraConfig(r=4, target_modules=["proj"], init_weights=False),
    ):
        model = torch.nn.Sequential(OrderedDict(proj=norm(torch.nn.Linear(16, 16))))
        model = get_peft_model(model, config).eval()
        with torch.no_grad(), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            adapted = model(x)
            with model.disable_adapter():
                plain = model(x)
            model.merge_adapter()
            merged = model(x)
        moved = (merged - plain).abs().max().item()
        assert (adapted - plain).abs().max() > 0.1
        kind = config.peft_type.value
        print(f"{norm.__name__}, {kind}: moves the outputs; merged, moves them by {moved}")
        assert moved == 0 and not heard, "the merge has changed"
PYTHON
