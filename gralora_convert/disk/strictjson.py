"""JSON as untrusted files hold it: every ambiguity that a lenient parser hides is a `JsonError`.

And JSON that no parser refuses.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from gralora_convert.disk.files import open_regular, reading
from gralora_convert.errors import UnreadableError

MAX_JSON_BYTES = 32_000_000  # the largest public index has 10 MB
MAX_DEPTH = 127  # of serde_json, which reads the same files in other tools
_INTEGER_DIGITS = 300  # longer integers may exceed every float; longer than 4300 Python refuses
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAYBE_INCOMPLETE = "Is the file complete? Copy or download it again."


class JsonError(UnreadableError):
    """Not the JSON that was expected; `reason` is one of bom, not-json, duplicate-key,
    non-finite, not-object."""


def parse_json(data: bytes, *, where: object, allow_non_finite: bool = False) -> dict[str, object]:
    """The JSON object in `data`.

    Raises:
        JsonError: a byte order mark, no JSON, a key twice in one object, NaN or an infinity
            (unless `allow_non_finite`: transformers writes them for some architectures), or
            something other than an object at the top.

    >>> parse_json(b'{"r": 8}', where="adapter_config.json")
    {'r': 8}
    """

    def wrong(what: str, hint: str = "", reason: str = "not-json") -> JsonError:
        return JsonError(what, where=where, hint=hint, reason=reason)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            what = f"the key {key!r} stands twice in one object"
            hint = "Keep one of them; which one is meant cannot be told."
            raise wrong(what, hint, "duplicate-key")
        return result

    def number(text: str) -> float:
        value = float(text.replace("Infinity", "inf"))
        if math.isfinite(value) or allow_non_finite:
            return value
        raise wrong(f"{text[:40]} is not a finite number", reason="non-finite")

    def integer(text: str) -> int | float:
        return number(text) if len(text) > _INTEGER_DIGITS else int(text)

    if data.startswith(b"\xef\xbb\xbf"):
        what = "starts with a UTF-8 byte order mark, which JSON parsers refuse"
        raise wrong(what, "Save the file as UTF-8 without BOM.", "bom")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=number,
            parse_float=number,
            parse_int=integer,
        )
    except RecursionError:
        raise wrong("is nested too deeply") from None
    except ValueError as error:
        raise wrong(f"is not valid JSON: {error}", _MAYBE_INCOMPLETE) from error
    if not isinstance(value, dict):
        what = f"holds a JSON {type(value).__name__}, an object was needed"
        raise wrong(what, reason="not-object")
    if _is_deeper_than(MAX_DEPTH, value):
        raise wrong("is nested too deeply")
    if _SURROGATE.search(data) and not _is_unicode(value):
        raise wrong("holds half of a surrogate pair, which is no character")
    return value


def _is_deeper_than(limit: int, value: dict[str, Any] | list[Any]) -> bool:
    level = [value]  # objects and arrays of one depth
    for _ in range(limit):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [child for held in inner for child in held if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def load_json(path: Path, *, allow_non_finite: bool = False) -> dict[str, object]:
    """The JSON object in the regular file `path`.

    Raises:
        UnreadableError: missing, not a regular file, too large, or not readable.
        JsonError: see `parse_json`.
    """
    with open_regular(path) as file, reading(path):
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UnreadableError(f"is larger than {MAX_JSON_BYTES} bytes", where=path)
    return parse_json(data, where=path, allow_non_finite=allow_non_finite)


def dump_json(value: object) -> str:
    """`value` as JSON for people and parsers.

    NaN and infinities, which JSON has not, become null. A name of a file may be no Unicode; what is
    no character of it becomes U+FFFD, because parsers refuse half a surrogate pair.

    >>> print(dump_json({"kept": float("nan")}))
    {
      "kept": null
    }
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError:
        value = json.loads(json.dumps(value), parse_constant=lambda name: None)
        text = json.dumps(value, indent=2)
    if not _SURROGATE.search(text.encode()) or _is_unicode(value):
        return text
    shown = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.dumps(json.loads(shown.decode("utf-8", "replace")), indent=2)
