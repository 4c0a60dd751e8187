"""An adapter on disk: config, keys, targets, tensors that agree. No torch until values are read."""

from gralora_convert.adapters.adapter import (
    Adapter,
    AdapterLike,
    Scan,
    natural,
    require_finite,
    scan_adapter,
)
from gralora_convert.adapters.beside import (
    Extra,
    extra_findings,
    extras,
    files_of,
    trained_files,
    unplaced,
    values_beside,
)
from gralora_convert.adapters.chain import chain_findings, is_on_adapter, model_below, whole_chains
from gralora_convert.adapters.completeness import (
    INCOMPLETE,
    bias_finding,
    is_all_linear,
    missing_targets,
    saved_findings,
    suspicions,
    target_findings,
)
from gralora_convert.adapters.config import (
    CONFIG_NAME,
    NAMES,
    GraloraConfig,
    LoraConfig,
    read_config,
)
from gralora_convert.adapters.folder import WEIGHTS
from gralora_convert.adapters.groups import Group, group, split, together
from gralora_convert.adapters.keys import PREFIX, Method, Role, key_of, parse_key
from gralora_convert.adapters.patterns import Patterns
from gralora_convert.adapters.rules import NEEDS_BASE, PEFT_VERSION
from gralora_convert.adapters.targets import is_saved
from gralora_convert.adapters.update import Update

__all__ = [
    "CONFIG_NAME", "INCOMPLETE", "NAMES", "NEEDS_BASE", "PEFT_VERSION", "PREFIX", "WEIGHTS",
    "Adapter", "AdapterLike", "Extra", "GraloraConfig", "Group", "LoraConfig", "Method", "Patterns",
    "Role", "Scan", "Update", "bias_finding", "chain_findings", "extra_findings", "extras",
    "files_of", "group", "is_all_linear", "is_on_adapter", "is_saved", "key_of", "missing_targets",
    "model_below", "natural", "parse_key", "read_config", "require_finite", "saved_findings",
    "scan_adapter", "split", "suspicions", "target_findings", "together", "trained_files",
    "unplaced", "values_beside", "whole_chains",
]  # fmt: skip
