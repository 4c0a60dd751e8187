"""What engines take of a LoRA: the limits within which it is served unmerged, as data.

Each fact was read in the source of the engine, at the version and in the files that `ENGINES`
names; docs/engines.md shows the runs.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gralora_convert.adapters import LoraConfig
from gralora_convert.disk import Checkpoint
from gralora_convert.errors import MisuseError

# vLLM's choices of max_lora_rank
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORAX_RANK = 128  # of its kernels
RANK_LIMITS: Mapping[str, int] = {"vLLM": SERVED_RANKS[-1], "LoRAX": LORAX_RANK}
GPT2 = frozenset({"c_attn", "c_fc", "c_proj"})
HEADS = frozenset({"lm_head", "embed_out"})
MERGE = "merge it"
TRANSPOSED_FOR = "transposed_for"  # a field of adapter_config.json, which no other reader knows
# what vLLM has a class of its own for, without LoRA
_VLLM_WITHOUT = frozenset(
    "BertForMaskedLM BertForSequenceClassification BertForTokenClassification BloomForCausalLM "
    "Cohere2MoeForCausalLM DbrxForCausalLM FalconForCausalLM FalconMambaForCausalLM "
    "GPT2ForSequenceClassification GPT2LMHeadModel GPTJForCausalLM Gemma3TextModel "
    "Gemma3nForCausalLM Gemma3nForConditionalGeneration Mamba2ForCausalLM MambaForCausalLM "
    "ModernBertForSequenceClassification ModernBertForTokenClassification "
    "Qwen2AudioForConditionalGeneration RobertaForTokenClassification StableLmForCausalLM "
    "XLMRobertaForTokenClassification Zamba2ForCausalLM".split()
)
# what SGLang knows the sizes of (a few of its models add more), and what of it was not seen to work
_SGLANG_LAYERS = frozenset(
    "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj lm_head".split()
)
_SGLANG_UNSEEN = frozenset("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj embed_tokens".split())
# SGLang stacks these with others, and looks for all of a stack by the first
_STACKED = {
    "q_proj": ("v_proj",), "k_proj": ("q_proj", "v_proj"), "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}  # fmt: skip
# Layers of which PEFT loses the factors of a LoRA, by type of model: it takes them for the experts
# of its stacks, or renames their keys once more (docs/engines.md)
_STACKING = (
    "afmoe beam deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe glm4_moe "
    "glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash qwen3_moe qwen3_next "
    "qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open"
)
_PEFT_LOSES = {
    **dict.fromkeys(_STACKING.split(), r"(?!.*\.experts\.)(.*\.)?(gate|up|down)_proj"),
    **dict.fromkeys(
        ("laguna", "mistral_large4", "mistral_large4_text"), r".*\.shared_experts\..*"
    ),
    "pi0": r"(.*\.)?embed_action_time\..*", "unlimited_ocr": r"(.*\.)?language_model\.layers\..*",
}  # fmt: skip
_PEFT_REFUSES = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), r"(.*\.)?(out_proj|conv1d)"
)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine as it was read: `sources` are its files."""

    title: str
    version: str
    sources: Sequence[str]


ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        "vLLM", "0.32.0",
        ("config/lora.py", "lora/peft_helper.py", "lora/lora_model.py", "lora/lora_weights.py",
         "lora/model_manager.py",
         "model_executor/models/registry.py", "config/model.py"),
    ),
    "sglang": Engine(
        "SGLang", "0.5.23",
        ("srt/lora/lora.py", "srt/lora/lora_manager.py", "srt/lora/mem_pool.py",
         "srt/lora/utils.py", "srt/configs/model_config.py"),
    ),
    "llama.cpp": Engine(
        "llama.cpp", "b11434", ("convert_lora_to_gguf.py", "conversion", "src/llama-adapter.cpp"),
    ),
    "peft": Engine(
        "PEFT", "0.21.2",
        ("tuners/lora/model.py", "utils/transformers_weight_conversion.py, with the table of "
         "transformers 5.23, conversion_mapping.py", "tuners/tuners_utils.py"),
    ),
}  # fmt: skip
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Exported:
    """What of a LoRA engines ask about: config, adapted modules, names of biases and saved
    parameters, and the base where it is known."""

    config: LoraConfig
    modules: Collection[str]
    values: Collection[str] = ()
    base: Checkpoint | None = None

    @property
    def transposed(self) -> bool:
        """Whether Conv1D layers have their factors as llama.cpp reads them."""
        return TRANSPOSED_FOR in self.config.extra

    @property
    def leaves(self) -> set[str]:
        return {leaf(module) for module in self.modules}

    @property
    def rank(self) -> int:
        return max([self.config.r, *self.config.rank_pattern.values()])

    @property
    def dtype(self) -> str | None:
        """The dtype in which the base is stored, where it is one that servers have."""
        if self.base is None:
            return None
        stored = [spec.dtype for spec in self.base.tensors.values()]
        return _DTYPES.get(max(dict.fromkeys(stored), key=stored.count))

    @property
    def is_gpt2(self) -> bool:
        """Whether layers are Conv1D, which no server calls by that name."""
        if self.base is not None and self.base.model_type is not None:
            return self.base.model_type == "gpt2" and bool(self.leaves & GPT2)
        return bool(self.leaves & GPT2)

    @property
    def tied_heads(self) -> list[str]:
        """Adapted heads without a weight of their own in the base."""
        tensors = {} if self.base is None else self.base.tensors
        return [
            module for module in self.modules
            if tensors and leaf(module) in HEADS and f"{module}.weight" not in tensors
        ]  # fmt: skip


def require_engine(server: str, to: str = "lora") -> None:
    """Raises `MisuseError` unless it is one of `ENGINES`, and a LoRA is made."""
    if server not in ENGINES:
        raise MisuseError(f"server {server!r} is none of {', '.join(ENGINES)}")
    if to != "lora":
        raise MisuseError(f'`server={server!r}` goes with `to="lora"`, not {to!r}')


def served_rank(r: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that serves a LoRA of rank r; None above its largest.

    >>> served_rank(136), served_rank(1024)
    (256, None)
    """
    return next((rank for rank in SERVED_RANKS if rank >= r), None)


def largest_rank(server: str) -> int | None:
    """The largest rank that an engine takes; None where it has no limit."""
    return SERVED_RANKS[-1] if server == "vllm" else None


def refusals(lora: Exported) -> dict[str, str]:
    """Why each engine does not serve a LoRA, and what can be done; "" where it does.

    >>> lora = Exported(LoraConfig(r=16, target_modules=["q_proj"]), ["layers.0.attn.q_proj"])
    >>> refusals(lora)["sglang"]
    'needs v_proj where q_proj is adapted (`server="sglang"` adds zeros)'
    """
    return {name: next(rule(lora), "") for name, rule in _RULES.items() if name != "peft"}


def reasons(server: str, lora: Exported) -> list[str]:
    """All that keeps one engine from serving a LoRA, each with what can be done."""
    return list(dict.fromkeys(_RULES[server](lora)))


def missing_siblings(modules: Collection[str]) -> list[tuple[str, str]]:
    """Layers that SGLang misses beside those of `modules`, each with one that it is stacked with.

    >>> missing_siblings(["mlp.up_proj"])
    [('mlp.gate_proj', 'mlp.up_proj')]
    """
    found: dict[str, str] = {}
    for module in modules:
        parent, dot, leaf = module.rpartition(".")
        for sibling in _STACKED.get(leaf, ()):
            name = f"{parent}{dot}{sibling}"
            if name not in modules:
                found.setdefault(name, module)
    return list(found.items())


def serving_notes(lora: Exported) -> list[str]:
    """Where an exported LoRA meets limits of servers that are worth a note while it is written."""
    notes = []
    if served_rank(lora.rank) is None:
        notes.append(
            f"rank {lora.rank} is above vLLM's largest, {SERVED_RANKS[-1]}: give `r` with "
            "`allow_inexact=True`, or merge"
        )
    if lora.rank > LORAX_RANK:
        notes.append(f"rank {lora.rank} is above what LoRAX's kernels take, {LORAX_RANK}")
    notes += [f"PEFT {ENGINES['peft'].version} {reason}" for reason in reasons("peft", lora)]
    if lora.values:
        notes.append(
            "vLLM, SGLang and llama.cpp do not load biases or saved modules: merge to serve those"
        )
    return notes


# one engine each, the first reason counts --------------------------------------------------------


def _beyond(lora: Exported) -> Iterator[str]:
    """What stops all servers."""
    if features := [f for f in lora.config.unsupported_features() if f != TRANSPOSED_FOR]:
        yield f"does not load {', '.join(features)}: {MERGE}"
    if lora.config.bias != "none" or any(name.endswith(".bias") for name in lora.values):
        yield f"does not load biases: {MERGE}"


def _vllm(lora: Exported) -> Iterator[str]:
    yield from _beyond(lora)
    saved = [name for name in lora.config.modules_to_save or () if name not in _CLASSIFIERS]
    if saved:
        yield f"does not load saved modules ({', '.join(saved)}): {MERGE}"
    known = () if lora.base is None else lora.base.architectures
    without = _VLLM_WITHOUT.intersection(known)
    if lora.is_gpt2:
        without = frozenset({"GPT2LMHeadModel"})
    if without:
        yield f"has no LoRA for {min(without)}: {MERGE}"
    # `FusedMoE(gate=self.gate)` keeps the bare router and calls that; Mixtral calls its own
    if any(leaf(m) in ("gate", "router") and "block_sparse_moe" not in m for m in lora.modules):
        yield f"was not seen to add LoRAs of routers other than Mixtral's: {MERGE}"
    yield from _partial_stacks(lora)
    if served_rank(lora.rank) is None:
        yield (
            f"takes ranks up to {SERVED_RANKS[-1]}: `r={SERVED_RANKS[-1]}` with "
            f"`allow_inexact=True`, or {MERGE}"
        )


_CLASSIFIERS = ("score", "classifier")


def _sglang(lora: Exported) -> Iterator[str]:
    yield from _beyond(lora)
    if lora.values or lora.config.modules_to_save:
        yield f"does not load saved modules: {MERGE}"
    if unknown := sorted(lora.leaves - _SGLANG_LAYERS - _SGLANG_UNSEEN):
        yield f"has no LoRA for layers of these names ({', '.join(unknown)}): {MERGE}"
    experts = {"experts"} if any(map(is_expert, lora.modules)) else set()
    if unseen := sorted(lora.leaves & _SGLANG_UNSEEN | experts):
        yield f"was not seen to serve LoRAs of {', '.join(unseen)} right: {MERGE}"
    if any(leaf(m) not in HEADS | {"embed_tokens"} and not _NUMBERED(m) for m in lora.modules):
        yield f"leaves out layers that are not below layers.N: {MERGE}"
    config = lora.config
    if config.rank_pattern:
        yield 'reads one rank for all modules (`server="sglang"` writes one)'
    if config.use_rslora or config.alpha_pattern:
        yield 'scales by the global fields alone (convert with `to="lora"` writes it so)'
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        yield 'takes no pattern as target_modules (`server="sglang"` lists them)'
    for sibling, held in missing_siblings(lora.modules):
        yield (
            f'needs {leaf(sibling)} where {leaf(held)} is adapted (`server="sglang"` adds zeros)'
        )


_NUMBERED: Callable[[str], object] = re.compile(r"(.*\.)?layers\.\d+\..*").fullmatch


def _llama_cpp(lora: Exported) -> Iterator[str]:
    yield from _beyond(lora)
    if lora.values or lora.config.modules_to_save:
        yield f"does not load saved modules: {MERGE}"
    if lora.is_gpt2 and not lora.transposed:
        yield (
            f"reads factors of {', '.join(sorted(lora.leaves & GPT2))} transposed "
            '(`server="llama.cpp"` writes them so)'
        )
    if lora.tied_heads:
        yield f"does not adapt a head that is tied to the embeddings: {MERGE}"
    if lora.config.use_rslora or lora.config.alpha_pattern:
        yield 'scales by lora_alpha alone (convert with `to="lora"` writes it so)'
    yield from _partial_stacks(lora)


def _peft(lora: Exported) -> Iterator[str]:
    if lora.transposed:
        yield "reads the factors of Conv1D layers in the other order than llama.cpp"
    kind = None if lora.base is None else lora.base.model_type
    for what, layers in (("loses the factors", _PEFT_LOSES), ("refuses LoRAs", _PEFT_REFUSES)):
        if kind not in layers:
            continue
        if found := [module for module in lora.modules if re.fullmatch(layers[kind], module)]:
            yield f"{what} of {len(found)} layers of this model, first {min(found)}: {MERGE}"


_RULES: Mapping[str, Callable[[Exported], Iterator[str]]] = {
    "vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp, "peft": _peft,
}  # fmt: skip


def _partial_stacks(lora: Exported) -> Iterator[str]:
    """vLLM (`pack_moe`) and llama.cpp's converter stack the layers of all experts."""
    stored = () if lora.base is None else lora.base.tensors
    whole = _stacks(name.removesuffix(".weight") for name in stored)
    for stack, held in _stacks(lora.modules).items():
        experts = whole.get(stack) or {str(n) for n in range(1 + max(map(int, held)))}
        if set(held) != set(experts) or any(len(leaves) < 3 for leaves in held.values()):
            yield f"needs all three layers of all experts where one is adapted ({stack}): {MERGE}"
        names = {
            name: [f"{stack}.{n}.{name}" for n in held] for name in set().union(*held.values())
        }
        for name, layers in sorted(names.items()):
            if len({lora.config.rank(layer) for layer in layers}) > 1:
                yield f"needs one rank for {name} of all experts ({stack}): {MERGE}"


def _stacks(modules: Iterable[str]) -> dict[str, dict[str, set[str]]]:
    """The layers of experts: by their stack, by their number."""
    found: dict[str, dict[str, set[str]]] = {}
    for module in modules:
        if held := _EXPERT.fullmatch(module):
            found.setdefault(held[1], {}).setdefault(held[2], set()).add(held[3])
    return found


def is_expert(module: str) -> bool:
    """Whether it is a layer of one of several experts."""
    return _EXPERT.fullmatch(module) is not None


def leaf(module: str) -> str:
    """The last word of a module's name."""
    return module.rpartition(".")[2]
