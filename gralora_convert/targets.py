"""Which modules a config selects, by PEFT's own rules.

After PEFT 0.21.2, tuners/tuners_utils.py, check_target_module_exists, and utils/other.py,
match_target_against_key; the default mapping after utils/constants.py (0.21.2).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from gralora_convert.errors import UnsupportedError

__all__ = ["DEFAULT_TARGETS", "Selection", "is_saved", "matches", "select"]

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


def select(config: Selection, modules: Iterable[str]) -> list[str]:
    """Those of `modules` that the config's list or regex selects (not `all-linear`, not None).

    Raises:
        UnsupportedError: a pattern that takes too long on these names.
    """
    targets = config.target_modules
    excluded = [rf"(^|.*\.){name}($|\..*)" for name in config.modules_to_save or ()]
    chosen = [m for m in modules if not any(matches(pattern, m) for pattern in excluded)]
    out = getattr(config, "exclude_modules", None)  # LoRA has it, GraLoRA has not
    if isinstance(out, str):
        chosen = [m for m in chosen if _match(out, m, full=True) is None]
    elif out:
        chosen = [m for m in chosen if m not in out and not _ends_in(set(out), m)]
    if isinstance(targets, str):
        return [m for m in chosen if _match(targets, m, full=True) is not None]
    names = set(targets or ())
    return [m for m in chosen if m in names or _by_suffix(config, names, m)]


def _ends_in(names: set[str], module: str) -> bool:
    words = module.split(".")
    return any(".".join(words[i:]) in names for i in range(1, len(words)))


def _by_suffix(config: Selection, names: set[str], module: str) -> bool:
    if not _ends_in(names, module):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern
    if not patterns:
        expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    else:
        named = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in named]
    for expression in expressions:
        index = _match(expression, module)
        if index is not None:
            wanted = [layers] if isinstance(layers, int) else layers
            return len(index) < 10 and int(index) in wanted
    return False


def is_saved(config: Selection, parameter: str) -> str | None:
    """The entry of `modules_to_save` that holds `parameter`; PEFT compares the ends of module
    names without a dot boundary (utils/other.py, `_set_trainable`)."""
    return next((e for e in config.modules_to_save or () if f"{e}." in parameter), None)


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name` from its start.

    Raises:
        UnsupportedError: a pattern that takes too long on this name.

    >>> matches(r"(.*\.)?(q_proj)$", "layers.0.q_proj")
    True
    """
    return _match(pattern, name) is not None


def _match(pattern: str, name: str, *, full: bool = False) -> str | None:
    """The group `idx` (or the whole match) of `pattern` in `name`, None when it does not match.

    The module `regex` reads the same patterns as `re` and can be stopped.
    """
    import regex

    try:
        compiled = regex.compile(pattern)
        matcher = compiled.fullmatch if full else compiled.match
        found = matcher(name, timeout=REGEX_SECONDS)
    except TimeoutError:
        raise UnsupportedError(
            f"the pattern {pattern!r} takes too long on {name!r}",
            hint="Write the modules as a list.",
        ) from None
    except (regex.error, re.error) as error:
        raise UnsupportedError(f"{pattern!r} is no regular expression: {error}") from error
    if found is None:
        return None
    return str(found["idx"] if "idx" in compiled.groupindex else found[0])
