"""Every architecture of transformers that builds small: merged by us, compared with PEFT.

    python -m benchmarks.architectures [MODEL_TYPE ...]

For each model type: a tiny model with random weights is saved, PEFT makes an `all-linear` adapter
with random factors, the command line merges, transformers loads the result, and every weight is
compared with base + PEFT's delta weight. Prints a line per model type and a count of
right, refused (with the code), not run (the model does not build small, or PEFT refuses) and WRONG.
"""

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import GraloraConfig, get_peft_model

from gralora_convert.cli import main as command

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "hidden_dim": 48, "n_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "word_embed_proj_dim": 32, "d_kv": 8,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64,
    "embedding_size": 32, "image_size": 32, "patch_size": 8, "num_channels": 3,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "dropout": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "dropout_rate": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
AUTOS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": None,
}


def small_config(model_type: str) -> Any:
    """The type's config with every size that it knows made small, also in the configs inside."""
    cls = transformers.CONFIG_MAPPING[model_type]
    default = cls()

    def shrink(config: Any) -> dict[str, Any]:
        known = config.to_dict()
        values = {name: value for name, value in SMALL.items() if name in known}
        for name, inner in vars(config).items():
            if isinstance(inner, transformers.PretrainedConfig):
                values[name] = shrink(inner)
        for name in ("layer_types", "mlp_layer_types"):
            if isinstance(known.get(name), list):
                values[name] = known[name][:2]
        return values

    return cls(**shrink(default))


def try_one(model_type: str, auto: str, folder: Path) -> str:
    """`right`, `refused: ...`, `not run: ...` or `WRONG: ...`."""
    task = AUTOS[auto]
    try:
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(small_config(model_type))
        if sum(p.numel() for p in model.parameters()) > 30_000_000:
            return "not run: does not become small"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / "base")
        model = getattr(transformers, auto).from_pretrained(folder / "base", dtype=torch.float32)
        config = GraloraConfig(r=4, alpha=8, target_modules="all-linear", task_type=task)
        adapted = get_peft_model(model, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "gralora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        adapted.save_pretrained(folder / "adapter")
    except Exception as error:  # a model that does not build, or PEFT does not adapt: no finding
        reason = (str(error).splitlines() or [""])[0][:80]
        return f"not run: {type(error).__name__}: {reason}"
    err = io.StringIO()
    arguments = ["merge", str(folder / "adapter"), "--base", str(folder / "base"),
                 "-o", str(folder / "out")]  # fmt: skip
    status = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            command(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    if status == 2:
        return f"refused: {err.getvalue().splitlines()[0][:160]}"
    if status:
        return f"WRONG: exit {status}: {err.getvalue()[-300:]}"
    return compare(adapted, auto, folder)


def compare(adapted: Any, auto: str, folder: Path) -> str:
    """Every parameter of the reloaded merge against base + PEFT's delta weight."""
    merged = dict(
        getattr(transformers, auto)
        .from_pretrained(folder / "out", dtype=torch.float32)
        .named_parameters()
    )
    inner = adapted.base_model.model
    worst, where = 0.0, ""
    for name, module in inner.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        wanted = (module.base_layer.weight + module.get_delta_weight("default")).detach()
        found = merged.get(f"{name}.weight")
        if found is None or found.shape != wanted.shape:
            return f"WRONG: {name}.weight is not in the reloaded model"
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if difference > worst:
            worst, where = difference, name
    if worst > 1e-5:
        return f"WRONG: {where} differs by {worst:.3g}"
    for name, parameter in inner.named_parameters():
        if "gralora_" in name or ".base_layer.weight" in name:
            continue
        found = merged.get(name.replace(".base_layer", ""))
        if found is not None and not torch.allclose(found, parameter, atol=1e-6):
            return f"WRONG: {name} was changed"
    return "right"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    chosen = sys.argv[1:] or sorted(transformers.CONFIG_MAPPING.keys())
    counts: Counter[str] = Counter()
    for model_type in chosen:
        for auto in AUTOS:
            mapping = getattr(transformers, f"MODEL{_MAPPINGS[auto]}_MAPPING")
            if type_config(model_type) not in mapping:
                continue
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                verdict = try_one(model_type, auto, Path(folder))
            counts[verdict.partition(":")[0]] += 1
            print(f"{model_type:28} {auto:24} {verdict}", flush=True)
    print(json.dumps(counts))


_MAPPINGS = {
    "AutoModelForCausalLM": "_FOR_CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "AutoModel": "",
}


def type_config(model_type: str) -> Any:
    try:
        return transformers.CONFIG_MAPPING[model_type]
    except (KeyError, ImportError, AttributeError):
        return None


if __name__ == "__main__":
    main()
