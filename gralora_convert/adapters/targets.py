"""Which modules a config selects, by PEFT's own rules.

After PEFT 0.21.2, tuners/tuners_utils.py, check_target_module_exists, and utils/other.py,
match_target_against_key.
"""

from collections.abc import Iterable
from typing import Literal

from gralora_convert.adapters.config import GraloraConfig, LoraConfig
from gralora_convert.adapters.patterns import Patterns

# Releases that find the layer number in a name differently; the newest first.
Rule = Literal["0.21", "0.20", "0.19"]
RULES: tuple[Rule, ...] = ("0.21", "0.20", "0.19")
Config = GraloraConfig | LoraConfig


def select(config: Config, modules: Iterable[str], *, rule: Rule = "0.21") -> list[str]:
    """Those of `modules` that the config's list or regex selects (not `all-linear`, not None).

    Raises:
        UnsupportedError: a pattern that is none, or takes too long on these names.
    """
    targets = config.target_modules
    patterns = Patterns()
    excluded = [rf"(^|.*\.){name}($|\..*)" for name in config.modules_to_save or ()]
    chosen = [m for m in modules if not any(patterns.match(p, m) for p in excluded)]
    out = config.exclude_modules if isinstance(config, LoraConfig) else None
    if isinstance(out, str):
        chosen = [m for m in chosen if not patterns.match(out, m, full=True)]
    elif out:
        chosen = [m for m in chosen if m not in out and not _ends_in(set(out), m)]
    if isinstance(targets, str):
        return [m for m in chosen if patterns.match(targets, m, full=True)]
    names = set(targets or ())
    return [
        m for m in chosen
        if m in names or (_ends_in(names, m) and _in_layers(config, m, rule, patterns))
    ]  # fmt: skip


def rule_of(
    config: Config, present: Iterable[str], modules: Iterable[str] | None = None
) -> Rule | None:
    """The newest rule that selects exactly the modules `present` of `modules` (None: that selects
    at least all of `present`); None when no release does."""
    wanted = set(present)
    names = list(wanted if modules is None else modules)
    return next((r for r in RULES if set(select(config, names, rule=r)) == wanted), None)


def _ends_in(names: set[str], module: str) -> bool:
    words = module.split(".")
    return any(".".join(words[i:]) in names for i in range(1, len(words)))


def _in_layers(config: Config, module: str, rule: Rule, patterns: Patterns) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    # the first number in the name since 0.20, the last one before; at its start since 0.21
    before = r".*\." if rule == "0.19" else r".*?\."
    named = config.layers_pattern
    if not named:
        expressions = [rf"{before}[^.]*\.(?P<idx>\d+)\."]
    else:
        start = rf"(?:^|{before})" if rule == "0.21" else before
        listed = [named] if isinstance(named, str) else named
        expressions = [rf"{start}{pattern}\.(?P<idx>\d+)\." for pattern in listed]
    for expression in expressions:
        found = patterns.match(expression, module)
        if found:
            wanted = [layers] if isinstance(layers, int) else layers
            return len(found["idx"]) < 10 and int(found["idx"]) in wanted
    return False


def is_saved(config: Config, parameter: str) -> str | None:
    """The entry of `modules_to_save` that holds `parameter`; PEFT compares the ends of module
    names without a dot boundary (utils/other.py, `_set_trainable`)."""
    return next((e for e in config.modules_to_save or () if f"{e}." in parameter), None)
