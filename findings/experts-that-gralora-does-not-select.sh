#!/usr/bin/env bash
# The same target_modules select the experts of a mixture for LoRA, and silently not for GraLoRA.
#
# peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
#
# transformers 5 stacks the experts of a layer in one parameter. PEFT translates the old names of
# a LoraConfig (`w1`, `w2`, `w3`) and `all-linear` to these parameters; a GraloraConfig is not
# translated. While one other name matches a layer (here `q_proj`), the names that select nothing
# are dropped without an error or a warning of PEFT: the adapter trains attention alone.
#
# Expected: the experts too, or a warning that names the targets that selected nothing.
#
# Output seen:
#
#     q_proj w1 w2 w3: modules and expert parameters of LoRA 1 and 2, of GraLoRA 1 and 0
#     all-linear: modules and expert parameters of LoRA 4 and 2, of GraLoRA 4 and 0
#     warnings about the targets of GraLoRA: 0
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

from peft import GraloraConfig, LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

config = MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4,
)


def selected(kind, targets):
    model = get_peft_model(MixtralForCausalLM(config), kind(r=4, target_modules=targets))
    experts = [name for name in model.targeted_parameter_names if ".experts." in name]
    return len(model.targeted_module_names), len(experts)


with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    names = selected(GraloraConfig, ["q_proj", "w1", "w2", "w3"])
    everything = selected(GraloraConfig, "all-linear")
texts = [str(warning.message).lower() for warning in heard]
told = [text for text in texts if any(word in text for word in ("target", "w1", "expert"))]
lora_names = selected(LoraConfig, ["q_proj", "w1", "w2", "w3"])
lora_everything = selected(LoraConfig, "all-linear")
line = "{}: modules and expert parameters of LoRA {} and {}, of GraLoRA {} and {}"
print(line.format("q_proj w1 w2 w3", *lora_names, *names))
print(line.format("all-linear", *lora_everything, *everything))
print("warnings about the targets of GraLoRA:", len(told))
assert (lora_names, names) == ((1, 2), (1, 0)), "the names select something else now"
assert (lora_everything, everything) == ((4, 2), (4, 0)), "all-linear selects something else now"
assert not told, told
PYTHON
