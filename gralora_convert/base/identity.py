"""Whether a base is the one that an adapter was trained on, by what both say of themselves.

Names prove nothing (folders are renamed, a `config.json` keeps its parent's name), so nothing here
is an error; what cannot be told is said.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from gralora_convert.adapters import CONFIG_NAME, Adapter, is_on_adapter
from gralora_convert.base.quantisation import nested
from gralora_convert.disk import Checkpoint, cached, is_folder, is_there, load_json, parse_name
from gralora_convert.errors import Finding, UnreadableError, note, warning

_CACHED = re.compile(r"models--(?:[^/]+?--)?([^/]+)/snapshots/")
_SAME = "Is this the model that it was trained on?"


def identity_findings(adapter: Adapter, base: Checkpoint) -> Iterator[Finding]:
    """A warning where the two speak of different models, a note where no name agrees."""
    named = adapter.config.base_model_name_or_path
    seen = _config_of(adapter.base_source)
    kinds = {_model_type(adapter.model_config), _model_type(seen)}
    known = {_model_type(config) for config in nested(base.config)} - {None}
    if other := sorted(kind for kind in kinds - known if kind and known):
        yield warning(
            "base-type-mismatch", CONFIG_NAME,
            f"was trained on a model of type {other[0]!r}, the base is a {base.model_type!r}",
            _SAME,
        )  # fmt: skip
    if is_on_adapter(adapter):  # the chain is told, and looked after
        return
    given = {*map(_last, (base.source, str(base.folder)))}
    if not named or (expected := _last(named)) in given or (seen and seen == base.config):
        return
    own = base.config.get("_name_or_path")
    if isinstance(own, str) and own:
        if _last(own) != expected:
            yield warning(
                "base-name-mismatch", CONFIG_NAME,
                f"was trained on {named!r}, the base names itself {own!r}", _SAME,
            )  # fmt: skip
        return
    unseen = not is_there(named) and (Path(named).is_absolute() or not parse_name(named))
    yield note(
        "base-other-name", CONFIG_NAME,
        f"was trained on {named!r}{', which is not here' if unseen else ''}; nothing in the base "
        "says that it is that model",
        f"{_SAME} If the other is itself an adapter, name it before this one.",
    )  # fmt: skip


def model_at_hand(name: str | None) -> Checkpoint | None:
    """The model of that name where it is here or in the Hub's cache; nothing is downloaded.

    Raises:
        UnreadableError, UnsupportedError: it is here, and cannot be read.
    """
    if name and is_folder(name):
        return Checkpoint.open(name)
    config = cached(name, "config.json") if name else None
    return None if config is None else Checkpoint.open(config.parent)


def _last(name: str) -> str:
    """The last part of a name, without a revision: what people keep when they move a model."""
    inside = _CACHED.search(f"{name.rstrip('/')}/")
    found = inside[1] if inside else name.rstrip("/").rpartition("/")[2]
    return found.partition("@")[0].lower()


def _config_of(name: str | None) -> Mapping[str, object]:
    """The `config.json` of a model that is here or in the Hub's cache; {} when unseen."""
    path = cached(name, "config.json") if name else None
    try:
        return {} if path is None else load_json(path, allow_non_finite=True)
    except UnreadableError:
        return {}  # it is not the base of this merge: nobody is held up by it


def _model_type(config: Mapping[str, object]) -> str | None:
    value = config.get("model_type")
    return value if isinstance(value, str) else None
