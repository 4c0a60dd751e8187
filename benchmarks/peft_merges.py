"""Merges by PEFT itself, of tiny models, as its users make them; and what `verify` says of them."""

import math
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from benchmarks import tiny

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt",
         "bloom", "falcon", "gemma"),
        "AutoModelForCausalLM",
    ),
    "t5": "AutoModelForSeq2SeqLM", "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Merge:
    """A base, an adapter and PEFT's merge of them, on disk; `targets` are the stored tensors that
    were adapted, with the update of each as it is stored."""

    folder: Path
    updates: Mapping[str, torch.Tensor]

    def verdict(self, merged: str = "merged") -> gc.Equivalence:
        return gc.verify(
            self.folder / "adapter", base=self.folder / "base", merged=self.folder / merged
        )


@cache
def _model(model_type: str) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return tiny.build(MODELS[model_type], model_type)


def merge(
    folder: Path, model_type: str, *, dtype: torch.dtype, rho: float, short: bool, **config: Any
) -> Merge:
    """An adapter with |update| / |weight| = `rho` in every module, merged by PEFT; `short` keeps
    factors in a 16-bit dtype of the base, and may do so in the merge, too."""
    _model(model_type).to(dtype).save_pretrained(folder / "base")

    def load() -> Any:
        auto = getattr(transformers, MODELS[model_type])
        return auto.from_pretrained(folder / "base", dtype=dtype)

    options = {"target_modules": "all-linear", "init_weights": False, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            load(), peft.GraloraConfig(**options), autocast_adapter_dtype=not short
        )
        updates = _resize(adapted, rho)
        adapted.save_pretrained(folder / "adapter")
        again = peft.PeftModel.from_pretrained(
            load(), folder / "adapter",
            autocast_adapter_dtype=not short or random.random() < 0.3,
        )  # fmt: skip
        whole = again.merge_and_unload(safe_merge=random.random() < 0.3)
        whole.save_pretrained(folder / "merged")
    return Merge(folder, updates)


def _resize(adapted: Any, rho: float) -> dict[str, torch.Tensor]:
    """Scales the B factors of every module; the updates by the module's name."""
    updates = {}
    for name, layer in adapted.base_model.model.named_modules():
        if not isinstance(layer, peft.tuners.gralora.layer.GraloraLayer):
            continue
        weight = layer.get_base_layer().weight.detach().double()
        delta = layer.get_delta_weight("default").detach().double()
        size = rho * float(weight.norm() / delta.norm())
        with torch.no_grad():
            layer.gralora_B["default"].mul_(size)
            if layer.hybrid_r["default"]:
                layer.gralora_B_general["default"].weight.mul_(size)
        updates[f"{name}.weight"] = layer.get_delta_weight("default").detach().double()
    return updates


# What is done to one adapted matrix of a right merge: (after, update) -> after.
Fault = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FAULTS: Mapping[str, Fault] = {
    "not applied": lambda after, update: after - update,
    "twice": lambda after, update: after + update,
    "sign": lambda after, update: after - 2 * update,
    "10 % too much": lambda after, update: after + 0.1 * update,
    "1 % too much": lambda after, update: after + 0.01 * update,
    "rows of the update reversed": lambda after, update: after - update + update.flip(0),
}


def spoil(made: Merge, fault: Fault, *, one: bool) -> bool:
    """Writes `wrong`: the merge with a fault in `one` of the adapted matrices, or in all; whether
    that changes anything that is stored."""
    (made.folder / "wrong").mkdir(exist_ok=True)
    for path in (made.folder / "merged").glob("*.json"):
        (made.folder / "wrong" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(made.folder / "merged" / "model.safetensors")
    names = [name for name in made.updates if name in tensors]
    different = False
    for name in [random.choice(names)] if one else names:
        before = tensors[name]
        changed = fault(before.double(), made.updates[name])
        tensors[name] = changed.to(before.dtype).contiguous()
        different = different or not torch.equal(tensors[name], before)
    save_file(tensors, made.folder / "wrong" / "model.safetensors", metadata={"format": "pt"})
    return different


@dataclass
class _Tally:
    made: int = 0
    weights: int = 0
    model: int = 0
    skipped: int = 0
    worst: float = 0.0
    farthest: float = 0.0
    least: float = math.inf

    def count(self, found: gc.Equivalence) -> None:
        self.made += 1
        self.weights += not found.weights_ok
        self.worst = max(self.worst, *(row.worst for row in found.rows))
        if found.model is None:
            self.skipped += 1
            return
        self.model += not found.model.ok
        self.farthest = max(self.farthest, found.model.ratio)
        self.least = min(self.least, found.model.ratio)


def audit_peft(rounds: int) -> int:
    """Two tables; the number of right merges at which there was an alarm and wrong ones missed by
    the weights."""
    right: dict[str, _Tally] = {}
    wrong: dict[str, _Tally] = {}
    for name, dtype in DTYPES.items():
        for number in range(rounds):
            model_type = list(MODELS)[number % len(MODELS)]
            with tempfile.TemporaryDirectory() as folder:
                made, kind = _drawn(Path(folder), model_type, name, dtype)
                tally = right.setdefault(kind, _Tally())
                found = made.verdict()
                tally.count(found)
                if not found.ok:
                    print(f"ALARM {model_type} {kind}: {found.as_text()}", flush=True)
                fault, one = random.choice(list(FAULTS)), random.random() < 0.5
                if spoil(made, FAULTS[fault], one=one):
                    where = "one module" if one else "all modules"
                    wrong.setdefault(f"{fault}, {where}", _Tally()).count(made.verdict("wrong"))
    print("| right merges | made | alarms: weights | model | not run | weights | model |")
    print("|---|---|---|---|---|---|---|")
    for kind, tally in right.items():
        print(
            f"| {kind} | {tally.made} | {tally.weights} | {tally.model} | {tally.skipped} "
            f"| {tally.worst:.4f} | {tally.farthest:.3f} |"
        )
    print("\n| wrong merges | made | found: weights | model | least ratio of the model |")
    print("|---|---|---|---|---|")
    for kind, tally in sorted(wrong.items()):
        print(f"| {kind} | {tally.made} | {tally.weights} | {tally.model} | {tally.least:.3g} |")
    alarms = sum(tally.weights + tally.model for tally in right.values())
    return alarms + sum(tally.made - tally.weights for tally in wrong.values())


def _drawn(folder: Path, model_type: str, name: str, dtype: torch.dtype) -> tuple[Merge, str]:
    ks = [1, 2] if model_type == "vit" else [1, 2, 4, 8]  # which has two labels
    k, short = random.choice(ks), random.random() < 0.4 and dtype != torch.float32
    made = merge(
        folder, model_type, dtype=dtype, rho=10 ** random.uniform(-4, math.log10(0.3)),
        short=short, r=8, gralora_k=k, hybrid_r=random.choice([0, 4]),
        alpha=random.choice([1, 16, 0.7, -8]),
    )  # fmt: skip
    return made, f"{name}, factors of {'16' if short else '32'} bits"
