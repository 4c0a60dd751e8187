"""A LoRA as one engine reads it: the same update with what the engine wants beside or otherwise."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from gralora_convert.adapters import CONFIG_NAME, key_of
from gralora_convert.disk import dump_json
from gralora_convert.errors import MisuseError, UnsupportedError
from gralora_convert.output import Computed, OutputFile, Part, Plan
from gralora_convert.verbs.serving import (
    ENGINES,
    GPT2,
    TRANSPOSED_FOR,
    Exported,
    leaf,
    missing_siblings,
    reasons,
    refusals,
)

_ALIKE = ({"k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # of the same shape in one layer


def tailored(plan: Plan, server: str, lora: Exported) -> Plan:
    """The plan of a LoRA for one engine: SGLang gets zero factors for layers that it stacks with
    adapted ones, and targets by name; llama.cpp the factors of GPT-2's Conv1D layers in the other
    order, which its converter turns back.

    Raises:
        UnsupportedError: the engine does not serve it, whatever its layout.
        MisuseError: the shape of a missing layer cannot be told without the base.
    """
    engine = ENGINES[server]
    edits: dict[str, object] = {}
    added: dict[str, tuple[Part, Part]] = {}
    parts = plan.files[0].parts
    if server == "sglang":
        added = _zero_factors(lora, {part.name: part for part in parts})
        targets = [*lora.modules, *added]
        edits["target_modules"] = targets
        lora = replace(lora, config=replace(lora.config, target_modules=targets), modules=targets)
    if server == "llama.cpp" and lora.is_gpt2:
        parts = tuple(_turned(parts, lora))
        edits[TRANSPOSED_FOR] = server
        extra = {**lora.config.extra, TRANSPOSED_FOR: server}
        lora = replace(lora, config=replace(lora.config, extra=extra))
    if found := reasons(server, lora):
        raise UnsupportedError(f"{engine.title} {engine.version} {found[0]}")
    config = json.loads(plan.texts[CONFIG_NAME]) | edits

    def receipt() -> dict[str, object]:
        made = plan.receipt()
        rows = made["modules"]
        assert isinstance(rows, list)
        zeros = [{"module": module, "error": 0.0} for module in added]
        return {**made, "server": server, "modules": rows + zeros, "serving": refusals(lora)}

    parts += tuple(part for pair in added.values() for part in pair)
    return replace(
        plan,
        files=(OutputFile(plan.files[0].name, parts), *plan.files[1:]),
        texts={**plan.texts, CONFIG_NAME: dump_json(config).encode() + b"\n"},
        receipt=receipt,
        notes=(*plan.notes, *_notes(server, added, edits)),
    )


def _notes(server: str, added: Mapping[str, object], edits: Mapping[str, object]) -> Iterator[str]:
    title = ENGINES[server].title
    if added:
        yield f"{next(iter(added))} and {len(added) - 1} more get zero factors, for {title}"
    if TRANSPOSED_FOR in edits:
        yield f"Conv1D layers have their factors as {title} reads them: for PEFT they are wrong"


def _zero_factors(lora: Exported, parts: Mapping[str, Part]) -> dict[str, tuple[Part, Part]]:
    """A and B of every layer that SGLang misses, in the dtype and rank of one beside it."""
    found = {}
    for module, held in missing_siblings(lora.modules):
        a = parts[key_of(held, "A", "lora")]
        b = parts[key_of(held, "B", "lora")]
        shapes = {"A": a.shape, "B": (_rows(module, held, b.shape[0], lora), b.shape[1])}
        found[module] = (
            _zeros(key_of(module, "A", "lora"), a, shapes["A"]),
            _zeros(key_of(module, "B", "lora"), b, shapes["B"]),
        )
    return found


def _rows(module: str, held: str, known: int, lora: Exported) -> int:
    """The out_features of a layer: the base's, or those of a layer that has the same."""
    tensors = {} if lora.base is None else lora.base.tensors
    names = [n for n in tensors if f".{n}".endswith(f".{module}.weight")]
    if len(names) == 1:
        return tensors[names[0]].shape[0]
    if {leaf(module), leaf(held)} in _ALIKE:
        return known
    raise MisuseError(
        f"SGLang needs {leaf(module)} beside {leaf(held)}, whose shape the adapter does not show",
        where=module, hint="Give the model as `base`.",
    )  # fmt: skip


def _zeros(name: str, like: Part, shape: tuple[int, ...]) -> Part:
    nbytes = like.nbytes // np.prod(like.shape, dtype=int).item() * shape[0] * shape[1]
    return Part(
        name, like.dtype, shape, nbytes, Computed(nbytes, lambda _: memoryview(bytes(nbytes)))
    )


def _turned(parts: tuple[Part, ...], lora: Exported) -> Iterator[Part]:
    """The parts, those of Conv1D layers as A' = B.T and B' = A.T: (B A).T = A.T B.T."""
    held = {part.name: part for part in parts}
    other: dict[str, str] = {}
    for module in lora.modules:
        if leaf(module) in GPT2:
            a, b = key_of(module, "A", "lora"), key_of(module, "B", "lora")
            other |= {a: b, b: a}
    for part in parts:
        yield _transposed(part.name, held[other[part.name]]) if part.name in other else part


def _transposed(name: str, part: Part) -> Part:
    source = part.source
    assert isinstance(source, Computed)
    rows, columns = part.shape

    def produce(tile: int) -> memoryview:
        words = np.frombuffer(source.produce(tile), f"u{part.nbytes // (rows * columns)}")
        return memoryview(words.reshape(rows, columns).T.tobytes())

    return replace(part, name=name, shape=(columns, rows), source=replace(source, produce=produce))
