"""Model cards: the README.md with which the Hub files a model under its base.

Metadata after the Hub's model card specification: `base_model`, `base_model_relation` (`finetune`
for one adapter merged into its base, `merge` for several, `adapter` for an adapter), and what the
base's own card says: `tags`, `library_name`, `pipeline_tag`, the licence.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gralora_convert.adapters import NAMES, Adapter
from gralora_convert.disk import Checkpoint, is_file, open_regular, parse_name, reading
from gralora_convert.errors import printable

CARD_NAME = "README.md"
LARGEST = 1 << 20  # bytes of a base's card that are looked at
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_FIELDS = re.compile(
    r"^(license|license_name|license_link|library_name|pipeline_tag): *([^\s#][^\n#]*?) *(?:#.*)?$",
    re.MULTILINE,
)
_TAGS = re.compile(r"^tags: *\n((?: *- .*\n?)+)", re.MULTILINE)


def merged_card(base: Checkpoint, adapters: Sequence[Adapter]) -> bytes:
    """The card of `base` with `adapters` merged into it.

    >>> from gralora_convert.adapters import Adapter
    >>> base = Checkpoint.open("fixtures/bases/llama")
    >>> card = merged_card(base, [Adapter.open("fixtures/peft-0.21.2/llama-hybrid")])
    >>> card.decode().splitlines()[:2]
    ['---', 'library_name: "transformers"']
    """
    # not the config's own _name_or_path: often that of the model which the base was made from
    named = [adapter.config.base_model_name_or_path for adapter in adapters]
    model = _hub_id([base.source, str(base.folder), *named])
    title = model or _title(base.source)
    names = [_title(str(adapter.path)) for adapter in adapters]
    body = [
        f"# {title} with {', '.join(names)}",
        "",
        f"{title} with {_listed(names)} merged into its weights by gralora-convert. It loads "
        "wherever its base does, without PEFT and without an adapter.",
        "",
        "What went in, and what rounding did to it, is in `gralora_convert.json`.",
    ]
    relation = "merge" if len(adapters) > 1 else "finetune"
    library = "diffusers" if base.is_of_diffusers else "transformers"
    return _card(model, relation, library, ["gralora", "merged"], base.folder, body)


def adapter_card(kind: str, base: str | None, source: Path | None = None) -> bytes:
    """The card of a converted or extracted adapter; that of the folder `source` if it has one.

    `kind` is gralora, hybrid or lora; `base` the base model's name, a Hub id or a path.
    """
    own = None if source is None else _own_card(source)
    if own is not None:
        return own
    model = _hub_id([base])
    title = model or (_title(base) if base else "a base that is not named")
    body = [
        f"# {NAMES[kind]} adapter of {title}",
        "",
        f"A {NAMES[kind]} adapter of {title}, written by gralora-convert. PEFT loads it with "
        "`PeftModel.from_pretrained`.",
        "",
        "What it was made from, and with what error, is in `gralora_convert.json`.",
    ]
    tags = ["lora" if kind == "lora" else "gralora"]
    if model is not None:
        tags.append(f"base_model:adapter:{model}")
    return _card(model, "adapter", "peft", tags, Path(base) if base else None, body)


def _own_card(folder: Path) -> bytes | None:
    """The card in a folder; a link is followed only into the blobs of the Hub's cache."""
    path = folder / CARD_NAME
    if not is_file(path) or (path.is_symlink() and path.resolve().parent.name != "blobs"):
        return None
    with open_regular(path) as file, reading(path):
        return file.read()


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _card(
    model: str | None,
    relation: str,
    library: str,
    tags: Sequence[str],
    base: Path | None,
    body: Sequence[str],
) -> bytes:
    """The front matter in YAML (strings as JSON, which YAML contains), then the body."""
    head = ["---"]
    if model is not None:  # the Hub refuses a base_model that is a path
        head += [f"base_model: {json.dumps(model)}", f"base_model_relation: {relation}"]
    front = _front_matter(base)
    said = {name: _unquoted(value) for name, value in _FIELDS.findall(front)}
    if library == "peft":  # of the base's tags, those of its own format are not the adapter's
        said["library_name"] = library
    elif found := _TAGS.search(front):
        tags = [*map(_unquoted, re.findall(r"- *(.+?) *$", found[1], re.MULTILINE)), *tags]
    fields = {"library_name": library} | said
    head += [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    head += ["tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags))]
    return "\n".join([*head, "---", "", *body, ""]).encode()


def _title(name: str) -> str:
    """A Hub id as it is, the last folder of a path; nothing that could be markup."""
    found = _hub_id([name])
    if found is not None:
        return found
    return re.sub(r"[^\w.@ +-]", "_", printable(name.rstrip("/").rpartition("/")[2])) or "a model"


def _hub_id(names: Iterable[str | None]) -> str | None:
    """The first of the names that is one of the Hub, or a folder of its cache."""
    for name in names:
        cached = _CACHED.search(name or "")
        if cached:
            return f"{cached[1]}/{cached[2]}"
        found = parse_name(name) if name else None
        if name and found and "/" in found.repository and not os.path.lexists(name):
            return found.repository
    return None


def _front_matter(folder: Path | None) -> str:
    """The front matter of the card in `folder`; "" when it has none."""
    text = ((_own_card(folder) if folder else None) or b"")[:LARGEST].decode(errors="replace")
    front, closed = text[4:].partition("\n---")[:2] if text.startswith("---\n") else ("", "")
    return front if closed else ""


def _unquoted(value: str) -> str:
    return value.strip("\"'")
