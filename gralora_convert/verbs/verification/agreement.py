"""How far the outputs of a merged model are from those of a right one, as numbers and a verdict."""

from dataclasses import dataclass

import torch

from gralora_convert.base import Setting

# A right merge takes the other number at fewer places than a draw does, which does at every second
# possible one. So its response is no larger in the mean square, and 8 times as large at most once
# in 64 merges by Markov's inequality, whatever its distribution. docs/verification.md has the
# largest one seen.
YARDSTICKS = 8.0
# Two orders of the same sums, through all layers, relative to the largest output: in float32, and
# in float64, where most models still compute their norms in float32.
ARITHMETIC = {
    torch.float32: 300 * torch.finfo(torch.float32).eps,
    torch.float64: 4 * torch.finfo(torch.float32).eps,
}


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Outputs of base + adapter against those of the merged model, computed in `dtype`.

    `rounding` is how far a right merge is from base + adapter, `excess` how far this one is from a
    right merge; both as the largest difference of outputs.
    `kl` is the mean KL divergence of the merged model's distribution from the adapter's, in nats,
    `kl_of_adapter` that of the base's, for scale; both None for outputs that are no logits.
    `yardstick` is the largest change of outputs from one right merge to another, drawn at random.
    `failure` is why the merged model could not be run as the base was.
    `settings` is what the merged `config.json` says otherwise than the base's.
    """

    max_abs_diff: float
    largest: float
    rounding: float
    excess: float
    yardstick: float
    kl: float | None
    kl_of_adapter: float | None
    argmax_agreement: float | None
    tokens: int
    inputs: tuple[str, ...]
    slack: float
    dtype: torch.dtype
    settings: tuple[Setting, ...] = ()
    failure: str = ""

    @property
    def ratio(self) -> float:
        """`excess` over what it may be: at most 1 for a right merge."""
        bound = YARDSTICKS * self.yardstick + ARITHMETIC[self.dtype] * self.largest
        return self.excess / bound if bound else float("inf") if self.excess else 0.0

    @property
    def far(self) -> tuple[Setting, ...]:
        """The settings that act where these inputs do not reach."""
        return tuple(setting for setting in self.settings if setting.is_far)

    @property
    def agrees(self) -> bool:
        """Whether the outputs on these inputs are those of a right merge."""
        return not self.failure and self.ratio <= self.slack

    @property
    def ok(self) -> bool:
        return self.agrees and not self.far

    def as_json(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "max_abs_diff": self.max_abs_diff,
            "largest_output": self.largest,
            "rounding": self.rounding,
            "excess": self.excess,
            "yardstick": self.yardstick,
            "kl": self.kl,
            "kl_of_adapter": self.kl_of_adapter,
            "argmax_agreement": self.argmax_agreement,
            "tokens": self.tokens,
            "inputs": list(self.inputs),
            "dtype": str(self.dtype).removeprefix("torch."),
            "settings": [setting.as_json() for setting in self.settings],
            **({"failure": self.failure} if self.failure else {}),
        }

    def as_text(self) -> str:
        if self.failure:
            return f"model: the merged folder is NOT a model like the base: {self.failure}"
        verdict = "agree" if self.agrees else "do NOT agree"
        text = (
            f"model: outputs {verdict} on {self.tokens} positions, from {', '.join(self.inputs)}; "
            f"largest difference {self.max_abs_diff:.3g} of {self.largest:.3g} "
            f"(a right merge: {self.rounding:.3g})"
        )
        if self.kl is None or self.kl_of_adapter is None or self.argmax_agreement is None:
            return text
        return (
            f"{text}, KL {self.kl:.3g} (base to adapter: {self.kl_of_adapter:.3g}), "
            f"same top choice {self.argmax_agreement:.1%}"
        )


@dataclass(frozen=True, slots=True)
class NotRun:
    """Why the models were not compared. `is_blind`: there is a model that people will run, and what
    it computes was not seen; else there is none to run, or no room for it here."""

    reason: str
    is_blind: bool = True


def incomparable(
    failure: str,
    settings: tuple[Setting, ...],
    inputs: tuple[str, ...],
    slack: float,
    dtype: torch.dtype,
) -> ModelComparison:
    """The verdict on a merged model that cannot be run as the base can."""
    far = float("inf")
    return ModelComparison(
        far, 0.0, 0.0, far, 0.0, None, None, None, 0, inputs, slack, dtype, settings, failure
    )
