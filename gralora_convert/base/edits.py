"""What the `config.json` of a merged model must say differently: classes and labels of a trained
head, the size of a vocabulary, ties that no longer hold."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gralora_convert.base.architecture import Architecture
from gralora_convert.base.names import AUTO_CLASSES
from gralora_convert.disk import Checkpoint
from gralora_convert.errors import MisuseError, printable

Json = Mapping[str, object]
_LABELS = ("id2label", "label2id")  # replaced as a whole, never added to
_NAMES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}


def head_edits(architecture: Architecture, rows: int, beside: Json) -> dict[str, object]:
    """The class that loads the base with a head of `rows` labels, and the names of the labels:
    those of the config `beside` the adapter or of the base, if one has so many."""
    edits: dict[str, object] = {}
    name = head_class(architecture)
    if name is not None and name not in architecture.base.architectures:
        edits["architectures"] = [name]
    if architecture.task_type != "QUESTION_ANS":  # its two outputs are no labels
        edits |= _labels((beside, architecture.base.config), rows)
    return edits


def head_class(architecture: Architecture) -> str | None:
    """The class that loads the base with a new head; None when it is not known."""
    base, name = architecture.base, architecture.class_name
    if name is not None and name not in base.architectures:
        return name
    auto = AUTO_CLASSES.get(architecture.task_type or "")
    if auto is None or base.model_type is None:
        return None
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, _NAMES[auto], {}).get(base.model_type)
    first = found[0] if isinstance(found, tuple | list) and found else found
    return first if isinstance(first, str) else None


def class_fields(architecture: Architecture) -> dict[str, object]:
    """What `adapter_config.json` says of a class in memory that is not the base's own: the task
    where that names it, else the class (PEFT 0.21.2, peft_model.py, save_pretrained)."""
    name, model = architecture.class_name, architecture.blueprint
    if name is None or model is None:
        return {}
    for task in AUTO_CLASSES:
        if head_class(replace(architecture, class_name=None, task_type=task)) == name:
            return {"task_type": task}
    library = type(model.model).__module__
    return {"auto_mapping": {"base_model_class": name, "parent_library": library}}


def _labels(configs: Sequence[Json], rows: int) -> dict[str, object]:
    for config in configs:
        names, numbers = config.get("id2label"), config.get("label2id")
        if isinstance(names, Mapping) and len(names) == rows:
            if not isinstance(numbers, Mapping) or len(numbers) != rows:
                numbers = {str(name): int(i) for i, name in names.items() if str(i).isdecimal()}
            return {"id2label": dict(names), "label2id": dict(numbers)}
    names = {str(i): f"LABEL_{i}" for i in range(rows)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def named_labels(
    edits: Json, labels: Sequence[str] | None
) -> tuple[dict[str, object], tuple[str, ...]]:
    """`edits` with these names for the labels of a trained head, and a note where nobody names
    them.

    Raises:
        MisuseError: there is no such head, or it has another number of labels.

    >>> edits = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    >>> named_labels(edits, ["no", "yes"])[0]["label2id"]
    {'no': 0, 'yes': 1}
    """
    known = edits.get("id2label")
    known = known if isinstance(known, Mapping) else {}
    if labels is None:
        unnamed = len(known) > 1 and all(name == f"LABEL_{i}" for i, name in known.items())
        said = f"config.json: the {len(known)} labels of the trained head are LABEL_0, LABEL_1"
        more = ", ..." if len(known) > 2 else ""
        return dict(edits), (f"{said}{more}; `labels` gives them names",) if unnamed else ()
    if not known:
        raise MisuseError("`labels` were given, and no adapter has a trained head with labels")
    if isinstance(labels, str) or len(labels) != len(known) or len(set(labels)) != len(labels):
        raise MisuseError(
            f"`labels` are {labels!r}; the trained head needs {len(known)} different names",
            hint="Name them in the order of the outputs.",
        )
    names = {str(i): name for i, name in enumerate(labels)}
    return {**edits, "id2label": names, "label2id": {n: int(i) for i, n in names.items()}}, ()


def updated(config: Mapping[str, object], edits: Mapping[str, object]) -> dict[str, object]:
    """`config` with the edits; an edit that is an object goes into the object of that name."""
    result = dict(config)
    for key, value in edits.items():
        inner = result.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping) and key not in _LABELS:
            result[key] = updated(inner, value)
        else:
            result[key] = value
    return result


def vocabulary_edits(config: Json, before: int, now: int) -> dict[str, object]:
    """`vocab_size` wherever it is the old one, in the config and in those within it."""
    edits: dict[str, object] = {}
    for name, value in config.items():
        if name == "vocab_size" and value == before:
            edits[name] = now
        elif isinstance(value, Mapping):
            inner = vocabulary_edits(value, before, now)
            if inner:
                edits[name] = inner
    return edits


def tie_edits(
    config: Json, flags: Sequence[tuple[str, ...]], edits: Mapping[str, object]
) -> dict[str, object]:
    """`edits` and a false `tie_word_embeddings` in the configs at these paths.

    A text config says the same as the whole: servers read either.
    """
    result = dict(edits)
    paths = list(flags)
    if () in paths and isinstance(config.get("text_config"), Mapping):
        paths.append(("text_config",))
    for path in dict.fromkeys(paths):
        result = _set(result, path)
    return result


def _set(edits: Json, path: tuple[str, ...]) -> dict[str, object]:
    if not path:
        return {**edits, "tie_word_embeddings": False}
    name, *rest = path
    inner = edits.get(name)
    return {**edits, name: _set(inner if isinstance(inner, Mapping) else {}, tuple(rest))}


# Names and labels, what a merge may change, and what the tensors on disk decide.
_FREE = frozenset({
    "_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
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
