#!/usr/bin/env bash
# A dequantised fp8 model is saved as fp8 codes, and loads again with the codes as its weights.
#
# transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
#
# `FineGrainedFP8Config(dequantize=True)` loads a block-wise fp8 checkpoint as plain float32
# layers, a model that one can train, merge adapters into and save. `save_pretrained` then turns
# the weights back into fp8 codes with `weight_scale_inv` (save_original_format is true by
# default), but drops `quantization_config` from config.json. Loading that folder takes the codes
# (up to 448) for weights; the scales are reported as unexpected keys, which "can be ignored".
# `save_pretrained(..., save_original_format=False)` writes the plain weights.
#
# Expected: plain weights, or codes together with the quantization_config that says how to read
# them.
#
# Output seen:
#
#     dequantised: torch.float32, off by less than 0.01
#     saved: torch.float8_e4m3fn, with scales True, with quantization_config False
#     loaded again: off by more than 100
#     saved with save_original_format=False: torch.float32, loaded again: off by less than 0.01
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
)
LlamaForCausalLM(config).save_pretrained("plain")
plain = load_file("plain/model.safetensors")
name = "model.layers.0.self_attn.q_proj.weight"

# The checkpoint in fp8: one block of 128 x 128 for each projection.
tensors = dict(plain)
for key in [key for key in plain if key.endswith("_proj.weight")]:
    scale = plain[key].abs().max() / torch.finfo(torch.float8_e4m3fn).max
    tensors[key] = (plain[key] / scale).to(torch.float8_e4m3fn)
    tensors[f"{key}_scale_inv"] = scale.reshape(1, 1).clone()
Path("fp8").mkdir()
save_file(tensors, "fp8/model.safetensors", metadata={"format": "pt"})
settings = json.loads(Path("plain/config.json").read_text())
settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Path("fp8/config.json").write_text(json.dumps(settings))


def error(model):
    return (model.state_dict()[name].float() - plain[name]).abs().max().item()


model = AutoModelForCausalLM.from_pretrained(
    "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
)
assert model.state_dict()[name].dtype == torch.float32 and error(model) < 0.01
print("dequantised: torch.float32, off by less than 0.01")

model.save_pretrained("saved")
saved = load_file("saved/model.safetensors")
scales = f"{name}_scale_inv" in saved
says = "quantization_config" in json.loads(Path("saved/config.json").read_text())
print(f"saved: {saved[name].dtype}, with scales {scales}, with quantization_config {says}")
assert (saved[name].dtype, scales, says) == (torch.float8_e4m3fn, True, False)
assert error(AutoModelForCausalLM.from_pretrained("saved")) > 100
print("loaded again: off by more than 100")

model.save_pretrained("cured", save_original_format=False)
dtype = load_file("cured/model.safetensors")[name].dtype
assert dtype == torch.float32 and error(AutoModelForCausalLM.from_pretrained("cured")) < 0.01
print(f"saved with save_original_format=False: {dtype}, loaded again: off by less than 0.01")
PYTHON
