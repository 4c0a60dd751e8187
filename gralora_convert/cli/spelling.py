"""How a message of the library reads on the command line: its parameters as options.

The library names the parameters of its functions in backticks, with values as Python writes them:
`key_map`, `dtype="float32"`, `allow_inexact=True`.
"""

import ast
import re
import shlex
from collections.abc import Mapping
from functools import cache

import click

# A sentence ends without a full stop after a value, for it to be copied with what is around it.
_PARAMETER = re.compile(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]+)`(?P<end>\.$)?|`)", re.MULTILINE)
# options that are one parameter of the library: of patterns that are so, and that are not
_OPPOSITES = {"fan_in_fan_out": ("--fan-in-fan-out", "--linear")}
_TOLD = ("message", "hint", "notes")  # the fields of a document that hold sentences of the library


def spelled(text: str) -> str:
    """`text` with the options of the running command line for the parameters it names.

    What is no parameter stays: fields of files, and commands such as `verify`, which are
    parameters only where they have a value.
    """
    context = click.get_current_context(silent=True)
    if context is None or "`" not in text:
        return text
    group = context.find_root().command
    return _PARAMETER.sub(lambda found: _option(found, group), text)


def spelled_json(value: object, *, told: bool = False) -> object:
    """The document with the sentences in it `spelled`; a receipt is quoted as it stands."""
    match value:
        case str():
            return spelled(value) if told else value
        case Mapping():
            return {
                name: inner if name == "provenance" else spelled_json(inner, told=name in _TOLD)
                for name, inner in value.items()
            }
        case list() | tuple():
            return [spelled_json(inner, told=told) for inner in value]
    return value


def _option(found: re.Match[str], group: click.Command) -> str:
    option, written = _options(group).get(found["name"]), found["value"]
    if option is None or (written is None and found["name"] in _commands(group)):
        return found[0]
    yes, no = option
    if written is None:
        return yes
    try:
        value = ast.literal_eval(written)
    except (ValueError, SyntaxError):  # a placeholder, such as MODEL
        return f"{yes} {written}"
    match value:
        case bool():
            return (yes if value else no) + (found["end"] or "") if value or no else found[0]
        case list() | tuple():
            return " ".join(f"{yes} {shlex.quote(str(each))}" for each in value)
        case dict() if all(isinstance(b, bool) for b in value.values()):
            return " ".join(f"{yes if b else no} {shlex.quote(str(a))}" for a, b in value.items())
        case dict():
            return " ".join(f"{yes} {shlex.quote(f'{a}={b}')}" for a, b in value.items())
    return f"{yes} {shlex.quote(str(value))}"


def _commands(group: click.Command) -> Mapping[str, click.Command]:
    return group.commands if isinstance(group, click.Group) else {}


@cache
def _options(group: click.Command) -> Mapping[str, tuple[str, str]]:
    """Of every parameter, the option that sets it and the one that unsets it ("" if none does)."""
    return _OPPOSITES | {
        str(parameter.name): (parameter.opts[-1], "".join(parameter.secondary_opts[:1]))
        for command in _commands(group).values()
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in _OPPOSITES
    }
