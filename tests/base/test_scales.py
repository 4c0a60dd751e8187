"""fp8 weights: every code, every layout of scales, any height of tiles; what is refused, and what
the config of the output lists."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gralora_convert.base import scales_of
from gralora_convert.base.scales import misread
from gralora_convert.disk import Checkpoint, Scale, decode, read_rows, read_torch
from gralora_convert.output.tiles import CastTensor
from tests import quantised
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok

UP = "layers.0.up"
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
E4M3 = torch.float8_e4m3fn


def test_every_code_means_what_torch_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = torch.empty(16, 16)
    decode(codes.view(torch.int8), values, torch.empty(16, 16, dtype=torch.int16))
    assert torch.equal((values * 256).nan_to_num(7.0), codes.view(E4M3).float().nan_to_num(7.0))
    assert int(values.isnan().sum()) == 2


@pytest.mark.parametrize("name", ["channel", "block"])
def test_blocks_that_do_not_divide_the_sizes_are_read_as_their_writer_does(
    name: str, tmp_path: Path
) -> None:
    """80 and 112 rows in blocks of 32: the last ones are short, at both ends."""
    model = quantised.llama(hidden_size=80, intermediate_size=112, head_dim=20)
    plain = quantised.write(tmp_path, f"ct {name}", model)
    specs = scales_of(Checkpoint.open(tmp_path)).specs
    assert specs.keys() == plain.keys()
    for tensor, value in plain.items():
        assert torch.equal(read_torch(specs[tensor]), value), tensor
        assert torch.equal(read_rows(specs[tensor], 7, 38), value[7:38]), tensor


SCALES = st.sampled_from(["F32", "BF16", "F16", "F8_E8M0"])
TORCH = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@given(
    rows=st.integers(1, 70), columns=st.integers(1, 70), tall=st.integers(1, 40),
    wide=st.integers(1, 40), dtype=SCALES, height=st.integers(1, 70), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_tile_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, tall: int, wide: int,
    dtype: str, height: int, seed: int,
) -> None:  # fmt: skip
    """Law: element (i, j) is code times scale (i // tall, j // wide), rounded once, whatever rows
    are read together."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, columns, generator=g).mul(100).clamp(-448, 448).to(E4M3)
    sizes = -(-rows // tall), -(-columns // wide)
    scales = torch.rand(sizes, generator=g).add(0.01).to(TORCH[dtype])
    folder = tmp_path_factory.mktemp("tiles")
    write_model(folder, {"a.weight": codes, "a.weight_scale_inv": scales})
    edit = {"quant_method": "fp8", "weight_block_size": [tall, wide]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": edit}))
    (spec,) = scales_of(Checkpoint.open(folder)).specs.values()
    grid = scales.float().repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    wanted = codes.float() * grid
    tiles = CastTensor(spec, "BF16")
    tiles.tile_rows, tiles.count = height, -(-rows // height)
    made = b"".join(bytes(tiles.produce(tile)) for tile in range(tiles.count))
    assert torch.equal(
        torch.frombuffer(bytearray(made), dtype=torch.bfloat16).view(rows, columns),
        wanted.bfloat16(),
    )


@pytest.mark.parametrize(
    ("shape", "scales", "block", "wanted"),
    [
        ((192, 256), (2, 2), (128, 128), (128, 128)),
        ((320, 576), (3, 5), (128, 128), (128, 128)),
        ((320, 576), (), (128, 128), (320, 576)),
        ((320, 576), (1, 1), None, (320, 576)),
        ((320, 576), (320, 1), None, (1, 576)),
        ((320, 576), (320,), None, (1, 576)),
        ((256, 256), (2, 1, 2, 1), (128, 128), (128, 128)),
        ((192, 256), (2, 2), None, None),
        ((192, 256), (3, 2), (128, 128), None),
        ((192, 256), (192, 2), (128, 128), None),
    ],
)
def test_blocks_are_those_of_the_config(
    shape: tuple[int, int], scales: tuple[int, ...], block: Any, wanted: Any, tmp_path: Path
) -> None:
    write_model(
        tmp_path, {"a.weight": torch.zeros(shape).to(E4M3), "a.weight_scale": torch.ones(scales)}
    )
    settings = {"quant_method": "fp8", "weight_block_size": block}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    found = scales_of(Checkpoint.open(tmp_path))
    if wanted is None:
        assert "do not fit" in found.problems["a.weight"]
    else:
        scale = found.specs["a.weight"].scale
        assert isinstance(scale, Scale)
        assert (scale.rows, scale.columns) == wanted


# refusals -----------------------------------------------------------------------------------------


def base(folder: Path, more: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    """A base whose layers.0.up is codes in blocks of 16 with scales."""
    tensors = write_base(folder, **(FP8 | config))
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(E4M3)
    tensors[f"{UP}.weight_scale_inv"] = torch.full((2, 2), 0.5)
    tensors |= more or {}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    write_model(folder, tensors, **(FP8 | config))
    return tensors


def method(name: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **settings}}


def groups(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": weights}}}


FLOAT8 = {"type": "float", "num_bits": 8}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "two scales": ({f"{UP}.weight_scale": torch.ones(1)}, {}, "one scale was needed"),
    "no scale": ({f"{UP}.weight_scale_inv": None}, {}, "no scale beside it"),
    "unknown shape": ({f"{UP}.weight_scale_inv": torch.ones(3, 2)}, {}, "which do not fit"),
    "dtype of scales": (
        {f"{UP}.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, {},
        "scales of dtype I32",
    ),
    "zero point": ({f"{UP}.weight_zero_point": torch.zeros(1)}, {}, "weight_zero_point beside it"),
    "other codes": (
        {f"{UP}.weight": torch.zeros(SHAPES[UP]).to(torch.float8_e5m2)}, {}, "F8_E5M2",
    ),
    "format": ({}, method("fp8", fmt="e5m2"), "format 'e5m2'"),
    "block": ({}, method("fp8", weight_block_size=[0, 16]), "blocks of the size [0, 16]"),
    "method": ({}, method("fbgemm_fp8"), "quantised by 'fbgemm_fp8'"),
    "rotated": (
        {}, method("compressed-tensors", **groups(**FLOAT8), transform_config={"a": 1}),
        "transform_config",
    ),
    "integers": ({}, method("compressed-tensors", **groups(type="int", num_bits=8)), "8-bit float"),
    "groups disagree": (
        {}, method("compressed-tensors", config_groups={
            "a": {"weights": {**FLOAT8, "block_structure": [16, 16]}}, "b": {"weights": FLOAT8},
        }), "different block_structure",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused_by_name_and_left_alone_elsewhere(
    case: str, tmp_path: Path
) -> None:
    tensors, config, word = WRONG[case]
    base(tmp_path / "base", tensors, **config)
    write_adapter(tmp_path / "adapter", {UP: random_delta(*SHAPES[UP])})
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    for command in (["validate"], ["merge", "-o", tmp_path / "out"]):
        outcome = run(command[0], *arguments, *command[1:])
        assert outcome.status == (1 if command[0] == "validate" else 2)
        said = outcome.stdout + outcome.stderr
        assert "base-quantised" in said
        assert word in said
        assert UP in said
    assert not (tmp_path / "out").exists()
    write_adapter(tmp_path / "other", {"layers.1.up": random_delta(*SHAPES["layers.1.up"])})
    run_ok("merge", tmp_path / "other", "--base", tmp_path / "base", "-o", tmp_path / "out")
    refused = run(
        "merge", tmp_path / "other", "--base", tmp_path / "base", "-o", tmp_path / "cast",
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert refused.status == 2
    assert "cannot be written as bfloat16" in refused.stderr
    assert not (tmp_path / "cast").exists()


@pytest.mark.parametrize("what", ["scale", "code"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_ends_the_merge(what: str, value: float, tmp_path: Path) -> None:
    held = base(tmp_path / "base")
    if what == "scale":
        held[f"{UP}.weight_scale_inv"][1, 1] = value
    else:
        held[f"{UP}.weight"].view(torch.uint8)[5, 7] = 0xFF if value > 0 else 0x7F
    write_model(tmp_path / "base", held, **FP8)
    write_adapter(tmp_path / "adapter", {UP: random_delta(*SHAPES[UP])})
    outcome = run(
        "merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out"
    )
    assert outcome.status == 2
    assert UP in outcome.stderr
    assert "NaN" in outcome.stderr
    assert not (tmp_path / "out").exists()


# the config of the output -------------------------------------------------------------------------


def merged_config(folder: Path, targets: list[str], model: Any, **quantisation: Any) -> Any:
    plain = quantised.write(folder / "base", "fp8 blocks", model)
    config = json.loads((folder / "base" / "config.json").read_text())
    held = config["quantization_config"] | quantisation
    quantised.edit(folder / "base", quantization_config=held)
    quantised.adapt(quantised.plain_model(folder / "base", plain), folder / "adapter", targets)
    run_ok("merge", folder / "adapter", "--base", folder / "base", "-o", folder / "out")
    merged = Checkpoint.open(folder / "out")
    assert not list(misread(scales_of(Checkpoint.open(folder / "base")), merged, lambda: ()))
    return merged.config.get("quantization_config")


def test_a_first_list_names_the_head_and_all_that_is_plain(tmp_path: Path) -> None:
    found = merged_config(tmp_path, ["gate_proj"], quantised.llama(), modules_to_not_convert=None)
    pulled = [f"model.layers.{i}.mlp.{leaf}" for i in (0, 1) for leaf in ("gate_proj", "up_proj")]
    assert found["modules_to_not_convert"] == ["lm_head", *pulled]


def test_a_tied_head_is_named_in_a_first_list(tmp_path: Path) -> None:
    model = quantised.llama(tie_word_embeddings=True)
    found = merged_config(tmp_path, ["gate_proj"], model, modules_to_not_convert=None)
    assert "lm_head" in found["modules_to_not_convert"]


def test_entries_stay_and_both_lists_are_kept(tmp_path: Path) -> None:
    lists = {"modules_to_not_convert": ["lm_head"], "ignored_layers": ["lm_head", "x"]}
    found = merged_config(tmp_path, ["down_proj"], quantised.llama(), **lists)
    own = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert found["modules_to_not_convert"] == ["lm_head", *own]
    assert found["ignored_layers"] == ["lm_head", "x", *own]


def test_where_all_become_plain_nothing_is_said_of_quantisation(tmp_path: Path) -> None:
    every = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert merged_config(tmp_path, every, quantised.llama()) is None
    assert not [n for n in Checkpoint.open(tmp_path / "out").tensors if "scale" in n]


STACK = "layers.0.mlp.experts.gate_up_proj"
DOWN = "layers.0.mlp.down"
OTHERS: dict[str, dict[str, torch.Tensor]] = {
    "stack": {STACK: torch.zeros(2, 32, 32).to(E4M3), f"{STACK}_scale_inv": torch.ones(2, 2, 2)},
    "packed": {
        f"{DOWN}.weight_packed": torch.zeros(32, 16, dtype=torch.uint8),
        f"{DOWN}.weight_scale": torch.ones(32, 2).to(E4M3),
        f"{DOWN}.weight_global_scale": torch.ones(1),
    },
    "integers": {
        f"{DOWN}.weight": torch.zeros(24, 32, dtype=torch.int8),
        f"{DOWN}.weight_scale": torch.ones(24, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_what_else_is_packed_keeps_its_config_where_all_matrices_become_plain(
    other: str, tmp_path: Path
) -> None:
    base(tmp_path / "base", OTHERS[other])
    write_adapter(tmp_path / "adapter", {UP: random_delta(*SHAPES[UP])})
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    run_ok("merge", *arguments, "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert UP in config["quantization_config"]["modules_to_not_convert"]
    checked = [*arguments, "--merged", tmp_path / "out", "--level", "modules"]
    run_ok("verify", *checked)
    quantised.edit(tmp_path / "out", quantization_config=None)
    outcome = run("verify", *checked)
    assert outcome.status == 1
    assert "no quantization_config says how they are read" in outcome.stdout
    outcome = run("merge", *arguments, "-o", tmp_path / "cast", "--dtype", "bfloat16")
    assert outcome.status == 2
    assert "cannot be written as bfloat16" in outcome.stderr


@pytest.mark.parametrize("others", [False, True])
def test_a_config_that_says_it_twice_is_edited_twice(others: bool, tmp_path: Path) -> None:
    up = "layers.1.up"
    more = {f"{up}.weight": torch.zeros(SHAPES[up]).to(E4M3)}
    more |= {f"{up}.weight_scale_inv": torch.ones(2, 2)}
    base(tmp_path / "base", more if others else {}, text_config=FP8)
    write_adapter(tmp_path / "adapter", {UP: random_delta(*SHAPES[UP])})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in (config, config["text_config"]):
        held = part.get("quantization_config")
        assert (UP in held["modules_to_not_convert"]) if others else held is None


@pytest.mark.parametrize("coded", [False, True])
def test_a_config_beside_the_adapter_does_not_decide_how_weights_are_read(
    coded: bool, tmp_path: Path
) -> None:
    """Trained on the decoded model, or on one that was quantised when it was loaded."""
    if coded:
        base(tmp_path / "base", model_type="x")
    else:
        write_base(tmp_path / "base", model_type="x")
    name = "layers.1.up"
    write_adapter(tmp_path / "adapter", {name: random_delta(*SHAPES[name])})
    beside = {"model_type": "x", **({} if coded else method("bitsandbytes", load_in_4bit=True))}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(beside))
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    run_ok("merge", *arguments, "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config") == (FP8["quantization_config"] if coded else None)
    quantised.edit(tmp_path / "out", quantization_config=beside.get("quantization_config"))
    checked = [*arguments, "--merged", tmp_path / "out", "--level", "modules"]
    assert run("verify", *checked).status == 1


def test_a_pattern_of_a_merged_config_that_is_none_is_refused(tmp_path: Path) -> None:
    base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", {UP: random_delta(*SHAPES[UP])})
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    run_ok("merge", *arguments, "-o", tmp_path / "out")
    quantised.edit(tmp_path / "out", **method("compressed-tensors", ignore=["re:["]))
    outcome = run("verify", *arguments, "--merged", tmp_path / "out", "--level", "modules")
    assert outcome.status == 2
    assert "'[' is no regular expression" in outcome.stderr


def test_one_expert_pulls_all_of_its_layer(tmp_path: Path) -> None:
    """As published by DeepSeek: experts under their own names; a router that is plain."""
    names = [f"layers.0.mlp.experts.{i}.{leaf}" for i in range(3) for leaf in ("up_proj", "down")]
    tensors: dict[str, torch.Tensor] = {}
    for name in [*names, "layers.1.mlp.experts.0.up_proj"]:
        tensors[f"{name}.weight"] = torch.randn(32, 48).to(E4M3)
        tensors[f"{name}.weight_scale_inv"] = torch.ones(2, 3)
    tensors["layers.0.mlp.gate.weight"] = torch.randn(3, 48)
    write_model(tmp_path / "base", tensors, **FP8)
    write_adapter(tmp_path / "adapter", {names[2]: random_delta(32, 48)})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    plain = {n for n, spec in merged.tensors.items() if spec.dtype == "BF16"}
    assert plain == {f"{name}.weight" for name in names}
    assert merged.tensors["layers.1.mlp.experts.0.up_proj.weight"].dtype == "F8_E4M3"


def test_names_of_text_only_loads_are_listed_too(tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.down_proj"
    other = "model.language_model.layers.1.mlp.down_proj"
    tensors = {f"{n}.weight": torch.randn(32, 48).to(E4M3) for n in (name, other)}
    tensors |= {f"{n}.weight_scale_inv": torch.ones(2, 3) for n in (name, other)}
    write_model(tmp_path / "base", tensors, text_config=FP8)
    write_adapter(tmp_path / "adapter", {name: random_delta(32, 48)})
    run_ok("merge", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    listed = config["text_config"]["quantization_config"]["modules_to_not_convert"]
    assert {name, "model.layers.0.mlp.down_proj"} <= set(listed)
    assert other not in listed


def test_a_cache_in_fp8_is_given_up_with_the_last_codes(tmp_path: Path) -> None:
    base(tmp_path / "base", {"layers.0.attn.k_scale": torch.ones(1)})
    write_adapter(tmp_path / "adapter", {UP: random_delta(*SHAPES[UP])})
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    run_ok("merge", *arguments, "-o", tmp_path / "out", "--dtype", "float32")
    merged = Checkpoint.open(tmp_path / "out")
    assert not [name for name in merged.tensors if "scale" in name]
    assert "quantization_config" not in merged.config
    run_ok("verify", *arguments, "--merged", tmp_path / "out", "--level", "modules")


def test_inspect_and_a_dry_run_say_what_a_merge_would_do(tmp_path: Path) -> None:
    plain = quantised.write(tmp_path / "base", "ct tensor")
    quantised.adapt(
        quantised.plain_model(tmp_path / "base", plain), tmp_path / "adapter", ["q_proj"]
    )
    assert "reads its 14 fp8 weights" in run_ok("inspect", tmp_path / "base").stdout
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base"]
    told = run_ok("merge", *arguments, "-o", tmp_path / "out", "--dry-run").stdout
    assert "8 of its 14 fp8 weights become BF16, 2 that are adapted and 6" in told
    assert "base-calibrated" in told
    assert "base-quantised-read" in run_ok("validate", *arguments).stdout
    receipt = json.loads(run_ok("merge", *arguments, "-o", tmp_path / "out", "--json").stdout)
    assert any("8 of its 14 fp8 weights" in note for note in receipt["notes"])


def test_dora_on_an_fp8_base_takes_the_decoded_weight(tmp_path: Path) -> None:
    """Its magnitudes are divided by the norms of the base's rows."""
    from peft import LoraConfig, get_peft_model

    plain = quantised.write(tmp_path / "base", "fp8 blocks")
    model = quantised.plain_model(tmp_path / "base", plain)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    run_ok(
        "convert", tmp_path / "adapter", "--to", "lora", "--r", "64", "--base", tmp_path / "base",
        "-o", tmp_path / "lora",
    )  # fmt: skip
    ids = torch.tensor([[1, 2, 3, 4]])
    wanted = adapted.eval()(ids).logits
    run_ok(
        "merge", tmp_path / "lora", "--base", tmp_path / "base", "-o", tmp_path / "out",
        "--dtype", "float32",
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert float((found - wanted).abs().max()) < 1e-4
