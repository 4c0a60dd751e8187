"""What the `config.json` of a merged model must say differently: classes and labels of a trained
head, the size of a vocabulary, ties that no longer hold."""

from collections.abc import Mapping, Sequence

from gralora_convert.architecture import AUTO_CLASSES, Architecture

__all__ = ["head_class", "head_edits", "tie_edits", "updated", "vocabulary_edits"]

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


def _labels(configs: Sequence[Json], rows: int) -> dict[str, object]:
    for config in configs:
        names, numbers = config.get("id2label"), config.get("label2id")
        if isinstance(names, Mapping) and len(names) == rows:
            if not isinstance(numbers, Mapping) or len(numbers) != rows:
                numbers = {str(name): int(i) for i, name in names.items() if str(i).isdecimal()}
            return {"id2label": dict(names), "label2id": dict(numbers)}
    names = {str(i): f"LABEL_{i}" for i in range(rows)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


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
