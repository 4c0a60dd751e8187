"""What LoRA servers take: the limits that an adapter must respect to be served unmerged."""

# vLLM's choices of max_lora_rank (vllm/config/lora.py)
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORAX_RANK = 128  # of its kernels


def served_rank(r: int) -> int | None:
    """The smallest `max_lora_rank` of vLLM that serves a LoRA of rank r; None above its largest.

    >>> served_rank(136), served_rank(1024)
    (256, None)
    """
    return next((rank for rank in SERVED_RANKS if rank >= r), None)


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
