"""`merge`: base + adapters -> a dense checkpoint that every loader reads, from file to file.

Every tensor of the base becomes one of the output: most are copied as bytes, the adapted ones are
computed in tiles (`tiles.py`), a few are replaced or added whole. The layout of the files is the
base's own, or shards of a given size.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from gralora_convert.adapters import Adapter, AdapterLike, files_of
from gralora_convert.base import (
    Kept,
    Merged,
    Patched,
    Reading,
    Recipe,
    Replaced,
    beside,
    combine,
    gathered,
    named_labels,
    place_in,
    unread_tensor,
    updated,
)
from gralora_convert.disk import (
    FLOATING,
    Checkpoint,
    dtype_name,
    load_json,
    nbytes_of,
    written_dtype,
)
from gralora_convert.errors import CheckFailedError, MisuseError
from gralora_convert.output import (
    CARD_NAME,
    CastTensor,
    Computed,
    Copied,
    MergedTensor,
    OutputFile,
    Part,
    PatchedTensor,
    Plan,
    index_json,
    index_name,
    lay_out,
    merged_card,
    taken,
)
from gralora_convert.version import __version__

if TYPE_CHECKING:
    import torch


def merge(
    *adapters: AdapterLike,
    base: Checkpoint | str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: "str | torch.dtype" = "keep",
    shard_size: str = "keep",
    device: str = "cpu",
    verify: bool = True,
    again: bool = False,
    key_map: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    fan_in_fan_out: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of base + sum of weight * delta; `plan.write(output)` carries it out.

    Sums are float32 (float64 for float64 tensors), rounded once to the dtype written. Biases and
    `modules_to_save` of an adapter replace those of the base. Untouched tensors keep their bytes.

    Arguments:
        adapters: one or several GraLoRA, Hybrid GraLoRA or LoRA adapters.
        base: default: the `base_model_name_or_path` that the adapters agree on.
        weights: one per adapter, default 1.0; a negative one takes the update away.
        dtype: `keep`, `float32`, `bfloat16` or `float16` (or torch's), of all floating tensors
            written.
        shard_size: `keep` for the base's own files, else the largest file, such as `5GB`.
        verify: recompute one row in 64 while it is hot, and refuse to publish what
            differs by more than one rounding.
        again: merge also what the base's receipt says it holds already.
        key_map: names of modules in the adapter -> in the base, whole or leading parts of names.
        fan_in_fan_out: which weights are stored (in, out), as Conv1D has them, by patterns of
            module names ({"*.c_attn": True, "*": False}), for layers of which nothing else tells.
        labels: the names of a trained classifier's labels, in the order of its outputs; default:
            those of the config beside the adapter or of the base.

    Raises:
        InvalidAdapterError: an adapter has errors or does not fit the base.
        MisuseError: arguments that do not go together.
        UnreadableError: the base.
        UnsupportedError: the base, or a LoRA whose update is more than scaling * B @ A.

    >>> plan = merge("fixtures/peft-0.21.2/llama-gralora", base="fixtures/bases/llama")
    >>> len(plan.files)
    1
    """
    dtype = dtype_name(dtype)
    written_dtype(dtype, "F32")
    weighted, target, chained = gathered(adapters, base, weights, insist=again)
    opened, factors = [adapter for adapter, _ in weighted], [weight for _, weight in weighted]
    if not again:
        _refuse_twice(weighted, target)
    reading = Reading.of(key_map, fan_in_fan_out, trust_remote_code)
    placements = [place_in(one, target, reading) for one in opened]
    if dtype != "keep" and (unread := unread_tensor(target)):
        raise MisuseError(
            f"the base is quantised: {unread} cannot be written as {dtype}", where=target.path,
            hint='Give `dtype="keep"`: only what is adapted becomes plain.',
        )  # fmt: skip
    recipe = combine(placements, factors, dtype)
    merged = {
        name: MergedTensor(entry.spec, entry.dtype, entry.updates, device=device, check=verify)
        for name, entry in recipe.merged.items()
    }
    files = lay_out(target, _parts(recipe, merged), shard_size)
    texts, copies, notes = _texts_and_sidecars(
        recipe, files, dtype, labels, index_name(target, shard_size)
    )
    notes = [*chained, *notes]
    return Plan(
        command="merge",
        files=files,
        receipt=partial(_receipt, recipe, merged, dtype, verify, notes),
        texts=texts,
        sidecars=copies,
        inputs=(*target.layout.values(), *chain.from_iterable(map(files_of, opened))),
        protected=(target.path, *(adapter.path for adapter in opened)),
        notes=tuple(notes),
        settings={
            "adapters": [adapter.config.to_dict() for adapter in opened],
            "weights": factors,
            "device": device,
            "verify": verify,
        },
        resumable=True,
        prepare=partial(import_module, "torch"),
        meanwhile=lambda: [adapter.sha256() for adapter in opened],
    )


def _refuse_twice(weighted: Sequence[tuple[Adapter, float]], base: Checkpoint) -> None:
    """A base that already holds one of the adapters would get its update a second time; a negative
    weight takes it away."""
    merged = set(base.merged_adapters)
    for adapter, weight in weighted if merged else ():
        if weight > 0 and adapter.sha256() in merged:
            raise MisuseError(
                f"the base {base.source} already holds this adapter (its receipt lists it)",
                where=adapter.path,
                hint="Merge into the original base, or insist with `again=True`.",
            )


def _parts(recipe: Recipe, merged: Mapping[str, MergedTensor]) -> dict[str, list[Part]]:
    """The tensors of the output by weight file of the base, in the base's order; new ones (an
    untied head, a trained classifier) follow in the last file."""
    base = recipe.base
    files = {
        file_name: [
            _part(recipe, name, merged)
            for name, spec in base.tensors.items()
            if spec.file == file.path and name in recipe.tensors
        ]
        for file_name, file in base.layout.items()
    }
    new = [name for name in recipe.tensors if name not in base.tensors]
    files[next(reversed(files))] += [_part(recipe, name, merged) for name in new]
    return files


def _part(recipe: Recipe, name: str, merged: Mapping[str, MergedTensor]) -> Part:
    source: Copied | Computed
    stored = {file.path for file in recipe.base.layout.values()}
    match recipe.tensors[name]:
        case Merged(spec=spec, dtype=dtype):
            source = merged[name].source()
        case Patched(spec=spec, dtype=dtype, parts=parts):
            source = PatchedTensor(spec, dtype, parts).source()
        case Replaced(spec=spec, dtype=dtype) if spec.file not in stored:
            source = taken(spec, dtype)
        case Replaced(spec=spec, dtype=dtype) | Kept(spec=spec, dtype=dtype):
            source = Copied(spec) if spec.dtype == dtype else CastTensor(spec, dtype).source()
        case other:
            assert_never(other)
    size = nbytes_of(dtype, spec.shape)
    return Part(recipe.final_name(name), dtype, spec.shape, size, source)


def _texts_and_sidecars(
    recipe: Recipe,
    files: Sequence[OutputFile],
    dtype: str,
    labels: Sequence[str] | None,
    index: str,
) -> tuple[dict[str, bytes], dict[str, Path], list[str]]:
    """Small files to write, files to copy, and what is worth telling about them."""
    held = beside(recipe.base, recipe.adapters)
    notes = [*recipe.notes, *held.notes]
    copies = held.copies
    texts = held.texts | {CARD_NAME: merged_card(recipe.base, recipe.adapters)}
    source = copies.get("config.json")
    config = load_json(source, allow_non_finite=True) if source is not None else {}
    edits, said = named_labels(_config_edits(recipe, config, dtype), labels)
    edited = recipe.quantised(updated(config, edits))
    if source is not None and edited != config:
        del copies["config.json"]
        texts["config.json"] = (json.dumps(edited, indent=2) + "\n").encode()
        notes += said
        if edited.get("pad_token_id") != config.get("pad_token_id"):
            notes.append(
                f"config.json: pad_token_id is {edited['pad_token_id']}, with which the tokenizer "
                f"pads, instead of {config.get('pad_token_id')}: a classifier looks for it"
            )
    if len(files) > 1:
        texts[index] = index_json(files)
    return texts, copies, notes


def _config_edits(recipe: Recipe, config: Mapping[str, object], dtype: str) -> dict[str, object]:
    edits = dict(recipe.config_edits())
    if dtype == "keep":
        return edits
    dtypes = {s.dtype for s in recipe.base.tensors.values() if s.dtype in FLOATING}
    if dtypes != {written_dtype(dtype, "")} and "torch_dtype" not in config:
        edits["dtype"] = dtype
    return updated(edits, _dtype_edits(config, dtype))


def _receipt(
    recipe: Recipe,
    merged: Mapping[str, MergedTensor],
    dtype: str,
    verify: bool,
    notes: Sequence[str],
) -> dict[str, object]:
    """What was done; raises when the check of what was written says no."""
    if not any(tensor.changed for tensor in merged.values()) and not recipe.replaced:
        raise CheckFailedError(
            "the merge would change nothing: every update is zero or below the rounding of the "
            "stored dtype",
            hint='Is the adapter trained? If it is, write `dtype="float32"`.',
        )
    from gralora_convert.delta import Survival

    survival = sum((tensor.survival for tensor in merged.values()), Survival())
    for name, tensor in merged.items():
        if tensor.worst > 1.0:
            raise CheckFailedError(
                f"differs from base + delta by {tensor.worst:.3g} x what one rounding allows",
                where=name,
                hint="Nothing was published. Please report this with the two inputs.",
            )
    base, digests = recipe.base, [adapter.sha256() for adapter in recipe.adapters]
    held = base.merged_adapters
    for (_, weight), digest in zip(recipe.weighted, digests, strict=True):
        if weight < 0 and digest in held:
            held.remove(digest)  # taken away
        else:
            held.append(digest)
    return {
        "tool": "gralora-convert",
        "version": __version__,
        "command": "merge",
        "inputs": {
            "base": {"source": base.source, "headers_sha256": base.digest()},
            "adapters": [
                {
                    "path": str(adapter.path),
                    "sha256": digest,
                    "weight": weight,
                    "kind": adapter.kind,
                }
                for (adapter, weight), digest in zip(recipe.weighted, digests, strict=True)
            ],
        },
        "merged_adapters": held,
        "modules": [_row(name, tensor, checked=verify) for name, tensor in merged.items()],
        "replaced": sorted(recipe.replaced),
        "survival": survival.as_json() if verify else None,
        "dtype": dtype,
        "notes": list(notes),
    }


def _row(name: str, tensor: MergedTensor, *, checked: bool) -> dict[str, object]:
    row: dict[str, object] = {
        "tensor": name,
        "modules": list(dict.fromkeys(update.module for update in tensor.updates)),
        "shape": list(tensor.spec.shape),
        "dtype": tensor.dtype,
    }
    return row | ({"worst": tensor.worst, **tensor.survival.as_json()} if checked else {})


def _dtype_edits(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """`dtype` wherever a config or one within it says one, by its name of today or before."""
    edits: dict[str, object] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            edits[key] = dtype
        elif isinstance(value, Mapping) and key.endswith("_config"):
            edits |= {key: inner} if (inner := _dtype_edits(value, dtype)) else {}
    return edits
