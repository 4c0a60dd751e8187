#!/usr/bin/env bash
# A LoRA on plain layers beside a mixture of experts goes elsewhere, or is lost when it is loaded.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
#
# transformers 5 stacks the experts of a layer in parameters, and PEFT translates the targets and
# the keys of a LoRA to these. Both translations also catch layers that are no experts:
#
# * DeepSeek-V3, targets `gate_proj`, `up_proj` and `down_proj` of the dense first layer by their full
#   names: none of them is adapted; the experts of the second layer are, which nobody named. The same
#   with the short names: the dense layer and the shared expert get nothing. A GraLoRA with the
#   same targets adapts what they name.
# * Laguna, all layers of the shared expert: they are adapted and trained, and saved under their
#   names; when the folder is loaded, their factors are not found (a warning lists them as missing)
#   and stay what a new LoRA has: no update.
#
# Expected: the layers that the targets name are adapted, and loaded as they were saved.
#
# Output seen:
#
#     deepseek_v3, targets in layer 0: LoRA adapts layers [1], GraLoRA [0]
#     laguna: update of the shared expert before saving not 0, after loading 0.0
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PYTHON'
import re

import torch
import transformers
from peft import GraloraConfig, LoraConfig, PeftModel, get_peft_model

transformers.logging.set_verbosity_error()
sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
}
mlp = ("gate_proj", "up_proj", "down_proj")


def layers(model):
    names = [name for name, _ in model.named_parameters() if re.search("lora_A", name)]
    return sorted({int(re.search(r"layers\.(\d+)", name)[1]) for name in names})


def deepseek():
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        **sizes, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1,
    ))


dense = [f"model.layers.0.mlp.{name}" for name in mlp]
lora = layers(get_peft_model(deepseek(), LoraConfig(r=4, target_modules=dense)))
gralora = layers(get_peft_model(deepseek(), GraloraConfig(r=4, target_modules=dense)))
print(f"deepseek_v3, targets in layer 0: LoRA adapts layers {lora}, GraLoRA {gralora}")
assert (lora, gralora) == ([1], [0]), "the targets are taken otherwise now"

config = transformers.LagunaConfig(**sizes, head_dim=16, num_experts=2, num_experts_per_tok=1)
transformers.LagunaForCausalLM(config).save_pretrained("base")
base = transformers.LagunaForCausalLM.from_pretrained("base")
shared = [name for name, _ in base.named_modules() if re.search(r"shared_expert.*_proj$", name)]
adapted = get_peft_model(base, LoraConfig(r=4, target_modules=shared))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:  # as after training
        torch.nn.init.normal_(parameter)


def update(model):
    found = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    assert len(found) == len(shared) > 0
    return max(m.get_delta_weight("default").abs().max().item() for m in found)


before = update(adapted)
adapted.save_pretrained("adapter")
fresh = transformers.LagunaForCausalLM.from_pretrained("base")
after = update(PeftModel.from_pretrained(fresh, "adapter"))
print(f"laguna: update of the shared expert before saving {'0' if before == 0 else 'not 0'}, "
      f"after loading {after}")
assert before > 0 and after == 0, "the factors are loaded otherwise now"
PYTHON
