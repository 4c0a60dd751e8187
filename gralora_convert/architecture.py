"""What a base model is: names in memory <-> names on disk, orientation, ties, kinds of modules.

Config and headers answer most questions. What they cannot answer is asked of transformers: facts
that stand in its source text first (no import), then the model itself, built on the meta device
(imports torch and transformers, allocates nothing).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_convert.checkpoint import Checkpoint
from gralora_convert.tensors import FLOATING, TensorSpec

if TYPE_CHECKING:
    import torch

    from gralora_convert.origins import Origin

__all__ = ["TIE_FLAG_MEANS_MORE", "Architecture", "near_misses", "quantisation"]

# Blocks of these models are Conv1D throughout, their heads nn.Linear (transformers 5.23).
_CONV1D_FAMILY = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_IN_BLOCK = re.compile(r"(.*\.)?h\.\d+\..*")
# Their tie_word_embeddings also switches the scaling of the decoder's output (configuration_t5.py),
# so an own lm_head is told by its presence in the file alone.
TIE_FLAG_MEANS_MORE = frozenset({"t5", "mt5", "umt5", "longt5", "pop2piano"})
_EMBEDDING = re.compile(r"(.*\.)?(\w*embed(ding|dings|_tokens|_in)?|wte|wpe|shared)")
_QUANTISED_SUFFIXES = {
    ".weight_scale_inv": "fp8 (block scales)",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4",
}
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def quantisation(base: Checkpoint) -> str | None:
    """The name of the quantisation of a base, None when its weights are plain numbers."""
    config = base.config.get("quantization_config")
    if isinstance(config, Mapping):
        method = config.get("quant_method") or config.get("quant_algo")
        if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
            method = "bitsandbytes"
        return str(method or "a quantization_config")
    for name in base.tensors:
        for suffix, method in _QUANTISED_SUFFIXES.items():
            if name.endswith(suffix) and _is_quantised_partner(base, name, suffix):
                return method
    return None


def _is_quantised_partner(base: Checkpoint, name: str, suffix: str) -> bool:
    stem = name.removesuffix(suffix)
    if suffix == "_blocks":
        return f"{stem}_scales" in base.tensors
    if suffix == ".weight_scale_inv":
        return f"{stem}.weight" in base.tensors
    return True


@dataclass(frozen=True)
class Architecture:
    """The base as an adapter's names see it; `class_name` is the model class in memory (None:
    the base's own)."""

    base: Checkpoint
    class_name: str | None = None
    task_type: str | None = None
    key_map: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False

    @cached_property
    def source(self) -> str:
        """The text of transformers' modeling files of this model type; '' when there are none."""
        spec = find_spec("transformers")
        if spec is None or not spec.submodule_search_locations or not self.base.model_type:
            return ""
        name = self.base.model_type.replace("-", "_")
        if not re.fullmatch(r"\w+", name):
            return ""
        folder = Path(spec.submodule_search_locations[0]) / "models"
        folder /= {"openai_gpt": "openai"}.get(name, name)
        files = sorted(folder.glob("modeling_*.py")) if folder.is_dir() else []
        return "\n".join(file.read_text(encoding="utf-8") for file in files)

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """The architecture's own `base_model_prefix`, from the source text."""
        found = re.findall(r"^    base_model_prefix = \"(\w+)\"", self.source, re.MULTILINE)
        return tuple(dict.fromkeys(found))

    @cached_property
    def model(self) -> "torch.nn.Module | None":
        """The model on the meta device, None when transformers does not know the architecture."""
        return _meta_model(self)

    # names ------------------------------------------------------------------------------------

    def renamer(self, modules: Iterable[str]) -> tuple[Callable[[str], str], str]:
        """The way from names in memory to names on disk that fits every module, and what it does
        ('' when names are the same). When none fits all, names stay as they are."""
        modules = [self.mapped(module) for module in modules]
        candidates: list[tuple[Callable[[str], str], str]] = [(_same, "")]
        for prefix in self.prefixes:
            candidates.append((_stripper(prefix), f"without the prefix {prefix!r}"))
            candidates.append((_adder(prefix, self.base), f"with the prefix {prefix!r}"))
        for rename, what in candidates:
            if all(
                f"{rename(m)}.weight" in self.base.tensors or self._may_lack(m) for m in modules
            ):
                if any(f"{rename(m)}.weight" in self.base.tensors for m in modules):
                    return rename, what
        return _same, ""

    def mapped(self, name: str) -> str:
        """`name` after the user's `key_map` (whole names, or leading parts)."""
        for start, to in self.key_map.items():
            if name == start or name.startswith(f"{start}."):
                return to + name.removeprefix(start)
        return name

    def _may_lack(self, module: str) -> bool:
        """Whether a module may be tied, so that its weight is not on disk."""
        return module.rpartition(".")[2] in ("lm_head", "embed_out", "output")

    @cached_property
    def origins(self) -> "Mapping[str, tuple[Origin, ...]]":
        """Parameter in memory -> where it lies on disk, by transformers' conversion mapping; {}
        when it does not know the architecture."""
        from gralora_convert.origins import origins

        return {} if self.model is None else origins(self.model, self.base)

    def tied_source(self, module: str, shape: tuple[int, int]) -> str | None:
        """The tensor on disk that an output head without one shares: the input embedding."""
        if not self._may_lack(module):
            return None
        found = [
            name
            for name, spec in self.base.tensors.items()
            if name.endswith(".weight")
            and _EMBEDDING.fullmatch(name.removesuffix(".weight"))
            and spec.shape == shape
            and "position" not in name
            and not name.endswith("wpe.weight")
        ]
        shared = [name for name in found if name.endswith("shared.weight")]
        return shared[0] if shared else found[0] if len(found) == 1 else None

    @property
    def is_tied(self) -> bool:
        """Whether the config (or the absence of a head on disk) ties the output head."""
        value = self.base.config.get("tie_word_embeddings")
        return value is not False

    # kinds ------------------------------------------------------------------------------------

    def is_transposed(self, module: str, spec: TensorSpec, shape: tuple[int, int]) -> bool | None:
        """Whether the weight is stored (in, out), as Conv1D does; None when that cannot be told.

        `shape` is (out, in) of the adapter.
        """
        if spec.shape == shape and shape[0] != shape[1]:
            return False
        if spec.shape == shape[::-1] and shape[0] != shape[1]:
            return True
        if self.base.model_type in _CONV1D_FAMILY:
            return _IN_BLOCK.fullmatch(module) is not None
        if self.source and "Conv1D" not in self.source:
            return False
        kind = self.kind(module)
        return None if kind is None else kind == "Conv1D"

    def kind(self, module: str) -> str | None:
        """The class name of a module in memory; None when the model cannot be built or lacks it."""
        model = self.model
        if model is None:
            return None
        import torch

        try:
            found = model.get_submodule(module)
        except AttributeError:
            return None
        if isinstance(found, torch.nn.MultiheadAttention):
            return "MultiheadAttention"
        return "Linear" if isinstance(found, torch.nn.Linear) else type(found).__name__

    def is_attention_output(self, disk_module: str) -> bool:
        """Whether a module is the out_proj of torch's MultiheadAttention, by its siblings."""
        parent, _, last = disk_module.rpartition(".")
        siblings = (f"{parent}.in_proj_weight", f"{parent}.q_proj_weight")
        return last == "out_proj" and any(name in self.base.tensors for name in siblings)

    def is_embedding(self, module: str) -> bool:
        """Whether a module is an embedding, by its name."""
        return _EMBEDDING.fullmatch(module) is not None

    def head_class(self) -> str | None:
        """The class that loads this base with a head for the adapter's task."""
        auto = _AUTO_CLASSES.get(self.task_type or "")
        if self.class_name and self.class_name not in self.base.architectures:
            return self.class_name
        if auto is None or self.base.model_type is None:
            return None
        return _class_of_task(auto, self.base.model_type)

    def linear_modules(self) -> list[str] | None:
        """Names in memory of all nn.Linear and Conv1D but the output head; None if unknown."""
        model = self.model
        if model is None:
            return None
        import torch

        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [
            name
            for name, module in model.named_modules()
            if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
            and module is not head
        ]

    def disk_modules(self) -> list[str]:
        """Names on disk of what looks like a linear layer: 2-D floating weights, no embeddings."""
        return [
            name.removesuffix(".weight")
            for name, spec in self.base.tensors.items()
            if name.endswith(".weight")
            and len(spec.shape) == 2
            and spec.dtype in FLOATING
            and not self.is_embedding(name.removesuffix(".weight"))
        ]


def _same(name: str) -> str:
    return name


def _stripper(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(f"{prefix}.")


def _adder(prefix: str, base: Checkpoint) -> Callable[[str], str]:
    """Adds the prefix, except to what stands beside the base model (a head)."""

    def add(name: str) -> str:
        present = any(f"{name}.{leaf}" in base.tensors for leaf in ("weight", "bias"))
        return name if present or name in base.tensors else f"{prefix}.{name}"

    return add


def _class_of_task(auto: str, model_type: str) -> str | None:
    from transformers.models.auto import modeling_auto

    mapping = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": (
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        ),
        "AutoModelForTokenClassification": (
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
        ),
        "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    }[auto]
    found = mapping.get(model_type)
    return found if isinstance(found, str) else None


def _meta_model(architecture: Architecture) -> "torch.nn.Module | None":
    """The base's model in the adapter's class, on the meta device."""
    if architecture.base.model_type is None:
        return None
    import torch
    import transformers

    folder = architecture.base.folder
    names = [
        architecture.class_name,
        _class_of_task(_AUTO_CLASSES[architecture.task_type], architecture.base.model_type)
        if architecture.task_type in _AUTO_CLASSES
        else None,
        *architecture.base.architectures,
    ]
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=architecture.trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            for name in names:
                cls = getattr(transformers, name, None) if name else None
                if isinstance(cls, type):
                    return cls(config)  # type: ignore[no-any-return]
            return transformers.AutoModel.from_config(  # type: ignore[no-any-return]
                config, trust_remote_code=architecture.trust_remote_code
            )
    except (ValueError, OSError, ImportError, KeyError, AttributeError, TypeError, RuntimeError):
        return None  # an architecture that this transformers cannot build


def near_misses(name: str, names: Sequence[str]) -> str:
    """The names most like `name`, for a message; '' when none is."""
    import difflib

    found = difflib.get_close_matches(name, names, 3, 0.6)
    return f"Near misses: {', '.join(found)}." if found else ""
