"""JSON as untrusted files hold it: every ambiguity that a lenient parser hides is a `JsonError`."""

import json
from pathlib import Path

from gralora_convert.errors import UnreadableError

__all__ = ["JsonError", "load_json", "parse_json"]

MAX_JSON_BYTES = 256 * 1024 * 1024  # the index of the largest public checkpoints is below 100 MB


class JsonError(UnreadableError):
    """Not the JSON that was expected; `reason` is one of bom, not-json, duplicate-key,
    non-finite, not-object."""

    def __init__(self, reason: str, message: str, *, where: object = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.reason = reason


def parse_json(data: bytes, *, where: object, allow_non_finite: bool = False) -> dict[str, object]:
    """The JSON object in `data`.

    Raises:
        JsonError: a byte order mark, no JSON, a key twice in one object, NaN or an infinity
            (unless `allow_non_finite`: transformers writes them for some architectures), or
            something other than an object at the top.

    >>> parse_json(b'{"r": 8}', where="adapter_config.json")
    {'r': 8}
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise JsonError(
                "duplicate-key",
                f"the key {key!r} stands twice in one object",
                where=where,
                hint="Keep one of them; which one is meant cannot be told.",
            )
        return result

    def constant(text: str) -> float:
        if allow_non_finite:
            return float(text.replace("Infinity", "inf"))
        raise JsonError("non-finite", f"{text} is not a number in JSON", where=where)

    if data.startswith(b"\xef\xbb\xbf"):
        raise JsonError(
            "bom",
            "starts with a UTF-8 byte order mark, which JSON parsers refuse",
            where=where,
            hint="Save the file as UTF-8 without BOM.",
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise JsonError("not-json", "is nested too deeply", where=where) from None
    except ValueError as error:
        raise JsonError(
            "not-json",
            f"is not valid JSON: {error}",
            where=where,
            hint="Is the file complete? Copy or download it again.",
        ) from error
    if not isinstance(value, dict):
        raise JsonError(
            "not-object", f"holds a JSON {type(value).__name__}, an object was needed", where=where
        )
    return value


def load_json(path: Path, *, allow_non_finite: bool = False) -> dict[str, object]:
    """The JSON object in the regular file `path`.

    Raises:
        UnreadableError: missing, not a regular file, too large, or not readable.
        JsonError: see `parse_json`.
    """
    from gralora_convert.tensors import open_regular

    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UnreadableError(f"is larger than {MAX_JSON_BYTES} bytes", where=path)
    return parse_json(data, where=path, allow_non_finite=allow_non_finite)
