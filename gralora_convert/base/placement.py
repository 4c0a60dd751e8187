"""Where every tensor of an adapter goes in a base checkpoint, or why it cannot.

`place` finds everything that only the two together can show: modules that do not exist, shapes that
do not fit, targets without tensors, lost biases, tied weights. Headers only, but for embeddings
that may be unchanged copies.
"""

from collections.abc import Mapping

from gralora_convert.adapters import Adapter, extra_findings, together
from gralora_convert.base import checks
from gralora_convert.base.architecture import Architecture
from gralora_convert.base.edits import head_edits, tie_edits, vocabulary_edits
from gralora_convert.base.identity import identity_findings
from gralora_convert.base.modules import Pair, target_of
from gralora_convert.base.quantisation import (
    RESAVED,
    is_config_alone,
    plain_under_packed_names,
    quantised_by,
)
from gralora_convert.base.reading import NOTHING_SAID, Reading
from gralora_convert.base.recipe import Placement, Target
from gralora_convert.base.replacements import Replacements, replacements_of
from gralora_convert.base.sets import padding, stray_adapter
from gralora_convert.base.ties import Claims, Settlement, settle
from gralora_convert.disk import Checkpoint
from gralora_convert.errors import Finding, Report, error, note


def place(
    adapter: Adapter,
    base: Checkpoint,
    reading: Reading = NOTHING_SAID,
) -> tuple[Placement | None, Report]:
    """Where `adapter` goes in `base`; None with errors in the report when it does not fit."""
    if is_config_alone(base):
        return None, Report.of([error(
            "base-quantised", base.path,
            f"its config.json says quantised ({quantised_by(base)}), but no tensor is: loaders "
            "would quantise, or misread, the merged weights",
            f"Were they dequantised? Then remove quantization_config from config.json. {RESAVED}",
        )])  # fmt: skip
    name = (adapter.config.auto_mapping or {}).get("base_model_class")
    beside = adapter.model_config.get("architectures")
    if plain := plain_under_packed_names(base):
        return None, Report.of([error(
            "base-quantised", base.path,
            f"{plain} is {base.tensors[plain].dtype} under a name of packed numbers: loaders fill "
            "its experts at random", RESAVED,
        )])  # fmt: skip
    architecture = Architecture(
        base, adapter.modules, name if isinstance(name, str) else None, adapter.task_type,
        reading, str(beside[0]) if isinstance(beside, list) and len(beside) == 1 else None,
        {module: adapter.shape(module) for module in adapter.modules},
        (*adapter.values, *adapter.frozen),
    )  # fmt: skip
    if architecture.rivals is not None:
        return None, Report.of([architecture.rivals])
    values = replacements_of(adapter, architecture)
    pair = Pair(adapter, architecture, values.frozen, values.renamed)
    findings, settlement = _settled(pair, values)
    report = Report.of(findings)
    return (_placement(pair, values, settlement, report) if report.ok else None), report


def _settled(pair: Pair, values: Replacements) -> tuple[list[Finding], Settlement]:
    """All that is found, and the claims on tensors of the base, settled."""
    adapter, architecture, base = pair.adapter, pair.architecture, pair.base
    findings = [*checks.unused(pair), *extra_findings(adapter), *stray_adapter(base)]
    findings += identity_findings(adapter, base)
    if architecture.prefix_note:
        findings.append(note(
            "base-prefix", base.path,
            f"names its tensors {architecture.prefix_note} of the adapter's names",
        ))  # fmt: skip
    found = {f"{module}.weight": target_of(pair, module) for module in adapter.modules}
    targets = {name: one for name, one in found.items() if isinstance(one, Target)}
    problems = [one for one in found.values() if isinstance(one, Finding)]
    findings += [*problems, *checks.misnamed(pair)]
    if targets or not problems:  # else nothing fits, and the modules say so
        findings += [*checks.selected(pair), *checks.orientation(pair, targets.values())]
        findings += checks.config_beside(pair, values)
        findings += checks.head(pair, values)
        values.findings += checks.new_head(values)
        if lost := checks.missing_bias(values, [target.module for target in targets.values()]):
            values.findings.append(lost)
    claims = Claims(targets, values.trained, values.frozen, frozenset(values.in_place))
    settlement = settle(claims, architecture)
    findings += [*values.findings, *settlement.findings]
    if values.head_rows is None:  # else the class of the output is another
        findings += checks.unloaded(pair, settlement)
    return [*findings, *checks.quantised(pair, settlement)], settlement


def place_in(adapter: Adapter, base: Checkpoint, reading: Reading = NOTHING_SAID) -> Placement:
    """Where `adapter` goes in `base`.

    Raises:
        InvalidAdapterError: it does not fit.
    """
    placement, report = place(adapter, base, reading)
    report.require_ok(adapter.path)
    assert placement is not None
    return placement


def _placement(
    pair: Pair, values: Replacements, settlement: Settlement, report: Report
) -> Placement:
    architecture, config = pair.architecture, pair.base.config
    edits = {} if values.vocabulary is None else vocabulary_edits(config, *values.vocabulary)
    edits = tie_edits(config, settlement.flags, edits)
    rows = values.head_rows

    def config_edits() -> Mapping[str, object]:
        if rows is None:
            return edits
        found = edits | head_edits(architecture, rows, pair.adapter.model_config)
        is_padded = architecture.task_type == "SEQ_CLS"
        return found | (padding(pair.adapter, pair.base) if is_padded else {})

    return Placement(
        pair.adapter, architecture, tuple(settlement.targets), tuple(settlement.replacements),
        edits, config_edits, {} if rows is None else architecture.outer_names(),
        tuple(map(str, together(report.findings))), pair.scales,
    )  # fmt: skip
