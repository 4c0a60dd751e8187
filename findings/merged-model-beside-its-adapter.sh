#!/usr/bin/env bash
# A merged model beside its adapter is loaded with the adapter added a second time.
#
# transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU), Python 3.11.
#
# A folder that PEFT saved an adapter into, and then the model that this adapter was merged into,
# holds both `model.safetensors` (merged) and `adapter_config.json`. `from_pretrained` of that
# folder takes the merged weights, ignores the `base_model_name_or_path` that the adapter names
# (without weights in the folder it would load that base), and puts the adapter on top of them:
# W + 2 dW. There is no warning.
#
# Expected: the base that the adapter names with the adapter on it, or the merged weights alone.
#
# Output seen:
#
#     files: adapter_config.json adapter_model.safetensors config.json model.safetensors
#     loaded weight of the layer: the merged one
#     weight it computes with: W + 2 dW
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
LlamaForCausalLM(config).save_pretrained("base")
layer = "model.layers.0.self_attn.q_proj"

model = AutoModelForCausalLM.from_pretrained("base")
before = model.get_submodule(layer).weight.detach().clone()
model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
model.save_pretrained("folder")
merged = model.merge_and_unload()
after = merged.get_submodule(layer).weight.detach().clone()
merged.save_pretrained("folder")
names = {path.name for path in Path("folder").iterdir()}
print("files:", *sorted(names - {"README.md", "generation_config.json"}))

loaded = AutoModelForCausalLM.from_pretrained("folder").get_submodule(layer)
stored = loaded.base_layer.weight
used = stored + loaded.get_delta_weight("default")
assert torch.equal(stored, after), "the weights of the folder are no longer taken"
assert torch.allclose(used, before + 2 * (after - before), atol=1e-6), "no longer counted twice"
assert not torch.allclose(used, after, atol=1e-3)
print("loaded weight of the layer: the merged one")
print("weight it computes with: W + 2 dW")
PYTHON
