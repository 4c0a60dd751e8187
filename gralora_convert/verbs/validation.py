"""`validate`: is an adapter intact, does it fit its base? All findings in one run, no torch.

Structure comes from `scan_adapter`, the fit from `place`; here are the values (read once, a few MiB
at a time, as raw bytes) and what is worth a warning when there is no base to ask.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from gralora_convert.adapters import (
    CONFIG_NAME,
    Adapter,
    AdapterLike,
    LoraConfig,
    chain_findings,
    extra_findings,
    model_below,
    parse_key,
    scan_adapter,
    suspicions,
    values_beside,
)
from gralora_convert.base import Reading, model_at_hand, place
from gralora_convert.disk import FLOATING, RECEIPT_NAME, Checkpoint, TensorFile, look
from gralora_convert.errors import ConvertError, Finding, Report, error, note, warning
from gralora_convert.output import adapter_receipt_findings, checkpoint_receipt_findings
from gralora_convert.verbs.serving import ENGINES, Exported, reasons, require_engine


def validate(
    adapter: AdapterLike,
    base: str | Path | Checkpoint | None = None,
    *,
    server: str | None = None,
    key_map: Mapping[str, str] | None = None,
    fan_in_fan_out: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Everything that is wrong with an adapter, or worth knowing about it.

    Without `base` the adapter is checked against the model that it names, if that is a local
    folder, and on its own otherwise. The values of all tensors are read once.

    `server` asks besides whether vllm, sglang, llama.cpp or peft serves the adapter as it is.

    A checkpoint that this tool merged is checked against its receipt instead.

    Raises:
        UnreadableError: `adapter` is no folder, or the given `base` cannot be read.
        UnsupportedError: the given base is in a format that is not read.

    >>> validate("fixtures/peft-0.21.2/llama-gralora", "fixtures/bases/llama").ok
    True
    """
    reading = Reading.of(key_map, fan_in_fan_out, trust_remote_code)
    held = adapter if isinstance(adapter, str | Path) else Adapter.open(adapter)
    named = held.path if isinstance(held, Adapter) else held
    opened = None if base is None else Checkpoint.open(base)
    if _is_merged(Path(named)):
        return Report.of(checkpoint_receipt_findings(Path(named), opened))
    scan = scan_adapter(named)
    findings = list(scan.report.findings)
    if scan.file is not None:
        findings += _value_findings(scan.file)
    if scan.adapter is not None:
        findings += _adapter_findings(scan.adapter, opened, reading, server)
    return Report.of(findings)


def _is_merged(path: Path) -> bool:
    """Whether `path` holds what `merge` wrote, and no adapter."""
    return os.path.lexists(path / RECEIPT_NAME) and not os.path.lexists(path / CONFIG_NAME)


def _adapter_findings(
    adapter: Adapter, base: Checkpoint | None, reading: Reading, server: str | None
) -> Iterator[Finding]:
    yield from chain_findings(adapter)
    if os.path.lexists(adapter.path / RECEIPT_NAME):  # of `convert` or `extract`
        modules = frozenset(adapter.modules)
        yield from adapter_receipt_findings(adapter.path, adapter.file.path, modules)
    if base is None:
        base, unseen = _base_at_hand(adapter)
        if unseen:
            yield note("base-not-checked", CONFIG_NAME, unseen)
    if base is None:
        yield from suspicions(adapter)
        yield from extra_findings(adapter)
    else:
        yield from place(adapter, base, reading)[1].findings
    if server is not None:
        yield from _server_findings(adapter, base, server)


def _base_at_hand(adapter: Adapter) -> tuple[Checkpoint | None, str]:
    """The model that an adapter names, or why it cannot be looked at."""
    try:
        named = model_below(adapter)
        found = model_at_hand(named)
    except ConvertError as problem:
        return None, f"the base it names cannot be read: {problem}"
    what = f"{named!r} is not here" if named else "none is named"
    return found, "" if found is not None else f"checked without a base model: {what}"


def _server_findings(adapter: Adapter, base: Checkpoint | None, server: str) -> Iterator[Finding]:
    """What keeps an engine from serving an adapter as it is."""
    require_engine(server)
    engine, config = ENGINES[server], adapter.config
    if not isinstance(config, LoraConfig):
        if server != "peft":
            yield error(
                "server-refuses", CONFIG_NAME, f"{engine.title} serves LoRA, and this is none",
                f"`convert` it with `to=\"lora\"` and `server={server!r}`.",
            )  # fmt: skip
        return
    values = [*adapter.values, *values_beside(adapter)]
    for reason in reasons(server, Exported(config, adapter.modules, values, base)):
        yield error("server-refuses", CONFIG_NAME, f"{engine.title} {engine.version} {reason}")


def _value_findings(file: TensorFile) -> Iterator[Finding]:
    for spec in file.tensors.values():
        if spec.dtype not in FLOATING or not spec.nbytes:
            continue
        role = parse_key(spec.name).role
        finite, zero = look(spec)
        if not finite:
            yield error(
                "tensor-non-finite", spec.name, "holds NaN or infinity",
                "Training diverged, or the file is damaged: use an earlier checkpoint.",
            )  # fmt: skip
        if zero and role in ("B", "general_B"):
            yield warning(
                "zero-factor", spec.name, "is all zero: this part of the adapter has no effect",
                "Is it trained?",
            )  # fmt: skip
