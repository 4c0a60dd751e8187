#!/usr/bin/env bash
# A LoRA that PEFT made of another adapter has lost its task: PEFT's own auto class refuses it.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
#
# `save_as_lora` writes the adapter of a model as a LoRA. The adapter's task_type ("CAUSAL_LM")
# becomes null, and target_modules holds each module twice, by the short name of the original
# config and by its full name. `AutoPeftModelForCausalLM.from_pretrained`, which loads the
# original folder, raises a ValueError on the converted one, and `PeftModel.from_pretrained` makes
# a plain PeftModel of it.
#
# Expected: the task_type of the adapter, and a folder that loads wherever the original loads.
#
# Output seen:
#
#     original: CAUSAL_LM, loads as PeftModelForCausalLM
#     as LoRA: task_type None, target_modules model.layers.0.self_attn.q_proj q_proj
#     as LoRA: ValueError: Cannot infer the auto class from the config, please make sure that you are
#     loading the correct model for your task type.
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import json
from pathlib import Path

from peft import AutoPeftModelForCausalLM, GraloraConfig, get_peft_model, save_as_lora
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
LlamaForCausalLM(config).save_pretrained("base")
base = AutoModelForCausalLM.from_pretrained("base")
gralora = GraloraConfig(r=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(base, gralora)
model.save_pretrained("original")
save_as_lora("lora", model, rank=8)

kind = type(AutoPeftModelForCausalLM.from_pretrained("original")).__name__
print(f"original: CAUSAL_LM, loads as {kind}")
saved = json.loads(Path("lora/adapter_config.json").read_text())
targets = sorted(saved["target_modules"])
print(f"as LoRA: task_type {saved['task_type']}, target_modules", *targets)
assert saved["task_type"] is None, "the task is kept now"
assert targets == ["model.layers.0.self_attn.q_proj", "q_proj"], "each module is listed once now"
try:
    AutoPeftModelForCausalLM.from_pretrained("lora")
except ValueError as error:
    print(f"as LoRA: ValueError: {error}")
    assert "Cannot infer the auto class" in str(error)
else:
    raise SystemExit("the converted folder loads now")
PYTHON
