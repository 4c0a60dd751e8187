"""What LoRA servers take: the limits that an adapter must respect to be served unmerged."""

__all__ = ["SERVED_RANKS", "served_rank"]

# vLLM's choices of --max-lora-rank (vllm/config/lora.py)
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def served_rank(r: int) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that serves a LoRA of rank r; None above its largest.

    >>> served_rank(136), served_rank(1024)
    (256, None)
    """
    return next((rank for rank in SERVED_RANKS if rank >= r), None)
