"""Which modules a config selects, by PEFT's own rules.

After PEFT 0.21.2, tuners/tuners_utils.py, check_target_module_exists, and utils/other.py,
match_target_against_key; the default mapping after utils/constants.py (0.21.2).
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from re import _parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Literal, Protocol

from gralora_convert.errors import UnsupportedError

if TYPE_CHECKING:
    import regex

__all__ = [
    "DEFAULT_TARGETS",
    "RULES",
    "Patterns",
    "Rule",
    "Selection",
    "default_targets",
    "is_saved",
    "require_pattern",
    "rule_of",
    "select",
]

_Q_V = ("q_proj", "v_proj")
_QKV = ("query_key_value",)
_BERT = ("query", "value")
DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(
        (
            "bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm",
            "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3",
        ),
        _Q_V,
    ),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(
        ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _QKV
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _BERT),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}  # fmt: skip
REGEX_SECONDS = 5.0  # for all names together; a pattern that needs more is an attack or a mistake
LONGEST_PATTERN = 20_000  # characters; a list of all modules as one alternation stays below
MOST_STEPS = 100_000  # of a pattern whose counted repetitions are written out; 1 KB of memory each
# Releases that find the layer number in a name differently; the newest first.
Rule = Literal["0.21", "0.20", "0.19"]
RULES: tuple[Rule, ...] = ("0.21", "0.20", "0.19")


class Selection(Protocol):
    """The fields of a config that select modules."""

    @property
    def target_modules(self) -> Sequence[str] | str | None: ...
    @property
    def modules_to_save(self) -> Sequence[str] | None: ...
    @property
    def layers_to_transform(self) -> Sequence[int] | int | None: ...
    @property
    def layers_pattern(self) -> Sequence[str] | str | None: ...


def select(config: Selection, modules: Iterable[str], *, rule: Rule = "0.21") -> list[str]:
    """Those of `modules` that the config's list or regex selects (not `all-linear`, not None).

    Raises:
        UnsupportedError: a pattern that is none, or takes too long on these names.
    """
    targets = config.target_modules
    patterns = Patterns()
    excluded = [rf"(^|.*\.){name}($|\..*)" for name in config.modules_to_save or ()]
    chosen = [m for m in modules if not any(patterns.match(p, m) for p in excluded)]
    out = getattr(config, "exclude_modules", None)  # LoRA has it, GraLoRA has not
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
    config: Selection, present: Iterable[str], modules: Iterable[str] | None = None
) -> Rule | None:
    """The newest rule that selects exactly the modules `present` of `modules` (None: that selects
    at least all of `present`); None when no release does."""
    wanted = set(present)
    names = list(wanted if modules is None else modules)
    return next((r for r in RULES if set(select(config, names, rule=r)) == wanted), None)


def default_targets(model_type: str | None) -> Sequence[str] | str | None:
    """What PEFT adapts in a model of this type when `target_modules` is None."""
    return DEFAULT_TARGETS.get(model_type or "")


def _ends_in(names: set[str], module: str) -> bool:
    words = module.split(".")
    return any(".".join(words[i:]) in names for i in range(1, len(words)))


def _in_layers(config: Selection, module: str, rule: Rule, patterns: "Patterns") -> bool:
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


def is_saved(config: Selection, parameter: str) -> str | None:
    """The entry of `modules_to_save` that holds `parameter`; PEFT compares the ends of module
    names without a dot boundary (utils/other.py, `_set_trainable`)."""
    return next((e for e in config.modules_to_save or () if f"{e}." in parameter), None)


def require_pattern(pattern: str) -> None:
    """Raises `UnsupportedError` for what Python's `re`, by which PEFT reads it, takes for no
    pattern, and for one that would need much memory.

    It is parsed, not compiled: a stranger's pattern can make that take minutes.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise _too_long(pattern)
    try:
        steps = _steps(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as problem:
        raise _no_pattern(pattern, problem) from problem
    if steps > MOST_STEPS:
        raise _too_long(pattern)


def _steps(node: object) -> int:
    """What a parsed pattern asks for, in tests of one character."""
    if isinstance(node, _parser.SubPattern):
        return sum(_steps(item) for item in node)
    match node:
        case (_, (int(least), int(most), _parser.SubPattern() as body)):  # a repetition
            times = least if most == _parser.MAXREPEAT else most
            return max(1, times) * (1 + _steps(body))
        case (_, (-1, _parser.SubPattern() as body)) if len(set(body.getwidth())) > 1:
            raise re.error("look-behind requires fixed-width pattern")
        case tuple() | list():
            return 1 + sum(_steps(item) for item in node)
    return 0


def _too_long(pattern: str) -> UnsupportedError:
    return UnsupportedError(
        f"the pattern {pattern[:80]!r} takes too long on the modules' names",
        hint="Write the modules as a list.",
    )


def _no_pattern(pattern: str, problem: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"{pattern[:80]!r} is no regular expression: {problem}", hint="Write the modules as a list."
    )


class Patterns:
    """Regular expressions of a config, with one time limit for all of them together.

    The module `regex` reads the same patterns as `re` does and can be stopped.

    >>> Patterns().match(r"(.*\\.)?(q_proj)$", "layers.0.q_proj") is not None
    True
    """

    def __init__(self) -> None:
        self._left = REGEX_SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def match(self, pattern: str, name: str, *, full: bool = False) -> "regex.Match[str] | None":
        import regex

        started = time.monotonic()
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                require_pattern(pattern)
                compiled = self._compiled[pattern] = regex.compile(pattern)
            matcher = compiled.fullmatch if full else compiled.match
            found = matcher(name, timeout=self._left)
        except TimeoutError:
            raise _too_long(pattern) from None
        except (regex.error, RecursionError, OverflowError) as problem:
            raise _no_pattern(pattern, problem) from problem
        self._left -= time.monotonic() - started
        if self._left <= 0:
            self._left = 1e-9  # the next one times out
        return found
