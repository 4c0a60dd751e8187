"""Two whole models side by side: base + attached adapter, and the merged checkpoint, as
transformers loads them, on the same inputs.

What difference is right is not guessed. The base gets the weights that a right merge has, rounded
to the stored dtype: its outputs are what the merged model must give. How near it must come is
measured, too: these weights are moved at random by up to their rounding, and the outputs' response
is the yardstick.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gralora_convert.adapter import Adapter
from gralora_convert.checkpoint import Checkpoint
from gralora_convert.delta import Delta
from gralora_convert.errors import ConvertError, MisuseError
from gralora_convert.forward import GraloraLinear, attach
from gralora_convert.hub import config_errors
from gralora_convert.layer import bare
from gralora_convert.modalities import Inputs, inputs_for
from gralora_convert.products import dense
from gralora_convert.rounding import half_ulp
from gralora_convert.tensors import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelComparison", "compare_models"]

_CONTROL_GROUP = Path("/sys/fs/cgroup")
# Right merges differ from one another by one unit in up to 18 % of the elements (where the update
# was rounded first), that is by less in the mean square than what the yardstick moves them by. By
# Markov's inequality for squares the response is 8 times as large at most once in 118 such merges,
# whatever its distribution; merges that round once give the very weights, and no difference.
YARDSTICKS = 8.0
# Two orders of the same float32 sums, through all layers, relative to the largest output.
ARITHMETIC = 300 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Outputs of base + adapter against those of the merged model, computed in float32.

    `rounding` is how far a right merge is from base + adapter, `excess` how far this one is from a
    right merge; both as the largest difference of outputs.
    `kl` is the mean KL divergence of the merged model's distribution from the adapter's, in nats,
    `kl_of_adapter` that of the base's, for scale; both None for outputs that are no logits.
    `yardstick` is the largest change of outputs when the adapted weights move by their rounding.
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

    @property
    def ok(self) -> bool:
        bound = YARDSTICKS * self.yardstick + ARITHMETIC * self.largest
        return self.excess <= self.slack * bound

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
        }

    def as_text(self) -> str:
        text = (
            f"model: outputs {'agree' if self.ok else 'do NOT agree'} on {self.tokens} positions, "
            f"from {', '.join(self.inputs)}; "
            f"largest difference {self.max_abs_diff:.3g} of {self.largest:.3g} "
            f"(a right merge: {self.rounding:.3g})"
        )
        if self.kl is None or self.kl_of_adapter is None or self.argmax_agreement is None:
            return text
        return (
            f"{text}, KL {self.kl:.3g} (base to adapter: {self.kl_of_adapter:.3g}), "
            f"same top choice {self.argmax_agreement:.1%}"
        )


def compare_models(
    adapter: Adapter,
    base: Checkpoint,
    merged: Checkpoint,
    *,
    slack: float = 1.0,
    device: str = "cpu",
    text: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[ModelComparison | None, tuple[str, ...]]:
    """The comparison, or None and a note that says why it was left out.

    One model is in memory at a time, in float32.
    """
    if not merged.path.is_dir() or not merged.config:
        return None, ("the model was not run: the merged checkpoint has no config.json",)
    needed = 4 * sum(spec.numel for spec in merged.tensors.values())
    if needed * 1.25 > available_memory():
        return None, (
            f"the model was not run: it needs {needed / 1e9:.1f} GB of memory in float32, "
            f"{available_memory() / 1e9:.1f} GB are available; weights and modules were compared",
        )
    try:
        given = None if text is None else _tokenised(merged, text, trust_remote_code)
        with _quiet():
            first = _outputs_of_adapter(adapter, base, merged, given, device, trust_remote_code)
            second = _outputs(_load(merged, merged, device, trust_remote_code), first.inputs)
    except _CannotRunError as reason:
        return None, (f"the model was not run: {reason}",)
    return _compared(first, second, slack), ()


# What models raise on inputs that they do not take.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


# What transformers raises for a folder that it cannot load.
_UNLOADABLE: tuple[type[Exception], ...] = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
    *config_errors(),
)


class _CannotRunError(Exception):
    """Why a whole model cannot be run; weights and modules still decide."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """Outputs on `inputs`: of the bare base, of base + adapter, of a right merge, and of that with
    its weights moved."""

    inputs: Inputs
    base: Tensor
    adapter: Tensor
    right: Tensor
    moved: Tensor


def _compared(first: _Reference, second: Tensor, slack: float) -> ModelComparison:
    if first.adapter.shape != second.shape:
        nothing = float("inf")
        return ModelComparison(
            nothing, 0.0, 0.0, nothing, 0.0, None, None, None, 0, tuple(first.inputs), slack
        )
    is_logits = second.shape[-1] > 1
    kl = _kl(first.adapter, second) if is_logits else None
    same = first.adapter.argmax(-1) == second.argmax(-1)
    return ModelComparison(
        _farthest(first.adapter, second),
        float(first.adapter.abs().max()),
        _farthest(first.adapter, first.right),
        _farthest(first.right, second),
        _farthest(first.right, first.moved),
        kl,
        _kl(first.adapter, first.base) if is_logits and first.base.shape == second.shape else None,
        float(same.double().mean()) if is_logits else None,
        same.numel(),
        tuple(first.inputs),
        slack,
    )


def _farthest(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where one of the two is no number."""
    found = float((one - other).abs().max()) if one.numel() else 0.0
    return found if found == found else float("inf")


def _kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) over positions, in nats; float64, so that tiny ones are not noise."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))


def _outputs_of_adapter(
    adapter: Adapter,
    base: Checkpoint,
    merged: Checkpoint,
    given: Inputs | None,
    device: str,
    trust_remote_code: bool,
) -> _Reference:
    model = _load(base, merged, device, trust_remote_code)
    inputs, plain = _first_that_runs(model, merged, given)
    try:
        attached = attach(_holder(model, adapter), adapter)
    except ConvertError as error:
        raise _CannotRunError(
            f"the adapter's names are not the model's ({error.message})"
        ) from error
    with attached:
        outputs = _outputs(model, inputs)
        for name, layer in attached.layers.items():
            layer.remove(attached.name)
            _set_weight(layer, _right_weight(layer, adapter.delta(name), merged, name))
        right = _outputs(model, inputs)
        generator = torch.Generator().manual_seed(0)
        for name, layer in attached.layers.items():
            weight = layer.weight.double().cpu()
            noise = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 4 - 2
            # up to one unit in the last place: float32 must see it
            _set_weight(layer, weight + noise * half_ulp(weight, _stored_dtype(merged, name)))
        moved = _outputs(model, inputs)
    return _Reference(inputs, plain, outputs, right, moved)


def _first_that_runs(
    model: "PreTrainedModel", merged: Checkpoint, given: Inputs | None
) -> tuple[Inputs, Tensor]:
    """The inputs of the richest kind that the model takes, and what it makes of them."""
    failed = _CannotRunError("its config.json describes no input that is known here")
    for inputs in [given] if given is not None else inputs_for(model, merged.config):
        try:
            return inputs, _outputs(model, inputs)
        except _CannotRunError as reason:
            failed = reason
    raise failed


def _right_weight(layer: nn.Module, delta: Delta, merged: Checkpoint, name: str) -> Tensor:
    """The weight of a right merge, in float64."""
    weight = bare(layer).get_parameter("weight")
    update = dense(delta, torch.float64)
    if not isinstance(bare(layer), nn.Linear):  # Conv1D keeps (in, out)
        update = update.T
    total = weight.detach().double().cpu() + update
    return total.to(_stored_dtype(merged, name)).double()


def _set_weight(layer: GraloraLinear, weight: Tensor) -> None:
    """A weight of its own, so that whatever shared the old one (tied embeddings) keeps it."""
    like = layer.weight
    parameter = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
    bare(layer).register_parameter("weight", parameter)


def _stored_dtype(merged: Checkpoint, module: str) -> torch.dtype:
    """The dtype of a module's weight on disk; the commonest one when its name differs there."""
    spec = merged.tensors.get(f"{module}.weight")
    if spec is None:
        dtypes = [s.dtype for s in merged.tensors.values() if len(s.shape) == 2]
        return torch_dtype(max(set(dtypes), key=dtypes.count))
    return torch_dtype(spec.dtype)


def _holder(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The part of the model whose modules the adapter names: the whole, or the bare base model."""
    names = {name for name, _ in model.named_modules()}
    inner = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    fits = adapter.modules[0] in names
    return inner if not fits and isinstance(inner, nn.Module) else model


def _load(
    source: Checkpoint, like: Checkpoint, device: str, trust_remote_code: bool
) -> "PreTrainedModel":
    """`source` as a model of the class (and labels) of `like`, in float32 and evaluation mode."""
    import transformers

    name = like.architectures[0] if like.architectures else "AutoModel"
    cls = getattr(transformers, name, None) or transformers.AutoModel
    options: dict[str, object] = {}
    labels = like.config.get("id2label")
    if isinstance(labels, Mapping) and source is not like:
        options["num_labels"] = len(labels)
    try:
        torch.manual_seed(0)  # a head that the source lacks is drawn at random, then replaced
        model: PreTrainedModel = cls.from_pretrained(
            source.folder,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            ignore_mismatched_sizes=source is not like,
            **options,
        )
    except _UNLOADABLE as error:
        raise _CannotRunError(
            f"transformers cannot load {source.source}: {_first_line(error)}"
        ) from error
    return model.to(device).eval()


def _outputs(model: "PreTrainedModel", inputs: Inputs) -> Tensor:
    with torch.no_grad():
        try:
            result = model(**{name: value.to(model.device) for name, value in inputs.items()})
        except _FAILURES as error:
            raise _CannotRunError(
                f"it does not take {', '.join(inputs)} alone: {_first_line(error)}"
            ) from error
    values = result.values() if isinstance(result, Mapping) else result
    for name in ("logits", "start_logits", "last_hidden_state"):
        if isinstance(result, Mapping) and isinstance(result.get(name), Tensor):
            found: Tensor = result[name]
            return found.float().cpu()
    first = next((value for value in values if isinstance(value, Tensor)), None)
    if first is None:
        raise _CannotRunError("it returns no tensor")
    return first.float().cpu()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _tokenised(merged: Checkpoint, text: str, trust_remote_code: bool) -> Inputs:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            merged.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except _UNLOADABLE as error:
        raise MisuseError(
            f"--text needs a tokenizer, and none can be loaded: {_first_line(error)}",
            where=merged.path,
        ) from error
    encoded = tokenizer(text, return_tensors="pt")
    inputs: Inputs = {"input_ids": encoded["input_ids"]}
    if merged.config.get("is_encoder_decoder"):
        inputs = {**inputs, "decoder_input_ids": encoded["input_ids"]}
    return inputs


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CONTROL_GROUP / "memory.max").read_text())
        free = min(free, limit - int((_CONTROL_GROUP / "memory.current").read_text()))
    return free


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and warnings off stderr: what matters is in the comparison."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    enabled = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if enabled:
            logging.enable_progress_bar()
        if bars is None:
            os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
