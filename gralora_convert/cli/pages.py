"""The pages of `inspect`: the facts of its JSON documents as text, with the next commands to type.

Every line is made printable, so that no name in a hostile file breaks out of its line.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_convert.adapters import CONFIG_NAME, NAMES, Group
from gralora_convert.cli.terminal import Line, shortened
from gralora_convert.disk import cached, is_there
from gralora_convert.errors import printable
from gralora_convert.verbs import (
    SERVED_RANKS,
    AdapterFacts,
    CheckpointFacts,
    SoundFacts,
)

if TYPE_CHECKING:
    from gralora_convert.verbs import Inspection

Json = Mapping[str, object]
EXACT = 1e-6  # as in delta/resizing.py: relative errors below it are those of float32 factors


def inspection_page(found: "Inspection") -> list[Line]:
    """What was found, for people."""
    match found.facts:
        case CheckpointFacts() as facts:
            return _checkpoint_page(found, facts)
        case AdapterFacts() as facts:
            return _adapter_page(found, facts)
        case None:
            return _adapters_page(found)


def _adapter_page(found: "Inspection", facts: AdapterFacts) -> list[Line]:
    """What an adapter is, how it is served, whether it is sound, what can be done with it."""
    report, whole = found.report, facts if isinstance(facts, SoundFacts) else None
    verdict = (
        "no errors in config, names and shapes; `validate` reads the values, too"
        if report.ok
        else f"{len(report.errors)} error(s); what follows from them is not told above"
    )
    findings = shortened([Line.of(finding) for finding in report.findings])
    fields = [
        ("base", _base(facts.base_model)),
        ("shape", _shape(facts)),
        ("as a LoRA", _serving(whole) if whole else ""),
        ("size", _size(facts)),
        ("also", ", ".join(whole.also) if whole else ""),
        ("made by", _provenance(found.receipt)),
        ("modules" if report.ok else "tensors", _table(found.groups)),
        ("health", [verdict, *findings]),
        ("next", _next_of_adapter(found, whole if report.ok else None)),
    ]
    return _page(f"{found.name}: {_kind(facts)}", fields)


def _adapters_page(found: "Inspection") -> list[Line]:
    """Several adapters in sub-folders, a line each."""
    rows = [
        (folder, f"{_kind(inner.facts)}, {_short_shape(inner.facts)}"
         + ("" if inner.report.ok else f", {len(inner.report.errors)} error(s)"))
        for folder, inner in found.inner.items() if isinstance(inner.facts, AdapterFacts)
    ]  # fmt: skip
    first = shlex.quote(str(Path(found.name) / next(iter(found.inner))))
    title = f"{found.name}: {len(found.inner)} adapter(s) in sub-folders"
    return _page(title, [*rows, ("next", [_command(f"inspect {first}")])])


def _checkpoint_page(found: "Inspection", facts: CheckpointFacts) -> list[Line]:
    """What a dense checkpoint is and where it comes from."""
    method, files = facts.quantisation, facts.files
    sizes = ((facts.layers, "layers"), (facts.hidden_size, "wide"), (facts.vocabulary, "tokens"))
    numbers = ", ".join(f"{size:,} {word}" for size, word in sizes if size is not None)
    fields = [
        ("model", "; ".join(filter(None, [facts.model_type, numbers]))),
        ("size", f"{facts.tensors} tensors, {facts.parameters:,} parameters, "
                 + ", ".join(f"{count} x {dtype}" for dtype, count in facts.dtype.items())
                 + f", {_bytes(facts.bytes)}"),
        ("files", files[0] + (f" ... {files[-1]} ({len(files)} files)" if files[1:] else "")),
        ("ties", "the output head is the input embedding" if facts.tied else "none"),
        ("quantised", f"{method}: {_merges(facts.fp8_weights)}" if method else "no"),
        ("made by", _provenance(found.receipt)),
        ("weights", _table(found.groups)),
        ("next", [] if method else _next_of_checkpoint(found.name, found.receipt)),
    ]  # fmt: skip
    what = ", ".join(facts.architectures) or "of an unknown architecture (no config.json)"
    return _page(f"{found.name}: dense checkpoint, {what}", fields)


def _merges(codes: int) -> str:
    """What a merge does with a quantised base."""
    if codes:
        return f"a merge reads its {codes} fp8 weights, and makes plain what an adapter adds to"
    return "a merge adds to its plain weights only, and copies the others"


# layout -------------------------------------------------------------------------------------------


def _page(title: str, fields: Sequence[tuple[str, str | Sequence[str | Line]]]) -> list[Line]:
    """A title and `  name  value` lines, values with several lines set off by empty ones."""
    held = [(name, [v] if isinstance(v, str) else v) for name, v in fields if v]
    width = max([9, *(len(name) for name, _ in held)])
    lines = [Line(printable(title))]
    apart = True
    for name, values in held:
        if apart or len(values) > 1:
            lines.append(Line(""))
        apart = len(values) > 1
        for i, value in enumerate(values):
            line = value if isinstance(value, Line) else Line(value)
            label = f"  {'' if i else printable(name):<{width}}  "
            lines.append(replace(line, text=printable(line.text), label=label))
    return lines


def _table(groups: Sequence[Group]) -> Sequence[str | Line]:
    """How many, of what shape, which."""
    if not groups:
        return []
    sizes = [" x ".join(map(str, g.shape)) or "scalar" for g in groups]
    width, digits = max(map(len, sizes)), len(str(max(g.count for g in groups)))
    return shortened([
        f"{g.count:>{digits}}  {size:>{width}}  {g.name}"
        for g, size in zip(groups, sizes, strict=True)
    ])  # fmt: skip


def _command(arguments: str) -> Line:
    return Line(f"gralora-convert {arguments}", is_command=True)


def _bytes(count: int) -> str:
    """A number of bytes for people, and exactly."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.2f} {unit} ({count:,} bytes)"
    return f"{count:,} bytes"


# adapters -----------------------------------------------------------------------------------------


def _kind(facts: AdapterFacts) -> str:
    kind, version = facts.kind, facts.peft_version
    if kind is None:
        return "an adapter of a method that is not read here"
    writer = f"PEFT {version}" if version else "PEFT"
    if facts.dialect == "authors":
        writer = "the original authors' code"
    return f"{NAMES[kind]} adapter, written by {writer}"


def _base(base: object) -> str:
    if not isinstance(base, str) or not base:
        return "not named; give --base"
    if is_there(base):
        return f"{base} (here)"
    held = cached(base, "config.json") or cached(base, CONFIG_NAME)
    return f"{base} ({'in the cache of the Hub' if held else 'not here'})"


def _short_shape(facts: AdapterFacts) -> str:
    blocks = "" if facts.kind == "lora" else f" k={facts.k} hybrid_r={facts.hybrid_r}"
    return f"r={facts.r}{blocks}"


def _shape(facts: AdapterFacts) -> str:
    r, k, h = facts.r, facts.k, facts.hybrid_r
    line = f"{_short_shape(facts)}, alpha={facts.alpha}"
    if facts.scaling is not None:
        line += f", scaling={facts.scaling:g}"
    if facts.kind == "lora" or not (type(r) is int and type(k) is int and k > 0 and r % k == 0):
        return line
    general = f" beside a LoRA of rank {h}" if h else ""
    return f"{line}: {k} x {k} blocks of rank {r // k}{general}"


def _serving(facts: SoundFacts) -> str:
    """The rank, whether a server takes it, and what servers would refuse or misread."""
    exact, rank = facts.exact_lora_rank, facts.max_lora_rank
    line = f"{'it is one' if facts.kind == 'lora' else 'the same function'} at rank {exact}; "
    if rank is None:
        line += f"above vLLM's largest ({SERVED_RANKS[-1]}): merge it, or convert with --max-error"
    else:
        line += f"vLLM serves it with --max-lora-rank {rank}"
    if facts.unsupported:
        line += f"; {', '.join(facts.unsupported)}: not every server reads that"
    elif facts.biases or facts.saved:
        line += "; its biases and saved modules only live in a merged model"
    return line


def _size(facts: AdapterFacts) -> str:
    if not facts.tensors:
        return "no tensors"
    return (
        f"{len(facts.modules)} modules, {facts.parameters:,} parameters, "
        f"{', '.join(facts.dtype)}, {_bytes(facts.bytes)} in {facts.file}"
    )


def _next_of_adapter(found: "Inspection", facts: SoundFacts | None) -> list[Line]:
    path = shlex.quote(found.name)
    if facts is None:
        return [_command(f"validate {path}")]
    named = facts.base_model
    model = shlex.quote(named) if isinstance(named, str) and named else "MODEL"
    codes = {finding.code for finding in found.report.findings}
    base = "" if "base-is-adapter" in codes else f" --base {model}"  # the chain is followed
    lines = [_command(f"validate {path}{base}")]
    if facts.kind != "lora":
        lines.append(_command(f"convert {path} --to lora -o OUT"))
    elif not facts.beyond_factors:
        lines.append(_command(f"convert {path} --to hybrid -o OUT"))
    if not facts.beyond_factors:
        lines.append(_command(f"merge {path}{base} -o OUT"))
    return lines


# checkpoints --------------------------------------------------------------------------------------


def _next_of_checkpoint(name: str, receipt: Json | None) -> list[Line]:
    path = shlex.quote(name)
    if receipt is not None and receipt.get("command") == "merge":
        base, adapters = _inputs(receipt)
        if base and adapters:
            named = " ".join(map(shlex.quote, adapters))
            return [_command(f"verify {named} --base {shlex.quote(base)} --merged {path}")]
    return [
        _command(f"merge ADAPTER --base {path} -o OUT"),
        _command(f"extract --base {path} --tuned TUNED --to gralora -o OUT"),
    ]


def _provenance(receipt: Json | None) -> str:
    """What a receipt says, in words."""
    if receipt is None:
        return ""
    base, others = _inputs(receipt)
    modules, kept, error = (receipt.get(key) for key in ("modules", "survival", "error"))
    line = f"{receipt.get('tool')} {receipt.get('version')} {receipt.get('command')}: "
    line += " + ".join([*([base] if base else []), *others])
    if isinstance(modules, list):
        line += f"; {len(modules)} modules"
    if isinstance(kept, Mapping) and isinstance(kept.get("kept"), float):
        line += f", rounding kept {kept['kept']:.1%} of the update"
    if isinstance(error, float):
        line += ", exact" if error <= EXACT else f", relative error {error:.3g}"
    return line


def _inputs(receipt: Json) -> tuple[str, list[str]]:
    """The base, and the other inputs (adapters, a tuned model), that a receipt lists."""
    inputs = receipt.get("inputs")
    base, others = "", []
    for key, value in inputs.items() if isinstance(inputs, Mapping) else ():
        for entry in value if isinstance(value, list) else [value]:
            place = entry.get("source") or entry.get("path") if isinstance(entry, Mapping) else None
            if isinstance(place, str) and key == "base":
                base = place
            elif isinstance(place, str):
                others.append(place)
    return base, others
