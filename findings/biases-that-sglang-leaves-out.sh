#!/usr/bin/env bash
# SGLang serves a LoRA with trained biases without them, and says nothing.
#
# sglang 0.5.23 (with torch 2.14.1, transformers 5.19.0), peft 0.19.1, Python 3.11, on a CPU without AMX.
#
# PEFT's LoRA with bias="all" trains the biases of the model, too, and saves them beside the factors
# (`...q_proj.base_layer.bias`). SGLang reads no `bias` of adapter_config.json; its loader
# keeps every tensor below `layers.N`, and what is neither lora_A nor lora_B goes where a lora_B goes,
# from where the real lora_B drives it out. The engine starts, and every answer is that of the LoRA
# without its biases. (vLLM 0.32.0 refuses: "Adapter bias is not supported.")
#
# For a machine without a GPU two things are taken out of the way: page-locked memory, which torch gives
# only beside one, and the library of CUDA kernels, in whose place is an empty module.
#
# Expected: the answers of PEFT, or a refusal, or a warning.
#
# Output seen:
#
#     with biases: PEFT [63, 76, 76, 76, 76, 76, 76, 76]
#                SGLang [74, 63, 292, 248, 0, 280, 248, 291]
#         without: PEFT [74, 63, 292, 248, 0, 280, 248, 291]
#                SGLang [74, 63, 292, 248, 0, 280, 248, 291]
#     lines of SGLang's log about a bias: 0
#
# Exit status 0: it still behaves so; otherwise it has changed.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" # about 11 GB
"$work/venv/bin/pip" install --quiet sglang==0.5.23 torch==2.14.1 transformers==5.19.0 \
  accelerate==1.15.0
"$work/venv/bin/pip" install --quiet --no-deps peft==0.19.1
cd "$work"
mkdir shim
touch shim/common_ops.py
cat > shim/sitecustomize.py <<'PYTHON'
import functools
import torch

def unpinned(make):
    @functools.wraps(make)
    def made(*args, **more):
        more.pop("pin_memory", None)
        return make(*args, **more)
    return made

for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
    setattr(torch, name, unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *_, **__: self
PYTHON
cat > models.py <<'PYTHON'
import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

PROMPT, TOKENS = [5, 17, 42, 99, 7, 61], 8
torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(
    vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    tie_word_embeddings=False,
))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.08)
model.save_pretrained("model")
spoken = {}
for bias in ("all", "none"):
    config = LoraConfig(
        r=8, target_modules=["q_proj", "k_proj", "v_proj"], bias=bias, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
        ids = list(PROMPT)
        for _ in range(TOKENS):
            ids.append(int(adapted(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    adapted.save_pretrained(bias)
    spoken[bias] = ids[len(PROMPT):]
Path("peft.json").write_text(json.dumps(spoken))
PYTHON
cat > serve.py <<'PYTHON'
import json
from pathlib import Path

import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path="model", dtype="float32", device="cpu", skip_tokenizer_init=True,
        enable_lora=True, max_lora_rank=8, lora_backend="torch_native",
        lora_paths=["with=all", "without=none"], max_loras_per_batch=2,
        max_total_tokens=1024, max_running_requests=4,
    )
    how = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    spoken = {}
    for bias, name in (("all", "with"), ("none", "without")):
        [told] = engine.generate(
            input_ids=[[5, 17, 42, 99, 7, 61]], sampling_params=how, lora_path=[name]
        )
        spoken[bias] = told["output_ids"]
    Path("sglang.json").write_text(json.dumps(spoken))
    engine.shutdown()
PYTHON
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" SGLANG_USE_CPU_ENGINE=1
venv/bin/python -W ignore models.py > models.log 2>&1 || { tail -5 models.log; exit 2; }
PYTHONPATH="$work/shim" venv/bin/python -W ignore serve.py > serve.log 2>&1 || { tail -5 serve.log; exit 2; }
venv/bin/python -W ignore - <<'PYTHON'
import json
from pathlib import Path

peft, served = (json.loads(Path(f"{name}.json").read_text()) for name in ("peft", "sglang"))
for bias, words in (("all", "with biases"), ("none", "without")):
    print(f"{words + ': PEFT':>17} {peft[bias]}\n{'SGLang':>17} {served[bias]}")
log = Path("serve.log").read_text().splitlines()
about = [line for line in log if "bias" in line and "server_args" not in line]
print(f"lines of SGLang's log about a bias: {len(about)}")
right, left_out = served["none"] == peft["none"], served["all"] == served["none"]
assert right and left_out and peft["all"] != peft["none"] and not about, "it behaves otherwise"
PYTHON
