"""What an adapter and a base show only together, beside where each module goes: names that select
nothing, settings that disagree, what loaders would not take."""

import fnmatch
import re
from collections.abc import Collection, Iterator, Sequence

from gralora_convert.adapters import (
    CONFIG_NAME,
    bias_finding,
    is_all_linear,
    missing_targets,
    target_findings,
)
from gralora_convert.base.edits import head_class, sizes, updated, vocabulary_edits
from gralora_convert.base.likeness import near_misses
from gralora_convert.base.modules import Pair
from gralora_convert.base.names import AUTO_CLASSES
from gralora_convert.base.recipe import Target
from gralora_convert.base.replacements import Replacements, find
from gralora_convert.base.scales import plain_dtype, plain_tensors
from gralora_convert.base.source_text import HEADS
from gralora_convert.base.ties import Settlement
from gralora_convert.disk import FLOATING, WRITTEN
from gralora_convert.errors import Finding, error, note, warning

# PEFT 0.21.2: LoraConfig wraps the parameters of a stack (tuners/lora/layer.py, ParamWrapper).
_STACKED = (
    "transformers 5 keeps experts as one parameter, which PEFT's GraLoRA does not adapt (a LoRA "
    "would). Was the adapter meant to train them?"
)
_CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")


def unused(pair: Pair) -> Iterator[Finding]:
    """Renamings that rename nothing, patterns that match nothing: most likely misspelt."""
    adapter, reading = pair.adapter, pair.architecture.reading
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


def misnamed(pair: Pair) -> Iterator[Finding]:
    """Other names than its class has: that a loader fills at random, adapter or not."""
    lacking, strays = ([], []) if pair.method else pair.architecture.misnamed()
    if lacking:
        yield warning(
            "base-misnamed", pair.base.path,
            f"has no tensor for {lacking[0]} ({len(lacking)} parameters in all), and "
            f"{strays[0]} is no parameter ({len(strays)} tensors in all): loaders draw the "
            "former at random",
            "Was it renamed, or saved by another release? Load and save it with the release "
            "that made it.",
        )  # fmt: skip


def selected(pair: Pair) -> Iterator[Finding]:
    """The modules that the config selects in the base against those in the file."""
    names = pair.architecture.likely_modules()
    every = is_all_linear(pair.adapter.config)
    if names is None or missing_targets(pair.adapter, [*names, *(() if every else HEADS)]):
        # a module on disk need not exist in memory, nor a tied head on disk: ask the model
        exact = pair.architecture.linear_modules(head=not every)
        names = names if exact is None else exact
        if beyond := _beyond_encoder(pair, names or []):
            yield note(
                "part-trained", CONFIG_NAME,
                f"selects {len(beyond)} modules of the decoder, too, and has none of them: taken "
                "as trained on the encoder alone",
            )  # fmt: skip
            names = [name for name in names or () if name.startswith("encoder.")]
    yield from target_findings(pair.adapter, names or [])
    yield from _names(pair)


def _beyond_encoder(pair: Pair, names: Sequence[str]) -> list[str]:
    """The missing modules, where the adapter is whole in the encoder and has nothing of the
    decoder: PEFT's FEATURE_EXTRACTION does not say that it was an encoder alone."""
    missing = missing_targets(pair.adapter, names)
    inside = [m for m in (*pair.adapter.modules, *missing) if m.startswith("encoder.")]
    part = pair.architecture.text.has_encoder_class
    task = pair.adapter.config.task_type in (None, "FEATURE_EXTRACTION")
    return missing if part and task and inside == list(pair.adapter.modules) else []


def _names(pair: Pair) -> Iterator[Finding]:
    """Names of the config that select nothing, or mean what GraLoRA does not adapt."""
    config = pair.adapter.config
    targets, modules = config.target_modules, pair.adapter.modules
    stacked = [name for name in pair.base.tensors if ".experts." in name]
    # PEFT writes all-linear down as the whole names that it took
    everything = is_all_linear(config) or (targets and set(targets) == set(modules))
    if everything and stacked and not any(".experts." in m for m in modules):
        yield note(
            "experts-not-adapted", CONFIG_NAME,
            f"holds none of the experts ({len(stacked)} tensors of the base)", _STACKED,
        )  # fmt: skip
    layers = config.layers_to_transform
    known = {int(w) for m in modules for w in m.split(".") if w.isdecimal() and len(w) < 10}
    wanted = [layers] if isinstance(layers, int) else layers or []
    if beyond := [layer for layer in wanted if layer not in known]:
        yield warning(
            "layers-unmatched", CONFIG_NAME,
            f"layers_to_transform names {', '.join(map(str, beyond))}: no module here has that "
            "number", "Another base, or a layer that it does not have?",
        )  # fmt: skip
    if targets is None or isinstance(targets, str):
        return
    for target in targets:
        if any(m == target or m.endswith(f".{target}") for m in modules):
            continue
        if any(f".{target}" in f"{name.removesuffix('.weight')}." for name in stacked):
            yield warning(
                "experts-not-adapted", CONFIG_NAME,
                f"{target!r} selects no module: it names a part of the experts", _STACKED,
            )  # fmt: skip
        else:
            yield note("target-name-unmatched", CONFIG_NAME, f"{target!r} selects no module")


def orientation(pair: Pair, targets: Collection[Target]) -> Iterator[Finding]:
    """A flag that says otherwise than all layers."""
    flag, kinds = pair.adapter.config.fan_in_fan_out, {t.transposed for t in targets}
    if kinds and flag not in kinds:
        yield warning(
            "fan-in-fan-out-mismatch", CONFIG_NAME,
            f"fan_in_fan_out is {str(flag).lower()}, but the layers are "
            f"{'nn.Linear' if flag else 'Conv1D'}; the layer decides",
        )  # fmt: skip


def config_beside(pair: Pair, values: Replacements) -> Iterator[Finding]:
    """A merge takes the `config.json` beside the adapter: it must describe the same tensors."""
    own, beside = pair.base.config, pair.adapter.model_config
    if not beside or beside.get("model_type") != pair.base.model_type:
        return
    if values.vocabulary is not None:
        own, beside = (
            updated(config, vocabulary_edits(config, *values.vocabulary))
            for config in (own, beside)
        )
    if sizes(own) != sizes(beside) and (found := pair.architecture.misfit(own, beside)):
        yield error(
            "config-other-model", "config.json",
            f"beside the adapter describes another model than the base: {found}",
            "Another base? Was the vocabulary resized, and the embeddings not saved? Or remove "
            "that file.",
        )  # fmt: skip


def head(pair: Pair, values: Replacements) -> Iterator[Finding]:
    """The class of the merged model reads settings that the base's own may not read."""
    if values.head_rows is None or not (name := head_class(pair.architecture)):
        return
    if name not in pair.base.architectures and (why := pair.architecture.build_problem(name)):
        yield error(
            "head-class-unbuildable", "config.json",
            f"of the base does not make the {name} that the adapter's head needs: {why}",
            "Mend that setting, or give another base.",
        )  # fmt: skip


def unloaded(pair: Pair, settlement: Settlement) -> Iterator[Finding]:
    """Tensors beside those of the base that the loader of the output would not take, or would
    take for what another tensor is."""
    written = {name for name, _ in settlement.replacements}
    written |= {rows.tensor for target in settlement.targets for rows, _ in target.parts}
    for name in written - pair.base.tensors.keys():
        loaded, others = pair.architecture.loaded_as(name)
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


def quantised(pair: Pair, settlement: Settlement) -> Iterator[Finding]:
    """What becomes of a quantised base."""
    tensors, codes = pair.base.tensors, pair.scales.specs
    written = {name for name, _ in settlement.replacements}
    written |= {rows.tensor for target in settlement.targets for rows, _ in target.parts}
    touched = {name: tensors[name] for name in written & tensors.keys()}
    plain = pair.scales.fused(touched)
    if plain:
        own, dtype = len(touched.keys() & codes.keys()), plain_dtype(pair.base.config)
        name = next(name for name, held in WRITTEN.items() if held == dtype)
        size = sum(max(2 * t.numel, t.nbytes) for t in plain_tensors(pair.base).values())
        others = (
            "those that are left keep their bytes; all plain it would have about "
            f"{size:,} bytes (`dtype={name!r}`)"
        )
        if pair.scales.are_all(plain):
            others = "none are left, and quantization_config goes"
        yield note(
            "base-quantised-read", pair.base.path,
            f"is quantised ({pair.method}): {len(plain)} of its {len(codes)} fp8 weights "
            f"become {dtype}, {own} that are adapted and {len(plain) - own} that servers fuse "
            f"with them; {others}",
        )  # fmt: skip
    elif pair.method is not None and settlement.targets:
        packed = sum(spec.dtype not in FLOATING for spec in tensors.values())
        yield note(
            "base-quantised-beside", pair.base.path,
            f"is quantised ({pair.method}); no adapted module is: its {packed} packed tensors "
            "and their scales are copied byte for byte",
        )  # fmt: skip
    if plain and pair.scales.is_static:
        yield note(
            "base-calibrated", pair.base.path,
            "has activation scales that were calibrated without the adapter; those of the "
            "modules that stay fp8 are kept",
        )  # fmt: skip


def new_head(held: Replacements) -> Iterator[Finding]:
    """A class with a new head may have more layers that the base lacks, unsaved by PEFT."""
    if not held.is_new_head and not _needs_new_head(held):
        return
    if held.is_new_head and not _names_a_class(held):
        yield error(
            "head-incomplete", next(iter(held.config.modules_to_save or ()), CONFIG_NAME),
            "is trained and new, and neither task_type nor auto_mapping says which class of model "
            "has it", "Write task_type into adapter_config.json.",
        )  # fmt: skip
        return
    lacking = held.architecture.lacking(held.adapter.values.keys())
    if lacking:
        holder = lacking[0].rpartition(".")[0]
        yield error(
            "head-incomplete", lacking[0],
            f"is one of {len(lacking)} parameters of the trained model that neither the base "
            "nor the adapter has: they were drawn at random, and are lost",
            f"Train again from a base that has them, or with {holder!r} in modules_to_save.",
        )  # fmt: skip


def _needs_new_head(held: Replacements) -> bool:
    """Whether the model that was trained is a classifier of a class that the base is not."""
    architecture = held.architecture
    named = architecture.class_name or AUTO_CLASSES.get(architecture.task_type or "", "")
    if not _CLASSIFIER.search(named):  # before transformers is asked
        return False
    name = head_class(architecture)
    if name is None or name in held.base.architectures or architecture.blueprint is None:
        return False
    return type(architecture.blueprint.model).__name__ == name


def _names_a_class(held: Replacements) -> bool:
    """Whether the class with the new head is known, or there are no classes to choose from."""
    known = held.adapter.task_type or held.architecture.class_name
    beside = (held.adapter.path / "config.json").is_file()
    return bool(known) or beside or held.base.model_type is None


def missing_bias(held: Replacements, modules: Sequence[str]) -> Finding | None:
    """Biases of the adapted `modules` (and of all others, by mode) that should be here."""
    mode = held.config.bias
    if mode == "none":
        return None
    saved = {name.removesuffix(".bias") for name in held.adapter.saved}
    present = saved.union(held.adapter.biases)
    own = [m for m in modules if m not in present and find(held, f"{m}.bias")]
    others = _other_biases(held) if mode == "all" and not held.adapter.biases else []
    if others and not own and held.architecture.blueprint is not None:  # of another head?
        state = held.architecture.blueprint.own
        every = {shared for name in held.trained for shared in held.architecture.sharing(name)}
        given = set(map(held.architecture.today, every))
        others = [n for n in state if n.endswith(".bias") and find(held, n) and n not in given]
    return bias_finding(held.adapter, [f"{module}.bias" for module in own], others)


def _other_biases(held: Replacements) -> list[str]:
    """Biases on disk that the adapter has no value for."""
    written = {name for parts in held.trained.values() for name, _ in parts}
    return [
        name for name in held.base.tensors
        if name.endswith((".bias", ".beta")) and name not in written
    ]  # fmt: skip
