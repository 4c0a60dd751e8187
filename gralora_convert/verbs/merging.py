"""`merge`: base + adapters -> a dense checkpoint that every loader reads, from file to file.

Every tensor of the base becomes one of the output: most are copied as bytes, the adapted ones are
computed in tiles (`tiles.py`), a few are replaced or added whole. The layout of the files is the
base's own, or shards of a given size.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gralora_convert.adapters import Adapter
from gralora_convert.base import Placement, Replacement, beside, named_labels, place, updated
from gralora_convert.delta import Gralora, Lora, Survival, permute_rows, to_device
from gralora_convert.disk import (
    FLOATING,
    Checkpoint,
    TensorSpec,
    load_json,
    nbytes_of,
    written_dtype,
)
from gralora_convert.errors import CheckFailedError, MisuseError, is_number
from gralora_convert.output import (
    CARD_NAME,
    CastTensor,
    Computed,
    Contribution,
    Copied,
    MergedTensor,
    OutputFile,
    Part,
    Patch,
    PatchedTensor,
    Plan,
    index_json,
    lay_out,
    merged_card,
    taken,
)
from gralora_convert.version import __version__

__all__ = [
    "merge",
]


def merge(
    *adapters: Adapter | str | Path,
    base: Checkpoint | str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: str = "keep",
    shard_size: str = "keep",
    device: str = "cpu",
    verify: bool = True,
    again: bool = False,
    key_map: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """The plan of base + sum of weight * delta; `plan.write(output)` carries it out.

    Sums are float32 (float64 for float64 tensors), rounded once to the dtype written. Biases and
    `modules_to_save` of an adapter replace those of the base. Untouched tensors keep their bytes.

    Arguments:
        adapters: one or several GraLoRA, Hybrid GraLoRA or LoRA adapters.
        base: default: the `base_model_name_or_path` that the adapters agree on.
        weights: one per adapter, default 1.0; a negative one takes the update away.
        dtype: `keep`, `float32`, `bfloat16` or `float16`, of all floating tensors written.
        shard_size: `keep` for the base's own files, else the largest file, such as `5GB`.
        verify: recompute one row in 64 while it is hot, and refuse to publish what
            differs by more than one rounding.
        again: merge also what the base's receipt says it holds already.
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
    written_dtype(dtype, "F32")
    opened = [a if isinstance(a, Adapter) else Adapter.open(a) for a in adapters]
    for adapter in opened:
        adapter.require_plain()
    factors = _weights(weights, opened)
    if len(opened) > 1 and len({adapter.sha256() for adapter in opened}) < len(opened):
        raise MisuseError("an adapter is named twice", hint="Use --weight 2 to apply it twice.")
    named = _base_name(opened) if base is None else base
    target = named if isinstance(named, Checkpoint) else Checkpoint.open(named)
    if not again:
        _refuse_twice(opened, target)
    placements = []
    for adapter in opened:
        placement, report = place(
            adapter, target, key_map=key_map or {}, trust_remote_code=trust_remote_code
        )
        report.require_ok(adapter.path)
        assert placement is not None
        placements.append(placement)
    return _Merge(opened, factors, target, placements, dtype, device, verify, labels).plan(
        shard_size
    )


def _weights(weights: Sequence[float] | None, adapters: Sequence[Adapter]) -> list[float]:
    if not adapters:
        raise MisuseError("no adapter was given")
    if weights is None:
        return [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise MisuseError(
            f"{len(weights)} weights for {len(adapters)} adapters; one each was needed",
            hint="Repeat --weight, in the order of the adapters.",
        )
    for weight, adapter in zip(weights, adapters, strict=True):
        if not is_number(weight):
            raise MisuseError(f"the weight {weight!r} is not a finite number")
        if weight == 0:
            raise MisuseError(
                "weight 0 was given, which would leave the adapter out", where=adapter.path,
                hint="Leave out the adapter itself.",
            )  # fmt: skip
        if weight != 1.0 and (adapter.biases or adapter.saved):
            raise MisuseError(
                f"weight {weight:g} was given, but trained biases and saved modules replace those "
                "of the base and cannot be weighted",
                where=adapter.path,
                hint="Use weight 1.",
            )
    return list(weights)


def _base_name(adapters: Sequence[Adapter]) -> str:
    names = {adapter.base_source for adapter in adapters}
    name = names.pop()
    if names or not name:
        found = "different base models" if names else "no base model"
        raise MisuseError(
            f"adapter_config.json names {found}", where=adapters[0].path, hint="Give --base."
        )
    return name


def _refuse_twice(adapters: Sequence[Adapter], base: Checkpoint) -> None:
    """A base that already holds one of the adapters would get its update a second time."""
    merged = set(_merged_before(base))
    for adapter in adapters if merged else ():
        if adapter.sha256() in merged:
            raise MisuseError(
                f"the base {base.source} already holds this adapter (its receipt lists it)",
                where=adapter.path,
                hint="Merge into the original base, or insist with --again.",
            )


def _merged_before(base: Checkpoint) -> list[str]:
    """sha256 of the adapters that a receipt beside the base lists, this merge's and earlier."""
    receipt = base.receipt or {}
    listed = receipt.get("merged_adapters")
    return [value for value in listed if isinstance(value, str)] if isinstance(listed, list) else []


@dataclass(frozen=True)
class _Merge:
    """Everything one merge knows before it computes."""

    adapters: list[Adapter]
    weights: list[float]
    base: Checkpoint
    placements: list[Placement]
    dtype: str
    device: str
    verify: bool
    labels: Sequence[str] | None

    def plan(self, shard_size: str) -> Plan:
        merged = self._merged_tensors()
        parts = self._parts(merged)
        files = lay_out(self.base, parts, shard_size)
        texts, copies, notes = self._texts_and_sidecars(files)
        return Plan(
            command="merge",
            files=files,
            receipt=partial(self._receipt, merged, notes),
            texts=texts,
            sidecars=copies,
            inputs=(*self.base.layout.values(), *(a.file for a in self.adapters)),
            protected=(self.base.path, *(a.path for a in self.adapters)),
            notes=tuple(notes),
            settings={
                "adapters": [adapter.config.to_dict() for adapter in self.adapters],
                "weights": self.weights,
                "device": self.device,
                "verify": self.verify,
            },
            resumable=True,
            meanwhile=lambda: [adapter.sha256() for adapter in self.adapters],
        )

    def _merged_tensors(self) -> dict[str, MergedTensor]:
        """Output name -> the tensor that receives updates."""
        contributions: dict[str, list[Contribution]] = {}
        sources: dict[str, TensorSpec] = {}
        dtypes: dict[str, str] = {}
        for adapter, weight, placement in zip(
            self.adapters, self.weights, self.placements, strict=True
        ):
            for target in placement.targets:
                for piece in target.pieces:
                    stored = self.base.tensors[piece.tensor]
                    sources[piece.output] = piece.source or stored
                    dtypes[piece.output] = stored.dtype
                    contributions.setdefault(piece.output, []).append(
                        Contribution(
                            target.module,
                            _loader(adapter, target.module, piece.order, self.device),
                            weight,
                            piece.start,
                            piece.count,
                            0 if piece.order else piece.delta_start,
                            target.transposed,
                            adapter.blocks,
                            adapter.factor_bytes(target.module),
                        )
                    )
        return {
            name: MergedTensor(
                sources[name],
                self._written(dtypes[name]),
                of_tensor,
                device=self.device,
                check=self.verify,
            )
            for name, of_tensor in contributions.items()
        }

    def _written(self, dtype: str) -> str:
        return written_dtype(self.dtype, dtype) if dtype in FLOATING else dtype

    def _parts(self, merged: Mapping[str, MergedTensor]) -> dict[str, list[Part]]:
        """The tensors of the output by weight file of the base, in the base's order; new ones (an
        untied head, a trained classifier) follow in the last file."""
        replaced = self._replacements()
        self._refuse_clash(merged, replaced)
        added = {*merged, *replaced}
        files: dict[str, list[Part]] = {}
        for file_name, file in self.base.layout.items():
            specs = [s for n, s in self.base.tensors.items() if s.file == file.path]
            parts = files[file_name] = []
            for spec in specs:
                parts.append(self._part(spec.name, spec, merged, replaced))
                added.discard(spec.name)
        last = files[next(reversed(files))]
        for name in [*merged, *replaced]:
            if name in added:
                last.append(self._part(name, None, merged, replaced))
        return files

    def _part(
        self,
        name: str,
        spec: TensorSpec | None,
        merged: Mapping[str, MergedTensor],
        replaced: Mapping[str, list[Replacement]],
    ) -> Part:
        final = self._final_name(name)
        if name in merged:
            tensor = merged[name]
            shape, dtype = tensor.spec.shape, tensor.dtype
            return Part(final, dtype, shape, nbytes_of(dtype, shape), tensor.source())
        found = replaced.get(name)
        if found is not None and found[0].start is not None and spec is not None:
            patches = [_patch(replacement) for replacement in found]
            patched = PatchedTensor(spec, self._written(spec.dtype), patches)
            nbytes = nbytes_of(patched.dtype, spec.shape)
            return Part(final, patched.dtype, spec.shape, nbytes, patched.source())
        stored = spec if found is None else found[0].source
        assert stored is not None
        dtype = self._written(stored.dtype)
        if name in replaced and spec is not None and spec.dtype in FLOATING:
            dtype = self._written(spec.dtype)  # a float32 head of a bfloat16 model stays bfloat16
        source: Copied | Computed
        if any(stored.file == adapter.file.path for adapter in self.adapters):
            source = taken(stored, dtype)
        else:
            same = dtype == stored.dtype
            source = Copied(stored) if same else CastTensor(stored, dtype).source()
        return Part(final, dtype, stored.shape, nbytes_of(dtype, stored.shape), source)

    def _final_name(self, name: str) -> str:
        """A bare base that gets a head is written with its architecture's prefix."""
        return next((p.final_name(name) for p in self.placements if p.outer_names), name)

    def _replacements(self) -> dict[str, list[Replacement]]:
        """Output name -> what replaces it: one whole tensor, or rows of it."""
        found: dict[str, list[Replacement]] = {}
        owners: dict[str, Adapter] = {}
        for adapter, placement in zip(self.adapters, self.placements, strict=True):
            for replacement in placement.replacements:
                owner = owners.setdefault(replacement.output, adapter)
                held = found.setdefault(replacement.output, [])
                if owner is not adapter and replacement not in held:
                    raise MisuseError(
                        f"replaces {replacement.output!r}, as another of the adapters does",
                        where=adapter.path,
                        hint="Only one adapter can carry a bias or saved module.",
                    )
                if replacement not in held:
                    held.append(replacement)
        return found

    def _refuse_clash(
        self, merged: Mapping[str, MergedTensor], replaced: Mapping[str, list[Replacement]]
    ) -> None:
        both = sorted(merged.keys() & replaced.keys())
        if both:
            raise MisuseError(
                f"{both[0]!r} is adapted by one adapter and replaced whole by another",
                where=self.adapters[0].path,
                hint="Merge one of them, and train the other on the result.",
            )

    def _texts_and_sidecars(
        self, files: Sequence[OutputFile]
    ) -> tuple[dict[str, bytes], dict[str, Path], list[str]]:
        """Small files to write, files to copy, and what is worth telling about them."""
        held = beside(self.base, self.adapters)
        notes = [*(note for p in self.placements for note in p.notes), *held.notes]
        copies, texts = held.copies, held.texts | {CARD_NAME: merged_card(self.base, self.adapters)}
        source = copies.get("config.json")
        config = load_json(source, allow_non_finite=True) if source is not None else {}
        edits, said = named_labels(self._config_edits(config), self.labels)
        edited = updated(config, edits)
        if source is not None and edited != config:
            del copies["config.json"]
            texts["config.json"] = (json.dumps(edited, indent=2) + "\n").encode()
            notes += said
        if len(files) > 1:
            texts["model.safetensors.index.json"] = index_json(files)
        return texts, copies, notes

    def _config_edits(self, config: Mapping[str, object]) -> dict[str, object]:
        edits: dict[str, object] = {}
        for placement in self.placements:
            edits = updated(edits, placement.config_edits())
        if self.dtype == "keep":
            return edits
        dtypes = {s.dtype for s in self.base.tensors.values() if s.dtype in FLOATING}
        if dtypes != {written_dtype(self.dtype, "")} and "torch_dtype" not in config:
            edits["dtype"] = self.dtype
        return updated(edits, _dtype_edits(config, self.dtype))

    def _receipt(
        self,
        merged: Mapping[str, MergedTensor],
        notes: Sequence[str],
    ) -> dict[str, object]:
        """What was done; raises when the check of what was written says no."""
        if not any(tensor.changed for tensor in merged.values()) and not self._replacements():
            raise CheckFailedError(
                "the merge would change nothing: every update is zero or below the rounding of "
                "the stored dtype",
                hint="Is the adapter trained? If it is, write --dtype float32.",
            )
        survival = sum((tensor.survival for tensor in merged.values()), Survival())
        for name, tensor in merged.items():
            if tensor.worst > 1.0:
                raise CheckFailedError(
                    f"differs from base + delta by {tensor.worst:.3g} x what one rounding allows",
                    where=name,
                    hint="Nothing was published. Please report this with the two inputs.",
                )
        digests = [adapter.sha256() for adapter in self.adapters]
        return {
            "tool": "gralora-convert",
            "version": __version__,
            "command": "merge",
            "inputs": {
                "base": {"source": self.base.source, "headers_sha256": self.base.digest()},
                "adapters": [
                    {
                        "path": str(adapter.path),
                        "sha256": digest,
                        "weight": weight,
                        "kind": adapter.kind,
                    }
                    for adapter, digest, weight in zip(
                        self.adapters, digests, self.weights, strict=True
                    )
                ],
            },
            "merged_adapters": [*_merged_before(self.base), *digests],
            "modules": [_row(name, tensor, checked=self.verify) for name, tensor in merged.items()],
            "replaced": sorted(self._replacements()),
            "survival": survival.as_json() if self.verify else None,
            "dtype": self.dtype,
            "notes": list(notes),
        }


def _loader(
    adapter: Adapter, module: str, order: tuple[int, ...] | None, device: str
) -> Callable[[], Gralora | Lora]:
    """Reads the factors of one module; with rows in another order on disk, as that permutation of
    the exact LoRA (a permutation breaks the blocks, not the rank)."""

    def load() -> Gralora | Lora:
        delta = adapter.delta(module)
        ordered = delta if order is None else permute_rows(delta, order)
        return ordered if device == "cpu" else to_device(ordered, device)

    return load


def _patch(replacement: Replacement) -> Patch:
    assert replacement.start is not None
    return Patch(
        replacement.source,
        replacement.start,
        replacement.count,
        replacement.source_start,
        replacement.order,
    )


def _row(name: str, tensor: MergedTensor, *, checked: bool) -> dict[str, object]:
    row: dict[str, object] = {
        "tensor": name,
        "modules": list(dict.fromkeys(c.module for c in tensor.contributions)),
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
