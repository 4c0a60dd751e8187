"""A receipt against the files beside it: is what this tool wrote still what is there?

The receipt (`gralora_convert.json`) states what was made of what: tensors, bytes, the digest of the
base's headers, and the size and, where they were asked for, sha256 of every file written.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gralora_convert.adapters import CONFIG_NAME
from gralora_convert.disk import RECEIPT_NAME, Checkpoint, Measure, load_json, measured
from gralora_convert.errors import ConvertError, Finding, UnreadableError, error, note, warning

T = TypeVar("T")
_REMADE = "Was it edited, trained on or replaced? Then remove the receipt; else make it again."


@dataclass(frozen=True, slots=True)
class _Receipt:
    """What a receipt states, as far as files can be held against it; None: it does not say.

    `tensors` and `nbytes` count those of all weight files; `tensor_names` are those computed,
    `module_names` the adapted modules.
    """

    outputs: Mapping[str, Measure] | None
    tensors: int | None
    nbytes: int | None
    base_digest: str | None
    tensor_names: frozenset[str]
    module_names: frozenset[str]


def checkpoint_receipt_findings(folder: Path, base: Checkpoint | None) -> Iterator[Finding]:
    """Everything in which the merged checkpoint `folder` is not what its receipt says.

    Its weights must be those that were written; other files may have been edited since.
    """
    try:
        receipt = _read(folder)
    except ConvertError as problem:
        yield error("receipt-unreadable", RECEIPT_NAME, problem.message, problem.hint)
        return
    try:
        merged = Checkpoint.open(folder)
        beside = merged.sidecars()
    except ConvertError as problem:
        where = str(problem.where).removeprefix(f"{folder}/")
        yield error("weights-unreadable", where, problem.message, problem.hint)
        return
    weights = {name: file.path for name, file in merged.layout.items()}
    if merged.index_name is not None:
        weights[merged.index_name] = folder / merged.index_name
    yield from _count_findings(receipt, merged)
    yield from _file_findings(receipt, weights, beside)
    if base is not None and receipt.base_digest not in (None, base.digest()):
        yield error(
            "receipt-base-mismatch", RECEIPT_NAME,
            f"the merge was made from a base of other tensors or another config than {base.source}",
            "Name the base that the receipt names under inputs.",
        )  # fmt: skip


def adapter_receipt_findings(
    folder: Path, weights: Path, modules: frozenset[str]
) -> Iterator[Finding]:
    """In what an adapter is not what the receipt beside it says; warnings, because to train on or
    to copy another one over is normal. `weights` is its file, `modules` what it adapts."""
    try:
        receipt = _read(folder)
    except ConvertError as problem:
        yield warning("receipt-unreadable", RECEIPT_NAME, problem.message, problem.hint)
        return
    beside = {path.name: path for path in (folder / CONFIG_NAME, weights)}
    yield from _file_findings(receipt, {}, beside)
    if receipt.outputs is None and receipt.module_names != modules:
        yield warning(
            "receipt-mismatch", RECEIPT_NAME,
            f"states {len(receipt.module_names)} modules, the adapter has {len(modules)} "
            "(or others)",
            _REMADE,
        )  # fmt: skip


def altered_files(folder: Path) -> list[str]:
    """The files in `folder` that are not, or not any more, what its receipt says was written."""

    def found(name: str, digest: bool) -> Measure | None:
        with contextlib.suppress(UnreadableError):
            return measured(folder / name, digest=digest)
        return None

    stated = _read(folder).outputs or {}
    return [name for name, of in stated.items() if found(name, of.sha256 is not None) != of]


def _count_findings(receipt: _Receipt, merged: Checkpoint) -> Iterator[Finding]:
    tensors = len(merged.tensors)
    nbytes = sum(file.stamp[1] for file in merged.layout.values())
    for what, stated, found in (
        ("tensors", receipt.tensors, tensors), ("bytes", receipt.nbytes, nbytes),
    ):  # fmt: skip
        if stated not in (None, found):
            yield error(
                "receipt-mismatch", RECEIPT_NAME,
                f"states {stated} {what} of weights, the files hold {found}", _REMADE,
            )  # fmt: skip
    lacking = sorted(receipt.tensor_names - merged.tensors.keys())
    if lacking:
        yield error(
            "receipt-mismatch", lacking[0],
            f"is one of {len(lacking)} merged tensors that the files do not hold", _REMADE,
        )  # fmt: skip


def _file_findings(
    receipt: _Receipt, weights: Mapping[str, Path], beside: Mapping[str, Path]
) -> Iterator[Finding]:
    """Files that are missing, added or changed; errors for `weights`, warnings for others."""
    if receipt.outputs is None or any(of.sha256 is None for of in receipt.outputs.values()):
        yield note(
            "receipt-without-digests", RECEIPT_NAME,
            "states no digests of the files: tensors and bytes were compared, not their values",
            "Large merges get them with `digests=True`; `verify` compares every element.",
        )  # fmt: skip
    if receipt.outputs is None:
        return
    for name, stated in receipt.outputs.items():
        path = weights.get(name) or beside.get(name)
        is_weights = bool(weights) and name.endswith((".safetensors", ".index.json"))
        kind = error if is_weights else warning
        if path is None:
            yield kind("receipt-mismatch", name, "was written and is not there any more", _REMADE)
            continue
        found = measured(path, digest=stated.sha256 is not None)
        if found != stated:
            yield kind(
                "receipt-mismatch", name,
                f"has {_described(found)}; {_described(stated)} were written", _REMADE,
            )  # fmt: skip
    for name in weights.keys() - receipt.outputs.keys():
        yield error("receipt-mismatch", name, "holds weights that were not written", _REMADE)


def _described(measure: Measure) -> str:
    digest = f", sha256 {measure.sha256[:12]}..." if measure.sha256 else ""
    return f"{measure.nbytes} bytes{digest}"


def _read(folder: Path) -> _Receipt:
    """The receipt in `folder`; `UnreadableError` when it is missing, or another program's."""
    path = folder / RECEIPT_NAME
    values = load_json(path)
    try:
        return _parsed(values)
    except (KeyError, TypeError) as problem:
        raise UnreadableError(f"is no receipt of this tool: {problem}", where=path) from problem


def _parsed(values: Mapping[str, object]) -> _Receipt:
    """Raises `KeyError` or `TypeError` for what is not as this tool writes it."""
    base = _is(dict, _is(dict, values["inputs"]).get("base", {}))
    outputs = None
    if "outputs" in values:
        stated = {name: _is(dict, of) for name, of in _is(dict, values["outputs"]).items()}
        outputs = {
            name: Measure(_is(int, of["bytes"]), _is(str, of["sha256"]) if "sha256" in of else None)
            for name, of in stated.items()
        }
    modules = values["modules"]
    if not isinstance(modules, list):
        raise TypeError("modules is no list")
    rows = [_is(dict, row) for row in modules]
    return _Receipt(
        outputs,
        _is(int, values["tensors"]) if "tensors" in values else None,
        _is(int, values["bytes"]) if "bytes" in values else None,
        _is(str, base["headers_sha256"]) if base else None,
        frozenset(_is(str, row["tensor"]) for row in rows if "tensor" in row),
        frozenset(_is(str, row["module"]) for row in rows if "module" in row),
    )


def _is(kind: type[T], value: object) -> T:
    if type(value) is not kind:
        needed = {dict: "an object", int: "a whole number", str: "a string"}[kind]
        raise TypeError(f"{needed} was needed, it holds {value!r:.60}")
    return value
