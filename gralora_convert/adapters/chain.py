"""Adapters that were trained on adapters: SFT, then DPO on top of it."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from gralora_convert.adapters.adapter import WEIGHTS, Adapter
from gralora_convert.adapters.config import CONFIG_NAME, read_config
from gralora_convert.disk import is_file, is_there
from gralora_convert.errors import Finding, MisuseError, UnsupportedError, note

LONGEST = 32  # adapters below one another


def below(adapter: Adapter) -> list[Path]:
    """The folders of the adapters that `adapter` was trained on, the first trained one first; []
    when its base is a model, or is not here.

    Raises:
        UnsupportedError: the chain leads back to itself.

    transformers 5.23 (integrations/peft.py) loads such a chain from the name of the last one.
    """
    found: list[Path] = []
    name = adapter.config.base_model_name_or_path
    while name and is_there(name) and _holds_an_adapter(Path(name)):
        folder = Path(os.path.realpath(name))
        if folder in found or len(found) == LONGEST:
            raise UnsupportedError(
                "names an adapter as its base that leads back to itself", where=adapter.path
            )
        found.append(folder)
        value = read_config(folder).values.get("base_model_name_or_path")
        name = value if isinstance(value, str) else None
    return found[::-1]


def chain_findings(adapter: Adapter) -> Iterator[Finding]:
    """That the base of an adapter is an adapter, which other tools leave out."""
    if folders := below(adapter):
        names = " and ".join(map(str, folders))
        yield note(
            "base-is-adapter", CONFIG_NAME, f"was trained on top of the adapter {names}",
            "A merge takes both; without the first the function is another.",
        )  # fmt: skip


def _holds_an_adapter(folder: Path) -> bool:
    return is_file(folder / CONFIG_NAME) and any(is_file(folder / name) for name in WEIGHTS)


def whole_chains(
    adapters: Sequence[Adapter], held: Collection[str] | None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, each behind those that it was trained on, and a note for each that was put in.

    `held` are the sha256 of adapters that the given base holds already; None when no base was
    given, so that the chain is followed to its end.

    Raises:
        MisuseError: the base was given, and an adapter of the chain is missing.
    """
    folders = [below(adapter) for adapter in adapters]
    if not any(folders):  # mostly so, and hashing a large adapter takes a second
        return list(adapters), []
    named = {adapter.sha256() for adapter in adapters}
    chain: list[Adapter] = []
    notes = []
    for adapter, parents in zip(adapters, folders, strict=True):
        for folder in parents:
            parent = Adapter.open(folder)
            parent.require_plain()
            if parent.sha256() in {*named, *(held or ())}:
                continue
            if held is not None:
                raise MisuseError(
                    f"was trained on the adapter {folder}, which is neither named nor in this base",
                    where=adapter.path,
                    hint=f"Name it before: {folder} {adapter.path}; or, if the base holds it, "
                    "insist with `again=True`.",
                )
            named.add(parent.sha256())
            chain.append(parent)
            notes.append(f"{adapter.path} was trained on the adapter {folder}: both are merged")
        chain.append(adapter)
    return chain, notes
