"""Which modules a config selects: the same ones that PEFT's own rules select."""

import re
import resource
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_convert.adapters.config import GraloraConfig, LoraConfig
from gralora_convert.adapters.patterns import Patterns
from gralora_convert.adapters.targets import is_saved, rule_of, select
from gralora_convert.errors import ConvertError, UnsupportedError

MODULES = [
    "q_proj", "lm_head", "score", "model.norm", "h.0.attn.q_proj", "h.11.attn.q_proj",
    "layers.1.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.xq_proj",
    "model.layers.10.self_attn.q_proj", "model.layers.1.mlp.experts.7.up", "encoder.block.2.up",
    "model.layers.1.mlp.score.up", "model.decoder.layers.3.q_proj.inner",
]  # fmt: skip
words = st.sampled_from(
    ["q_proj", "up", "inner", "score", "attn.q_proj", "h.0.attn.q_proj", "proj", "lm_head", "norm",
     "model.layers.1.q_proj", "experts.7.up", "zzz", "layers.1.q_proj"]
)  # fmt: skip
regexes = st.sampled_from([r".*q_proj", r"q_proj", r".*layers\.\d\..*", r"(h|model)\..*up", "zzz"])
targets = st.lists(words, max_size=4, unique=True) | regexes | st.just("")  # nothing is a choice
layers: st.SearchStrategy[Any] = (
    st.none() | st.just([]) | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=4)
)
patterns = st.none() | st.sampled_from(["", "h", "layers", "block", "decoder.layers"]) | st.lists(
    st.sampled_from(["h", "layers", "experts", "block"]), max_size=2
)  # fmt: skip
saved = st.none() | st.lists(
    st.sampled_from(["score", "head", "model", "lm.head", "h"]), max_size=2
)


def matches(pattern: str, name: str) -> bool:
    return Patterns().match(pattern, name) is not None


@given(targets, layers, patterns, saved)
def test_gralora_selects_what_peft_selects(
    target_modules: Any, layers_to_transform: Any, layers_pattern: Any, modules_to_save: Any
) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    arguments = {
        "target_modules": target_modules, "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern, "modules_to_save": modules_to_save,
    }  # fmt: skip
    theirs = peft.GraloraConfig(**arguments)
    wanted = [module for module in MODULES if check_target_module_exists(theirs, module)]
    assert select(GraloraConfig(**arguments), MODULES) == wanted


@given(targets, targets | st.none(), layers, patterns, saved)
def test_lora_leaves_out_what_peft_leaves_out(
    target_modules: Any,
    exclude_modules: Any,
    layers_to_transform: Any,
    layers_pattern: Any,
    modules_to_save: Any,
) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(target_modules, str) or layers_to_transform is None:  # refused by its constructor
        layers_to_transform, layers_pattern = None, None
    arguments = {
        "target_modules": target_modules, "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern, "modules_to_save": modules_to_save,
    }  # fmt: skip
    theirs = peft.LoraConfig(**arguments, exclude_modules=exclude_modules)
    wanted = [module for module in MODULES if check_target_module_exists(theirs, module)]
    ours = LoraConfig(**arguments, extra={"exclude_modules": exclude_modules})
    assert select(ours, MODULES) == wanted


@pytest.mark.parametrize(
    ("entry", "parameter", "expected"),
    [
        ("score", "score.weight", True),
        ("norm", "model.layers.0.input_layernorm.weight", True),  # no dot before: as in PEFT
        ("classifier", "classifier.dense.weight", True),
        ("score", "scores.weight", False),
        ("lm.head", "lm_head.weight", False),
        ("weight", "score.weight", False),
    ],
)
def test_saved_modules_are_compared_by_their_ends(
    entry: str, parameter: str, expected: bool
) -> None:
    config = GraloraConfig(modules_to_save=["zzz", entry])
    assert is_saved(config, parameter) == (entry if expected else None)


def test_patterns_that_cannot_be_carried_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gralora_convert.adapters.patterns.REGEX_SECONDS", 0.05)
    with pytest.raises(UnsupportedError, match="takes too long"):
        matches(r"([a-z]|[a-z]{2})+$", "a" * 60 + "!")
    with pytest.raises(UnsupportedError, match="no regular expression"):
        matches("(", "a")


@pytest.mark.parametrize(
    "pattern", ["(?:(?:a?){60000}){60000}", "(?:(a)?(b)?){1000000,}", "(?:(?:a?){9}){99999}?"]
)
def test_a_pattern_that_would_take_gigabytes_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match="takes too long"):
        matches(pattern, "model.layers.0.self_attn.q_proj")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB


@pytest.mark.parametrize("pattern", [r"\p{L}+_proj", "(?R)?a", "(?<=a*)q_proj", "(?V1)q_proj"])
def test_what_peft_takes_for_no_pattern_is_none_here(pattern: str) -> None:
    with pytest.raises(re.error):
        re.compile(pattern)
    with pytest.raises(UnsupportedError, match="no regular expression"):
        matches(pattern, "q_proj")


@pytest.mark.parametrize(
    "pattern",
    [r".*layers\.\d{1,2}\.(mlp|attn)\..{0,64}", "(.*?[a-z]{1,}){2,40}", "(?<=q)_proj|q.*"],
)
def test_counts_that_people_write_are_taken(pattern: str) -> None:
    assert matches(pattern, "q_proj") == (re.match(pattern, "q_proj") is not None)


def test_an_absurd_layer_number_is_no_layer() -> None:
    config = GraloraConfig(target_modules=["q"], layers_to_transform=[1])
    names = [f"model.layers.{'9' * 5000}.q", "model.layers.1.q"]
    assert select(config, names) == ["model.layers.1.q"]


NESTED = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in (0, 3) for j in (3, 7)]
BY_LAYER = GraloraConfig(target_modules=["w1"], layers_to_transform=[3])


def test_releases_find_the_layer_number_differently() -> None:
    # PEFT 0.19 takes the last number of a name (greedy), later releases the first
    assert select(BY_LAYER, NESTED, rule="0.19") == [NESTED[0], NESTED[2]]
    assert select(BY_LAYER, NESTED, rule="0.20") == NESTED[2:]
    # since 0.21 the pattern may stand at the start of a name
    at_start = ["h.1.attn.c_proj", "transformer.h.1.attn.c_proj"]
    config = GraloraConfig(target_modules=["c_proj"], layers_to_transform=[1], layers_pattern="h")
    assert select(config, at_start, rule="0.20") == at_start[1:]
    assert select(config, at_start, rule="0.21") == at_start


def test_the_release_that_selected_the_modules_in_a_file_is_recognised() -> None:
    assert rule_of(BY_LAYER, [NESTED[0], NESTED[2]], NESTED) == "0.19"
    assert rule_of(BY_LAYER, NESTED[2:], NESTED) == "0.21"
    assert rule_of(BY_LAYER, NESTED, NESTED) is None
    assert rule_of(BY_LAYER, [NESTED[2]]) == "0.21"  # without a base: selects what is there


@pytest.mark.parametrize("pattern", [r"(.|\w)*[XY]", r"(.|a)*\.(a|aa)+[XY]", "a" * 100_000])
def test_all_names_together_have_one_time_limit(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gralora_convert.adapters.patterns.REGEX_SECONDS", 0.2)
    modules = [f"model.layers.{i}." + "a" * 60 for i in range(200)]
    started = time.process_time()
    with pytest.raises(ConvertError, match="takes too long"):
        select(GraloraConfig(target_modules=pattern), modules)
    assert time.process_time() - started < 2
