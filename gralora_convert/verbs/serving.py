"""What LoRA servers take: the limits that an adapter must respect to be served unmerged."""

from collections.abc import Iterable

# vLLM's choices of max_lora_rank (vllm/config/lora.py)
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORAX_RANK = 128  # of its kernels
_GPT2 = frozenset({"c_attn", "c_fc", "c_proj"})
# SGLang stacks these with others, and looks for all of a stack by the first
_STACKED = (
    ("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj"),
)  # fmt: skip


def served_rank(r: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that serves a LoRA of rank r; None above its largest.

    >>> served_rank(136), served_rank(1024)
    (256, None)
    """
    return next((rank for rank in SERVED_RANKS if rank >= r), None)


def refusals(rank: int, modules: Iterable[str], *, extras: bool) -> dict[str, str]:
    """Why each server does not load a LoRA of this rank on these modules; "" where it does.
    `extras`: it has biases or saved modules.

    vLLM 0.32.0 (config/lora.py, lora/peft_helper.py, and the classes that support LoRA); SGLang
    0.5.23 (srt/lora/lora.py: what it stacks into qkv_proj and gate_up_proj).

    >>> refusals(16, ["layers.0.self_attn.q_proj"], extras=False)["sglang"]
    'needs v_proj where q_proj is adapted'
    """
    leaves = {module.rpartition(".")[2] for module in modules}
    both = "does not load biases or saved modules" if extras else ""
    conv1d = f"has no LoRA for layers of GPT-2 ({', '.join(sorted(leaves & _GPT2))})"
    both = both or (conv1d if leaves & _GPT2 else "")
    return {
        "vllm": both or ("" if served_rank(rank) else f"takes ranks up to {SERVED_RANKS[-1]}"),
        "sglang": both or next(
            (f"needs {needed} where {held} is adapted"
             for held, needed in _STACKED if held in leaves and needed not in leaves), "",
        ),
    }  # fmt: skip


def serving_notes(rank: int, *, extras: bool) -> list[str]:
    """Where an exported LoRA meets a server's limits; `extras`: it has biases or saved modules.

    vllm/config/lora.py and lora/peft_helper.py; sglang srt/lora/lora_manager.py; LoRAX's kernels.
    """
    notes = []
    if served_rank(rank) is None:
        notes.append(
            f"rank {rank} is above vLLM's largest, {SERVED_RANKS[-1]}: give `r` with "
            "`allow_inexact=True`, or merge"
        )
    if rank > LORAX_RANK:
        notes.append(f"rank {rank} is above what LoRAX's kernels take, {LORAX_RANK}")
    if extras:
        notes.append(
            "vLLM, SGLang and llama.cpp do not load biases or saved modules: merge to serve those"
        )
    return notes
