"""What the configs of two models say differently, and what of it no short input can show."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gralora_convert.checkpoint import Checkpoint
from gralora_convert.errors import printable

__all__ = ["Setting", "different_settings", "sizes", "written_settings"]

# Names and labels, what a merge may change, and what the tensors on disk decide.
_FREE = frozenset({
    "_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "vocab_size",
})  # fmt: skip
# Rotations, windows and chunks: what they do to far positions, near ones need not show.
_FAR = re.compile(r"rope|rotary|sliding|window|attention_chunk|\blayer_types")
_SHOWN = 60  # characters of a value


@dataclass(frozen=True, slots=True)
class Setting:
    """A value of the merged model's config that the base's config does not have."""

    name: str
    base: object
    merged: object

    @property
    def is_far(self) -> bool:
        """Whether it changes the function, but perhaps not on inputs as short as those run here."""
        return bool(_FAR.search(self.name))

    def __str__(self) -> str:
        name = printable(self.name)
        return f"config.json: {name} is {_shown(self.merged)}, {_shown(self.base)} in the base"

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "base": self.base, "merged": self.merged}


def different_settings(
    base: Mapping[str, object], merged: Mapping[str, object]
) -> tuple[Setting, ...]:
    """What two configs, as transformers reads them, say differently of the function.

    >>> one, other = {"dtype": "float32", "rope": {"theta": 1.0}}, {"rope": {"theta": 2.0}}
    >>> [str(setting) for setting in different_settings(one, other)]
    ['config.json: rope.theta is 2.0, 1.0 in the base']
    """
    one, other = dict(_flat(base)), dict(_flat(merged))
    return tuple(
        Setting(name, one.get(name), other.get(name))
        for name in dict.fromkeys((*one, *other))
        if one.get(name) != other.get(name)
    )


def written_settings(base: Checkpoint, merged: Checkpoint) -> tuple[Setting, ...]:
    """What the `config.json` of a model that cannot be loaded says otherwise than its base's."""
    settings = different_settings(base.config, merged.config)
    return tuple(s for s in settings if s.name in base.config or s.merged is not None)


def sizes(config: Mapping[str, object]) -> dict[str, object]:
    """The values of a config that may decide which tensors there are and how large they are: flags,
    whole numbers and lists, but no tokens.

    >>> sizes({"hidden_size": 8, "eos_token_id": 2, "eps": 0.1, "text": {"bias": True}})
    {'hidden_size': 8, 'text.bias': True}
    """
    flat = [*_flat(config), ("vocab_size", config.get("vocab_size"))]
    return {
        name: value
        for name, value in flat
        if isinstance(value, int | list) and not re.search(r"_token_ids?$|\buse_cache$", name)
    }


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if name in _FREE:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    text = printable(json.dumps(value, default=str))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
