"""Keys: what PEFT writes, every other spelling, names that look like keys, and the way back."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from gralora_convert.adapters.keys import PREFIX, Method, Role, key_of, parse_key
from gralora_convert.errors import UnsupportedError

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
M = "model.layers.0.self_attn.q_proj"
GRALORA: list[Role] = ["A", "B", "general_A", "general_B", "bias", "base_weight"]
LORA: list[Role] = ["A", "B", "lora_bias", "magnitude", "embedding_A", "embedding_B"]
FACTORS: list[tuple[Role, Method]] = [(role, "gralora") for role in GRALORA[:4]]
FACTORS += [(role, "lora") for role in LORA]

# words that modules may have although PEFT's keys have them, too
words = st.sampled_from(
    ["layers", "0", "11", "q_proj", "default", "module", "weight", "gralora_A", "gralora_B", "my",
     "gralora_x", "lora_A", "base_model", "model", "gralora_A_general", "embed_tokens", "bias"]
)  # fmt: skip
modules = st.lists(words, min_size=1, max_size=5).map(".".join)


@given(modules, st.sampled_from(FACTORS))
def test_a_key_that_is_written_is_understood(module: str, factor: tuple[Role, Method]) -> None:
    role, method = factor
    parsed = parse_key(key_of(module, role, method))
    assert (parsed.name, parsed.role, parsed.method) == (module, role, method)
    assert parsed.prefixed
    assert parsed.adapter_name is None
    assert parsed.wrappers == ()


@pytest.mark.parametrize("role", ["bias", "base_weight"])
def test_base_layer_keys_are_understood(role: Role) -> None:
    assert (parse_key(key_of(M, role)).name, parse_key(key_of(M, role)).role) == (M, role)


@given(modules, st.sampled_from(FACTORS), st.sampled_from(["default", "my", "a-b"]))
def test_the_name_of_an_adapter_is_found(
    module: str, factor: tuple[Role, Method], name: str
) -> None:
    role, method = factor
    key = key_of(module, role, method)
    leaf = key.removeprefix(f"{PREFIX}{module}.").split(".")
    named = ".".join([PREFIX + module, leaf[0], name, *leaf[1:]])
    parsed = parse_key(named)
    assert (parsed.role, parsed.method) == (role, method)
    assert (parsed.name, parsed.adapter_name) == (module, name)


@pytest.mark.parametrize(
    ("key", "wrappers"),
    [
        (f"module.{PREFIX}{M}.gralora_A", ("module",)),
        (f"module.module.{PREFIX}{M}.gralora_A", ("module",)),
        (f"_orig_mod.{PREFIX}{M}.gralora_A", ("_orig_mod",)),
        (f"{PREFIX}_orig_mod.{M}.gralora_A", ("_orig_mod",)),
        (f"base_model.model._fsdp_wrapped_module.{M}.gralora_A", ("_fsdp_wrapped_module",)),
        (
            f"{PREFIX}model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.gralora_A",
            ("_checkpoint_wrapped_module",),
        ),
        (f"_orig_mod.module.{PREFIX}{M}.gralora_A", ("_orig_mod", "module")),
        (f"{PREFIX}{M}._fsdp_wrapped_module.gralora_A", ("_fsdp_wrapped_module",)),
    ],
)
def test_wrappers_are_taken_out_and_named(key: str, wrappers: tuple[str, ...]) -> None:
    parsed = parse_key(key)
    assert (parsed.name, parsed.role, parsed.prefixed) == (M, "A", True)
    assert parsed.wrappers == wrappers


@pytest.mark.parametrize("role", FACTORS)
def test_a_missing_prefix_is_told(role: tuple[Role, Method]) -> None:
    parsed = parse_key(key_of(M, *role).removeprefix(PREFIX))
    assert (parsed.name, parsed.role, parsed.prefixed) == (M, role[0], False)


@pytest.mark.parametrize(
    ("path", "leaf"),
    [
        (f"{M}.gralora_A.weight", "gralora_A"),
        (f"{M}.gralora_B.default.weight", "gralora_B"),
        (f"{M}.gralora_A_general", "gralora_A_general"),
        (f"{M}.gralora_C", "gralora_C"),
        (f"{M}.lora_A", "lora_A"),
        (f"{M}.lora_embedding_A.weight", "lora_embedding_A"),
        (f"{M}.hada_w1_a", "hada_w1_a"),
        (f"{M}.lokr_w1", "lokr_w1"),
        (f"{M}.vera_lambda_b", "vera_lambda_b"),
        (f"{M}.ia3_l", "ia3_l"),
        (f"{M}.oft_R.default.weight", "oft_R"),
        (f"{M}.lora_monteclora_sampler.std_prior", "lora_monteclora_sampler"),
        ("embed.token_adapter.trainable_tokens_delta", "trainable_tokens_delta"),
        ("prompt_embeddings", "prompt_embeddings"),
    ],
)
def test_foreign_keys_are_named(path: str, leaf: str) -> None:
    parsed = parse_key(PREFIX + path)
    assert (parsed.role, parsed.leaf, parsed.name) == ("foreign", leaf, path)


@pytest.mark.parametrize(
    "path",
    ["score.weight", "model.norm.weight", "prompt_encoder.mask.bias", "default.weight", "bias",
     "shadow.weight", "model.module.weight"],
)  # fmt: skip
def test_full_tensors_keep_their_path(path: str) -> None:
    parsed = parse_key(key_of(path, "parameter"))
    assert (parsed.name, parsed.role, parsed.copy_of) == (path, "parameter", ())


@pytest.mark.parametrize(
    ("path", "copy_of"),
    [
        ("head.modules_to_save.bias", ("head.bias",)),
        ("head.modules_to_save.default.bias", ("head.default.bias", "head.bias")),
        ("head.modules_to_save.dense.bias", ("head.dense.bias", "head.bias")),
        ("head.modules_to_save.my.dense.bias", ("head.my.dense.bias", "head.dense.bias")),
        ("head.original_module.dense.bias", ("head.dense.bias",)),
    ],
)
def test_keys_inside_a_saved_modules_wrapper(path: str, copy_of: tuple[str, ...]) -> None:
    assert parse_key(PREFIX + path).copy_of == copy_of


ANY_ROLE = st.sampled_from(["A", "B", "general_A", "bias", "base_weight", "parameter"])
ODD_WORD = st.sampled_from(
    ["lora_A", "gralora_B", "weight", "bias", "base_layer", "modules_to_save", "head", "0"]
)


@given(st.lists(ODD_WORD, min_size=1, max_size=4), ANY_ROLE)
def test_a_key_is_written_only_if_it_reads_back(words: list[str], role: Role) -> None:
    module = ".".join(words)
    key = None
    with contextlib.suppress(UnsupportedError):
        key = key_of(module, role)
    if key is not None:
        assert (parse_key(key).name, parse_key(key).role) == (module, role)


@pytest.mark.parametrize("name", ["mlp.lora_A.bias", "mlp.gralora_B", "head.base_layer.weight"])
def test_a_parameter_with_the_name_of_a_factor_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no adapter can hold its parameter"):
        key_of(name, "parameter")


@given(st.text() | st.lists(words | st.just(""), max_size=6).map(".".join))
def test_no_key_makes_it_fail(key: str) -> None:
    assert parse_key(key).key == key
    assert parse_key(PREFIX + key).key == PREFIX + key


@pytest.mark.parametrize(
    "file", sorted(FIXTURES.glob("peft-*/**/*.safetensors")), ids=lambda p: p.parent.name
)
def test_every_key_that_peft_wrote_is_understood(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        for key in opened.keys():
            parsed = parse_key(key)
            assert parsed.role != "foreign"
            assert parsed.prefixed
            if not parsed.copy_of:
                assert key_of(parsed.name, parsed.role, parsed.method or "gralora") == key
