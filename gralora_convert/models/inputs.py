"""Inputs for a whole model, made from its config: token ids, images, sound, time series.

Which of them a model takes is read off its `forward`; how large they are, off its config. Seeded,
small, and only meant to tell two models with the same config apart.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gralora_convert.models.foreign import ForeignError, foreign

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Mapping[str, Tensor]
Config = Mapping[str, object]
BATCH, LENGTH, SAMPLES = 2, 16, 4000
_TEXT = ("text_config", "llm_config", "language_config", "decoder", "thinker_config")
_VISION = ("vision_config", "image_config", "encoder", "backbone_config")
_AUDIO = ("audio_config", "speech_config", "encoder", "audio_encoder_config")


def inputs_for(model: "PreTrainedModel", config: Config) -> Iterator[Inputs]:
    """Inputs that the model might take, the richest first; `config` is that of the checkpoint."""
    taken = set(inspect.signature(model.forward).parameters)
    main = str(getattr(model, "main_input_name", "input_ids"))
    made: dict[str, Inputs] = {}
    for name, make in _MAKERS.items():
        found = make(config) if name in taken else None
        if found is not None:
            made[name] = {name: found}
    ids = made.get("input_ids", {})
    decoder = {"decoder_input_ids": _decoder_ids(config)} if "decoder_input_ids" in taken else {}
    others = [inputs for name, inputs in made.items() if name != "input_ids"]
    if ids:
        for other in others:
            with_image = _with_placeholders(model, config, {**ids, **other})
            yield from ([with_image] if with_image else [])
            yield {**ids, **other}
        yield {**ids, **decoder} if decoder and config.get("is_encoder_decoder") else ids
    for other in sorted(others, key=lambda inputs: main not in inputs):
        yield {**other, **decoder} if decoder else other
    if ids:  # a sequence classifier finds each sequence's last token by its pad, which some lack
        yield {"input_ids": ids["input_ids"][:1]}
    yield dict(model.dummy_inputs)


def tokens(vocabulary: int, length: int) -> Tensor:
    """Seeded ids; padding and other special ids, which come first, are left out."""
    generator = torch.Generator().manual_seed(0)
    low = min(4, vocabulary - 1)
    return torch.randint(low, vocabulary, (BATCH, length), generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _number(config: Config, *names: str, inner: tuple[str, ...] = ()) -> int | None:
    """The first of the fields that is a number, of the config or of one inside it."""
    held = [config, *(c for key in inner if isinstance(c := config.get(key), Mapping))]
    held += [c for one in held[1:] for key in inner if isinstance(c := one.get(key), Mapping)]
    for one in held:
        for name in names:
            value = one.get(name)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _input_ids(config: Config) -> Tensor | None:
    vocabulary = _number(config, "vocab_size", inner=_TEXT)
    if vocabulary is None:
        return None
    fields = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    length = _number(config, *fields, inner=_TEXT) or LENGTH
    ids = tokens(vocabulary, min(LENGTH, length))
    special = {config.get(f"{kind}_token_{suffix}") for kind in ("image", "audio", "video")
               for suffix in ("id", "index")}  # fmt: skip
    for token in special:
        if isinstance(token, int):
            ids = torch.where(ids == token, min(4, vocabulary - 1), ids)
    return ids


def _decoder_ids(config: Config) -> Tensor:
    return tokens(_number(config, "vocab_size", inner=_TEXT) or 8, 5)


def _pixel_values(config: Config) -> Tensor | None:
    sizes = ("image_size", "img_size", "input_size")
    found: object = None
    for one in (config, *(c for key in _VISION if isinstance(c := config.get(key), Mapping))):
        found = next((one[name] for name in sizes if one.get(name)), found)
    if isinstance(found, Mapping):
        found = [found.get("height"), found.get("width")]
    pair = found if isinstance(found, (list, tuple)) and len(found) == 2 else (found, found)
    height, width = pair
    if found is None:
        height = width = 64  # a convolutional model takes any size
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    channels = _number(config, "num_channels", "in_channels", "in_chans", inner=_VISION) or 3
    return _normal(BATCH, channels, height, width)


def _input_features(config: Config) -> Tensor | None:
    bins = _number(config, "num_mel_bins", "input_feat_per_channel", "feature_size",
                   "feature_projection_input_dim", "input_dim", inner=_AUDIO)  # fmt: skip
    if bins is None:
        return None
    positions = _number(config, "max_source_positions", inner=_AUDIO)
    if config.get("model_type") == "whisper" or isinstance(config.get("audio_config"), Mapping):
        return _normal(1, bins, 2 * (positions or 50))  # mel bins first, a window of fixed length
    return _normal(1, 64, bins)


def _input_values(config: Config) -> Tensor | None:
    bins, length = _number(config, "num_mel_bins"), _number(config, "max_length")
    if bins is not None and length is not None:  # a spectrogram as an image
        return _normal(1, length, bins)
    return _normal(1, SAMPLES)


def _past_values(config: Config) -> Tensor | None:
    length = _number(config, "context_length")
    channels = _number(config, "num_input_channels", "input_size") or 1
    return None if length is None else _normal(BATCH, length, channels)


_MAKERS: Mapping[str, Callable[[Config], Tensor | None]] = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "input_features": _input_features,
    "input_values": _input_values,
    "past_values": _past_values,
}


def _with_placeholders(
    model: "PreTrainedModel", config: Config, inputs: Inputs
) -> dict[str, Tensor] | None:
    """The inputs with as many image tokens as the image has features, where the model says it."""
    token = _number(config, "image_token_id", "image_token_index")
    features = getattr(model, "get_image_features", None)
    if token is None or features is None or "pixel_values" not in inputs:
        return None
    one = {name: value[:1] for name, value in inputs.items()}
    try:
        with torch.no_grad(), foreign():
            found = features(pixel_values=one["pixel_values"].to(model.device))
    except ForeignError:
        return None
    found = getattr(found, "pooler_output", found)
    found = found[0] if isinstance(found, (list, tuple)) else found
    if not isinstance(found, Tensor) or found.ndim < 2:
        return None
    count = found.shape[:-1].numel()
    ids = torch.cat([torch.full((1, count), token), one["input_ids"]], dim=1)
    return {**one, "input_ids": ids}
