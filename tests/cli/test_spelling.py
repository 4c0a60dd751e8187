"""Parameters that the library's messages name are printed as the options that set them."""

import click
import pytest

from gralora_convert.cli.commands import commands
from gralora_convert.cli.spelling import spelled, spelled_json


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Give `base`.", "Give --base."),
        ("another `key_map`?", "another --key-map?"),
        ("Repeat `weights`.", "Repeat --weight."),
        ('Write `dtype="float32"`.', "Write --dtype float32"),
        ("`allow_inexact=True`", "--allow-inexact"),
        ("`digests=False`", "--no-digests"),
        ("`trust_remote_code=True`", "--trust-remote-code"),
        ('`exclude="*.a b"`', "--exclude '*.a b'"),
        ("`weights=[2, 1]`", "--weight 2 --weight 1"),
        ('`key_map={"a.b": "c"}`', "--key-map a.b=c"),
        ("`base=MODEL`", "--base MODEL"),
        ("`output`, as a folder", "--output, as a folder"),
    ],
)
def test_a_parameter_reads_as_its_option(message: str, shown: str) -> None:
    with click.Context(commands):
        assert spelled(message) == shown


@pytest.mark.parametrize(
    "message",
    [
        "`verify` compares", "`validate` lists all", "`modules` is empty", "`gralora_k` is 2",
        "again=True", "`overwrite=False`", "`a.base`", "dtype float32",
    ],
)  # fmt: skip
def test_what_is_no_parameter_stays(message: str) -> None:
    with click.Context(commands):
        assert spelled(message) == message


def test_a_command_is_a_parameter_only_with_a_value() -> None:
    with click.Context(commands):
        assert spelled("`verify`: `verify=False`") == "`verify`: --no-verify"


def test_outside_of_the_command_line_nothing_changes() -> None:
    assert spelled("Give `base`.") == "Give `base`."


def test_in_documents_only_sentences_change() -> None:
    finding = {"where": "`base`", "message": "`base`", "hint": "Give `r`."}
    document = {
        "findings": [finding],
        "notes": ["`k=4`"],
        "modules": ["`base`"],
        "provenance": {"notes": ["`base`"]},
    }
    with click.Context(commands):
        assert spelled_json(document) == {
            "findings": [{"where": "`base`", "message": "--base", "hint": "Give --r."}],
            "notes": ["--k 4"],
            "modules": ["`base`"],
            "provenance": {"notes": ["`base`"]},
        }
