"""Adapters that were trained on adapters: SFT, then DPO on top of it."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.adapters.config import CONFIG_NAME, read_config, source_of
from gralora_convert.adapters.folder import WEIGHTS
from gralora_convert.disk import cached, is_file, is_there, locate, parse_name
from gralora_convert.errors import Finding, MisuseError, UnsupportedError, error, note

LONGEST = 32  # adapters below one another
_CYCLE = "names an adapter as its base that leads back to itself"


def below(adapter: Adapter, *, fetch_names: bool = False) -> list[Path]:
    """The folders of the adapters that `adapter` was trained on, the first trained one first; []
    when its base is a model, or is neither here nor in the Hub's cache.

    `fetch_names` asks the Hub for what is not in its cache.

    Raises:
        UnsupportedError: the chain leads back to itself.
        UnreadableError: a name to fetch could not be had.

    transformers 5.23 (integrations/peft.py) loads such a chain from the name of the last one.
    """
    found: list[Path] = []
    name = adapter.base_source
    while name:
        if fetch_names and not is_there(name) and parse_name(name):
            locate(name)
        folder = _adapter_of(name)
        if folder is None:
            break
        if folder in found or len(found) == LONGEST:
            raise UnsupportedError(_CYCLE, where=adapter.path)
        found.append(folder)
        name = _named_by(folder)
    return found[::-1]


def chain_findings(adapter: Adapter) -> Iterator[Finding]:
    """That the base of an adapter is an adapter, which other tools leave out."""
    try:
        folders = below(adapter)
    except UnsupportedError:
        yield error("base-is-adapter", CONFIG_NAME, _CYCLE, "Name the model in one of them.")
        return
    if folders:
        names = " and ".join(map(str, folders))
        yield note(
            "base-is-adapter", CONFIG_NAME, f"was trained on top of the adapter {names}",
            "A merge takes both; without the first the function is another.",
        )  # fmt: skip


def _adapter_of(name: str) -> Path | None:
    """The folder of the adapter that `name` means, here or in the Hub's cache; None for a model,
    and where nothing of that name is."""
    config = cached(name, CONFIG_NAME)
    if config is None or not any(is_file(config.parent / weights) for weights in WEIGHTS):
        return None
    return Path(os.path.realpath(config.parent))


def model_below(adapter: Adapter) -> str | None:
    """The name of the model at the end of the chain, as far as it can be seen here.

    Raises:
        UnsupportedError: the chain leads back to itself.
    """
    folders = below(adapter)
    return _named_by(folders[0]) if folders else adapter.base_source


def is_on_adapter(adapter: Adapter) -> bool:
    """Whether the base that `adapter` names is an adapter, by all that can be seen here."""
    return bool(below(adapter) or _namesake(adapter))


def _namesake(adapter: Adapter) -> Path | None:
    """An adapter near `adapter` under the name of a base that is not where the config says: the
    run was moved, or its names are relative to a folder above."""
    name = adapter.base_source
    if not name or cached(name, CONFIG_NAME) or is_there(name):
        return None
    own = Path(os.path.realpath(adapter.path))
    above = [] if Path(name).is_absolute() else [folder / name for folder in own.parents]
    for folder in (*above, own.parent / Path(name).name):
        found = _adapter_of(str(folder))
        # one that has the same base is a run called after the model
        if found and found != own and _named_by(found) != name:
            return found
    return None


def _named_by(folder: Path) -> str | None:
    values = read_config(folder).values
    return source_of(values.get("base_model_name_or_path"), values.get("revision"))


def whole_chains(
    adapters: Sequence[Adapter], held: Collection[str] | None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, each behind those that it was trained on, and a note for each that was put in.

    `held` are the sha256 of adapters that the given base holds already; None when no base was
    given, so that the chain is followed to its end.

    Raises:
        MisuseError: the base was given, and an adapter of the chain is missing.
    """
    near = [_namesake(adapter) for adapter in adapters]
    folders = [
        [] if likely else below(adapter, fetch_names=held is None)
        for adapter, likely in zip(adapters, near, strict=True)
    ]
    if not any((*folders, *near)):  # mostly so, and hashing a large adapter takes a second
        return list(adapters), []
    at_hand = {adapter.sha256() for adapter in adapters}.union(held or ())
    chain: list[Adapter] = []
    notes = []
    for adapter, known, likely in zip(adapters, folders, near, strict=True):
        parents = [Adapter.open(folder) for folder in known or filter(None, [likely])]
        for parent in parents:
            parent.require_plain()
        lacking = [parent for parent in parents if parent.sha256() not in at_hand]
        if lacking and (held is not None or likely):
            paths = [str(parent.path) for parent in lacking]
            named = f"the adapter {paths[0]}, which is neither named nor in this base"
            if likely:
                named = f"{adapter.base_source}, which is not there; {likely} is an adapter"
            raise MisuseError(
                f"was trained on {named}",
                where=adapter.path,
                hint=f"Name it before: {' '.join(paths)} {adapter.path}; or, if the base holds "
                "it, insist with `again=True`.",
            )
        for parent in lacking:
            at_hand.add(parent.sha256())
            chain.append(parent)
            notes.append(
                f"{adapter.path} was trained on the adapter {parent.path}: both are merged"
            )
        chain.append(adapter)
    return chain, notes
