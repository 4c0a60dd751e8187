"""Where every tensor of an adapter goes in a base checkpoint, or why it cannot.

`place` finds everything that only the two together can show: modules that do not exist, shapes that
do not fit, targets without tensors, lost biases, tied weights. Headers only, but for embeddings
that may be unchanged copies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gralora_convert.adapter import Adapter
from gralora_convert.architecture import (
    TIE_FLAG_MEANS_MORE,
    Architecture,
    near_misses,
    quantisation,
)
from gralora_convert.checkpoint import Checkpoint
from gralora_convert.config import CONFIG_NAME
from gralora_convert.report import Finding, Report, error, note, warning
from gralora_convert.targets import is_saved, select
from gralora_convert.tensors import FLOATING, TensorSpec, read_bytes

__all__ = ["Piece", "Placement", "Replacement", "Target", "place"]

_COMPARED = 16 * 1024 * 1024  # bytes of an embedding that are compared at a time


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a module's delta and the rows of the tensor on disk that they are added to.

    Rows `[start, start + count)` of `tensor` get delta rows `[delta_start, ...)`, or, with `order`,
    the delta rows that it lists. `output` is the tensor's name in the output.
    """

    tensor: str
    output: str
    start: int
    count: int
    delta_start: int = 0
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted module: mostly one piece, several where it is cut or fused on disk.

    `transposed`: stored (in, out), as Conv1D does. `untied`: the output gets a tensor of its own.
    """

    module: str
    pieces: tuple[Piece, ...]
    transposed: bool = False
    untied: bool = False


@dataclass(frozen=True, slots=True)
class Replacement:
    """A full tensor that takes the place of (or is added to) one of the output; `source` is one of
    the adapter's, or of the base's when a shared weight needs a second copy."""

    source: TensorSpec
    output: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the adapter goes, and what the merged `config.json` must say differently."""

    targets: tuple[Target, ...]
    replacements: tuple[Replacement, ...]
    untied: bool
    vocab_size: int | None
    head_rows: int | None
    architecture: Architecture = field(repr=False)
    notes: tuple[str, ...] = ()

    def config_edits(self) -> dict[str, object]:
        """The edits of `config.json` (may import transformers for a new head's class)."""
        base = self.architecture.base
        edits: dict[str, object] = {}
        if self.untied and base.model_type not in TIE_FLAG_MEANS_MORE:
            edits["tie_word_embeddings"] = False
            if isinstance(base.config.get("text_config"), Mapping):
                edits["text_config"] = {"tie_word_embeddings": False}
        if self.vocab_size is not None:
            inner = base.config.get("text_config")
            if isinstance(inner, Mapping) and "vocab_size" in inner:
                edits["text_config"] = {"vocab_size": self.vocab_size}
            if "vocab_size" in base.config or not edits.get("text_config"):
                edits["vocab_size"] = self.vocab_size
        if self.head_rows is not None:
            name = self.architecture.head_class()
            if name is not None:
                edits["architectures"] = [name]
            edits |= _labels(base, self.head_rows)
        return edits


def _labels(base: Checkpoint, rows: int) -> dict[str, object]:
    known = base.config.get("id2label")
    if isinstance(known, Mapping) and len(known) == rows:
        return {}
    names = {str(i): f"LABEL_{i}" for i in range(rows)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def place(
    adapter: Adapter,
    base: Checkpoint,
    *,
    key_map: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Placement | None, Report]:
    """Where `adapter` goes in `base`; None with errors in the report when it does not fit."""
    method = quantisation(base)
    if method is not None:
        return None, Report.of([error(
            "base-quantised", base.path, f"is quantised ({method}); plain weights were needed",
            "Merge into the original model, then quantise the result.",
        )])  # fmt: skip
    mapping = adapter.config.auto_mapping or {}
    name = mapping.get("base_model_class")
    architecture = Architecture(
        base, name if isinstance(name, str) else None, adapter.config.task_type, key_map or {},
        trust_remote_code,
    )  # fmt: skip
    placer = _Placer(adapter, base, architecture)
    report = Report.of(placer.findings)
    if not report.ok:
        return None, report
    notes = tuple(str(f) for f in report.findings if f.severity != "error")
    placement = Placement(
        tuple(placer.targets), tuple(placer.replacements), placer.untied, placer.vocab_size,
        placer.head_rows, architecture, notes,
    )  # fmt: skip
    return placement, report


class _Placer:
    """Places one adapter, gathering findings on the way."""

    def __init__(self, adapter: Adapter, base: Checkpoint, architecture: Architecture) -> None:
        self.adapter, self.base, self.architecture = adapter, base, architecture
        self.findings: list[Finding] = []
        self.targets: list[Target] = []
        self.replacements: list[Replacement] = []
        self.untied = False
        self.vocab_size: int | None = None
        self.head_rows: int | None = None
        self._compare_names()
        self.rename, what = architecture.renamer(adapter.modules)
        if what:
            self._say(
                note("base-prefix", base.path, f"names its tensors {what} of the adapter's names")
            )
        for module in adapter.modules:
            self._place_module(module)
        self._require_separate()
        self._check_targets()
        self._check_orientation()
        for module, spec in adapter.biases.items():
            self._place_bias(module, spec)
        self._check_biases()
        self._place_saved()
        self._check_saved()

    def _say(self, finding: Finding) -> None:
        self.findings.append(finding)

    def _disk(self, parameter: str) -> str:
        """The name on disk of a parameter in memory, whether it exists or not."""
        module, _, leaf = parameter.rpartition(".")
        name = f"{self.rename(self.architecture.mapped(module))}.{leaf}" if module else leaf
        if name not in self.base.tensors:
            legacy = name.removesuffix("weight") + "gamma" if leaf == "weight" else ""
            legacy = name.removesuffix("bias") + "beta" if leaf == "bias" else legacy
            if legacy in self.base.tensors:
                return legacy
        return name

    def _compare_names(self) -> None:
        expected, own = (
            self.adapter.config.base_model_name_or_path,
            self.base.config.get("_name_or_path"),
        )
        if isinstance(own, str) and own and expected and own != expected:
            if own.rstrip("/").rpartition("/")[2] != expected.rstrip("/").rpartition("/")[2]:
                self._say(warning(
                    "base-name-mismatch", CONFIG_NAME,
                    f"was trained on {expected!r}, the base names itself {own!r}",
                ))  # fmt: skip

    # targets ------------------------------------------------------------------------------------

    def _place_module(self, module: str) -> None:
        disk = self._disk(f"{module}.weight")
        shape = self.adapter.shape(module)
        spec = self.base.tensors.get(disk)
        if spec is None:
            origins = self.architecture.tied_source(module, shape)
            if origins is not None:
                self._place_tied(module, disk, origins)
            else:
                self._place_by_conversion(module, shape)
            return
        problem = self._kind_problem(module, disk.removesuffix(".weight"), spec)
        if problem is not None:
            self._say(problem)
        elif sorted(spec.shape) != sorted(shape):
            self._say(self._misfit(module, spec, shape))
        else:
            transposed = self.architecture.is_transposed(module, spec, shape)
            if transposed is None:
                self._say(error(
                    "fan-in-fan-out-ambiguous", module,
                    f"is square {spec.shape}, and whether it is stored (out, in) or (in, out) "
                    "cannot be told without the architecture",
                    "Put the model's config.json beside its weights.",
                ))  # fmt: skip
                return
            untied = self._unties(disk)
            pieces = (Piece(disk, disk, 0, spec.shape[0]),)
            self.targets.append(Target(module, pieces, transposed, untied))

    def _place_tied(self, module: str, disk: str, shared: str) -> None:
        count = self.base.tensors[shared].shape[0]
        self.untied = True
        self._say(note(
            "tied-target", module, f"shares {shared} in the base; the output gets its own {disk}"
        ))  # fmt: skip
        self.targets.append(Target(module, (Piece(shared, disk, 0, count),), False, True))

    def _unties(self, disk: str) -> bool:
        """A head that stands on disk beside a config that ties it is told apart from now on."""
        last = disk.removesuffix(".weight").rpartition(".")[2]
        if last in ("lm_head", "embed_out", "output") and self.architecture.is_tied:
            self.untied = True
        return self.untied

    def _place_by_conversion(self, module: str, shape: tuple[int, int]) -> None:
        """Asks transformers for the place of a module whose name is not on disk."""
        found = self.architecture.origins.get(f"{module}.weight", ())
        if not found:
            if self.architecture.is_embedding(module):
                return self._say(self._unsupported(module, "an embedding"))
            names = self.architecture.disk_modules()
            self._say(error(
                "module-not-in-base", module, f"is not in the base {self.base.source}",
                near_misses(module, names) + " Another base, or --key-map FROM=TO?",
            ))  # fmt: skip
            return
        total = sum(origin.count for origin in found)
        if total != shape[0] or any(
            self.base.tensors[o.tensor].shape[1:] != (shape[1],) for o in found
        ):
            self._say(self._misfit(module, self.base.tensors[found[0].tensor], shape))
            return
        self.targets.append(Target(module, tuple(
            Piece(o.tensor, o.tensor, o.start, o.count, o.delta_start, o.order) for o in found
        )))  # fmt: skip

    def _kind_problem(self, module: str, disk: str, spec: TensorSpec) -> Finding | None:
        if self.architecture.is_attention_output(disk):
            return error(
                "attention-out-proj", module,
                "is the out_proj of nn.MultiheadAttention, whose forward ignores the adapter",
                "The trained function is the base's here; remove these tensors to merge the rest.",
            )  # fmt: skip
        if self.architecture.is_embedding(module):
            return self._unsupported(module, "an embedding")
        if len(spec.shape) != 2:
            kinds = {3: "a stack of experts or a convolution", 4: "a convolution"}
            return self._unsupported(module, kinds.get(len(spec.shape), f"of shape {spec.shape}"))
        if spec.dtype not in FLOATING:
            return error(
                "base-quantised", module, f"has dtype {spec.dtype}, a 16- or 32-bit one was needed",
                "Merge into the original model.",
            )  # fmt: skip
        return None

    def _unsupported(self, module: str, what: str) -> Finding:
        return error(
            "module-kind-unsupported",
            module,
            f"is {what}; GraLoRA adapts nn.Linear and Conv1D only",
        )

    def _misfit(self, module: str, spec: TensorSpec, shape: tuple[int, int]) -> Finding:
        k = getattr(self.adapter.config, "gralora_k", 1)
        if any(size % k for size in spec.shape):
            return error(
                "k-not-dividing", module, f"has shape {spec.shape} in the base, gralora_k={k} does "
                "not divide it", "Another base?",
            )  # fmt: skip
        return error(
            "base-shape-mismatch", module, f"is {shape} (out, in) in the adapter, "
            f"{spec.shape} in the base", "Another base?",
        )  # fmt: skip

    def _require_separate(self) -> None:
        """Two modules must not add to one tensor: they share a parameter in memory."""
        users: dict[tuple[str, int], str] = {}
        for target in self.targets:
            for piece in target.pieces:
                first = users.setdefault((piece.output, piece.start), target.module)
                if first != target.module:
                    self._say(error(
                        "shared-parameter", target.module,
                        f"shares its weight {piece.tensor} with {first}; both are adapted",
                        "A dense checkpoint cannot hold two values of one weight.",
                    ))  # fmt: skip

    def _check_targets(self) -> None:
        """The modules that the config selects in the base against those in the file."""
        if not self.targets and self.findings:
            return  # nothing fits at all: the modules already say so
        selected = self._selected(self._memory_names())
        missing = [m for m in selected if m not in self.adapter.roles]
        if missing:  # a module on disk need not exist in memory: ask the model before accusing
            known = self.architecture.linear_modules()
            if known is not None:
                head = [m for m in missing if m.rpartition(".")[2] == "lm_head"]
                selected = self._selected([*known, *head])
                missing = [m for m in selected if m not in self.adapter.roles]
        for module in missing:
            self._say(error(
                "target-without-tensors", module, "is selected by the config, but has no tensors",
                "Incomplete adapter, or another base?",
            ))  # fmt: skip
        self._check_names()

    def _memory_names(self) -> list[str]:
        """The base's modules as the adapter spells them."""
        names = {self.rename(self.architecture.mapped(m)): m for m in self.adapter.modules}
        found = []
        for disk in self.architecture.disk_modules():
            found.append(names.get(disk) or self._unrename(disk))
        return found

    def _unrename(self, disk: str) -> str:
        """The inverse of the prefix that `rename` adds or strips."""
        for prefix in self.architecture.prefixes:
            for name in (f"{prefix}.{disk}", disk.removeprefix(f"{prefix}.")):
                if self.rename(name) == disk:
                    return name
        return disk

    def _selected(self, names: Sequence[str]) -> list[str]:
        config = self.adapter.config
        targets = config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            known = self.architecture.linear_modules()
            return list(known) if known is not None else []
        return select(config, names)

    def _check_names(self) -> None:
        targets = self.adapter.config.target_modules
        if targets is None or isinstance(targets, str):
            return
        present = [*self.adapter.modules]
        for target in targets:
            if not any(m == target or m.endswith(f".{target}") for m in present):
                self._say(
                    note("target-name-unmatched", CONFIG_NAME, f"{target!r} selects no module")
                )

    def _check_orientation(self) -> None:
        if not self.targets:
            return
        flag, kinds = self.adapter.config.fan_in_fan_out, {t.transposed for t in self.targets}
        if flag not in kinds:
            self._say(warning(
                "fan-in-fan-out-mismatch", CONFIG_NAME,
                f"fan_in_fan_out is {str(flag).lower()}, but the layers are "
                f"{'nn.Linear' if flag else 'Conv1D'}; the layer decides",
            ))  # fmt: skip

    # biases and saved modules ---------------------------------------------------------------------

    def _place_bias(self, module: str, spec: TensorSpec) -> None:
        disk = self._disk(f"{module}.bias")
        found = self.base.tensors.get(disk)
        if found is None:
            origins = self.architecture.origins.get(f"{module}.bias", ())
            if len(origins) == 1 and origins[0].order is None:
                disk = origins[0].tensor
                found = self.base.tensors[disk]
        if found is None:
            self._say(error(
                "module-not-in-base", f"{module}.bias", "is a trained bias that the base lacks"
            ))  # fmt: skip
        elif found.shape != spec.shape:
            self._say(error(
                "base-shape-mismatch", f"{module}.bias",
                f"has shape {spec.shape} in the adapter, {found.shape} in the base",
            ))  # fmt: skip
        else:
            self.replacements.append(Replacement(spec, disk))

    def _check_biases(self) -> None:
        mode = self.adapter.config.bias
        if mode == "none":
            return
        own = [
            t.module for t in self.targets
            if self._disk(f"{t.module}.bias") in self.base.tensors
            and t.module not in self.adapter.biases
        ]  # fmt: skip
        every = mode == "all" and not self.adapter.biases
        others = [n for n in self.base.tensors if n.endswith((".bias", ".beta"))] if every else []
        if own or others:
            count, example = (len(own), f"{own[0]}.bias") if own else (len(others), others[0])
            self._say(bias_missing(
                self.adapter.config.peft_version, mode, f"{count} trained biases, first {example},"
            ))  # fmt: skip

    def _place_saved(self) -> None:
        resized: dict[str, int] = {}
        for parameter, spec in self.adapter.saved.items():
            disk = self._disk(parameter)
            entry = is_saved(self.adapter.config, parameter)
            found = self.base.tensors.get(disk)
            if found is None:
                self._place_new(parameter, disk, spec)
            elif found.shape == spec.shape:
                self._replace_saved(parameter, disk, spec, found, trained=entry is not None)
            elif self._is_resized(found, spec):
                resized[parameter] = spec.shape[0]
                self._replace_saved(parameter, disk, spec, found, trained=True)
            elif entry is not None and self._is_head(parameter):
                self.head_rows = spec.shape[0] if len(spec.shape) == 2 else self.head_rows
                self.replacements.append(Replacement(spec, disk))
            else:
                self._say(self._saved_misfit(parameter, spec, found, entry))
        self._check_resize(resized)

    def _is_resized(self, found: TensorSpec, spec: TensorSpec) -> bool:
        return (
            len(spec.shape) == 2
            and spec.shape[1] == found.shape[1]
            and found.shape[0] == self._vocabulary()
        )

    def _vocabulary(self) -> int | None:
        config = self.base.config
        inner = config.get("text_config")
        value = config.get("vocab_size")
        if value is None and isinstance(inner, Mapping):
            value = inner.get("vocab_size")
        return value if isinstance(value, int) else None

    def _check_resize(self, resized: Mapping[str, int]) -> None:
        """A vocabulary is resized as a whole: input embedding and head alike, or not at all."""
        if not resized:
            return
        rows = set(resized.values())
        vocabulary = self._vocabulary()
        replaced = {r.output for r in self.replacements}
        kept = [
            name for name, spec in self.base.tensors.items()
            if len(spec.shape) == 2 and spec.shape[0] == vocabulary and name not in replaced
            and (name.endswith("lm_head.weight") or self.architecture.is_embedding(
                name.removesuffix(".weight")))
        ]  # fmt: skip
        if len(rows) > 1 or kept:
            for parameter, count in resized.items():
                entry = is_saved(self.adapter.config, parameter)
                code = "modules-to-save-shape" if entry else "embedding-size-mismatch"
                other = f"{kept[0]} keeps {vocabulary}" if kept else f"others have {sorted(rows)}"
                self._say(error(code, parameter, f"has {count} rows, {other}"))
            return
        self.vocab_size = rows.pop()

    def _saved_misfit(
        self, parameter: str, spec: TensorSpec, found: TensorSpec, entry: str | None
    ) -> Finding:
        code = "modules-to-save-shape" if entry else "embedding-size-mismatch"
        return error(
            code, parameter, f"has shape {spec.shape} in the adapter, {found.shape} in the base",
            "Another base?",
        )  # fmt: skip

    def _replace_saved(
        self, parameter: str, disk: str, spec: TensorSpec, found: TensorSpec, *, trained: bool
    ) -> None:
        if not trained:
            if same_bytes(spec, found):
                return  # PEFT saved the frozen embedding
            self._say(warning(
                "embeddings-differ-from-base", parameter,
                "differs from the base's although it was not trained; the adapter's is used",
                "Was the adapter trained on another base?",
            ))  # fmt: skip
        self.replacements.append(Replacement(spec, disk))
        self._untie_partner(parameter, disk, found)
        self._unties(disk)
        if self._is_head(parameter) and len(spec.shape) == 2:
            self.head_rows = spec.shape[0]

    def _untie_partner(self, parameter: str, disk: str, found: TensorSpec) -> None:
        """A replaced input embedding that the head shares: the head keeps the base's values."""
        module = parameter.removesuffix(".weight")
        if not self.architecture.is_embedding(module) or not parameter.endswith(".weight"):
            return
        head = "lm_head.weight"
        wanted = {self._disk(p) for p in self.adapter.saved}
        present = any(
            self.architecture._may_lack(n.removesuffix(".weight")) for n in self.base.tensors
        )
        is_shared = (
            not present
            and self.architecture.is_tied
            and self.architecture.tied_source("lm_head", (found.shape[0], found.shape[1])) == disk
            and (self.adapter.config.task_type in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"))
            and any("ForCausalLM" in a or "LMHead" in a or "Generation" in a
                    for a in self.base.architectures)
        )  # fmt: skip
        if not is_shared or self._disk(head) in wanted:
            return
        if (
            any(t.untied for t in self.targets)
            or found.shape != self.adapter.saved[parameter].shape
        ):
            return  # the head is adapted and untied already, or resized with the embedding
        self.untied = True
        self._say(note(
            "tied-target", parameter, f"is shared with {head} in the base; the output unties them"
        ))  # fmt: skip
        self.replacements.append(Replacement(found, head))

    def _place_new(self, parameter: str, disk: str, spec: TensorSpec) -> None:
        """A saved tensor that the base lacks: an untied head, or a head trained for a task."""
        origins = self.architecture.origins.get(parameter, ())
        if len(origins) == 1 and origins[0].order is None:
            found = self.base.tensors[origins[0].tensor]
            if found.shape == spec.shape:
                self.replacements.append(Replacement(spec, origins[0].tensor))
                return
        module = parameter.rpartition(".")[0]
        tied = len(spec.shape) == 2 and self.architecture.tied_source(
            module, (spec.shape[0], spec.shape[1])
        )
        if tied:
            shared = self.base.tensors[tied]
            if is_saved(self.adapter.config, parameter) is None and same_bytes(spec, shared):
                return  # the frozen copy of a tied pair
            self.untied = True
            self._say(note("tied-target", parameter, f"shares {tied} in the base; untied"))
        elif len(spec.shape) == 2:
            rows = spec.shape[0]
            self.head_rows = rows if self.head_rows is None else min(rows, self.head_rows)
        # a head stands beside the base model: the prefix that the base lacks is not its own
        self.replacements.append(Replacement(spec, self.architecture.mapped(parameter)))

    def _is_head(self, parameter: str) -> bool:
        entry = is_saved(self.adapter.config, parameter)
        return entry in ("classifier", "score", "qa_outputs") and self.adapter.config.task_type in (
            "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS",
        )  # fmt: skip

    def _check_saved(self) -> None:
        entries = self.adapter.config.modules_to_save or ()
        used = {is_saved(self.adapter.config, p) for p in self.adapter.saved}
        for entry in entries:
            if entry in used:
                continue
            modules = {n.rpartition(".")[0] for n in self.base.tensors}
            holders = {m for m in modules if m.endswith(entry)}
            if holders:
                self._say(error(
                    "modules-to-save-missing", entry,
                    "is in modules_to_save and in the base, but the adapter has no tensors of it",
                ))  # fmt: skip
            else:
                self._say(note("modules-to-save-unmatched", entry, "is no module of the base"))


def bias_missing(version: str | None, mode: str, what: str) -> Finding:
    """The finding for biases that were trained and not saved."""
    release = tuple(int(x) for x in (version or "").split(".")[:2] if x.isdecimal())
    reason = (
        f"PEFT {version} trains biases but does not save them (fixed in 0.21.0): they are lost."
        if len(release) == 2 and release < (0, 21)
        else "Is the file complete?"
    )
    return error(
        "bias-missing", CONFIG_NAME, f"bias is {mode!r}, but {what} are not in the file", reason
    )


def same_bytes(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors are equal bit for bit; a few MiB in memory at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.nbytes, _COMPARED):
        stop = min(start + _COMPARED, one.nbytes)
        if read_bytes(one, start, stop) != read_bytes(other, start, stop):
            return False
    return True
