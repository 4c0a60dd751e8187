"""`extract`: the adapter between two checkpoints, in real PEFT and against the dense optimum."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import gralora_convert as gc
from gralora_convert.delta.products import dense
from gralora_convert.errors import MisuseError
from tests import oracle
from tests.builders import SHAPES, random_delta, write_adapter, write_base, write_model
from tests.command import run, run_ok
from tests.verbs.test_conversion import in_peft
from tests.zoo import ARCHITECTURES, Architecture, close, load, outputs, save_base, train


def tune(base: Path, auto: str, folder: Path, *, everything: bool) -> None:
    """A full fine-tune of a few steps (of the linear layers, or of all parameters)."""
    model = load(base, auto)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if everything or (parameter.ndim == 2 and "embed" not in name and "wte" not in name
                              and "wpe" not in name and "lm_head" not in name):  # fmt: skip
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-tied", "t5"])
@pytest.mark.parametrize(
    ("to", "shape"),
    [("lora", ["--r", "16"]), ("gralora", ["--k", "2", "--r", "16"])],
    ids=["lora", "gralora"],
)
@pytest.mark.parametrize("everything", [False, True], ids=["linear", "everything"])
def test_a_full_rank_extract_is_the_tuned_model_in_peft(
    everything: bool, to: str, shape: list[str], name: str, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = save_base(architecture, tmp_path / "base")
    tune(base, architecture.auto, tmp_path / "tuned", everything=everything)
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", to, *shape]
    run_ok("extract", *pair, "-o", tmp_path / "adapter")
    expected = outputs(load(tmp_path / "tuned", architecture.auto), architecture.inputs)
    if "tied" in name or name in ("gpt2", "t5"):  # PEFT warns of a saved embedding that is tied
        adapted = PeftModel.from_pretrained(load(base, architecture.auto), tmp_path / "adapter")
    else:
        adapted = in_peft(base, tmp_path / "adapter")
    assert close(outputs(adapted, architecture.inputs), expected) <= 2e-5
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    merged = load(tmp_path / "merged", architecture.auto)
    assert close(outputs(merged, architecture.inputs), expected) <= 2e-5


def test_what_was_merged_is_found_again(tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    chosen = Architecture(ARCHITECTURES["llama"].build, ["q_proj", "down_proj"])
    train(base, chosen, tmp_path / "adapter", gralora_k=2, r=4, alpha=8)
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "tuned")
    found = run_ok(
        "extract", "--base", base, "--tuned", tmp_path / "tuned", "--to", "gralora", "--r", "4",
        "-o", tmp_path / "again", "--json",
    ).json  # fmt: skip
    assert isinstance(found["error"], float)
    assert found["error"] < 1e-5
    source, again = gc.Adapter.open(tmp_path / "adapter"), gc.Adapter.open(tmp_path / "again")
    assert source.modules == again.modules
    for module in source.modules:
        assert torch.allclose(dense(source.delta(module)), dense(again.delta(module)), atol=1e-6)


def test_the_error_is_the_optimum_of_each_block(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base")
    torch.manual_seed(5)
    moved = {f"{n}.weight": torch.randn(s) * 0.1 for n, s in SHAPES.items()}
    write_model(tmp_path / "tuned", tensors | {n: tensors[n] + d for n, d in moved.items()})
    receipt = run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned",
        "--to", "gralora", "--k", "2", "--r", "8", "-o", tmp_path / "out", "--json",
    ).json  # fmt: skip
    lost = total = 0.0
    for delta in moved.values():
        rows, columns = delta.shape
        blocks = delta.view(2, rows // 2, 2, columns // 2).transpose(1, 2)
        values = torch.linalg.svdvals(blocks.double()).square()
        lost, total = lost + float(values[..., 4:].sum()), total + float(values.sum())
    assert receipt["error"] == pytest.approx((lost / total) ** 0.5, rel=0.01)
    assert isinstance(receipt["lora_error"], float)


def test_include_exclude_and_nothing_to_do(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base")
    write_model(tmp_path / "tuned", {n: t + 0.01 * torch.randn_like(t) for n, t in tensors.items()})
    pair = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "4"]
    receipt = run_ok(
        "extract", *pair, "--exclude", "*.down", "--exclude", "embed*", "--exclude", "norm",
        "-o", tmp_path / "out", "--json",
    ).json  # fmt: skip
    assert [row["module"] for row in receipt["modules"]] == ["layers.0.up", "layers.1.up"]  # type: ignore[attr-defined]
    assert len([n for n in receipt["notes"] if "differs and was left out" in n]) == 3  # type: ignore[attr-defined]
    same = ["--base", tmp_path / "base", "--tuned", tmp_path / "base", "--to", "lora"]
    refused = run("extract", *same, "-o", tmp_path / "none")
    assert refused.status == 2
    assert "no linear layer differs" in refused.stderr


def test_include_writes_what_it_includes_and_nothing_else(tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    tune(base, ARCHITECTURES["llama"].auto, tmp_path / "tuned", everything=True)
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "16"]
    one, more = ["*.q_proj"], ["*.q_proj", "*.embed_tokens"]
    for patterns in (one, more):
        included = [word for pattern in patterns for word in ("--include", pattern)]
        run_ok("extract", *pair, *included, "-o", tmp_path / "out", "--overwrite")
        keys = load_file(tmp_path / "out/adapter_model.safetensors")
        modules = {re.sub(r"(\.lora_[AB])?\.weight$", "", key).rpartition(".")[2] for key in keys}
        assert modules == {pattern.removeprefix("*.") for pattern in patterns}


@pytest.mark.parametrize("resized", [False, True], ids=["same size", "longer vocabulary"])
def test_linear_layers_alone_are_a_lora_that_servers_take(
    resized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference that is left out is told: here by torch, from the two files."""
    llama = ARCHITECTURES["llama"]
    base = save_base(llama, tmp_path / "base")
    tune(base, llama.auto, tmp_path / "tuned", everything=True)
    if resized:
        model = load(tmp_path / "tuned", llama.auto)
        model.resize_token_embeddings(40)
        model.save_pretrained(tmp_path / "tuned")
    arguments = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "16"]
    done = run_ok("extract", *arguments, "--linear-only", "-o", tmp_path / "out")
    keys = load_file(tmp_path / "out/adapter_model.safetensors")
    assert keys
    assert all(re.search(r"_proj\.lora_[AB]\.weight$", key) for key in keys)
    assert "to serve: vllm serve" in done.stdout
    assert "layers.{0-1}.input_layernorm.weight (2) differ and were left out" in done.stderr

    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "tuned"))
    norms = {n: _distance2(before[n], after[n]) for n in before}
    left = sum(norm for name, norm in norms.items() if "_proj" not in name)
    share = (left / sum(norms.values())) ** 0.5
    assert f"left out is {share:.3g} of the difference (Frobenius, relative)" in done.stderr
    receipt = json.loads((tmp_path / "out/gralora_convert.json").read_text())
    assert receipt["left_out"] == pytest.approx(share, rel=1e-6)
    monkeypatch.setattr("gralora_convert.verbs.differences.NUMBERS", 64)  # a row at a time
    plan = gc.extract(base=base, tuned=tmp_path / "tuned", to="lora", r=16, linear_only=True)
    assert any(f"left out is {share:.3g} of the difference" in note for note in plan.notes)
    assert not [part for file in plan.files for part in file.parts if "lora_" not in part.name]

    wanted = outputs(_with_linear_layers(load(base, llama.auto), after))
    assert close(outputs(in_peft(base, tmp_path / "out")), wanted) <= 2e-5


def _distance2(before: torch.Tensor, after: torch.Tensor) -> float:
    rows = len(before)
    moved = (after[:rows].double() - before.double()).square().sum()
    return float(moved + after[rows:].double().square().sum())


def _with_linear_layers(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.copy_(tensors[name])
    return model


def test_a_sixteen_bit_model_tells_its_rounding_floor(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base", dtype=torch.bfloat16)
    deltas = {n: random_delta(*s, size=0.05, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    write_adapter(tmp_path / "adapter", deltas)
    gc.merge(tmp_path / "adapter", base=tmp_path / "base").write(tmp_path / "tuned")
    receipt = run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "gralora",
        "--r", "8", "-o", tmp_path / "out", "--json",
    ).json  # fmt: skip
    merged = gc.Checkpoint.open(tmp_path / "tuned")
    assert merged.tensors["layers.0.up.weight"].dtype == "BF16"
    assert isinstance(receipt["rounding_floor"], float)
    assert 0 < receipt["rounding_floor"] < 1
    assert tensors


def changed(model: transformers.PreTrainedModel, words: list[str], folder: Path) -> Path:
    """The model with noise on the parameters of these names."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def test_layers_that_are_cut_from_one_tensor_are_told_apart(tmp_path: Path) -> None:
    """HRM's gate, q, k and v are one tensor on disk; two of them changed."""
    config = transformers.HrmTextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.HrmTextForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", "AutoModelForCausalLM")
    tuned = changed(model, ["self_attn.q_proj", "mlp.gate_proj"], tmp_path / "tuned")
    assert any("gqkv" in name for name in load_file(tuned / "model.safetensors"))
    run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tuned, "--to", "gralora", "--r", "16",
        "-o", tmp_path / "new",
    )  # fmt: skip
    found = gc.Adapter.open(tmp_path / "new").modules
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "gate_proj"}
    assert len(found) == 8
    wanted = outputs(load(tuned, "AutoModelForCausalLM"))
    assert close(outputs(in_peft(tmp_path / "base", tmp_path / "new")), wanted) <= 1e-5


def test_experts_are_refused_or_left_out_by_name(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", "AutoModelForCausalLM")
    tuned = changed(model, ["experts", "q_proj"], tmp_path / "tuned")
    pair = ["--base", tmp_path / "base", "--tuned", tuned, "--to", "lora", "--r", "16"]
    refused = run("extract", *pair, "-o", tmp_path / "new")
    assert refused.status == 2
    assert "experts" in refused.stderr
    assert re.search(r"--exclude \S*experts", refused.stderr)
    done = run_ok("extract", *pair, "--exclude", "*experts*", "-o", tmp_path / "new")
    for name in ("w1", "w2", "w3"):
        assert f"experts.{{0-1}}.{name}.weight (2) differ and were left out" in done.stderr
    assert gc.Adapter.open(tmp_path / "new").modules == ("model.layers.0.self_attn.q_proj",)


@pytest.mark.parametrize("to", ["lora", "gralora", "hybrid"])
def test_the_error_printed_is_the_distance_of_what_is_written(to: str, tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base", {"a": (48, 32), "b": (32, 48)})
    g = torch.Generator().manual_seed(1)
    moved = {n: torch.randn(tensors[n].shape, generator=g) for n in ("a.weight", "b.weight")}
    write_model(tmp_path / "tuned", tensors | {n: tensors[n] + d for n, d in moved.items()})
    receipt = run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", to,
        "--r", "8", "-o", tmp_path / "new", "--json",
    ).json  # fmt: skip
    adapter = gc.Adapter.open(tmp_path / "new")
    lost = sum(float((dense(adapter.delta(m)) - moved[f"{m}.weight"]).square().sum()) for m in "ab")
    total = sum(float(d.square().sum()) for d in moved.values())
    assert receipt["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_an_error_chooses_the_rank(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base", {"a": (48, 32)})
    move = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    write_model(tmp_path / "tuned", tensors | {"a.weight": tensors["a.weight"] + move})
    run_ok(
        "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "gralora",
        "--k", "2", "--max-error", "0.3", "-o", tmp_path / "new",
    )  # fmt: skip
    errors = (oracle.tails(move.double().numpy(), 2) / float(move.double().square().sum())) ** 0.5
    r = gc.Adapter.open(tmp_path / "new").config.r
    assert errors[r // 2] <= 0.3 < errors[r // 2 - 1]


def test_large_blocks_are_near_the_optimum_and_exact_on_request(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base", {"a": (640, 600)})
    g = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 600, generator=g))[0] for n in (640, 600))
    move = u @ torch.diag(1 / torch.arange(1.0, 601)) @ v.T
    write_model(tmp_path / "tuned", tensors | {"a.weight": tensors["a.weight"] + move})
    best = float(torch.linalg.svdvals(move)[20:].norm() / move.norm())
    pair = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "20"]
    for svd, excess in (("auto", 0.01), ("exact", 1e-5)):
        out = tmp_path / svd
        run_ok("extract", *pair, "--svd", svd, "-o", out)
        error = json.loads((out / "gralora_convert.json").read_text())["error"]
        assert best * (1 - 1e-5) <= error <= best * (1 + excess)


def test_another_dtype_alone_is_no_difference(tmp_path: Path) -> None:
    tensors = {n: t.bfloat16().float() for n, t in write_base(tmp_path / "base").items()}
    write_model(tmp_path / "base", tensors)
    tuned = {n: t.bfloat16() for n, t in tensors.items()}
    tuned["layers.0.up.weight"] = tuned["layers.0.up.weight"] * 2
    write_model(tmp_path / "tuned", tuned)
    plan = gc.extract(base=tmp_path / "base", tuned=tmp_path / "tuned", to="lora", r=24)
    plan.write(tmp_path / "new")
    assert gc.Adapter.open(tmp_path / "new").modules == ("layers.0.up",)


def test_a_difference_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = write_base(tmp_path / "base")
    bad = tensors["layers.0.up.weight"].clone()
    bad[3, 4] = float("nan")
    write_model(tmp_path / "tuned", tensors | {"layers.0.up.weight": bad})
    for options in (["--r", "4"], ["--max-error", "0.5"]):
        refused = run(
            "extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "lora",
            *options, "-o", tmp_path / "new",
        )  # fmt: skip
        assert refused.status == 2
        assert "layers.0.up" in refused.stderr
        assert "not finite" in refused.stderr


def vit() -> transformers.PreTrainedModel:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def clip() -> transformers.PreTrainedModel:
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 32, "eos_token_id": 6, "max_position_embeddings": 16, **sizes},
        vision_config={"image_size": 8, "patch_size": 4, **sizes}, projection_dim=16,
    )  # fmt: skip
    return transformers.CLIPModel(config)


def wav2vec2() -> transformers.PreTrainedModel:
    config = transformers.Wav2Vec2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,),
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=16, num_labels=4,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


def qwen3_next() -> transformers.PreTrainedModel:
    config = transformers.Qwen3NextConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, intermediate_size=24, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


def bare_llama() -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = ARCHITECTURES["llama"].build().model
    return model


SOUND = {"input_values": torch.linspace(-1, 1, 400).view(2, 200).sin()}
PICTURE = {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
# an architecture, words of the parameters that differ besides the linear layers, and what is
# saved whole
OWN: dict[str, tuple[Architecture, tuple[str, ...], set[str]]] = {
    "parameters beside a convolution": (
        Architecture(vit, [], None, PICTURE, "AutoModelForImageClassification"),
        ("cls_token", "patch_embeddings"), {"vit.embeddings"},
    ),
    "parameters beside what is the same": (
        Architecture(vit, [], None, PICTURE, "AutoModelForImageClassification"),
        ("cls_token",), {"vit.embeddings"},
    ),
    "parameters beside linear layers": (
        Architecture(qwen3_next, []), ("A_log",),
        {f"model.layers.{i}.linear_attn" for i in range(3)},
    ),
    "a weight that is computed": (
        Architecture(wav2vec2, [], None, SOUND, "AutoModelForAudioClassification"),
        ("parametrizations",), {"wav2vec2.encoder.pos_conv_embed.conv"},
    ),
    "most of the model": (
        Architecture(wav2vec2, [], None, SOUND, "AutoModelForAudioClassification"),
        ("masked_spec_embed", "conv"), {"wav2vec2"},
    ),
    "a name that others end in": (
        Architecture(bare_llama, [], None, auto="AutoModel"), ("^norm",),
        {"norm", *(f"layers.{i}.{name}_layernorm" for i in range(2)
                   for name in ("input", "post_attention"))},
    ),
}  # fmt: skip


def tune_some(architecture: Architecture, words: tuple[str, ...], base: Path, folder: Path) -> None:
    """A fine-tune of the linear layers and of the parameters whose names hold one of the words."""
    model = load(base, architecture.auto)
    torch.manual_seed(3)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(re.search(word, name) for word in words) or (
                name in linear and len(parameter) > 1
                and (head is None or parameter is not head.weight)
            ):  # fmt: skip
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", OWN)
def test_what_peft_can_only_save_with_its_module_is(name: str, tmp_path: Path) -> None:
    architecture, words, saved = OWN[name]
    base = save_base(architecture, tmp_path / "base")
    tune_some(architecture, words, base, tmp_path / "tuned")
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "gralora", "--r", "16"]
    run_ok("extract", *pair, "-o", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == saved
    expected = outputs(load(tmp_path / "tuned", architecture.auto), architecture.inputs)
    adapted = PeftModel.from_pretrained(load(base, architecture.auto), tmp_path / "adapter")
    assert close(outputs(adapted, architecture.inputs), expected) <= 2e-5
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    merged = load(tmp_path / "merged", architecture.auto)
    assert close(outputs(merged, architecture.inputs), expected) <= 2e-5


def test_a_parameter_of_the_model_itself_is_refused_or_left_out(tmp_path: Path) -> None:
    architecture = Architecture(clip, [], None, auto="CLIPModel")
    base = save_base(architecture, tmp_path / "base")
    tune_some(architecture, ("logit_scale",), base, tmp_path / "tuned")
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "gralora", "--r", "16"]
    refused = run("extract", *pair, "-o", tmp_path / "adapter")
    assert refused.status == 2
    assert "logit_scale: differs, and is a parameter of the model itself" in refused.stderr
    done = run_ok("extract", *pair, "--exclude", "", "-o", tmp_path / "adapter")
    assert "logit_scale differs and was left out" in done.stderr


def test_nothing_is_left_beside_a_module_that_is_saved_whole(tmp_path: Path) -> None:
    architecture = Architecture(wav2vec2, [], None, SOUND, "AutoModelForAudioClassification")
    base = save_base(architecture, tmp_path / "base")
    tune_some(architecture, ("masked_spec_embed",), base, tmp_path / "tuned")
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "16"]
    heads = ["--exclude", "projector", "--exclude", "classifier"]
    refused = run("extract", *pair, *heads, "-o", tmp_path / "adapter")
    assert refused.status == 2
    assert "wav2vec2: has parameters of its own that differ: it would be saved" in refused.stderr
    run_ok("extract", *pair, *heads, "--exclude", "wav2vec2", "-o", tmp_path / "adapter")
    run_ok("validate", tmp_path / "adapter", "--base", base)


def test_what_is_left_out_keeps_the_values_of_the_base(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    base = save_base(architecture, tmp_path / "base")
    tune(base, architecture.auto, tmp_path / "tuned", everything=True)
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "16"]
    run_ok("extract", *pair, "--exclude", "*.c_fc", "-o", tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before = load_file(base / "model.safetensors")
    for i in range(2):
        name = f"transformer.h.{i}.mlp.c_fc.bias"
        assert torch.equal(stored[f"base_model.model.{name}"], before[name])


def test_a_resized_vocabulary_is_told(tmp_path: Path) -> None:
    base = save_base(ARCHITECTURES["llama"], tmp_path / "base")
    model = load(base, "AutoModelForCausalLM")
    model.resize_token_embeddings(40)
    tuned = tmp_path / "resized"
    model.save_pretrained(tuned)
    tune(tuned, "AutoModelForCausalLM", tmp_path / "tuned", everything=False)
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "lora", "--r", "16"]
    done = run_ok("extract", *pair, "-o", tmp_path / "adapter")
    assert "lm_head.weight has shape (40, 16), (32, 16) in the base: PEFT loads" in done.stderr


def renamed(folder: Path, rename: Callable[[str], str], **more: torch.Tensor) -> Path:
    """The weights of a model under other names, with further tensors."""
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors | more, path, metadata={"format": "pt"})
    return folder


MASK = torch.ones(1, 1, 32, 32).tril()
# an architecture, how the base calls its tensors, and what only the base has
LAYOUTS: dict[str, tuple[str, Callable[[str], str], dict[str, torch.Tensor]]] = {
    "gpt2 of the hub": (
        "gpt2", lambda name: name.removeprefix("transformer."),
        {f"h.{i}.attn.bias": MASK.clone() for i in range(2)},
    ),
    "a buffer of old": (
        "llama", str, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("everything", [False, True], ids=["linear", "everything"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_layouts_of_one_model_are_compared(name: str, everything: bool, tmp_path: Path) -> None:
    kind, rename, more = LAYOUTS[name]
    architecture = ARCHITECTURES[kind]
    base = save_base(architecture, tmp_path / "base")
    tune(base, architecture.auto, tmp_path / "tuned", everything=everything)
    renamed(base, rename, **more)
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "gralora", "--r", "16"]
    done = run_ok("extract", *pair, "-o", tmp_path / "adapter")
    assert "in one checkpoint only, and not needed: left out" in done.stderr
    expected = outputs(load(tmp_path / "tuned", architecture.auto))
    adapted = PeftModel.from_pretrained(load(base, architecture.auto), tmp_path / "adapter")
    assert close(outputs(adapted), expected) <= 2e-5
    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    assert close(outputs(load(tmp_path / "merged", architecture.auto)), expected) <= 2e-5


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_may_be_stored_or_not(same: bool, tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama-tied"]
    base = save_base(architecture, tmp_path / "base")
    tuned = tmp_path / "tuned"
    tune(base, architecture.auto, tuned, everything=True)
    head = load_file(tuned / "model.safetensors")["model.embed_tokens.weight"] + (not same)
    renamed(tuned, str, **{"lm_head.weight": head})
    pair = ["--base", base, "--tuned", tuned, "--to", "gralora", "--r", "16"]
    done = run_ok("extract", *pair, "-o", tmp_path / "adapter")
    assert ("lm_head.weight is new in the tuned model" in done.stderr) != same
    adapted = PeftModel.from_pretrained(load(base, architecture.auto), tmp_path / "adapter")
    assert close(outputs(adapted), outputs(load(tuned, architecture.auto))) <= 2e-5


def test_a_head_is_not_left_out_where_the_class_is_not_named(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = save_base(architecture, tmp_path / "base")
    tune(base, architecture.auto, tmp_path / "tuned", everything=True)
    for folder in (base, tmp_path / "tuned"):
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    pair = ["--base", base, "--tuned", tmp_path / "tuned", "--to", "gralora", "--r", "16"]
    refused = run("extract", *pair, "-o", tmp_path / "adapter")
    assert refused.status == 2
    assert "lm_head.weight: differs" in refused.stderr


def test_a_layer_that_k_does_not_divide_is_named_with_the_ways_out(tmp_path: Path) -> None:
    shapes = {**SHAPES, "score": (3, 24)}
    before = write_base(tmp_path / "base", shapes)
    names = {f"{name}.weight" for name in shapes}
    after = {name: tensor + (name in names) for name, tensor in before.items()}
    write_model(tmp_path / "tuned", after)
    pair = ["--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--to", "gralora"]
    refused = run("extract", *pair, "-o", tmp_path / "adapter")
    assert refused.status == 2
    assert "score: k=2 does not divide its 3 x 24 weight" in refused.stderr
    assert "leave this one out with --exclude score, or take --to lora" in refused.stderr
    with pytest.raises(MisuseError, match=r'with `exclude=.*`, or take `to="lora"`'):
        gc.extract(base=tmp_path / "base", tuned=tmp_path / "tuned", to="gralora")
    run_ok("extract", *pair, "--exclude", "score", "-o", tmp_path / "adapter")
