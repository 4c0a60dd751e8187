"""`python -m tests.api` writes docs/api.md: the public names with the first sentence of each."""

import inspect
import re
from pathlib import Path

import gralora_convert as gc

PAGE = Path(__file__).parent.parent / "docs/api.md"
HEAD = """# Public names

What `import gralora_convert as gc` offers, each with the first sentence of its docstring;
`help(gc.merge)` has the rest: shapes, errors, examples. Other names may change.
"""
OTHERS = {
    "__version__": "The version, as text.",
    "Delta": "Any of `Gralora`, `Lora` and `Dense`.",
}
KINDS = "Functions", "Classes", "Others"


def kind(name: str) -> str:
    value = getattr(gc, name)
    if name in OTHERS:
        return "Others"
    return "Classes" if inspect.isclass(value) else "Functions"


def line(name: str) -> str:
    """One name: how a function is called, and the first sentence about it."""
    value = getattr(gc, name)
    text = " ".join(OTHERS.get(name, inspect.getdoc(value) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z`])", text)[0]
    arguments = ""
    if kind(name) == "Functions":
        parameters = inspect.signature(value).parameters.values()
        arguments = f"({', '.join(str(p).partition(':')[0].partition('=')[0] for p in parameters)})"
    return f"* `gc.{name}{arguments}`: {sentence}"


def page() -> str:
    names = sorted(gc.__all__, key=str.lower)
    parts = [f"## {k}\n\n" + "\n".join(line(n) for n in names if kind(n) == k) for k in KINDS]
    return "\n\n".join([HEAD.rstrip(), *parts]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
