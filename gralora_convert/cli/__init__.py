"""The command line: parse, call one verb, print what it returns."""

from gralora_convert.cli.entry import run

__all__ = ["run"]
