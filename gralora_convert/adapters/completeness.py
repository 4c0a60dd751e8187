"""What an adapter must hold: every module that its config selects, saved modules whole, the trained
biases. One account for every verb; each brings the names that it knows, those of a base or those of
a live model.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.adapters.config import CONFIG_NAME
from gralora_convert.adapters.targets import Config, is_saved, rule_of, select
from gralora_convert.errors import Finding, error, note, warning

# The findings that say: it does not hold what it must.
INCOMPLETE = frozenset(
    {"target-without-tensors", "modules-to-save-missing", "bias-missing", "head-incomplete"}
)


def is_all_linear(config: Config) -> bool:
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == "all-linear"


def missing_targets(adapter: Adapter, linear: Iterable[str]) -> list[str]:
    """The modules among `linear` (nn.Linear and Conv1D) that the config selects, without tensors.

    PEFT's default targets (`target_modules` null) depend on its release: nothing is said then."""
    config = adapter.config
    if config.target_modules is None:
        return []
    names = list(linear)
    if is_all_linear(config):
        chosen = [name for name in names if is_saved(config, f"{name}.") is None]
    else:
        chosen = select(config, names)
    return [module for module in chosen if module not in adapter.roles]


def target_findings(adapter: Adapter, linear: Collection[str]) -> Iterator[Finding]:
    """An error for each of `missing_targets`; a warning where another release of PEFT selects
    exactly the modules that are there."""
    missing = missing_targets(adapter, linear)
    if not missing:
        return
    rule = None if is_all_linear(adapter.config) else rule_of(
        adapter.config, adapter.modules, linear
    )  # fmt: skip
    if rule is not None:
        yield warning(
            "target-rule-changed", CONFIG_NAME,
            f"selects {len(missing)} more modules by today's rules, first {missing[0]}; "
            f"by those of PEFT {rule} exactly the ones in the file, which are taken",
        )  # fmt: skip
        return
    for module in missing:
        yield error(
            "target-without-tensors", module, "is selected by the config, but has no tensors",
            "Incomplete adapter, or another base?",
        )  # fmt: skip


def saved_findings(
    adapter: Adapter, written: Collection[str], parameters: Collection[str]
) -> Iterator[Finding]:
    """Saved modules without tensors, or without some of them.

    `parameters` are all that the model has, `written` those that the adapter brings, in the same
    names.
    """
    config = adapter.config
    used = {is_saved(config, parameter) for parameter in adapter.saved}
    modules = {name.rpartition(".")[0] for name in parameters}
    for entry in config.modules_to_save or ():
        if entry in used:
            continue
        if any(module.endswith(entry) for module in modules):
            yield error(
                "modules-to-save-missing", entry,
                "is in modules_to_save and in the base, but the adapter has no tensors of it",
                "Incomplete adapter, or another base?",
            )  # fmt: skip
        else:
            yield note("modules-to-save-unmatched", entry, "is no module of the base")
    begun = {_holder(config, name) for name in written} - {None}
    for name in parameters:
        known = name.endswith((".weight", ".bias"))
        if known and name not in written and _holder(config, name) in begun:
            yield error(
                "modules-to-save-missing", name,
                "belongs to a module that is saved, but the adapter does not have it",
                "Incomplete adapter, or another base?",
            )  # fmt: skip


def _holder(config: Config, parameter: str) -> str | None:
    """The module of `modules_to_save` that holds a parameter."""
    entry = is_saved(config, parameter)
    return None if entry is None else parameter[: parameter.index(f"{entry}.") + len(entry)]


def bias_finding(adapter: Adapter, own: Collection[str], others: Collection[str]) -> Finding | None:
    """That trained biases are missing: `own` names those of adapted modules, `others` all others
    that the model has and the adapter has not."""
    mode, found = adapter.config.bias, own or others
    if mode == "none" or not found:
        return None
    what = f"{len(found)} trained biases, first {next(iter(found))},"
    return _bias_missing(adapter, what)


def _bias_missing(adapter: Adapter, what: str) -> Finding:
    version, mode = adapter.config.peft_version, adapter.config.bias
    release = tuple(int(x) for x in (version or "").split(".")[:2] if x.isdecimal())
    reason = (
        f"PEFT {version} trains biases but does not save them (fixed in 0.21.0): they are lost."
        if len(release) == 2 and release < (0, 21)
        else "Is the file complete?"
    )
    return error(
        "bias-missing", CONFIG_NAME, f"bias is {mode!r}, but {what} are not in the file", reason
    )


def suspicions(adapter: Adapter) -> Iterator[Finding]:
    """What an adapter shows without a base or a model, short of proof."""
    config = adapter.config
    if config.bias != "none" and not adapter.biases:
        found = _bias_missing(adapter, "trained biases")
        yield warning(found.code, found.where, found.message, found.hint)
    targets, modules = config.target_modules, adapter.modules
    saved = {is_saved(config, parameter) for parameter in adapter.saved}
    whole = {parameter.rpartition(".")[0] for parameter in adapter.saved}
    for name in targets if targets is not None and not isinstance(targets, str) else ():
        if any(m == name or m.endswith(f".{name}") for m in (*modules, *whole)):
            continue
        if not any(name.endswith(entry) for entry in config.modules_to_save or ()):  # is saved then
            yield warning(
                "target-without-tensors", CONFIG_NAME,
                f"target_modules names {name!r}, of which the file holds no tensors",
                "Check with `base` whether the model has it.",
            )  # fmt: skip
    for entry in config.modules_to_save or ():
        if entry not in saved:
            yield note("modules-to-save-unmatched", entry, "is in modules_to_save, without tensors")
    yield from _uneven_layers(adapter)


def _uneven_layers(adapter: Adapter) -> Iterator[Finding]:
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for module in adapter.modules:
        found = re.match(r"(.*?)\.(\d+)\.(.+)", module)
        if found:
            layers[found[1], found[2]].add(found[3])
    every: dict[str, set[str]] = defaultdict(set)
    for (stack, _), names in layers.items():
        every[stack] |= names
    for (stack, index), names in layers.items():
        lacking = [
            name for name in sorted(every[stack] - names)
            if not is_saved(adapter.config, f"{stack}.{index}.{name}.")
        ]  # fmt: skip
        if lacking:
            yield warning(
                "target-without-tensors", f"{stack}.{index}",
                f"lacks {', '.join(lacking)}, which other layers have",
                "Check with `base`.",
            )  # fmt: skip
