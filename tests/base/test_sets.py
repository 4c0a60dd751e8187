"""What lies beside the weights: tokenizers, processors and pipelines come whole from one side, and
trained tensors beside the adapter's file are never left out silently."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Router, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from gralora_convert.errors import InvalidAdapterError
from gralora_convert.models import attach
from tests.command import Outcome, run, run_ok
from tests.zoo import ARCHITECTURES, load, outputs, save_base, train

LLAMA = ARCHITECTURES["llama"]
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 3, **{f"w{i}": i + 4 for i in range(28)}}
MAP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = MAP | {"chat_template": "BASE {{ messages[0].content }}"} | more
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


def trained() -> PreTrainedTokenizerFast:
    template = "TRAINED {{ messages[0].content }}"
    return tokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template)


def as_5(folder: Path, held: PreTrainedTokenizerFast) -> None:
    held.save_pretrained(folder)


def as_4(folder: Path, held: PreTrainedTokenizerFast) -> None:
    """As transformers 4 writes it: the template inside, special tokens in a file of their own."""
    held.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    template = folder / "chat_template.jinja"
    config |= {"chat_template": template.read_text(), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    numbers = {held.convert_tokens_to_ids(t): t for t in held.special_tokens_map.values()}
    config["added_tokens_decoder"] = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                 "single_word": False, "special": True}
        for i, token in numbers.items()
    }  # fmt: skip
    path.write_text(json.dumps(config))
    template.unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(held.special_tokens_map)))


def as_old_4(folder: Path, held: PreTrainedTokenizerFast) -> None:
    """As transformers before 4.34 does, without `added_tokens_decoder`."""
    as_4(folder, held)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["added_tokens_decoder"]
    path.write_text(json.dumps(config))


def answers(folder: Path) -> tuple[object, ...]:
    held = AutoTokenizer.from_pretrained(folder)
    said = held.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    return said, held.eos_token, held.pad_token, held.bos_token, held("w1 w2 nothing").input_ids


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_base(LLAMA, tmp_path / "base")
    train(base, LLAMA, tmp_path / "adapter")
    return tmp_path / "adapter", base


def merged(adapter: Path, base: Path, *more: object) -> tuple[Path, Outcome]:
    out = adapter.parent / "out"
    return out, run_ok("merge", adapter, "--base", base, "-o", out, *more)


# Tokenizers ---------------------------------------------------------------------------------------


Writer = Callable[[Path, PreTrainedTokenizerFast], None]


@pytest.mark.parametrize("of_adapter", [as_5, as_4, as_old_4])
@pytest.mark.parametrize("of_base", [as_5, as_4, as_old_4])
def test_the_merged_tokenizer_answers_as_the_adapters(
    of_base: Writer, of_adapter: Writer, pair: tuple[Path, Path]
) -> None:
    adapter, base = pair
    of_base(base, tokenizer())
    of_adapter(adapter, trained())
    generation = {"eos_token_id": 2, "temperature": 0.5}
    (base / "generation_config.json").write_text(json.dumps(generation))
    out, outcome = merged(adapter, base)
    assert answers(out) == answers(adapter) != answers(base)
    assert answers(out)[:3] == ("TRAINED hi", "<|im_end|>", "<|im_end|>")
    written = json.loads((out / "generation_config.json").read_text())
    assert written == generation | {"eos_token_id": [2, 3]}
    assert "eos_token_id 3 (<|im_end|>), where the tokenizer ends, added to 2" in outcome.stderr


def test_a_tokenizer_of_the_base_stays_as_it_is(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    as_4(base, trained())
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    out, _ = merged(adapter, base)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_template_alone_goes_with_the_tokenizer_of_the_base(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    as_4(base, tokenizer())
    (base / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    (adapter / "chat_template.jinja").write_text("TRAINED {{ messages[0].content }}")
    out, outcome = merged(adapter, base)
    assert answers(out) == ("TRAINED hi", *answers(base)[1:])
    assert "chat_template.jinja taken from" in outcome.stderr
    assert not (out / "chat_template.json").exists(), "AutoProcessor reads it first"


def test_a_tokenizer_without_vocabulary_is_left_out(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    as_5(base, tokenizer())
    as_4(adapter, trained())
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="backend tokenizer"):
        AutoTokenizer.from_pretrained(adapter)
    out, outcome = merged(adapter, base)
    assert answers(out) == answers(base)
    assert "special_tokens_map.json, tokenizer_config.json beside" in outcome.stderr
    assert "no whole tokenizer, left out" in outcome.stderr


def test_a_tokenizer_that_has_no_vocabulary_is_whole_without(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    transformers.ByT5Tokenizer().save_pretrained(base)
    transformers.ByT5Tokenizer(extra_ids=5).save_pretrained(adapter)
    out, _ = merged(adapter, base)
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(adapter))


def test_the_files_of_every_tokenizer_are_of_its_set(pair: tuple[Path, Path]) -> None:
    """PhoBERT's codes are called as no other tokenizer's."""
    adapter, base = pair
    for folder, codes in ((base, "h e 5\n"), (adapter, "w 1</w> 5\n")):
        words, merges = folder.parent / "words.txt", folder.parent / "codes"
        words.write_text("w@@ 10\n1 9\nw1 4\n")
        merges.write_text(codes)
        transformers.PhobertTokenizer(str(words), str(merges)).save_pretrained(folder)
    out, _ = merged(adapter, base)
    said = [AutoTokenizer.from_pretrained(f)("w1").input_ids for f in (out, adapter, base)]
    assert said[0] == said[1] != said[2]


def test_two_adapters_with_tokenizers_say_whose_is_taken(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, base = pair
    as_5(base, tokenizer())
    as_4(adapter, tokenizer())
    second = tmp_path / "second"
    train(base, LLAMA, second, gralora_k=1)
    as_5(second, trained())
    out, outcome = merged(adapter, base, second)
    assert answers(out) == answers(second)
    lines = [line for line in outcome.stderr.splitlines() if "tokenizer.json" in line]
    assert f"tokenizer_config.json of {second} instead of those of {adapter}" in outcome.stderr
    assert [line for line in lines if line.endswith(f"taken from {adapter}")] == []
    assert len([line for line in lines if line.endswith(f"taken from {second}")]) == 1


@pytest.mark.parametrize(
    ("ends", "written", "said"),
    [
        ([2, 3], [2, 3], ""),
        ([2, 5], [2, 5, 3], "added to [2, 5]"),
        (None, 3, "added to None"),
    ],
)
def test_the_end_token_is_added_where_it_is_not(
    ends: object, written: object, said: str, pair: tuple[Path, Path]
) -> None:
    adapter, base = pair
    as_5(adapter, trained())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    out, outcome = merged(adapter, base)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == written
    assert ("where the tokenizer ends" in outcome.stderr) == bool(said)
    assert not said or said in outcome.stderr


@pytest.mark.parametrize("vocabulary", [WORDS, [[word, -1.0] for word in WORDS]])
def test_an_end_token_is_found_in_any_kind_of_vocabulary(
    vocabulary: object, pair: tuple[Path, Path]
) -> None:
    adapter, base = pair
    as_5(adapter, trained())
    path = adapter / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": [], "model": {"vocab": vocabulary}}))
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    out, _ = merged(adapter, base)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


def test_a_model_without_generation_config_is_told(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    as_5(adapter, trained())
    (base / "generation_config.json").unlink(missing_ok=True)
    out, outcome = merged(adapter, base)
    assert "eos_token_id is 2, the tokenizer ends at 3 (<|im_end|>), and no" in outcome.stderr
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_an_end_token_of_unknown_number_is_told(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    as_5(adapter, trained())
    (adapter / "tokenizer.json").write_text('{"added_tokens": [], "model": {"vocab": {}}}')
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    out, outcome = merged(adapter, base)
    assert "eos_token_id is 2; is that '<|im_end|>', the tokenizer's?" in outcome.stderr
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 2}'


@pytest.mark.parametrize("before", [None, 0])
def test_a_classifier_pads_as_its_tokenizer(before: int | None, pair: tuple[Path, Path]) -> None:
    """Trainers (trl 1.16, RewardTrainer) set it in memory; no file beside the adapter has it."""
    adapter, base = pair[0].parent / "reward", pair[1]
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": before}))
    model = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    words = trained()
    model.config.pad_token_id = words.pad_token_id
    model = get_peft_model(
        model,
        GraloraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_proj"], init_weights=False),
    ).eval()
    model.save_pretrained(adapter)
    words.save_pretrained(adapter)
    out, outcome = merged(adapter, base)
    rows = words(["w1 w2 w3 w4", "w5"], padding=True, return_tensors="pt")
    given = {name: rows[name] for name in ("input_ids", "attention_mask")}
    found = transformers.LlamaForSequenceClassification.from_pretrained(out).eval()
    torch.testing.assert_close(found(**given).logits, model(**given).logits, rtol=0, atol=1e-6)
    assert (
        f"pad_token_id is 3, with which the tokenizer pads, instead of {before}" in outcome.stderr
    )
    run_ok("verify", adapter, "--base", base, "--merged", out)


# Processors ---------------------------------------------------------------------------------------


def test_a_processor_comes_from_one_side(pair: tuple[Path, Path]) -> None:
    adapter, base = pair

    def save(folder: Path, size: int) -> None:
        image = transformers.CLIPImageProcessor(size={"shortest_edge": size})
        transformers.CLIPProcessor(image, tokenizer()).save_pretrained(folder)

    save(base, 64)
    save(adapter, 32)
    old = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}}
    (base / "preprocessor_config.json").write_text(json.dumps(old))
    out, outcome = merged(adapter, base)
    found, right = (AutoProcessor.from_pretrained(folder) for folder in (out, adapter))
    assert found.image_processor.size == right.image_processor.size
    assert not (out / "preprocessor_config.json").exists()
    assert "preprocessor_config.json left out: the processor is that of" in outcome.stderr


# Pipelines of sentence-transformers ---------------------------------------------------------------


def with_factors(model: Any, task: str, **more: Any) -> Any:
    more = {"target_modules": ["query", "value"], "r": 8, "gralora_k": 2, "alpha": 16} | more
    config = GraloraConfig(task_type=task, **more)
    model.add_adapter(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "gralora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    return model


def bert(folder: Path, name: str, **more: Any) -> Path:
    """A base of BERT with its tokenizer."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
    torch.manual_seed(1)
    getattr(transformers, name)(transformers.BertConfig(**sizes, **more)).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


SENTENCES = ["w1 w2 w3", "w9 w8"]


def pipeline(base: Path, seed: int) -> SentenceTransformer:
    torch.manual_seed(seed)
    steps = [Transformer(str(base)), Pooling(32, pooling_mode="cls"), Dense(32, 16), Normalize()]
    return SentenceTransformer(
        modules=steps, device="cpu", prompts={"query": f"w{seed} "}, default_prompt_name="query"
    )


@pytest.mark.parametrize("base_has_one", [False, True])
def test_a_pipeline_of_sentence_transformers_is_taken_whole(
    base_has_one: bool, tmp_path: Path
) -> None:
    base = bert(tmp_path / "base", "BertModel")
    model = with_factors(pipeline(base, 3), "FEATURE_EXTRACTION")
    model.save_pretrained(str(tmp_path / "adapter"))
    if base_has_one:  # another Dense, another prompt
        pipeline(base, 7).save_pretrained(str(tmp_path / "whole"))
        base = tmp_path / "whole"
    out, _ = merged(tmp_path / "adapter", base)
    found = SentenceTransformer(str(out), device="cpu")
    assert [type(step).__name__ for step in found] == [type(step).__name__ for step in model]
    assert np.abs(found.encode(SENTENCES) - model.encode(SENTENCES)).max() <= 1e-5
    assert found.prompts == model.prompts
    assert found.default_prompt_name == "query"
    dense = "2_Dense/model.safetensors"
    assert (out / dense).read_bytes() == (tmp_path / "adapter" / dense).read_bytes()
    receipt = json.loads((out / "gralora_convert.json").read_text())
    assert receipt["outputs"][dense]["sha256"]
    assert any("modules.json" in note and dense in note for note in receipt["notes"])
    arguments = ["verify", tmp_path / "adapter", "--base", base, "--merged", out]
    run_ok(*arguments, "--level", "modules")
    for name in (dense, "modules.json"):
        (out / name).unlink()
        refused = run(*arguments, "--level", "weights")
        assert refused.status == 1
        assert f"{name}: of the adapter's pipeline is missing" in refused.stdout


def test_a_pipeline_of_the_base_stays(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", "BertModel")
    pipeline(base, 7).save_pretrained(str(tmp_path / "whole"))
    model = with_factors(pipeline(base, 7), "FEATURE_EXTRACTION")
    model.save_pretrained(str(tmp_path / "saved"))
    (tmp_path / "adapter").mkdir()
    for file in (tmp_path / "saved").glob("adapter_*"):
        shutil.copy(file, tmp_path / "adapter")
    out, _ = merged(tmp_path / "adapter", tmp_path / "whole")
    found = SentenceTransformer(str(out), device="cpu")
    assert np.abs(found.encode(SENTENCES) - model.encode(SENTENCES)).max() <= 1e-5


def test_the_steps_of_a_router_are_merged_each_into_its_place(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", "BertModel")
    routes = [Transformer(str(base), max_seq_length=n) for n in (6, 9)]
    steps = [[route, Pooling(32, pooling_mode="mean")] for route in routes]
    model = SentenceTransformer(modules=[Router.for_query_document(*steps)], device="cpu")
    for scale, route in enumerate(routes, 1):
        for name, parameter in with_factors(route.model, "FEATURE_EXTRACTION").named_parameters():
            parameter.data *= scale if "gralora_" in name else 1
    model.save_pretrained(str(tmp_path / "all"))
    pipeline(base, 7).save_pretrained(str(tmp_path / "whole"))  # max_seq_length is another
    for name in ("query_0_Transformer", "document_0_Transformer"):
        step, out = tmp_path / "all" / name, tmp_path / name
        told = run_ok("merge", step, "--base", tmp_path / "whole", "-o", out).stderr
        assert f"one step of the pipeline {tmp_path / 'all'}" in told
        shutil.rmtree(step)
        out.rename(step)
    found = SentenceTransformer(str(tmp_path / "all"), device="cpu")
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w4"]
    for encode in ("encode_query", "encode_document"):
        right = getattr(model, encode)(texts)
        assert np.abs(getattr(found, encode)(texts) - right).max() <= 1e-5


def test_a_cross_encoder_keeps_its_activation(tmp_path: Path) -> None:
    base = bert(tmp_path / "base", "BertForSequenceClassification", num_labels=1)
    whole = CrossEncoder(str(base), device="cpu", activation_fn=torch.nn.Identity(), num_labels=1)
    model = with_factors(whole, "SEQ_CLS")
    model.save_pretrained(str(tmp_path / "adapter"))
    out, _ = merged(tmp_path / "adapter", base)
    rows = [("w1 w2 w3", "w9 w8"), ("w4", "w5 w6")]
    found = CrossEncoder(str(out), device="cpu")
    assert np.abs(found.predict(rows) - model.predict(rows)).max() <= 1e-5
    assert type(found.activation_fn) is torch.nn.Identity


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_a_new_head_is_saved_or_its_loss_is_an_error(kind: str, task: str, tmp_path: Path) -> None:
    """transformers' add_adapter saves no head that modules_to_save does not name; PEFT adds it."""
    base, rows = bert(tmp_path / "base", kind), [("w1 w2 w3", "w9 w8"), ("w4", "w5 w6")]

    def trained_on(base: Path, folder: Path, saved: list[str] | None) -> CrossEncoder:
        model = CrossEncoder(str(base), device="cpu", num_labels=1)
        with_factors(model, task, modules_to_save=saved).save_pretrained(str(folder))
        return model

    trained_on(base, tmp_path / "lost", None)
    refused = run("merge", tmp_path / "lost", "--base", base, "-o", tmp_path / "out")
    assert refused.status == 2
    assert "[head-incomplete]" in refused.stderr
    assert "parameters of the trained model that neither the base nor" in refused.stderr
    model = trained_on(base, tmp_path / "adapter", ["classifier", "pooler"])
    out, _ = merged(tmp_path / "adapter", base)
    found = CrossEncoder(str(out), device="cpu")
    assert np.abs(found.predict(rows) - model.predict(rows)).max() <= 1e-5


def test_a_classifier_that_lost_its_head_is_refused(tmp_path: Path) -> None:
    """As a reward model of a language model, with a head that add_adapter did not save."""
    base = save_base(LLAMA, tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    model.add_adapter(GraloraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    refused = run("validate", tmp_path / "adapter", "--base", base)
    assert refused.status == 1
    assert "error[head-incomplete]: score.weight" in refused.stdout


# Trained tensors outside the adapter's file -------------------------------------------------------


NORM = "base_model.model.model.layers.0.input_layernorm.weight"


HEAD = "base_model.model.lm_head.base_layer.weight"


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "trainable_params.safetensors"])
def test_what_was_trained_in_the_base_replaces_it(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A norm and an output head, in place, saved by a trainer beside the adapter."""
    adapter, base = pair
    model = load(base, LLAMA.auto)
    draw = torch.Generator().manual_seed(3)
    state = model.state_dict()
    new = {
        NORM: torch.rand(16, generator=draw) + 0.5,
        HEAD: torch.randn(state["lm_head.weight"].shape, generator=draw),
    }
    with torch.no_grad():
        state["model.layers.0.input_layernorm.weight"].copy_(new[NORM])
        state["lm_head.weight"].copy_(new[HEAD])
    write(adapter / name, new)
    with pytest.raises(InvalidAdapterError, match="load the file into it first"):
        attach(load(base, LLAMA.auto), adapter)
    with attach(model, adapter):
        expected = outputs(model)
    out, outcome = merged(adapter, base)
    assert f"{name}: holds 2 tensor(s)" in outcome.stderr
    assert np.abs(outputs(load(out, LLAMA.auto)) - expected).max() <= 1e-5
    found = run_ok("verify", adapter, "--base", base, "--merged", out)
    assert "model: outputs agree" in found.stdout
    assert "replaced or added 2 tensors" in outcome.stdout
    (adapter / name).unlink()
    assert run("verify", adapter, "--base", base, "--merged", out).status == 1
    again = load_file(out / "model.safetensors")
    assert torch.equal(again["lm_head.weight"], new[HEAD])


def test_a_tied_weight_that_was_trained_in_place_stays_tied(tmp_path: Path) -> None:
    tied = ARCHITECTURES["llama-tied"]
    base = save_base(tied, tmp_path / "base")
    adapter = tmp_path / "adapter"
    train(base, tied, adapter, target_modules=["q_proj"])
    draw = torch.Generator().manual_seed(3)
    model = load(base, tied.auto)
    embeddings = torch.randn(model.get_input_embeddings().weight.shape, generator=draw)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embeddings)
    write(adapter / "new.bin", {"base_model.model.model.embed_tokens.weight": embeddings})
    with attach(model, adapter):
        expected = outputs(model)
    out, _ = merged(adapter, base)
    assert np.abs(outputs(load(out, tied.auto)) - expected).max() <= 1e-5
    run_ok("verify", adapter, "--base", base, "--merged", out)


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        ("non_lora_trainables.bin", {NORM: torch.ones(8)}, "it has shape (8,), there (16,)"),
        ("new_embeddings.safetensors", {"input_embeddings": torch.ones(2, 16)}, "no such tensor"),
        ("mm_projector.bin", {"model.mm_projector.0.weight": torch.ones(4, 4)}, "no such tensor"),
        ("value_head.pt", {"v_head.summary.weight": torch.ones(1, 16), NORM: torch.ones(16)},
         "v_head.summary.weight was trained with the adapter; the base has no such tensor"),
    ],
)  # fmt: skip
def test_trained_tensors_without_a_place_stop_the_merge(
    name: str, tensors: dict[str, torch.Tensor], said: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, base = pair
    out, _ = merged(adapter, base)
    write(adapter / name, tensors)
    for more in ([], ["--base", base]):  # the first finds the base that the adapter names
        found = run("validate", adapter, *more, "--json")
        assert found.status == 1
        assert {e["where"] for e in findings(found, "extra-weights")} == {name}
    refused = run("merge", adapter, "--base", base, "-o", tmp_path / "again")
    assert refused.status == 2
    assert f"{name}: [extra-weights] " in refused.stderr
    assert said in refused.stderr
    assert run("verify", adapter, "--base", base, "--merged", out).status == 2


def test_values_that_two_files_have_stop_the_merge(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = pair
    for name in ("one.bin", "two.bin"):
        write(adapter / name, {NORM: torch.ones(16)})
    refused = run("merge", adapter, "--base", base, "-o", tmp_path / "again")
    assert refused.status == 2
    assert "another file has it, too" in refused.stderr
    weighted = run("merge", adapter, "--weight", "2", "--base", base, "-o", tmp_path / "again")
    assert weighted.status == 2
    assert "cannot be weighted" in weighted.stderr


def test_two_values_of_one_parameter_stop_the_merge(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, base = pair
    twice = {NORM: torch.ones(16), NORM.removeprefix("base_model.model."): torch.zeros(16)}
    write(adapter / "one.bin", twice)
    refused = run("merge", adapter, "--base", base, "-o", tmp_path / "again")
    assert refused.status == 2
    assert "two of them mean the same parameter" in refused.stderr


def test_trained_values_beside_an_adapter_must_be_numbers(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, base = pair
    write(adapter / "non_lora_trainables.bin", {NORM: torch.full((16,), torch.nan)})
    refused = run("merge", adapter, "--base", base, "-o", tmp_path / "again")
    assert refused.status == 2
    assert "holds NaN or infinity" in refused.stderr
    assert not (tmp_path / "again").exists()


def test_a_conversion_takes_what_was_trained_beside_the_adapter_along(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, _ = pair
    write(adapter / "non_lora_trainables.bin", {NORM: torch.ones(16)})
    write(adapter / "value_head.safetensors", {"v_head.summary.weight": torch.ones(1, 16)})
    (adapter / "optimizer.pt").write_bytes(b"no tensors")
    run_ok("convert", adapter, "--to", "lora", "-o", tmp_path / "lora")
    for name in ("non_lora_trainables.bin", "value_head.safetensors"):
        assert (tmp_path / "lora" / name).read_bytes() == (adapter / name).read_bytes()
    assert not (tmp_path / "lora/optimizer.pt").exists()


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def findings(outcome: Outcome, code: str) -> list[dict[str, str]]:
    held = outcome.json["findings"]
    assert isinstance(held, list)
    return [finding for finding in held if finding["code"] == code]


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        ("value_head.safetensors", {"v_head.summary.weight": torch.ones(1, 16)}, "a value head"),
        ("pytorch_model.bin", {"v_head.summary.bias": torch.ones(1)}, "a value head"),
        (
            "model.safetensors",
            {"model.layers.0.self_attn.q_proj.weight": torch.ones(16, 16)},
            "a whole model",
        ),
    ],
)
def test_weights_that_leave_the_function_alone_are_noted(
    name: str, tensors: dict[str, torch.Tensor], said: str, pair: tuple[Path, Path]
) -> None:
    adapter, base = pair
    write(adapter / name, tensors)
    out, outcome = merged(adapter, base)
    assert said in outcome.stderr
    assert name in outcome.stderr
    run_ok("verify", adapter, "--base", base, "--merged", out, "--level", "weights")


def test_the_state_of_a_training_run_is_no_finding(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin",
                 "optimizer.bin", "._value_head.safetensors"):  # fmt: skip
        (adapter / name).write_bytes(b"no tensors")
    assert findings(run_ok("validate", adapter, "--base", base, "--json"), "extra-weights") == []


def test_weights_that_cannot_be_read_stop_the_merge(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    (adapter / "projector.safetensors").write_bytes(b"no tensors")
    found = run("validate", adapter, "--base", base)
    assert found.status == 1
    assert "what was trained there is not known" in found.stdout


def test_another_format_is_noted(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    (adapter / "adapter.gguf").write_bytes(b"GGUF")
    _, outcome = merged(adapter, base)
    assert "adapter.gguf: is in a format that is not read here" in outcome.stderr


# Labels -------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter with a trained head of three labels, and a base without a head."""
    base = bert(tmp_path / "base", "BertModel")
    import peft

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = GraloraConfig(task_type="SEQ_CLS", r=8, gralora_k=2, target_modules=["query"])
    held = peft.get_peft_model(model, config)
    for name, parameter in held.named_parameters():
        if "gralora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    held.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", base


def test_labels_without_names_are_told(classifier: tuple[Path, Path]) -> None:
    out, outcome = merged(*classifier)
    assert "the 3 labels of the trained head are LABEL_0, LABEL_1, ..." in outcome.stderr
    assert transformers.AutoConfig.from_pretrained(out).id2label[2] == "LABEL_2"


def test_labels_get_the_names_given(classifier: tuple[Path, Path]) -> None:
    out, outcome = merged(*classifier, "--labels", "bad,fair,good")
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert config.label2id == {"bad": 0, "fair": 1, "good": 2}
    assert "LABEL_0" not in outcome.stderr


@pytest.mark.parametrize("labels", ["bad,good", "bad,good,good", ""])
def test_other_labels_than_the_head_has(labels: str, classifier: tuple[Path, Path]) -> None:
    adapter, base = classifier
    refused = run("merge", adapter, "--base", base, "-o", adapter / "out", "--labels", labels)
    assert refused.status == 2
    assert "3 different names" in refused.stderr


def test_labels_without_a_head(pair: tuple[Path, Path]) -> None:
    adapter, base = pair
    refused = run("merge", adapter, "--base", base, "-o", adapter / "out", "--labels", "a,b")
    assert refused.status == 2
    assert "no adapter has a trained head" in refused.stderr
