"""Findings and refusals as a reader meets them: one line each, whatever a hostile file holds."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_convert import errors
from gralora_convert.errors import (
    ConvertError,
    Finding,
    InvalidAdapterError,
    Report,
    error,
    note,
    printable,
    sentences,
    warning,
)

ERROR = error("missing-tensor", "layers.0.up", "gralora_B is missing", "Is the file complete?")
WARNING = warning("alpha-zero", "adapter_config.json", "alpha is 0")
NOTE = note("metadata-missing", "", "has no __metadata__")
HOSTILE = "a\n::error::b\r\x1b[31m\x00\u2028\u202e\ud800\x85%"


def test_findings_are_ordered_by_severity_and_said_once() -> None:
    report = Report.of([NOTE, WARNING, ERROR, NOTE, ERROR])
    assert report.findings == (ERROR, WARNING, NOTE)
    assert report.errors == (ERROR,)
    assert not report.ok
    assert Report.of([NOTE, WARNING]).ok
    assert Report().ok


def test_findings_of_one_severity_keep_their_order() -> None:
    found = [note("n", str(number), "x") for number in (3, 1, 2)]
    assert Report.of(found).findings == tuple(found)


def test_text_is_one_line_for_each_finding() -> None:
    assert Report.of([NOTE, ERROR, WARNING]).as_text().splitlines() == [
        "error[missing-tensor]: layers.0.up: gralora_B is missing. Is the file complete?",
        "warning[alpha-zero]: adapter_config.json: alpha is 0.",
        "note[metadata-missing]: has no __metadata__.",
    ]
    assert Report().as_text() == ""


def test_annotations_are_workflow_commands() -> None:
    assert Report.of([NOTE, ERROR, WARNING]).as_annotations().splitlines() == [
        "::error title=missing-tensor::layers.0.up: gralora_B is missing. Is the file complete?",
        "::warning title=alpha-zero::adapter_config.json: alpha is 0.",
        "::notice title=metadata-missing::has no __metadata__.",
    ]


def test_json_holds_all_fields() -> None:
    document = json.loads(json.dumps(Report.of([ERROR, WARNING]).as_json()))
    assert document["ok"] is False
    assert [set(row) for row in document["findings"]] == [
        {"code", "severity", "where", "message", "hint"}
    ] * 2
    assert document["findings"][0]["where"] == "layers.0.up"


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_no_name_can_forge_a_line_or_a_command(where: str, message: str, hint: str) -> None:
    report = Report.of([error("code", where, message, hint)])
    for text in (report.as_text(), report.as_annotations()):
        assert text.isprintable()
        assert len(text.splitlines()) == 1
        text.encode()
    assert report.as_annotations().startswith("::error title=code::")
    refusal = ConvertError(message, where=where, hint=hint)
    assert str(refusal).isprintable()
    str(refusal).encode()


def test_what_could_steer_a_terminal_is_spelled_out() -> None:
    shown = printable(HOSTILE)
    assert shown == r"a\n::error::b\r\x1b[31m\x00\u2028\u202e\ud800\x85%"
    assert "%25" in Report.of([error("c", HOSTILE, "m")]).as_annotations()


def test_what_is_absurdly_long_is_cut_in_the_middle() -> None:
    shown = printable("a" * 10_000_000 + "z")
    assert len(shown) < 1100
    assert shown.startswith("aaa")
    assert shown.endswith("aaz")
    assert "characters" in shown
    assert printable("a" * 1000) == "a" * 1000


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("a", "b"), "a. b."),
        (("a.", "b?"), "a. b?"),
        (("a!", "", "b:"), "a! b:"),
        (("",), ""),
    ],
)
def test_sentences(parts: tuple[str, ...], text: str) -> None:
    assert sentences(*parts) == text


# refusals -----------------------------------------------------------------------------------------


def test_a_report_with_errors_refuses_with_the_first_and_carries_all() -> None:
    other = error("rank-mismatch", "layers.1.up", "r is 8")
    with pytest.raises(InvalidAdapterError) as caught:
        Report.of([NOTE, ERROR, other]).require_ok("adapter")
    assert caught.value.findings == (ERROR, other, NOTE)
    assert str(caught.value) == (
        "adapter: layers.0.up: [missing-tensor] gralora_B is missing (and 1 more; "
        "`validate` lists all). Is the file complete?"
    )
    Report.of([NOTE, WARNING]).require_ok("adapter")


def test_the_place_is_said_once() -> None:
    for where, said in {"adapter/config": "adapter/config: [", "": "adapter: ["}.items():
        with pytest.raises(InvalidAdapterError) as caught:
            Report.of([error("c", where, "m")]).require_ok("adapter")
        assert str(caught.value).startswith(said)


KINDS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, ConvertError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_refusal_is_one_family_with_a_kind_of_its_own(kind: type[ConvertError]) -> None:
    extra = {"exact_rank": 4, "error": 0.5} if kind is errors.InexactError else {}
    refusal = kind("was found", where="place", hint="Do this", **extra)
    assert str(refusal) == "place: was found. Do this."
    assert (refusal.where, refusal.message, refusal.hint) == ("place", "was found", "Do this")
    assert [other for other in KINDS if other.kind == kind.kind] == [kind]
    assert kind.kind == kind.kind.lower()
    assert kind.__doc__


def test_a_hint_can_be_added_on_the_way_up() -> None:
    refusal = ConvertError("was found", hint="Do this.")
    refusal.hint += " Delete that."
    assert str(refusal) == "was found. Do this. Delete that."


def test_a_refusal_without_a_place() -> None:
    assert str(ConvertError("was found")) == "was found."


def test_a_finding_is_a_value() -> None:
    copy = pickle.loads(pickle.dumps(ERROR))
    assert copy == ERROR
    assert hash(copy) == hash(Finding(*ERROR.as_json().values()))  # type: ignore[arg-type]


def test_what_a_finding_quotes_is_printable_and_short_everywhere() -> None:
    found = error("tensor-shape", "a\n\x1b[31m", "\ud800" * 100_000, "\u202e" * 3)
    assert found.where == "a\\n\\x1b[31m"
    for shown in (str(found), *found.as_json().values()):
        assert shown.isprintable()
        assert len(shown) < 20_000
