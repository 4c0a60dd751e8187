"""A merge into a pipeline of sentence-transformers loads there; the adapter's folder does not."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

from tests.command import run_ok

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SENTENCES = ["w1 w2 w3", "w9 w8"]


def pipeline(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(name="base")
def saved_base(tmp_path: Path) -> Path:
    """A tiny BERT with its tokenizer and mean pooling, as sentence-transformers saves it."""
    raw, words = tmp_path / "raw", [f"w{i}" for i in range(27)]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(raw)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(raw)
    steps = [Transformer(str(raw)), Pooling(16, pooling_mode="mean")]
    SentenceTransformer(modules=steps, device="cpu").save_pretrained(str(tmp_path / "base"))
    return tmp_path / "base"


def test_a_merge_loads_where_the_adapters_folder_does_not(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = peft.GraloraConfig(
        r=4, target_modules=["query", "value"], init_weights=False, task_type="FEATURE_EXTRACTION"
    )
    adapted = peft.get_peft_model(transformers.BertModel.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="tokenizer"):
        pipeline(tmp_path / "adapter").encode(SENTENCES)

    run_ok("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "merged")
    reference, merged = pipeline(base), pipeline(tmp_path / "merged")
    plain = reference.encode(SENTENCES)
    reference.load_adapter(str(tmp_path / "adapter"))
    trained, found = reference.encode(SENTENCES), merged.encode(SENTENCES)
    assert [type(step) for step in merged] == [Transformer, Pooling]
    assert np.abs(trained - plain).max() > 0.01
    np.testing.assert_allclose(found, trained, atol=1e-5)


def test_an_adapter_that_was_put_on_the_pipeline_itself(base: Path, tmp_path: Path) -> None:
    """PEFT's names begin with the model's step then: `0.model.encoder...`."""
    torch.manual_seed(1)
    config = peft.GraloraConfig(r=4, target_modules="all-linear", init_weights=False)
    model = pipeline(base)
    plain = model.encode(SENTENCES)
    adapted = peft.get_peft_model(model, config)
    trained = model.encode(SENTENCES)
    assert np.abs(trained - plain).max() > 0.01
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = [tmp_path / "adapter", "--base", base]
    assert "key-pipeline-prefix" in run_ok("validate", *arguments).stdout
    run_ok("merge", *arguments, "-o", tmp_path / "merged")
    np.testing.assert_allclose(pipeline(tmp_path / "merged").encode(SENTENCES), trained, atol=1e-5)
    run_ok("verify", *arguments, "--merged", tmp_path / "merged")
    run_ok("convert", *arguments, "--to", "lora", "-o", tmp_path / "lora")
    reference = pipeline(base)
    reference.load_adapter(str(tmp_path / "lora"))
    np.testing.assert_allclose(reference.encode(SENTENCES), trained, atol=1e-5)
