"""What transformers' own source text says of an architecture: read as text, never imported."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

HEADS = ("lm_head", "embed_out", "output")
LINES = re.MULTILINE | re.DOTALL


@cache
def text_of(*path: str) -> str:
    """A source file of the installed transformers; '' when it is not there. Nothing is imported."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    file = Path(spec.submodule_search_locations[0]).joinpath(*path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@cache
def modeling(model_type: str) -> str:
    """The text of transformers' modeling files of one model type; '' when there are none."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    names = dict(re.findall(r'\("([\w-]+)", "([\w-]+)"\)', text_of("models/auto/auto_mappings.py")
                            .partition("SPECIAL_MODEL_TYPE_TO_MODULE_NAME")[2]
                            .partition("\n)")[0]))  # fmt: skip
    name = names.get(model_type, model_type).replace("-", "_")
    folder = Path(spec.submodule_search_locations[0]) / "models" / name
    if not re.fullmatch(r"\w+", name) or not folder.is_dir():
        return ""
    return "\n".join(f.read_text(encoding="utf-8") for f in sorted(folder.glob("modeling_*.py")))


@cache
def converted() -> frozenset[str]:
    """Model types and classes whose names or values transformers changes while it loads them."""
    return frozenset(re.findall(r'"([\w-]+)"', text_of("conversion_mapping.py")))
