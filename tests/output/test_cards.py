"""Model cards: front matter that the Hub's own library reads, and no card that is overwritten."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.disk.checkpoint import Checkpoint
from gralora_convert.output.cards import adapter_card, merged_card
from tests.builders import random_delta, write_adapter, write_base
from tests.command import run_ok

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
LLAMA, BASE = FIXTURES / "peft-0.21.2/llama-hybrid", FIXTURES / "bases/llama"


@dataclass(frozen=True)
class Card:
    """A card as the Hub's library reads it."""

    data: dict[str, Any]
    text: str


def parsed(card: bytes) -> Card:
    read = ModelCard(card.decode())
    return Card(vars(read.data), read.text)


def adapter(folder: Path, base: str | None) -> Adapter:
    deltas = {"layers.0.up": random_delta(32, 24)}
    return Adapter.open(write_adapter(folder, deltas, base_model_name_or_path=base))


def test_a_merged_model_is_filed_under_its_base(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "base/README.md").write_text(
        "---\nlicense: other\nlicense_name: 'llama3.2'  # a comment\nlicense_link: LICENSE\n"
        "tags:\n- x\n---\nlicense: wrong\n"
    )
    base = Checkpoint.open(tmp_path / "base")
    one, two = adapter(tmp_path / "one", "org/base"), adapter(tmp_path / "two", "org/base")
    card = parsed(merged_card(base, [one]))
    assert card.data["base_model"] == "org/base"
    assert card.data["base_model_relation"] == "finetune"
    assert card.data["library_name"] == "transformers"
    assert card.data["license"] == "other"
    assert card.data["license_name"] == "llama3.2"
    assert "# org/base with one" in card.text
    both = parsed(merged_card(base, [one, two]))
    assert both.data["base_model_relation"] == "merge"
    assert "org/base with one and two merged" in both.text


@pytest.mark.parametrize("name", [None, "/models/llama", "./llama", "gpt2"])
def test_what_is_no_id_of_the_hub_is_no_base_model(name: str | None, tmp_path: Path) -> None:
    write_base(tmp_path / "base", _name_or_path="/elsewhere")
    base = Checkpoint.open(tmp_path / "base")
    card = parsed(merged_card(base, [adapter(tmp_path / "a", name)]))
    assert card.data.get("base_model") is None
    assert parsed(adapter_card("lora", name)).data.get("base_model") is None


@pytest.mark.parametrize("kind", ["gralora", "hybrid", "lora"])
def test_an_adapter_is_filed_as_one(kind: str) -> None:
    card = parsed(adapter_card(kind, "org/base"))
    data = card.data
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert "base_model:adapter:org/base" in data["tags"]
    assert ("lora" in data["tags"]) == (kind == "lora")


def test_names_are_no_markup(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    held = adapter(tmp_path / "a](x)<script>", "x\n---\nlicense: mit")
    card = parsed(merged_card(Checkpoint.open(tmp_path / "base"), [held]))
    assert "<" not in card.text
    assert "](" not in card.text
    assert card.data.get("license") is None


def test_every_verb_writes_one(tmp_path: Path) -> None:
    run_ok("merge", LLAMA, "--base", BASE, "-o", tmp_path / "merged")
    run_ok("convert", LLAMA, "--to", "lora", "-o", tmp_path / "lora")
    run_ok("extract", "--base", BASE, "--tuned", tmp_path / "merged", "--to", "gralora", "--r", "8",
           "-o", tmp_path / "extracted")  # fmt: skip
    for name in ("merged", "lora", "extracted"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert "gralora-convert" in card.text


def test_the_card_of_a_converted_adapter_stays(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "a")
    (tmp_path / "a/README.md").write_text("# mine\n")
    run_ok("convert", tmp_path / "a", "--to", "lora", "-o", tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "# mine\n"
    (tmp_path / "a/README.md").unlink()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "a/README.md").symlink_to(tmp_path / "secret")
    run_ok("convert", tmp_path / "a", "--to", "lora", "-o", tmp_path / "other")
    assert "secret" not in (tmp_path / "other/README.md").read_text()
