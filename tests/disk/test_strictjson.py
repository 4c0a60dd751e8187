"""JSON of untrusted files: what the standard parser accepts and this one does not."""

import json
import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gralora_convert.disk import strictjson
from gralora_convert.disk.strictjson import dump_json, load_json, parse_json
from gralora_convert.errors import ConvertError, UnreadableError

SURROGATE = "holds half of a surrogate pair, which is no character"
# what is in the file: (the reason, words of the message)
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "nothing": (b"", "not-json", "line 1 column 1"),
    "space": (b"  \n", "not-json", "not valid JSON"),
    "cut": (b'{"r": 8, "alp', "not-json", "Is the file complete?"),
    "two documents": (b"{}{}", "not-json", "Extra data"),
    "trailing comma": (b'{"r": 8,}', "not-json", "not valid JSON"),
    "comment": (b'{"r": 8} // rank', "not-json", "Extra data"),
    "single quotes": (b"{'r': 8}", "not-json", "not valid JSON"),
    "raw control character": (b'{"a\n": 1}', "not-json", "control character"),
    "NUL behind": (b"{}\0", "not-json", "Extra data"),
    "byte order mark": (b"\xef\xbb\xbf{}", "bom", "byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "not-json", "utf-8"),
    "UTF-32": ("{}".encode("utf-32-le"), "not-json", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not-json", "utf-8"),
    "overlong UTF-8": (b'{"\xc0\x80": 1}', "not-json", "utf-8"),
    "surrogate in UTF-8": (b'{"\xed\xa0\x80": 1}', "not-json", "utf-8"),
    "surrogate as key": (rb'{"\ud800": 1}', "not-json", SURROGATE),
    "surrogate as value": (rb'{"a": ["\uDFFF"]}', "not-json", SURROGATE),
    "surrogates in wrong order": (rb'{"a": "\udc00\ud800"}', "not-json", SURROGATE),
    "array": (b"[]", "not-object", "holds a JSON list, an object was needed"),
    "string": (b'"x"', "not-object", "str"),
    "number": (b"8", "not-object", "int"),
    "null": (b"null", "not-object", "NoneType"),
    "NaN": (b'{"alpha": NaN}', "non-finite", "NaN"),
    "infinity": (b'{"alpha": [-Infinity]}', "non-finite", "-Infinity"),
    "too large a number": (b'{"alpha": 1e999}', "non-finite", "1e999"),
    "5000 digits": (b'{"r": ' + b"1" * 5000 + b"}", "non-finite", "111"),
    "-5000 digits": (b'{"r": -' + b"9" * 5000 + b"}", "non-finite", "-999"),
    "400 digits": (b'{"r": ' + b"9" * 400 + b"}", "non-finite", "999"),
    "leading zero": (b'{"r": 08}', "not-json", "not valid JSON"),
    "hexadecimal": (b'{"r": 0x8}', "not-json", "not valid JSON"),
    "key twice": (b'{"r": 8, "r": 16}', "duplicate-key", "the key 'r' stands twice"),
    "key twice inside": (b'{"a": [{"r": 8, "q": 0, "r": 8}]}', "duplicate-key", "'r'"),
    "key twice in two spellings": (rb'{"r": 8, "\u0072": 16}', "duplicate-key", "'r'"),
    "128 objects": (b'{"a":' * 128 + b"1" + b"}" * 128, "not-json", "nested too deeply"),
    "128 levels": (b'{"a":' + b"[" * 127 + b"]" * 127 + b"}", "not-json", "nested too deeply"),
    "100 000 levels": (b"[" * 100_000, "not-json", "nested too deeply"),
    "100 000 closed levels": (
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not-json", "nested too deeply",
    ),
}  # fmt: skip


def outcome(data: bytes, allow_non_finite: bool = False) -> dict[str, object] | UnreadableError:
    try:
        return parse_json(data, where="x", allow_non_finite=allow_non_finite)
    except UnreadableError as error:
        return error


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    data, reason, words = REFUSED[name]
    with pytest.raises(UnreadableError) as caught:
        parse_json(data, where="a/config.json")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("a/config.json: ")
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"r": 8, "alpha": 16.5, "b": true, "n": null}',
         {"r": 8, "alpha": 16.5, "b": True, "n": None}),
        (' \n\t{"a": []}\r\n', {"a": []}),
        (r'{"\ud83d\ude00": "\u0000"}', {"😀": "\0"}),
        ('{"\u2028": "\x7f"}', {"\u2028": "\x7f"}),
        ('{"a": {"r": 1}, "b": {"r": 1}}', {"a": {"r": 1}, "b": {"r": 1}}),
        ('{"big": 18446744073709551616}', {"big": 2**64}),
        ('{"tiny": 1e-999}', {"tiny": 0.0}),
        ('{"a":' * 127 + "1" + "}" * 127, None),
        ('{"a":' + "[" * 126 + "]" * 126 + "}", None),
    ],
)  # fmt: skip
def test_what_is_accepted(text: str, value: object) -> None:
    found = parse_json(text.encode(), where="x")
    assert found == (json.loads(text) if value is None else value)


def test_numbers_keep_their_type() -> None:
    found = parse_json(b'{"a": 8, "b": 8.0, "c": true, "d": -0, "e": 1E2}', where="x")
    assert [type(value) for value in found.values()] == [
        int,
        float,
        bool,
        int,
        float,
    ]  # Python writes no integer -0


def test_some_configs_of_transformers_hold_infinities() -> None:
    data = b'{"a": Infinity, "b": -Infinity, "c": NaN, "d": 1e999, "e": ' + b"1" * 5000 + b"}"
    found = parse_json(data, where="x", allow_non_finite=True)
    assert [found[name] for name in "abde"] == [math.inf, -math.inf, math.inf, math.inf]
    assert isinstance(found["c"], float)
    assert math.isnan(found["c"])


TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)  # fmt: skip


@given(st.dictionaries(TEXT, VALUES, max_size=5), st.booleans(), st.none() | st.integers(0, 3))
def test_what_json_writes_is_read_back(
    value: dict[str, object], ensure_ascii: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
    assert parse_json(text.encode(), where="x") == value


PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"u", b"d8", b"00", b"e", b"E", b"+", b"-",
     b".", b"0", b"1", b"null", b"true", b"NaN", b"Infinity", b" ", b"\n", b"\0", b"\xff", b'"r"',
     b'{"r":', b"\\ud800", b"1e999", b"9" * 400]
)  # fmt: skip


@given(st.lists(PIECES, max_size=20).map(b"".join) | st.binary(max_size=40), st.booleans())
def test_any_bytes_are_an_object_or_a_refusal(data: bytes, allow_non_finite: bool) -> None:
    found = outcome(data, allow_non_finite)
    if isinstance(found, UnreadableError):
        assert str(found).isprintable()
        assert found.reason in {"bom", "not-json", "duplicate-key", "non-finite", "not-object"}
    else:
        json.dumps(found, ensure_ascii=False, allow_nan=allow_non_finite).encode()


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": [' + b"[]," * 500_000 + b"[]]}",
        b'{"a": "' + b"\\u0041" * 300_000 + b'"}',
        b'{"a": 0.' + b"1" * 2_000_000 + b"}",
        b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b"}",
        b'{"a": ' + b"-" * 2_000_000,
        b'{"' + b"\\" * 2_000_000,
    ],
    ids=["arrays", "escapes", "digits", "keys", "minus", "backslashes"],
)
def test_time_is_in_proportion(data: bytes) -> None:
    start = time.process_time()
    found = outcome(data)
    assert time.process_time() - start < 3
    assert isinstance(found, dict) or len(str(found)) < 2000


# files --------------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"r": 8}')
    (tmp_path / "link.json").symlink_to(path)
    assert load_json(path) == load_json(tmp_path / "link.json") == {"r": 8}


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling.json").symlink_to("nowhere")
    for path, words in {
        tmp_path / "fifo.json": "is not a regular file",
        tmp_path / "folder.json": "is not a regular file",
        Path("/dev/zero"): "is not a regular file",
        tmp_path / "loop.json": "Too many levels",
        tmp_path / "dangling.json": "No such file",
        tmp_path / "missing.json": "No such file",
        tmp_path / "fifo.json/below.json": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "a\0b": "not a file name",
        tmp_path / "\udfff": "not a file name",
    }.items():
        with pytest.raises(UnreadableError, match=words) as caught:
            load_json(path)
        assert str(caught.value).isprintable()


def test_a_disk_that_fails_is_a_refusal() -> None:
    """A regular file whose first byte cannot be read: Linux answers EIO."""
    memory = Path("/proc/self/mem")
    if not memory.is_file():
        pytest.skip("needs /proc")
    with pytest.raises(UnreadableError, match="cannot be read: Input/output error"):
        load_json(memory)


def test_an_endless_file_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 2**40)  # sparse
    monkeypatch.setattr(strictjson, "MAX_JSON_BYTES", 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConvertError, match="larger than 1000000 bytes"):
        load_json(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize("value", [{"a": "\U0001f600 \u00e9 \\udcff", "b": [1, None, 2.5]}, {}])
def test_what_is_written_is_what_json_writes(value: dict[str, object]) -> None:
    assert dump_json(value) == json.dumps(value, indent=2)


def test_a_name_that_is_no_text_is_written_as_json_that_is_read() -> None:
    text = dump_json({"path": "a\udcff/\U0001f600", "\udc80": 1})
    read = parse_json(text.encode(), where="receipt")
    assert len(read) == 2
    assert str(read["path"]).startswith("a\ufffd")
    assert str(read["path"]).endswith("/\U0001f600")


def test_what_is_no_number_is_written_as_null() -> None:
    text = dump_json({"kept": math.nan, "rows": [{"worst": -math.inf}, 1.5]})
    assert parse_json(text.encode(), where="") == {"kept": None, "rows": [{"worst": None}, 1.5]}
