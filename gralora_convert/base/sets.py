"""The files beside the weights of a merged model: which are the base's, which an adapter's.

Files that are read together are a set, and a set comes whole from one side: the adapter's, if it
has one that loads. Half a tokenizer of each would be a tokenizer that nobody trained with.
"""

import filecmp
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gralora_convert.adapters import CONFIG_NAME, Adapter
from gralora_convert.disk import (
    MAX_JSON_BYTES,
    STEP,
    Checkpoint,
    is_file,
    load_json,
    sidecars,
)
from gralora_convert.errors import Finding, printable, warning

Files = Mapping[str, Path]

# What AutoTokenizer reads, as transformers 4 and 5 write it (VOCAB_FILES_NAMES of all tokenizers).
_VOCABULARY = re.compile(
    r"(tokenizer|tekken|byte_maps)\.json|(\w+_)?vocab(-\w+)?\.\w+"
    r"|[^/]*\.(model(\.v\w+)?|spm|tiktoken|tokenizer)"
)
_TOKENIZER = re.compile(
    rf"{_VOCABULARY.pattern}|tokenizer[\w.-]*\.json|[^/]*\.jinja|additional_chat_templates/.*"
    r"|(special_tokens_map|added_tokens|normalizer|emoji|word_\w+)\.json|(merges|dict)\.txt"
    r"|bpe\.codes"
)
_TEMPLATE = re.compile(r"[^/]*\.jinja|additional_chat_templates/.*")
# What AutoProcessor reads; a chat_template.json, which no tokenizer reads, beats a .jinja there.
_PROCESSOR = re.compile(r"(\w+_)?(pre)?processor_config\.json|chat_template\.json")
# What SentenceTransformer and CrossEncoder read, with the steps that modules.json names.
_PIPELINE = re.compile(
    r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json"
    rf"|{STEP.pattern}/.*"
)
_STEP = re.compile(rf"(\w+_)?{STEP.pattern}")  # a Router writes query_0_Transformer
_SETS = {"tokenizer": _TOKENIZER, "processor": _PROCESSOR, "pipeline": _PIPELINE}
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Beside:
    """The files beside merged weights: `copies` by name, `texts` with other content than either
    side has, and what is worth telling."""

    copies: dict[str, Path]
    texts: dict[str, bytes]
    notes: tuple[str, ...]


def beside(base: Checkpoint, adapters: Sequence[Adapter]) -> Beside:
    """The base's files, with every set that an adapter has in the place of the base's.

    Raises:
        UnreadableError: a configuration beside an adapter is no JSON object.
    """
    copies = base.sidecars()
    given: dict[Path, Files] = {}
    notes: list[str] = []
    for adapter in adapters:
        taken, lost, said = _taken(adapter, base, copies)
        for name, path in taken.items():
            if "/" not in name and name.endswith("config.json"):  # transformers reads objects only
                load_json(path, allow_non_finite=True)
        for earlier, files in given.items():
            changed = [n for n in files.keys() & taken.keys() if not _is_same(files[n], taken[n])]
            if changed:
                notes.append(f"{_listed(changed)} of {adapter.path} instead of those of {earlier}")
        copies = {name: path for name, path in copies.items() if name not in lost} | taken
        given[adapter.path] = taken
        notes += said
    for folder, files in given.items():
        if names := [name for name, path in files.items() if copies.get(name) == path]:
            notes.append(f"{_listed(names)} taken from {folder}")
    texts: dict[str, bytes] = {}
    if any(_TOKENIZER.fullmatch(n) or n == _GENERATION for files in given.values() for n in files):
        edited, said = _generation(copies)
        notes += said
        if edited is not None:
            del copies[_GENERATION]
            texts[_GENERATION] = (json.dumps(edited, indent=2) + "\n").encode()
    return Beside(copies, texts, tuple(notes))


def _taken(
    adapter: Adapter, base: Checkpoint, copies: Files
) -> tuple[dict[str, Path], set[str], list[str]]:
    """The files of an adapter that go into the output, those that must not stay beside them, and
    what to say."""
    found = sidecars(adapter.path)
    taken = {name: found[name] for name in (_GENERATION,) if name in found}
    if "config.json" in found and adapter.model_config.get("model_type") == base.model_type:
        taken["config.json"] = found["config.json"]
    lost: set[str] = set()
    notes: list[str] = []
    for kind, pattern in _SETS.items():
        held, others = _matching(found, pattern), _matching(copies, pattern)
        left: set[str] = set()
        is_step = kind == "pipeline" and held and _pipeline_around(adapter.path)
        if not is_step and not _loads(kind, held, others):
            part = _matching(held, _TEMPLATE)  # trained with it, on the base's tokenizer
            left = held.keys() - part.keys()
            held, others = part, _matching(others, _TEMPLATE) if part else {}
        if left:
            notes.append(f"{_listed(left)} beside {adapter.path}: no whole {kind}, left out")
        if gone := others.keys() - held.keys():
            notes.append(f"{_listed(gone)} left out: the {kind} is that of {adapter.path}")
        taken |= held
        lost |= gone
    if any(name.endswith(".jinja") for name in taken):
        lost.add("chat_template.json")  # of a processor, which reads it first
    if whole := _pipeline_around(adapter.path):
        notes.append(
            f"{adapter.path} is one step of the pipeline {whole}: put the merged model in its "
            "place there"
        )
    return taken, lost, notes


def _loads(kind: str, held: Files, others: Files) -> bool:
    """Whether the files of a set are one that loads by itself."""
    if kind == "pipeline":
        return "modules.json" in held
    if kind == "processor":
        return any(name.endswith("_config.json") for name in held)
    if any(_VOCABULARY.fullmatch(name) for name in held):
        return True
    # ByT5 and its like have no vocabulary on either side
    return "tokenizer_config.json" in held and not _matching(others, _VOCABULARY)


def padding(adapter: Adapter, base: Checkpoint) -> dict[str, object]:
    """What the config of a sequence classifier says of the tokenizer that comes with it: such a
    model takes the last token that is no padding, and trainers set that beside the tokenizer's."""
    files = _matching(sidecars(adapter.path), _TOKENIZER)
    number = _special_token(files, "pad_token")[1]
    known = adapter.model_config.get("pad_token_id") is not None
    if number is None or known or not _loads("tokenizer", files, base.sidecars()):
        return {}
    said: dict[str, object] = {"pad_token_id": number}
    return said | ({"text_config": said} if "text_config" in base.config else {})


def _pipeline_around(adapter: Path) -> Path | None:
    """The pipeline of sentence-transformers of which the folder of an adapter is a step."""
    step = adapter.resolve()
    lists = ("modules.json", "router_config.json")
    is_step = _STEP.fullmatch(step.name) and any(is_file(step.parent / name) for name in lists)
    return step.parent if is_step else None


def _generation(copies: Files) -> tuple[dict[str, object] | None, list[str]]:
    """`generation_config.json` with the end token of the tokenizer beside it, where it lacks that,
    and what to say: a model that does not know its end token is never done."""
    token, number = _special_token(copies, "eos_token")
    name = _GENERATION if _GENERATION in copies else "config.json"
    if token is None or name not in copies:
        return None, []
    config = load_json(copies[name], allow_non_finite=True)
    ends = config.get("eos_token_id")
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if number in known or (name == "config.json" and not known):
        return None, []
    edited = None
    if number is None:
        said = f"eos_token_id is {ends}; is that {token!r}, the tokenizer's?"
    elif name == "config.json":
        said = (
            f"eos_token_id is {ends}, the tokenizer ends at {number} ({token}), and no "
            f"{_GENERATION} says so: give the server that end token"
        )
    else:
        edited = config | {"eos_token_id": [*known, number] if known else number}
        said = f"eos_token_id {number} ({token}), where the tokenizer ends, added to {ends}"
    return edited, [printable(f"{name}: {said}")]


def _special_token(copies: Files, name: str) -> tuple[str | None, int | None]:
    """A token of the tokenizer, and its number where the files that are read here say it."""
    config = _object(copies, "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # else transformers does not read the older file
        config = config | _object(copies, "special_tokens_map.json")
    token = _content(config.get(name))
    if token is None:
        return None, None
    number = _object(copies, "added_tokens.json").get(token)
    decoder = config.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        if _content(entry) == token and key.isdecimal() and len(key) < 10:
            number = int(key)
    path = copies.get("tokenizer.json")
    if number is None and path is not None and path.stat().st_size <= MAX_JSON_BYTES:
        number = _number(load_json(path, allow_non_finite=True), token)
    return token, number if isinstance(number, int) else None


def _number(tokenizer: Mapping[str, object], token: str) -> object:
    """The number of a token by a `tokenizer.json`."""
    added, model = tokenizer.get("added_tokens"), tokenizer.get("model")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, Mapping) and entry.get("content") == token:
            return entry.get("id")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        return vocabulary.get(token)
    for number, pair in enumerate(vocabulary if isinstance(vocabulary, list) else ()):
        if isinstance(pair, list) and token in pair[:1]:  # Unigram: token, log probability
            return number
    return None


def _content(token: object) -> str | None:
    """A token as configurations write it: its text, or an object with its text."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _object(copies: Files, name: str) -> dict[str, object]:
    return load_json(copies[name], allow_non_finite=True) if name in copies else {}


def stray_adapter(base: Checkpoint) -> Iterator[Finding]:
    """That the folder of a base holds an adapter, which transformers 5.23 puts on it (where PEFT
    is installed) and a merge leaves out."""
    if base.path.is_dir() and (base.path / CONFIG_NAME).exists():
        yield warning(
            "base-holds-adapter", base.path,
            f"holds an {CONFIG_NAME} beside its weights: transformers puts that adapter onto them, "
            "a merge does not",
            "Was yours trained on both? Then name that adapter first; else move it away.",
        )  # fmt: skip


def lost_steps(adapter: Adapter, merged: Checkpoint) -> list[str]:
    """Files of the adapter's pipeline that a merged model does not have: other steps would run."""
    found = sidecars(adapter.path)
    if "modules.json" not in found or not merged.path.is_dir():
        return []
    return sorted(_matching(found, _PIPELINE).keys() - merged.sidecars().keys())


def _matching(files: Files, pattern: re.Pattern[str]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if pattern.fullmatch(name)}


def _is_same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def _listed(names: Iterable[str]) -> str:
    return printable(", ".join(sorted(names)))
