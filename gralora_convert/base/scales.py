"""Bases in fp8: which tensors are codes with scales, and what a merge makes plain of them.

Touched modules, and those that servers fuse with them into one, become plain in the model's dtype;
all others keep their bytes, and the config names those that are plain now. Layouts are those of the
writers: transformers 5.23 (integrations/finegrained_fp8.py), compressed-tensors 0.20.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from gralora_convert.adapters import Patterns
from gralora_convert.disk import FLOATING, WRITTEN, Checkpoint, Scale, TensorSpec

CODES = "F8_E4M3"
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")  # all are multipliers
_LEAVING = (*_SCALES, "input_scale", "activation_scale", "qscale_act", "output_scale")
_CACHED = ("k_scale", "v_scale", "q_scale", "prob_scale")  # of an fp8 cache of keys and values
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_METHODS = ("fp8", "compressed-tensors")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
_UNLISTED = "but no list of the quantization_config has it: loaders take it for codes"

Json = Mapping[str, object]
Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scales:
    """The fp8 weights of a checkpoint: `specs` with their scales by the tensor's name, and
    `problems`, why others cannot be read. `path` leads to the quantization_config in the config."""

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    settings: Json = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.settings.get("quant_method", ""))

    @property
    def is_static(self) -> bool:
        """Whether inputs of layers are scaled by numbers that were calibrated."""
        dynamic = [one.get("dynamic") for one in _of_groups(self.settings, "input_activations")]
        return self.settings.get("activation_scheme") == "static" or False in dynamic

    def are_all(self, names: Collection[str]) -> bool:
        """Whether no codes are left where these weights are plain."""
        return len(names) == len(self.specs) + len(self.problems)

    def companions(self, names: Collection[str], known: Iterable[str]) -> frozenset[str]:
        """Which of the `known` tensors mean nothing once these weights are plain; where all are,
        the scales of an fp8 cache, too."""
        stems = {name.removesuffix("weight") for name in names}
        leaving = frozenset(f"{stem}{leaf}" for stem in stems for leaf in _LEAVING)
        cached = _CACHED if names and self.are_all(names) else ()
        return frozenset(n for n in known if n in leaving or n.rpartition(".")[2] in cached)

    def fused(self, touched: Mapping[str, TensorSpec]) -> frozenset[str]:
        """The weights that become plain with the `touched` ones, these included: servers hold one
        dtype for what they fuse (query, key, value; gate, up; the experts of a layer), which
        shares its parent and its input."""
        keys = {_group(name, spec) for name, spec in touched.items()}
        return frozenset(name for name, spec in self.specs.items() if _group(name, spec) in keys)


def scales_of(checkpoint: Checkpoint) -> Scales:
    """The fp8 weights of a checkpoint whose config says how they are read."""
    found = settings_of(checkpoint.config)
    if found is None:
        return Scales()
    path, settings = found
    why = _unread_method(settings)
    block, disagreement = _block(settings)
    specs, problems = dict[str, TensorSpec](), dict[str, str]()
    for name, spec in checkpoint.tensors.items():
        if not name.endswith(".weight") or not spec.dtype.startswith("F8_E"):
            continue
        read = why or disagreement or _problem(checkpoint, spec) or _scaled(checkpoint, spec, block)
        if isinstance(read, str):
            problems[name] = read
        else:
            specs[name] = read
    scales = Scales(specs, problems, path, settings)
    return scales if why else replace(scales, problems=problems | _packed(checkpoint, scales))


def settings_of(config: Json, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Json] | None:
    """The quantization_config of a config, or of one within it, and the names that lead there."""
    for name, value in config.items():
        if not isinstance(value, Mapping) or not value:
            continue
        if name in ("quantization_config", "compression_config"):
            return (*path, name), value
        if name.endswith("_config") and (inner := settings_of(value, (*path, name))):
            return inner
    return None


def plain_tensors(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint as a model without quantisation has them: codes with their
    scales, and no tensors that only belong to codes."""
    scales = scales_of(checkpoint)
    left = scales.companions(scales.specs, checkpoint.tensors)
    return {n: scales.specs.get(n, s) for n, s in checkpoint.tensors.items() if n not in left}


def plain_dtype(config: Json) -> str:
    """The dtype of a model whose weights are codes: what its config says, else bfloat16."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) in WRITTEN:
                return WRITTEN[str(values[key])]
    return "BF16"


# reading ------------------------------------------------------------------------------------------


def _unread_method(settings: Json) -> str:
    """Why codes under this quantization_config are not read; '' when they are."""
    method = settings.get("quant_method")
    if method not in _METHODS:
        return f"is quantised by {method or settings.get('quant_algo')!r}, which is not read here"
    if (fmt := settings.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        return f"has codes of the format {fmt!r}; e4m3 was needed"
    for name in ("transform_config", "sparsity_config"):
        value = settings.get(name)
        if isinstance(value, Mapping) and value.get("format") != "dense" and value:
            return f"has a {name}: its weights are not the model's"
    return ""


def _of_groups(settings: Json, part: str) -> list[Json]:
    """`weights` or `input_activations` of all groups of compressed-tensors."""
    groups = settings.get("config_groups")
    held = groups.values() if isinstance(groups, Mapping) else ()
    parts = [group.get(part) for group in held if isinstance(group, Mapping)]
    return [one for one in parts if isinstance(one, Mapping)]


def _block(settings: Json) -> tuple[Block | None, str]:
    """The rows and columns that share a scale by the config, and why that is not known."""
    if settings.get("quant_method") == "fp8":
        sizes = [settings.get("weight_block_size")]
    else:
        sizes = [
            one.get("block_structure")
            for one in _of_groups(settings, "weights")
            if one.get("type") == "float" and one.get("num_bits") == 8
        ]
        if not sizes:
            return None, "is F8_E4M3, and no group of config_groups has weights of 8-bit floats"
    if any(size != sizes[0] for size in sizes):
        return None, "has groups of different block_structure in config_groups"
    size = sizes[0]
    if size is None:
        return None, ""
    if isinstance(size, list | tuple) and len(size) == 2:
        rows, columns = size
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return (rows, columns), ""
    return None, f"has blocks of the size {size!r} in its config"


def _packed(checkpoint: Checkpoint, scales: Scales) -> dict[str, str]:
    """What else is no plain number, and why it is not read: stacks of experts, 4-bit weights."""
    known = scales.companions(scales.specs, checkpoint.tensors).union(scales.specs, scales.problems)
    return {
        name: f"is {spec.dtype} of shape {spec.shape}, which is not read here"
        for name, spec in checkpoint.tensors.items()
        if name not in known and spec.dtype not in (*FLOATING, "I64", "BOOL")
    }


def _problem(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    stem = spec.name.removesuffix("weight")
    if spec.dtype != CODES:
        return f"has dtype {spec.dtype}; of 8 bits only {CODES} is read"
    if len(spec.shape) != 2:
        return f"is {CODES} of shape {spec.shape}; only matrices are read"
    for leaf in ("weight_zero_point", "weight_g_idx"):
        if f"{stem}{leaf}" in checkpoint.tensors:
            return f"has {stem}{leaf} beside it, which is not read here"
    return ""


def _scaled(checkpoint: Checkpoint, spec: TensorSpec, block: Block | None) -> TensorSpec | str:
    """`spec` with its scale, or why it has none."""
    stem = spec.name.removesuffix("weight")
    found = [f"{stem}{leaf}" for leaf in _SCALES if f"{stem}{leaf}" in checkpoint.tensors]
    if len(found) != 1:
        held = f"{' and '.join(found)} beside it" if found else "no scale beside it"
        return f"is {spec.dtype} with {held}; one scale was needed"
    scale = checkpoint.tensors[found[0]]
    if scale.dtype not in _SCALE_DTYPES:
        return f"has scales of dtype {scale.dtype}; {', '.join(_SCALE_DTYPES)} are read"
    sizes = _block_of(spec.shape, scale.shape, block)
    if sizes is None:
        named = f"blocks of {block[0]} x {block[1]}" if block else "no blocks"
        return (
            f"is {spec.shape} with scales of shape {scale.shape}, which do not fit: the config "
            f"names {named}"
        )
    return replace(spec, scale=Scale(scale, *sizes))


def _block_of(shape: tuple[int, ...], scales: tuple[int, ...], block: Block | None) -> Block | None:
    """The rows and columns that share one of `scales`. They are never worked out from the shapes:
    192 rows with two scales are blocks of 128 and 64, not of 96."""
    rows, columns = shape[0], shape[1]
    if all(size == 1 for size in scales):
        return max(rows, 1), max(columns, 1)
    if len(scales) == 4 and scales[1] == scales[3] == 1:
        scales = (scales[0], scales[2])
    if block is not None and scales == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if scales in ((rows, 1), (rows,)):
        return 1, columns
    return None


def _group(name: str, spec: TensorSpec) -> tuple[object, ...]:
    module = name.removesuffix(".weight")
    if expert := _EXPERT.fullmatch(module):
        return (expert[1],)
    return (module.rpartition(".")[0], spec.shape[-1] if spec.shape else 0)


# what the config of the output says ---------------------------------------------------------------


def requantised(
    config: Json, scales: Scales, plain: Collection[str], linear: Callable[[], Collection[str]]
) -> dict[str, object]:
    """`config` where these fp8 weights of the base are `plain`: with no quantization_config where
    all are, else with the base's (and none where that has none), which lists the modules that are
    not to be read as codes. `linear` makes the names on disk of the weights of all linear layers,
    for which the model may have to be built."""
    own: tuple[tuple[str, ...], Json] = (scales.path, scales.settings)
    if not plain and own == (settings_of(config) or ((), {})):
        return dict(config)
    paths = [scales.path] if scales.path else []  # some say it twice: of the whole and of its text
    while found := settings_of(config):
        paths.append(found[0])
        config = _placed(config, found[0], None)
    if scales.settings and not (plain and scales.are_all(plain)):
        lists = dict(_listed(scales, plain, linear)) if plain else {}
        for path in dict.fromkeys(paths):
            config = _placed(config, path, {**scales.settings, **lists})
    return dict(config)


def _placed(config: Json, path: tuple[str, ...], value: object) -> dict[str, object]:
    """`config` with `value` at `path`, None: without it."""
    first, *rest = path
    inner = config.get(first)
    if rest:
        value = _placed(inner if isinstance(inner, Mapping) else {}, tuple(rest), value)
    edited = {**config, first: value}
    return {name: held for name, held in edited.items() if name != first or held is not None}


def _listed(
    scales: Scales, plain: Collection[str], linear: Callable[[], Collection[str]]
) -> Iterator[tuple[str, list[str]]]:
    """The lists of modules that stay plain, by their names in the quantization_config: full names,
    as vLLM 0.33 compares them."""
    names = {name.removesuffix(".weight") for name in plain}
    keys = _lists(scales.settings)
    # without a list, transformers leaves out the head by itself; with one, only what it lists
    if not _has_list(scales.settings) and scales.method == "fp8":
        names |= {name.removesuffix(".weight") for name in linear() if name not in scales.specs}
    names |= {name.replace(".language_model.", ".") for name in names}  # of text-only loads
    for key in keys:
        held = scales.settings.get(key)
        old = [str(one) for one in held] if isinstance(held, list | tuple) else []
        yield key, [*old, *sorted(names.difference(old))]


def _lists(settings: Json) -> tuple[str, ...]:
    if settings.get("quant_method") != "fp8":
        return ("ignore",)
    both = ("ignored_layers", "modules_to_not_convert")
    given = tuple(key for key in both if settings.get(key))
    return given or ("modules_to_not_convert",)


def misread(
    scales: Scales, merged: Checkpoint, linear: Callable[[], Collection[str]]
) -> Iterator[tuple[str, str]]:
    """The weights of a merged checkpoint that its loaders misread, and why: of those that are codes
    in the base, what its quantization_config lists must be plain, all others codes that it reads
    as the base's does. `linear` as in `requantised`."""
    found = settings_of(merged.config)
    coded = scales.specs.keys() if found else scales.specs.keys() | scales.problems.keys()
    theirs, patterns = scales_of(merged).specs, Patterns()
    if found and not scales.settings:
        why = f"has a {found[0][-1]} that the base has not: loaders would quantise, or misread, it"
        yield "config.json", why
    for name in coded & merged.tensors.keys():
        spec, module = merged.tensors[name], name.removesuffix(".weight")
        is_plain = spec.dtype in FLOATING
        if found is None and not is_plain:
            why = "and no quantization_config says how they are read: loaders take them for weights"
            yield name, f"is codes ({spec.dtype}), {why}"
        elif found is not None and is_plain and not is_listed(found[1], module, patterns):
            yield name, f"is plain ({spec.dtype}), {_UNLISTED}"
        elif found is not None and not is_plain and is_listed(found[1], module, patterns):
            yield name, f"is codes ({spec.dtype}), but the quantization_config lists it as plain"
        elif not (is_plain or _is_read_alike(scales.specs[name], theirs.get(name))):
            why = "by the dtype of its scales or by the quantization_config"
            yield name, f"is codes that are read otherwise than in the base, {why}"
    if found and scales.method == "fp8" and _has_list(found[1]) and not _has_list(scales.settings):
        for name in linear() if scales.specs else ():
            module = name.removesuffix(".weight")
            if name not in scales.specs and not is_listed(found[1], module, patterns):
                yield name, f"is plain, {_UNLISTED}"


def _is_read_alike(one: TensorSpec, other: TensorSpec | None) -> bool:
    """Whether the codes of `other` are read as those of `one`: F32 holds what all scales can."""
    ours, theirs = one.scale, None if other is None else other.scale
    if ours is None or theirs is None:
        return False
    is_whole = theirs.spec.dtype in (ours.spec.dtype, "F32")
    return is_whole and (theirs.rows, theirs.columns) == (ours.rows, ours.columns)


def _has_list(settings: Json) -> bool:
    return any(settings.get(key) for key in _lists(settings))


def is_listed(settings: Json, module: str, patterns: Patterns) -> bool:
    """Whether a quantization_config names a module as plain: whole, from a dot on, up to a dot, or
    by a pattern behind `re:`."""
    for key in ("ignored_layers", "modules_to_not_convert", "ignore"):
        held = settings.get(key)
        for entry in held if isinstance(held, list | tuple) else ():
            text = str(entry)
            if text.startswith("re:"):
                if patterns.match(text[3:], module):
                    return True
            elif f".{module}.".find(f".{text}.") >= 0:
                return True
    return False
