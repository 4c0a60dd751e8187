"""What `--plot` draws: the verbs' numbers for one adapter, behind a progress bar."""

import json
from typing import TYPE_CHECKING

from gralora_convert.adapters import CONFIG_NAME, Adapter, LoraConfig
from gralora_convert.cli.plots import draw_anatomy, draw_trade, require_drawable
from gralora_convert.cli.terminal import bar, show_notes
from gralora_convert.errors import MisuseError

if TYPE_CHECKING:
    from gralora_convert.cli.options import Wanted
    from gralora_convert.output import Plan
    from gralora_convert.verbs import Anatomy, Inspection


def plot_adapter(
    path: str, found: "Inspection", plot: str, base: str | None, progress: bool | None
) -> None:
    """The anatomy of the adapter that was inspected."""
    if found.document["kind"] not in ("gralora", "hybrid", "lora"):
        raise MisuseError(
            "--plot draws one adapter, which this is not", where=path,
            hint="`verify --plot` draws a merge.",
        )  # fmt: skip
    draw_anatomy(_dissected(Adapter.open(path), base, progress), plot)
    show_notes([f"drawn: {plot}"])


def drawn(path: str, wanted: "Wanted", plot: str) -> Adapter:
    """The adapter whose ranks are to be drawn; refuses early what cannot be."""
    require_drawable(plot)
    if wanted["to"] != "lora":
        raise MisuseError("--plot draws the ranks of a LoRA", hint="Give --to lora.")
    adapter = Adapter.open(path)
    adapter.require_plain()
    return adapter


def plot_trade(adapter: Adapter, plan: "Plan", plot: str, progress: bool | None) -> None:
    """The ranks that a LoRA of this adapter could have."""
    from gralora_convert.verbs import RANK_LIMITS

    anatomy = _dissected(adapter, None, progress)
    config = LoraConfig.from_dict(json.loads(plan.texts[CONFIG_NAME]))
    ranks = {part.module: config.rank(part.module) for part in anatomy.parts}
    draw_trade(anatomy, ranks, RANK_LIMITS, plot)
    show_notes([f"drawn: {plot}"])


def _dissected(adapter: Adapter, base: str | None, progress: bool | None) -> "Anatomy":
    from gralora_convert.verbs import dissect

    total = sum(adapter.factor_bytes(module) for module in adapter.modules)
    with bar(total, progress) as advance:
        return dissect(adapter, base, progress=advance)
