"""Configs: round trips, PEFT's reading of them, every rule, and the original authors' dialect."""

import json
import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_convert.adapters import patterns
from gralora_convert.adapters.config import (
    CONFIG_NAME,
    ConfigFile,
    GraloraConfig,
    LoraConfig,
    parse_config,
    read_config,
)
from gralora_convert.errors import ConvertError, InvalidAdapterError, OutputError, UnsupportedError
from tests.defects import CONFIG, DEFECTS, TOLD_BY_CONFIG, Parts

GOOD: Mapping[str, Any] = GraloraConfig(
    r=8, hybrid_r=4, alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
    inference_mode=True, base_model_name_or_path="some/model",
).to_dict()  # fmt: skip
LORA: Mapping[str, Any] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
AUTHORS: Mapping[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": "m", "bias": "none", "fan_in_fan_out": False,
    "gralora_alpha": 16, "gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 2,
    "inference_mode": True, "layers_pattern": None, "layers_to_transform": None,
    "modules_to_save": None, "peft_type": "GRALORA", "r": 8, "revision": None,
    "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def configs(draw: st.DrawFn) -> GraloraConfig:
    k = draw(st.integers(1, 4))
    fields = GraloraConfig.field_names() | LoraConfig.field_names()
    return GraloraConfig(
        r=k * draw(st.integers(1, 16)),
        hybrid_r=draw(st.integers(0, 8)),
        target_modules=draw(st.none() | st.lists(names, unique=True) | st.just(r".*\.(q|v)_proj")),
        alpha=draw(numbers.filter(lambda alpha: abs(alpha) < 3e38)),
        gralora_dropout=draw(st.floats(0, 1)),
        gralora_k=k,
        bias=draw(st.sampled_from(["none", "all", "gralora_only"])),
        modules_to_save=draw(st.none() | st.lists(names, max_size=2)),
        layers_to_transform=draw(st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9))),
        layers_pattern=draw(st.none() | names | st.lists(names, max_size=2)),
        task_type=draw(st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS"])),
        revision=draw(st.none() | names),
        peft_version=draw(st.sampled_from([None, "0.19.0", "0.21.2"])),
        extra=draw(st.dictionaries(names.filter(lambda n: n not in fields), json_values)),
    )


# laws ---------------------------------------------------------------------------------------------


@given(configs())
def test_what_is_written_is_read_back_and_extra_fields_survive(config: GraloraConfig) -> None:
    assert GraloraConfig.from_dict(json.loads(config.to_json())) == config
    assert GraloraConfig.from_dict(config.to_dict()) == config


@given(st.permutations(["v_proj", "k_proj", "q_proj", "up_proj"]))
def test_the_same_config_has_the_same_bytes(order: list[str]) -> None:
    given_as: list[Any] = [order, tuple(order), set(order), [*order, *order]]
    written = {GraloraConfig(target_modules=form).to_json() for form in given_as}
    assert written == {GraloraConfig(target_modules=sorted(order)).to_json()}


@pytest.mark.parametrize(
    "config",
    [
        GraloraConfig(r=8, alpha=0.5, target_modules=["b", "a"], extra={"later_field": [1, {}]}),
        LoraConfig(rank_pattern={"q": 4}, target_modules="q", extra={"use_bdlora": None}),
    ],
)
def test_a_folder_keeps_a_config(config: GraloraConfig | LoraConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "new")
    assert type(config).from_pretrained(tmp_path / "new") == config
    other = LoraConfig if isinstance(config, GraloraConfig) else GraloraConfig
    with pytest.raises(InvalidAdapterError, match=f"{other.peft_type} was needed"):
        other.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize("config", [GraloraConfig(r=8), LoraConfig(r=8)])
def test_a_config_is_made_again_from_its_fields(config: GraloraConfig | LoraConfig) -> None:
    fields: dict[str, Any] = config.to_dict()
    assert type(config)(**fields) == config
    wrong: dict[str, Any]
    for wrong, said in (
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"extra": 3}, "extra is 3, an object"),
        ({"extra": {1: 2}}, "extra is {1: 2}, an object"),
    ):
        with pytest.raises(InvalidAdapterError, match=said):
            type(config)(**wrong)


def test_a_config_is_found_by_the_name_of_its_file(tmp_path: Path) -> None:
    GraloraConfig(r=8).save_pretrained(tmp_path)
    assert GraloraConfig.from_pretrained(tmp_path / CONFIG_NAME).r == 8


@pytest.mark.parametrize("place", ["\0", "x" * 5000, "a file/below"])
def test_a_place_that_cannot_be_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        GraloraConfig().save_pretrained(f"{tmp_path}/{place}")
    with pytest.raises(ConvertError, match=r"is missing|is not a usable path"):
        GraloraConfig.from_pretrained(f"{tmp_path}/{place}")


def test_known_fields_win_over_extra_ones() -> None:
    assert GraloraConfig(r=8, extra={"r": 3, "peft_type": "LORA"}).to_dict()["r"] == 8


# PEFT ---------------------------------------------------------------------------------------------

GRALORA_ARGUMENTS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"r": 64, "hybrid_r": 16, "alpha": 0.1, "gralora_k": 4, "target_modules": ["q_proj"]},
    {"target_modules": ".*q_proj", "bias": "all", "task_type": "SEQ_CLS", "gralora_dropout": 0.1},
    {"target_modules": ["q"], "bias": "gralora_only", "modules_to_save": ["a", "b"], "alpha": 8},
    {"target_modules": ["q"], "layers_to_transform": [1, 0], "layers_pattern": "h"},
    {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    {"init_weights": False, "fan_in_fan_out": True, "revision": "main", "inference_mode": True},
]
LORA_ARGUMENTS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]},
    {"target_modules": ".*q_proj", "rank_pattern": {"a": 2}, "alpha_pattern": {"^b": 0.5}},
    {"target_modules": ["q"], "modules_to_save": ["h"], "bias": "lora_only", "lora_dropout": 0.1},
]


@pytest.mark.parametrize("arguments", GRALORA_ARGUMENTS)
def test_our_file_is_the_one_that_peft_writes(arguments: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.GraloraConfig(**arguments)
    theirs.save_pretrained(tmp_path)
    ours = GraloraConfig(**arguments, peft_version=peft.__version__)
    assert ours.to_json() == (tmp_path / CONFIG_NAME).read_bytes()
    assert GraloraConfig.from_pretrained(tmp_path) == ours


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("Gralora", a) for a in GRALORA_ARGUMENTS] + [("Lora", a) for a in LORA_ARGUMENTS],
)
def test_peft_reads_our_file_without_a_warning(
    kind: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    ours = (GraloraConfig if kind == "Gralora" else LoraConfig)(**arguments)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(theirs).__name__ == f"{kind}Config"
    read = json.loads(ours.to_json())
    for name, value in theirs.to_dict().items():
        plain = sorted(value) if isinstance(value, set) else value
        assert plain == read.get(name, plain), name


def test_fields_and_defaults_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    for ours, theirs in (
        (GraloraConfig(), peft.GraloraConfig()),
        (LoraConfig(), peft.LoraConfig()),
    ):
        defaults = theirs.to_dict()
        for name, value in ours.to_dict().items():
            default = defaults[name]
            assert value == (default.value if name == "peft_type" else default), name
            assert name == "peft_type" or type(value) is type(default), name
    assert GraloraConfig().to_dict().keys() == peft.GraloraConfig().to_dict().keys()
    positional = GraloraConfig(8, 2, ["q"], 16, 0.1, 4, True, "all", ["h"], False, [1], "layers")
    named = {
        "r": 8, "hybrid_r": 2, "target_modules": ["q"], "alpha": 16, "gralora_dropout": 0.1,
        "gralora_k": 4, "fan_in_fan_out": True, "bias": "all", "modules_to_save": ["h"],
        "init_weights": False, "layers_to_transform": [1], "layers_pattern": "layers",
    }  # fmt: skip
    theirs = peft.GraloraConfig(**named).to_dict()
    assert positional.to_dict() == theirs | {"peft_type": "GRALORA", "target_modules": ["q"]}


def test_lora_ranks_and_scalings_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    linear, nested = torch.nn.Linear, torch.nn.ModuleDict
    arguments: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "xq_proj", "up", "inner"],
        "rank_pattern": {"q_proj": 2, "x.*": 3, "layers.inner": 5, "^up": 7},
        "alpha_pattern": {".*q_proj": 9, "up": 0.5},
    }  # fmt: skip
    for use_rslora in (False, True):
        model = nested({name: linear(8, 8) for name in ("q_proj", "xq_proj", "up")})
        model["layers"] = nested({"inner": linear(8, 8)})
        theirs = peft.LoraConfig(**arguments, use_rslora=use_rslora)
        adapted = peft.inject_adapter_in_model(theirs, model)
        ours = LoraConfig(**arguments, use_rslora=use_rslora)
        layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "scaling")}
        assert set(layers) == {"q_proj", "xq_proj", "up", "layers.inner"}
        for name, layer in layers.items():
            assert ours.rank(name) == layer.r["default"], name
            assert ours.scaling(name) == layer.scaling["default"], name


# rules --------------------------------------------------------------------------------------------

NONE = ("", "")
MORE: list[tuple[Mapping[str, Any], str, str]] = [
    ({"r": 0}, "config-value-range", "error"),
    ({"r": -4}, "config-value-range", "error"),
    ({"r": 2**63}, "config-value-range", "error"),
    ({"alpha": 10**400}, "config-value-range", "error"),
    ({"alpha": math.inf}, "config-non-finite", "error"),
    ({"alpha": True}, "config-value-type", "error"),
    ({"alpha": -3.5}, *NONE),
    ({"gralora_dropout": -0.1}, "config-value-range", "error"),
    ({"bias": None}, "config-value-type", "error"),
    ({"rank_pattern": {}}, "config-key-unsupported", "warning"),
    ({"peft_version": "0.18.1"}, "peft-version-unverified", "warning"),
    ({"peft_version": "latest"}, "peft-version-unverified", "warning"),
    ({"peft_version": "0.20.1.dev0@UNKNOWN"}, *NONE),
    ({"peft_type": "LOHA"}, "peft-type-unsupported", "error"),
    ({"peft_type": 3}, "peft-type-unknown", "error"),
    # adapters 1.3.0, save_adapter
    (
        {"peft_type": ..., "config": {"r": 8}, "model_class": "BertModel"},
        "peft-type-unsupported",
        "error",
    ),
    ({"gralora_alpha": 16}, *NONE),
    ({"gralora_alpha": 8}, "fork-config", "error"),
    ({"auto_mapping": "x"}, "config-value-type", "error"),
    ({"target_modules": "all-linear"}, *NONE),
    ({"modules_to_save": []}, *NONE),
    ({"task_type": "SEQ_CLS"}, *NONE),
    ({"target_modules": ["q_proj", "q_proj"]}, "target-duplicate", "note"),
]
LORA_ROWS: list[tuple[Mapping[str, Any], str, str]] = [
    ({}, *NONE),
    ({"lora_alpha": ...}, "alpha-missing", "error"),
    ({"r": ...}, "config-key-missing", "warning"),
    ({"r": 0}, "config-value-range", "error"),
    ({"rank_pattern": None, "alpha_pattern": None}, *NONE),
    ({"rank_pattern": []}, "config-value-type", "error"),
    ({"rank_pattern": {"q": 2.0}}, "config-value-type", "error"),
    ({"rank_pattern": {"q": 0}}, "config-value-range", "error"),
    ({"rank_pattern": {"(": 2}}, "target-regex-invalid", "error"),
    ({"alpha_pattern": {"q": "2"}}, "config-value-type", "error"),
    ({"alpha_pattern": {"q": 10**400}}, "config-value-range", "error"),
    ({"alpha_pattern": {"q": 0}}, "alpha-zero", "warning"),
    ({"use_rslora": "yes"}, "config-value-type", "error"),
    ({"exclude_modules": 3}, "config-value-type", "error"),
    ({"init_lora_weights": 3}, "config-value-type", "error"),
    ({"bias": "lora_only"}, *NONE),
    ({"bias": "gralora_only"}, "bias-mode-alias", "warning"),
]


def changed(good: Mapping[str, Any], different: Mapping[str, Any]) -> dict[str, Any]:
    """`good` with other values; `...` removes a field."""
    return {name: value for name, value in {**good, **different}.items() if value is not ...}


def require(file: ConfigFile, code: str, severity: str) -> None:
    found = {(f.code, f.severity) for f in file.findings}
    assert found == ({(code, severity)} if code else set()), file.findings
    assert (file.config is None) is (severity == "error")


# what the config alone says of three rows, of which the tensors then say more
ALONE = {
    9: ("config-key-missing", "warning"),
    11: ("config-key-missing", "warning"),
    67: ("alpha-missing", "error"),
}


def difference(row: int) -> dict[str, Any]:
    """What a row of the table of defects has otherwise in its config; `...` is a removed field."""
    parts = Parts(Path())
    DEFECTS[row][0](parts)
    names = {*CONFIG, *parts.config}
    found = {name: parts.config.get(name, ...) for name in names}
    return {name: value for name, value in found.items() if value is not CONFIG.get(name, ...)}


@pytest.mark.parametrize("row", DEFECTS)
def test_every_defect_of_a_config_has_its_verdict(row: int) -> None:
    _, code, severity = DEFECTS[row]
    if row not in TOLD_BY_CONFIG:
        code, severity = ALONE.get(row, NONE)
    require(parse_config(changed(GOOD, difference(row)), CONFIG_NAME), code, severity)


@pytest.mark.parametrize(("different", "code", "severity"), MORE)
def test_more_defects(different: Mapping[str, Any], code: str, severity: str) -> None:
    require(parse_config(changed(GOOD, different), CONFIG_NAME), code, severity)


@pytest.mark.parametrize(("different", "code", "severity"), LORA_ROWS)
def test_defects_of_lora_configs(different: Mapping[str, Any], code: str, severity: str) -> None:
    require(parse_config(changed(LORA, different), CONFIG_NAME), code, severity)


def test_all_defects_are_told_at_once() -> None:
    values = changed(GOOD, {"r": "8", "alpha": None, "bias": "x", "task_type": "y"})
    codes = [finding.code for finding in parse_config(values, CONFIG_NAME).findings]
    assert sorted(codes) == [
        "bias-mode-unknown", "config-value-type", "config-value-type", "task-type-unknown",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "different",
    [
        different
        for different, _, severity in [
            *((difference(row), *TOLD_BY_CONFIG[row][1:]) for row in TOLD_BY_CONFIG), *MORE
        ]
        if severity == "error" and ... not in different.values()
        and different.keys() <= GraloraConfig.field_names()
    ],
)  # fmt: skip
def test_the_constructor_refuses_what_validation_calls_an_error(
    different: Mapping[str, Any],
) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        GraloraConfig(**{**GOOD, **different})
    assert caught.value.findings


@given(st.dictionaries(st.sampled_from(sorted({*GOOD, *LORA, "gralora_alpha"})), json_values))
def test_no_json_makes_it_fail(different: dict[str, Any]) -> None:
    for good in (GOOD, LORA, AUTHORS):
        file = parse_config({**good, **different}, CONFIG_NAME)
        assert file.config is not None or any(f.severity == "error" for f in file.findings)
        if isinstance(file.config, GraloraConfig):
            assert math.isfinite(file.config.scaling)
            assert GraloraConfig.from_dict(json.loads(file.config.to_json())) == file.config


# the original authors' dialect --------------------------------------------------------------------


@pytest.mark.parametrize(("r", "hybrid_r"), [(8, 0), (8, 2), (16, 4)])
def test_the_authors_config_keeps_its_meaning(r: int, hybrid_r: int) -> None:
    file = parse_config({**AUTHORS, "r": r, "hybrid_r": hybrid_r}, CONFIG_NAME)
    config = file.config
    assert isinstance(config, GraloraConfig)
    assert (config.r, config.hybrid_r, config.gralora_k) == (r - hybrid_r, hybrid_r, 2)
    assert config.scaling == 16 / r
    assert file.dialect == "authors"
    assert {(f.code, f.severity) for f in file.findings} == {
        ("fork-config", "note"), ("peft-version-missing", "note"),
    }  # fmt: skip
    assert config.to_dict()["alpha"] == 16
    assert "gralora_alpha" not in config.to_dict()


@pytest.mark.parametrize(
    ("different", "code"),
    [
        ({"hybrid_r": 8}, "config-value-range"),
        ({"hybrid_r": 3}, "rank-not-divisible"),
        ({"r": True}, "config-value-type"),
        ({"r": "8"}, "config-value-type"),
        ({"gralora_alpha": None}, "config-value-type"),
    ],
)
def test_broken_authors_configs_are_errors(different: Mapping[str, Any], code: str) -> None:
    file = parse_config({**AUTHORS, **different}, CONFIG_NAME)
    assert [f.code for f in file.findings if f.severity == "error"] == [code]


def test_an_authors_config_without_blocks_is_called_a_lora() -> None:
    found = parse_config({**AUTHORS, "r": 8, "hybrid_r": 8}, CONFIG_NAME).findings
    (problem,) = [finding for finding in found if finding.severity == "error"]
    assert problem.code == "config-value-range"
    assert "hybrid_r=8 is the whole rank" in problem.message


def test_the_authors_default_rank_is_theirs() -> None:
    config = parse_config(changed(AUTHORS, {"r": ...}), CONFIG_NAME).config
    assert isinstance(config, GraloraConfig)
    assert config.r == 6


# files --------------------------------------------------------------------------------------------

FILES: Mapping[str, tuple[bytes, str]] = {
    "list": (b"[1, 2]", "config-not-object"),
    "truncated": (json.dumps(GOOD).encode()[:100], "config-not-json"),
    "twice": (b'{"r": 8, "r": 4}', "config-duplicate-key"),
    "bom": (b"\xef\xbb\xbf{}", "config-bom"),
    "nan": (b'{"alpha": NaN}', "config-non-finite"),
    "deep": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "config-not-json"),
    "long number": (b'{"r": ' + b"9" * 10_000 + b"}", "config-non-finite"),
    "empty": (b"", "config-not-json"),
    "latin": (b'{"a": "\xff"}', "config-not-json"),
}


@pytest.mark.parametrize("name", FILES)
def test_unreadable_files_have_a_code(name: str, tmp_path: Path) -> None:
    content, code = FILES[name]
    (tmp_path / CONFIG_NAME).write_bytes(content)
    require(read_config(tmp_path), code, "error")


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).mkdir()
    require(read_config(tmp_path), "config-unreadable", "error")


@pytest.mark.parametrize(
    ("inner", "words"),
    [([], "Is this"), (["my_ad"], "my_ad' holds an adapter"), (["b", "a"], "a, b hold adapters")],
)
def test_a_missing_file_names_the_sub_folders_that_have_one(
    inner: list[str], words: str, tmp_path: Path
) -> None:
    for name in inner:
        GraloraConfig(target_modules=["q"]).save_pretrained(tmp_path / name)
    file = read_config(tmp_path)
    require(file, "config-missing", "error")
    assert words in file.findings[0].hint


# LoRA features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("different", "features"),
    [
        ({}, ()),
        ({"init_lora_weights": "gaussian", "exclude_modules": ["v"]}, ()),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, ()),
        ({"layer_replication": None, "loftq_config": {}, "megatron_core": "megatron.core"}, ()),
        ({"use_dora": True}, ("use_dora",)),
        ({"lora_bias": True, "use_qalora": True}, ("lora_bias", "use_qalora")),
        ({"target_parameters": ["experts.up"]}, ("target_parameters",)),
        ({"layer_replication": [[0, 1]]}, ("layer_replication",)),
        ({"never_heard_of": {"a": 1}}, ("never_heard_of",)),
        ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights=pissa_niter_4, which "
                                                  "changed the base",)),
    ],
)  # fmt: skip
def test_features_beyond_the_factors_are_named(
    different: Mapping[str, Any], features: tuple[str, ...]
) -> None:
    assert LoraConfig.from_dict({**LORA, **different}).unsupported_features() == features


def test_everything_that_peft_can_write_about_lora_is_known() -> None:
    peft = pytest.importorskip("peft")
    values = json.loads(json.dumps(peft.LoraConfig(target_modules="q").to_dict(), default=list))
    assert LoraConfig.from_dict(values).unsupported_features() == ()


def test_patterns_that_are_slow_to_compile_cost_little() -> None:
    """Each of them takes Python's `re` a second."""
    patterns = {f"x{i}" + "(?i:[\x01-\uffff])" * 200: 4 for i in range(40)}
    started = time.process_time()
    assert parse_config(changed(LORA, {"rank_pattern": patterns}), CONFIG_NAME).config is not None
    assert time.process_time() - started < 5
    patterns |= {f"x{i}" + "(a|b)" * 3000: 4 for i in range(100)}
    file = parse_config(changed(LORA, {"rank_pattern": patterns}), CONFIG_NAME)
    require(file, "target-regex-invalid", "error")


def test_all_patterns_of_a_config_have_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "REGEX_SECONDS", 0.2)
    slow = {f"x{i}|(.|[a-z])*(.|[a-z])*[XY]": 2 for i in range(100)}
    config = LoraConfig(rank_pattern=slow, target_modules=["q"])
    started = time.process_time()
    with pytest.raises(UnsupportedError, match="takes too long"):
        config.scaling("a" * 200)
    assert time.process_time() - started < 2


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "REGEX_SECONDS", 0.05)
    config = LoraConfig(rank_pattern={"(a|aa)+": 2}, target_modules=["q"])
    with pytest.raises(UnsupportedError, match="takes too long"):
        config.scaling("a" * 60 + "!")
