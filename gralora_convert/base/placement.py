"""Where every tensor of an adapter goes in a base checkpoint, or why it cannot.

`place` finds everything that only the two together can show: modules that do not exist, shapes that
do not fit, targets without tensors, lost biases, tied weights. Headers only, but for embeddings
that may be unchanged copies.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gralora_convert.adapters import (
    CONFIG_NAME,
    Adapter,
    is_all_linear,
    missing_targets,
    target_findings,
)
from gralora_convert.base.architecture import Architecture
from gralora_convert.base.edits import (
    head_class,
    head_edits,
    sizes,
    tie_edits,
    updated,
    vocabulary_edits,
)
from gralora_convert.base.identity import identity_findings
from gralora_convert.base.names import NOTHING_SAID, Reading, near_misses
from gralora_convert.base.quantisation import (
    ADVICE,
    by_config,
    companion,
    is_config_alone,
    plain_under_packed_names,
    quantised_by,
)
from gralora_convert.base.recipe import Placement, Target
from gralora_convert.base.replacements import Values, stored_shape
from gralora_convert.base.scales import plain_dtype, scales_of
from gralora_convert.base.sets import extra_weights, stray_adapter
from gralora_convert.base.ties import Claims, Settlement, settle
from gralora_convert.disk import FLOATING, Checkpoint, Rows, TensorSpec, is_zero
from gralora_convert.errors import Finding, Report, error, note, warning


def place(
    adapter: Adapter,
    base: Checkpoint,
    reading: Reading = NOTHING_SAID,
) -> tuple[Placement | None, Report]:
    """Where `adapter` goes in `base`; None with errors in the report when it does not fit."""
    if is_config_alone(base):
        return None, Report.of([error(
            "base-quantised", base.path,
            f"its config.json says quantised ({quantised_by(base)}), but no tensor is: loaders "
            "would quantise, or misread, the merged weights",
            f"Were they dequantised? Then remove quantization_config from config.json. {_RESAVED}",
        )])  # fmt: skip
    name = (adapter.config.auto_mapping or {}).get("base_model_class")
    beside = adapter.model_config.get("architectures")
    if plain := plain_under_packed_names(base):
        return None, Report.of([error(
            "base-quantised", base.path,
            f"{plain} is {base.tensors[plain].dtype} under a name of packed numbers: loaders fill "
            "its experts at random", _RESAVED,
        )])  # fmt: skip
    architecture = Architecture(
        base, adapter.modules, name if isinstance(name, str) else None, adapter.config.task_type,
        reading, str(beside[0]) if isinstance(beside, list) and len(beside) == 1 else None,
        {module: adapter.shape(module) for module in adapter.modules},
        (*adapter.values, *adapter.frozen),
    )  # fmt: skip
    if architecture.rivals is not None:
        return None, Report.of([architecture.rivals])
    placer = _Placer(adapter, architecture)
    placer.findings += [*_unused(reading, adapter), *extra_weights(adapter)]
    placer.findings += stray_adapter(base)
    settlement = placer.place()
    report = Report.of(placer.findings)
    if not report.ok:
        return None, report
    return _placement(placer, settlement, report), report


def place_in(adapter: Adapter, base: Checkpoint, reading: Reading = NOTHING_SAID) -> Placement:
    """Where `adapter` goes in `base`.

    Raises:
        InvalidAdapterError: it does not fit.
    """
    placement, report = place(adapter, base, reading)
    report.require_ok(adapter.path)
    assert placement is not None
    return placement


def _placement(placer: "_Placer", settlement: Settlement, report: Report) -> Placement:
    architecture, values = placer.architecture, placer.values
    config = architecture.base.config
    edits = {} if values.vocabulary is None else vocabulary_edits(config, *values.vocabulary)
    edits = tie_edits(config, settlement.flags, edits)
    rows = values.head_rows

    def config_edits() -> Mapping[str, object]:
        if rows is None:
            return edits
        return edits | head_edits(architecture, rows, placer.adapter.model_config)

    return Placement(
        placer.adapter, architecture, tuple(settlement.targets), tuple(settlement.replacements),
        edits, config_edits, {} if rows is None else architecture.outer_names(),
        tuple(str(finding) for finding in report.findings), placer.scales,
    )  # fmt: skip


# transformers 5.23 writes codes under the old names, and no quantization_config
_RESAVED = (
    "Was it saved by transformers after dequantising? That folder is broken: give the original "
    "base, or save it again with save_original_format=False."
)
_NORMED = (".weight_g", ".weight_v", ".weight_orig")
# PEFT 0.21.2: LoraConfig wraps the parameters of a stack (tuners/lora/layer.py, ParamWrapper).
_STACKED = (
    "transformers 5 keeps experts as one parameter, which PEFT's GraLoRA does not adapt (a LoRA "
    "would). Was the adapter meant to train them?"
)


class _Placer:
    """Places one adapter, gathering findings on the way."""

    def __init__(self, adapter: Adapter, architecture: Architecture) -> None:
        self.adapter, self.architecture = adapter, architecture
        self.base, self.config = architecture.base, adapter.config
        self.findings: list[Finding] = []
        self.method, self.scales = quantised_by(self.base), scales_of(self.base)
        self.values = Values(adapter, architecture)
        self.targets: dict[str, Target] = {}

    def place(self) -> Settlement:
        """The settled claims; errors are in `findings`."""
        self.findings += identity_findings(self.adapter, self.base)
        if self.architecture.prefix_note:
            self._say(note(
                "base-prefix", self.base.path,
                f"names its tensors {self.architecture.prefix_note} of the adapter's names",
            ))  # fmt: skip
        for module in self.adapter.modules:
            self._place_module(module)
        self._check_base()
        if self.targets or not self.findings:  # else nothing fits, and the modules say so
            self._check_targets()
            self._check_orientation()
            self._check_config_beside()
            self.values.check_head()
            self._check_head_class()
            self.values.check_biases([target.module for target in self.targets.values()])
        self.findings += self.values.findings
        claims = Claims(self.targets, self.values.trained, self.values.frozen, self.values.biases)
        settlement = settle(claims, self.architecture)
        self.findings += settlement.findings
        if self.values.head_rows is None:  # else the class of the output is another
            self.findings += _unloaded(settlement, self.architecture)
        self._tell_quantised(settlement)
        return settlement

    def _tell_quantised(self, settlement: Settlement) -> None:
        """What becomes of a quantised base."""
        tensors, codes = self.base.tensors, self.scales.specs
        written = {name for name, _ in settlement.replacements}
        written |= {rows.tensor for target in settlement.targets for rows, _ in target.parts}
        touched = {name: tensors[name] for name in written & tensors.keys()}
        plain = self.scales.fused(touched)
        if plain:
            own, dtype = len(touched.keys() & codes.keys()), plain_dtype(self.base.config)
            self._say(note(
                "base-quantised-read", self.base.path,
                f"is quantised ({self.method}): {len(plain)} of its {len(codes)} fp8 weights "
                f"become {dtype}, {own} that are adapted and {len(plain) - own} that servers fuse "
                "with them; the others keep their bytes, and quantization_config lists the plain",
            ))  # fmt: skip
        elif self.method is not None and settlement.targets:
            packed = sum(spec.dtype not in FLOATING for spec in tensors.values())
            self._say(note(
                "base-quantised-beside", self.base.path,
                f"is quantised ({self.method}); no adapted module is: its {packed} packed tensors "
                "and their scales are copied byte for byte",
            ))  # fmt: skip
        if plain and self.scales.is_static:
            self._say(note(
                "base-calibrated", self.base.path,
                "has activation scales that were calibrated without the adapter; those of the "
                "modules that stay fp8 are kept",
            ))  # fmt: skip

    def _say(self, finding: Finding) -> None:
        self.findings.append(finding)

    def _check_base(self) -> None:
        """Other names than its class has: that a loader fills at random, adapter or not."""
        lacking, strays = self.architecture.misnamed()
        if lacking and self.method is None:
            self._say(warning(
                "base-misnamed", self.base.path,
                f"has no tensor for {lacking[0]} ({len(lacking)} parameters in all), and "
                f"{strays[0]} is no parameter ({len(strays)} tensors in all): loaders draw the "
                "former at random",
                "Was it renamed, or saved by another release? Load and save it with the release "
                "that made it.",
            ))  # fmt: skip

    def _check_head_class(self) -> None:
        """The class of the merged model reads settings that the base's own may not read."""
        if self.values.head_rows is None or not (name := head_class(self.architecture)):
            return
        if name not in self.base.architectures and (why := self.architecture.build_problem(name)):
            self._say(error(
                "head-class-unbuildable", "config.json",
                f"of the base does not make the {name} that the adapter's head needs: {why}",
                "Mend that setting, or give another base.",
            ))  # fmt: skip

    def _check_config_beside(self) -> None:
        """A merge takes the `config.json` beside the adapter: it must describe the same tensors."""
        own, beside = self.base.config, self.adapter.model_config
        if not beside or beside.get("model_type") != self.base.model_type:
            return
        if self.values.vocabulary is not None:
            own, beside = (
                updated(config, vocabulary_edits(config, *self.values.vocabulary))
                for config in (own, beside)
            )
        if sizes(own) != sizes(beside) and (found := self.architecture.misfit(own, beside)):
            self._say(error(
                "config-other-model", "config.json",
                f"beside the adapter describes another model than the base: {found}",
                "Another base? Was the vocabulary resized, and the embeddings not saved? Or remove "
                "that file.",
            ))  # fmt: skip

    # one module -----------------------------------------------------------------------------------

    def _place_module(self, module: str) -> None:
        parameter, shape = f"{module}.weight", self.adapter.shape(module)
        origins, output = self._find(parameter, shape)
        if not origins:
            self._say(self._absent(module))
            return
        found = self._stored_shape(parameter, origins)
        problem = self._kind_problem(module, origins, found)
        problem = problem or self._misfit(module, found, shape)
        if problem is not None:
            self._say(problem)
            return
        spec = self._stored(origins[0].tensor)
        transposed = self.architecture.is_transposed(module, found, shape)
        transposed = self._agreed(module, transposed, spec)
        if transposed and spec.scale is not None:
            self._say(error(
                "base-quantised", module, "is a Conv1D of fp8 codes, which is not read here",
                ADVICE,
            ))  # fmt: skip
        elif transposed is not None:
            frozen = self._frozen(parameter)
            if frozen is not None:  # it may have another number of tokens
                origins = (Rows(origins[0].tensor, 0, found[0]),)
            parts = tuple(
                (replace(rows, tensor=output or rows.tensor), self._stored(rows.tensor))
                for rows in origins
            )
            self.targets[parameter] = Target(module, parts, transposed, output is not None, frozen)

    def _stored(self, tensor: str) -> TensorSpec:
        return self.scales.specs.get(tensor) or self.base.tensors[tensor]

    def _find(self, parameter: str, shape: tuple[int, int]) -> tuple[tuple[Rows, ...], str | None]:
        """Where a weight lies on disk, and the name of its own tensor in the output when it has
        none there, but shares another's."""
        architecture = self.architecture
        origins = architecture.locate(parameter)
        if origins:
            return origins, None
        for other in architecture.sharing(parameter):
            origins = architecture.locate(other)
            if origins:
                same = architecture.is_one_place(parameter, other)
                return origins, None if same else architecture.disk_name(parameter)
        tied = architecture.tied_source(parameter.removesuffix(".weight"), shape)
        if tied is None:
            return (), None
        whole = Rows(tied, 0, self.base.tensors[tied].shape[0])
        return (whole,), architecture.disk_name(parameter)

    def _stored_shape(self, parameter: str, origins: Sequence[Rows]) -> tuple[int, ...]:
        """The shape that the weight has before the delta is added."""
        frozen = self._frozen(parameter)
        return stored_shape(origins, self.base.tensors) if frozen is None else frozen.shape

    def _frozen(self, parameter: str) -> TensorSpec | None:
        """The adapter's copy of a base weight that takes the base's place."""
        held = self.values.frozen
        return next((held[n] for n in self.architecture.sharing(parameter) if n in held), None)

    def _absent(self, module: str) -> Finding:
        architecture = self.architecture
        if architecture.is_embedding(module):
            return self._unsupported(module, "an embedding")
        stacked = f"{architecture.mapped(module)}"
        if stacked in self.base.tensors:
            return self._unsupported(module, "a parameter (a stack of experts)")
        if self.method is not None:
            return error(
                "base-quantised", module,
                f"is no plain weight in the base, which is quantised ({self.method})", ADVICE,
            )  # fmt: skip
        names = architecture.disk_modules()
        if computed := next((name for name in self.base.tensors if _is_computed(name, module)), ""):
            return error(
                "module-kind-unsupported", module,
                f"has no weight of its own: torch computes it ({computed}), as weight_norm and "
                "spectral_norm do, and a merge there is lost when it is computed again",
                "Take it off the base with torch.nn.utils.parametrize.remove_parametrizations, "
                "and save that.",
            )  # fmt: skip
        return error(
            "module-not-in-base", module, f"is not in the base {self.base.source}",
            f"{near_misses(module, names)} Another base, or `key_map=FROM=TO`?".strip(),
        )  # fmt: skip

    def _kind_problem(
        self, module: str, origins: Sequence[Rows], shape: tuple[int, ...]
    ) -> Finding | None:
        if self.architecture.is_attention_output(origins[0].tensor.removesuffix(".weight")):
            return error(
                "attention-out-proj", module,
                "is the out_proj of nn.MultiheadAttention, whose forward ignores the adapter",
                "The trained function is the base's here; remove these tensors to merge the rest.",
            )  # fmt: skip
        if self.architecture.is_uncalled(module) and self._has_effect(module):
            return error(
                "forward-ignores-adapter", module,
                "is a layer that the model never calls by this name (it reads the weight, or calls "
                "what a plain list holds): the adapter there has no effect, and its factors are "
                "not zero",
                "The trained function is the base's here; remove these tensors to merge the rest.",
            )  # fmt: skip
        if self.architecture.is_embedding(module):
            kind = self.architecture.kind(module)
            if kind not in ("Linear", "Conv1D"):
                return self._unsupported(module, f"of kind {kind}" if kind else "an embedding")
        if len(shape) != 2:
            kinds = {3: "a stack of experts or a convolution", 4: "a convolution"}
            return self._unsupported(module, kinds.get(len(shape), f"of shape {shape}"))
        return self._quantised(module, origins[0].tensor)

    def _quantised(self, module: str, tensor: str) -> Finding | None:
        """Only a weight that is added to must be readable; the others are copied as they are."""
        spec = self._stored(tensor)
        if spec.scale is not None:
            return None
        if why := self.scales.problems.get(tensor):
            return error("base-quantised", module, why, ADVICE)
        if spec.dtype not in FLOATING:
            method = f" ({self.method})" if self.method else ""
            lost = self.method is not None and by_config(self.base) is None
            return error(
                "base-quantised", module,
                f"has dtype {spec.dtype}{method}, a 16- or 32-bit one was needed"
                + (", and no quantization_config says how it is read" if lost else ""),
                f"{_RESAVED} {ADVICE}" if lost and self.base.config else ADVICE,
            )  # fmt: skip
        half = self.method and companion(self.base, tensor.removesuffix(".weight"))
        if half:
            return error(
                "base-quantised", module,
                f"is {spec.dtype}, yet {half} stands beside it: half of a quantised weight",
                _RESAVED,
            )  # fmt: skip
        return None

    def _has_effect(self, module: str) -> bool:
        """Whether the delta is not all zero, as training leaves it where it gets no gradient."""
        roles = self.adapter.roles[module]
        return not all(is_zero(spec) for role, spec in roles.items() if role.endswith("B"))

    def _unsupported(self, module: str, what: str) -> Finding:
        return error(
            "module-kind-unsupported", module,
            f"is {what}; GraLoRA adapts nn.Linear and Conv1D only",
            "Remove its tensors to merge the rest.",
        )  # fmt: skip

    def _misfit(
        self, module: str, found: tuple[int, ...], shape: tuple[int, int]
    ) -> Finding | None:
        if found == shape or (found == shape[::-1] and self.architecture.may_hold_conv1d):
            return None
        k = self.adapter.blocks
        if any(size % k for size in found):
            return error(
                "k-not-dividing", module, f"has shape {found} in the base, which gralora_k={k} "
                "does not divide", "Another base?",
            )  # fmt: skip
        return error(
            "base-shape-mismatch", module,
            f"is {shape} (out, in) in the adapter, {found} in the base", "Another base?",
        )  # fmt: skip

    def _agreed(self, module: str, known: bool | None, spec: TensorSpec) -> bool | None:
        """Whether the weight is stored (in, out): as it is `known` by its shape or its model, else
        as the user says. Another module's layout says nothing of this one."""
        said = self.architecture.reading.is_transposed(module)
        if known is not None and said not in (None, known):
            self._say(error(
                "fan-in-fan-out-contradicted", module,
                f"is stored {_stored(known)}, and said to be stored {_stored(not known)}",
                "Narrow the pattern.",
            ))  # fmt: skip
            return None
        if known is None and said is None:
            code = "trust_remote_code=True" if self.base.config.get("auto_map") else ""
            self._say(error(
                "fan-in-fan-out-ambiguous", module,
                f"is square {spec.shape}, and whether it is stored (out, in) or (in, out) "
                "cannot be told without the architecture",
                "Put the model's config.json beside its weights"
                f"{f', or pass `{code}`' if code else ''}, or say it: "
                f"`fan_in_fan_out={ {module: False} }` for nn.Linear, "
                f"`fan_in_fan_out={ {module: True} }` for Conv1D; * stands for any part of a name.",
            ))  # fmt: skip
        return said if known is None else known

    # all modules ----------------------------------------------------------------------------------

    def _check_targets(self) -> None:
        """The modules that the config selects in the base against those in the file."""
        names = self.architecture.likely_modules()
        if names is None or missing_targets(self.adapter, names):
            # a module on disk need not exist in memory: ask the model
            exact = self.architecture.linear_modules(head=not is_all_linear(self.config))
            names = self._trained_part(names if exact is None else exact)
        self.findings += target_findings(self.adapter, names or [])
        self._check_names()

    def _trained_part(self, names: list[str] | None) -> list[str] | None:
        """`names`, or those of the encoder where the adapter is whole there and has nothing of the
        decoder: PEFT's FEATURE_EXTRACTION does not say that it was an encoder alone."""
        missing = missing_targets(self.adapter, names or [])
        inside = [m for m in (*self.adapter.modules, *missing) if m.startswith("encoder.")]
        if not missing or inside != list(self.adapter.modules):
            return names
        if not self.architecture.text.has_encoder_class or self.config.task_type not in (
            None, "FEATURE_EXTRACTION",
        ):  # fmt: skip
            return names
        self._say(note(
            "part-trained", CONFIG_NAME,
            f"selects {len(missing)} modules of the decoder, too, and has none of them: taken as "
            "trained on the encoder alone",
        ))  # fmt: skip
        return [name for name in names or () if name.startswith("encoder.")]

    def _check_names(self) -> None:
        targets, modules = self.config.target_modules, self.adapter.modules
        stacked = [name for name in self.base.tensors if ".experts." in name]
        # PEFT writes all-linear down as the whole names that it took
        everything = is_all_linear(self.config) or (targets and set(targets) == set(modules))
        if everything and stacked and not any(".experts." in m for m in modules):
            self._say(note(
                "experts-not-adapted", CONFIG_NAME,
                f"holds none of the experts ({len(stacked)} tensors of the base)", _STACKED,
            ))  # fmt: skip
        layers = self.config.layers_to_transform
        known = {int(w) for m in modules for w in m.split(".") if w.isdecimal() and len(w) < 10}
        wanted = [layers] if isinstance(layers, int) else layers or []
        if beyond := [layer for layer in wanted if layer not in known]:
            self._say(warning(
                "layers-unmatched", CONFIG_NAME,
                f"layers_to_transform names {', '.join(map(str, beyond))}: no module here has that "
                "number", "Another base, or a layer that it does not have?",
            ))  # fmt: skip
        if targets is None or isinstance(targets, str):
            return
        for target in targets:
            if any(m == target or m.endswith(f".{target}") for m in modules):
                continue
            if any(f".{target}" in f"{name.removesuffix('.weight')}." for name in stacked):
                self._say(warning(
                    "experts-not-adapted", CONFIG_NAME,
                    f"{target!r} selects no module: it names a part of the experts", _STACKED,
                ))  # fmt: skip
            else:
                self._say(
                    note("target-name-unmatched", CONFIG_NAME, f"{target!r} selects no module")
                )

    def _check_orientation(self) -> None:
        flag, kinds = self.config.fan_in_fan_out, {t.transposed for t in self.targets.values()}
        if kinds and flag not in kinds:
            self._say(warning(
                "fan-in-fan-out-mismatch", CONFIG_NAME,
                f"fan_in_fan_out is {str(flag).lower()}, but the layers are "
                f"{'nn.Linear' if flag else 'Conv1D'}; the layer decides",
            ))  # fmt: skip


def _unused(reading: Reading, adapter: Adapter) -> Iterator[Finding]:
    """Renamings that rename nothing, patterns that match nothing: most likely misspelt."""
    names = [*adapter.modules, *adapter.biases, *adapter.saved]
    for pattern in reading.fan_in_fan_out:
        if not fnmatch.filter(adapter.modules, pattern):
            yield warning(
                "pattern-unmatched", pattern, "is named by `fan_in_fan_out`, but matches no module "
                "here", near_misses(pattern.strip("*."), names),
            )  # fmt: skip
    for name in reading.key_map:
        if not any(known == name or known.startswith(f"{name}.") for known in names):
            yield warning(
                "key-map-unmatched", name, "is named by `key_map`, but begins no module here",
                near_misses(name, names),
            )  # fmt: skip


def _unloaded(settlement: Settlement, architecture: Architecture) -> Iterator[Finding]:
    """Tensors beside those of the base that the loader of the output would not take, or would
    take for what another tensor is."""
    written = {name for name, _ in settlement.replacements}
    written |= {rows.tensor for target in settlement.targets for rows, _ in target.parts}
    for name in written - architecture.base.tensors.keys():
        loaded, others = architecture.loaded_as(name)
        if not loaded:
            why = "is written beside the base's tensors, and no parameter is loaded from it"
        elif others - written:
            why = f"is written for {loaded}, which {min(others - written)} is loaded into as well"
        else:
            continue
        yield error(
            "tensor-not-loaded", name, why,
            "The adapter calls it otherwise than this base: `key_map=FROM=TO`.",
        )  # fmt: skip


def _is_computed(tensor: str, module: str) -> bool:
    """Whether a tensor is what torch computes the weight of `module` from (torch 2.13,
    nn/utils/parametrize.py and weight_norm.py)."""
    start, found, _ = tensor.partition(".parametrizations.weight.")
    if not found:
        start = next((tensor.removesuffix(e) for e in _NORMED if tensor.endswith(e)), "")
    return start == module or (start != "" and start.endswith(f".{module}"))


def _stored(transposed: bool) -> str:
    return "(in, out)" if transposed else "(out, in)"
