"""GraLoRA by PEFT on every model type and auto class; runs under older releases, too."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS: dict[str, str | None] = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModel": None,
    "AutoModelForImageTextToText": None,
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForMaskedLM": None,
    "AutoModelForImageClassification": None,
    "AutoModelForObjectDetection": None,
    "AutoModelForUniversalSegmentation": None,
    "AutoModelForSemanticSegmentation": None,
    "AutoModelForDepthEstimation": None,
    "AutoModelForZeroShotObjectDetection": None,
    "AutoModelForMaskGeneration": None,
    "AutoModelForSpeechSeq2Seq": None,
    "AutoModelForCTC": None,
    "AutoModelForAudioClassification": None,
    "AutoModelForTextToSpectrogram": None,
    "AutoModelForTextToWaveform": None,
}
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
HEADS = ("classifier", "score", "qa_outputs")  # saved whole by PEFT for these tasks


@dataclass(frozen=True)
class Case:
    model_type: str
    auto: str


def mapping(auto: str) -> set[str]:
    """The model types that an auto class knows."""
    import transformers

    names: Any = getattr(transformers, auto)._model_mapping._model_mapping
    return set(names)


def cases(chosen: Sequence[str]) -> list[Case]:
    import transformers

    types = sorted(set(chosen) or set(transformers.CONFIG_MAPPING.keys()))
    known = {auto: mapping(auto) for auto in TASKS}
    return [Case(name, auto) for auto in TASKS for name in types if name in known[auto]]


def adapt(case: Case, base: Path, out: Path) -> tuple[Any, str]:
    """The unmerged model on a saved base, after its adapter was saved; what was adapted.

    Raises:
        Exception: PEFT adapts none of its layers, in its own words.
    """
    import transformers
    from peft import GraloraConfig, get_peft_model

    task = TASKS[case.auto]
    options: dict[str, Any] = {"num_labels": 4} if task in ("SEQ_CLS", "TOKEN_CLS") else {}
    options |= {"dtype": float32(), "output_loading_info": True}
    for explicit in (False, True):
        model, info = getattr(transformers, case.auto).from_pretrained(base, **options)
        new = _new_modules(model, info["missing_keys"]) if task in HEADED else []
        targets = _adaptable(model, new) if explicit else "all-linear"
        config = GraloraConfig(
            r=4, alpha=8, target_modules=targets, task_type=task, modules_to_save=new or None
        )
        try:
            adapted = get_peft_model(model, config)
        except (ValueError, NotImplementedError, AttributeError, TypeError):
            if explicit:
                raise
            continue
        if not explicit and any("gralora_" in name for name in _ignored(adapted)):
            continue
        _randomise(adapted)
        try:
            adapted.save_pretrained(out)
        except NotImplementedError:  # its class does not say which its embeddings are
            adapted.save_pretrained(out, save_embedding_layers=False)
        return adapted, "all that PEFT can adapt" if explicit else "all-linear"
    raise ValueError("PEFT adapts none of its layers")


def base_auto(case: Case) -> str:
    """The class of the base: a task's head is trained on a model without it."""
    if TASKS[case.auto] not in HEADED:
        return case.auto
    is_encoder = case.model_type in mapping("AutoModelForMaskedLM")  # bare, with its pooler
    is_bare = is_encoder or TASKS[case.auto] == "QUESTION_ANS"
    autos = ["AutoModelForCausalLM", "AutoModel", case.auto]
    return next(auto for auto in autos[is_bare:] if case.model_type in mapping(auto))


def _new_modules(model: Any, missing: Sequence[str]) -> list[str]:
    """The modules that hold the parameters which the base lacks: a head, and what leads to it."""
    found = set()
    for name in missing:
        words = name.split(".")
        deep = 2 if words[0] == model.base_model_prefix else 1
        found.add(".".join(words[:deep] if len(words) > deep else words[:-1]))
    return sorted(found)


def float32() -> Any:
    import torch

    return torch.float32


def _adaptable(model: Any, new: Sequence[str]) -> list[str]:
    """Linear layers of even sizes, outside of new heads, that PEFT's forward does not ignore."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)
    try:
        output = head()
    except (NotImplementedError, AttributeError):
        output = None
    ignored = {id(m.out_proj) for m in model.modules() if hasattr(m, "in_proj_weight")}
    return [
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
        and id(module) not in ignored and all(n % 2 == 0 < n for n in module.weight.shape)
        and name not in HEADS and not any(f"{name}.".startswith(f"{head}.") for head in new)
    ]  # fmt: skip


def _ignored(adapted: Any) -> Iterator[str]:
    """Parameters of layers whose adapter PEFT's forward ignores, or that have no outputs."""
    for name, module in adapted.named_modules():
        if hasattr(module, "gralora_A") and not module.get_base_layer().weight.numel():
            yield f"{name}.gralora_A"
        if hasattr(module, "in_proj_weight"):
            yield from (f"{name}.{inner}" for inner, _ in module.named_parameters())


def _randomise(adapted: Any) -> None:
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "gralora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            elif parameter.requires_grad:  # a head that is trained whole
                parameter.add_(torch.randn_like(parameter) * 0.1)
