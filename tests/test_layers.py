"""Who may import whom, what may never be imported, and what a command may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gralora_convert"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

LAYERS = {
    "foundation": {"bits", "codes", "errors", "groups", "report", "serving", "version"},
    "disk": {
        "adapter", "cards", "checkpoint", "config", "files", "hub", "journal", "keys", "pages",
        "pickles", "places", "plan", "provenance", "ranks", "rules", "shapes", "signs", "specs",
        "staging", "strictjson", "targets", "tensors", "unpickling", "workers", "writing",
    },
    "mathematics": {
        "blocks", "delta", "diagnosis", "factorize", "layer", "products", "rounding",
        "variants",
    },
    "base": {
        "architecture", "heads", "pieces", "placement", "quantisation", "settings", "ties",
        "values",
    },
    "output": {"assembly", "layout", "tiles"},
    "models": {
        "audit", "blueprint", "comparison", "differences", "forward", "modalities",
        "outputs", "saving", "source",
    },
    "verbs": {
        "anatomy", "checks", "conversion", "equivalence", "extraction", "inspection", "merging",
    },
    "surface": {"__init__", "__main__", "cli", "options", "plots", "terminal"},
}  # fmt: skip
BELOW = {
    "foundation": set[str](),
    "disk": {"foundation"},
    "mathematics": {"foundation"},
    "base": {"foundation", "disk"},
    "output": {"foundation", "disk", "mathematics"},
    "models": {"foundation", "disk", "mathematics", "base"},
    "verbs": {"foundation", "disk", "mathematics", "base", "output", "models"},
    "surface": {"foundation", "disk", "output", "verbs"},
}
# Inside a function only: an adapter hands out deltas, and only an unknown architecture is built.
LAZY = {("adapter", "delta"), ("architecture", "blueprint")}
WITHOUT_TORCH = LAYERS["foundation"] | LAYERS["disk"] | LAYERS["base"] | LAYERS["surface"]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "safetensors", "huggingface_hub", "tqdm"}


@cache
def source(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imports(module: str, *, top: bool) -> set[str]:
    """The full names that a module imports at its top, or at any place of it."""
    return set(_imported(source(module), top))


def _imported(node: ast.AST, top: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(name), level=0, names=names):
                yield name
                if name == "gralora_convert":
                    yield from (f"{name}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise AssertionError("relative import")
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if top:
                pass
            case _:
                yield from _imported(child, top)


def ours(module: str, *, top: bool) -> set[str]:
    prefix = "gralora_convert."
    found = {n.removeprefix(prefix) for n in imports(module, top=top) if n.startswith(prefix)}
    return {name.split(".")[0] for name in found}


def theirs(module: str, *, top: bool) -> set[str]:
    return {name.split(".")[0] for name in imports(module, top=top)} - {"gralora_convert"}


def layer(module: str) -> str:
    return next(name for name, modules in LAYERS.items() if module in modules)


def called(module: str) -> set[str]:
    """The dotted names of everything that is called in a module."""
    nodes = (node for node in ast.walk(source(module)) if isinstance(node, ast.Call))
    return {ast.unparse(node.func) for node in nodes}


def test_every_module_has_one_layer() -> None:
    for module in MODULES:
        assert [name for name, modules in LAYERS.items() if module in modules], module
    assert sum(len(modules) for modules in LAYERS.values()) == len(set().union(*LAYERS.values()))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    mine = layer(module)
    for name in ours(module, top=False) - {"version"}:
        if (module, name) in LAZY:
            assert name not in ours(module, top=True), f"{module} imports {name} at its top"
        elif layer(name) == mine:
            assert mine != "verbs", f"the verb {module} imports the verb {name}"
        else:
            assert layer(name) in BELOW[mine], f"{module} ({mine}) imports {name} ({layer(name)})"


def test_no_module_imports_itself_over_others() -> None:
    below = {module: ours(module, top=True) & set(MODULES) for module in MODULES}
    while leaves := {module for module, names in below.items() if not names}:
        below = {m: names - leaves for m, names in below.items() if m not in leaves}
    assert not below, f"a circle among {sorted(below)}"


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH & set(MODULES)))
def test_what_reads_headers_loads_nothing_heavy(module: str) -> None:
    assert not theirs(module, top=True) & HEAVY


@pytest.mark.parametrize("module", sorted(LAYERS["mathematics"] & set(MODULES)))
def test_the_mathematics_opens_no_file(module: str) -> None:
    files = {"os", "io", "pathlib", "json", "mmap", "shutil", "tempfile", "safetensors", "pickle"}
    assert not theirs(module, top=False) & files
    assert not called(module) & {"open", "torch.load", "torch.save"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_foreign_is_imported(module: str) -> None:
    allowed = set(sys.stdlib_module_names) | {
        "torch", "safetensors", "transformers", "huggingface_hub", "numpy", "click", "tqdm",
        "regex", "matplotlib",
    }  # fmt: skip
    found = theirs(module, top=False)
    assert found <= allowed, "a dependency that users do not have (peft is for tests only)"
    assert "transformers" not in theirs(module, top=True), "it takes seconds: import it when needed"


NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "asyncio"}


@pytest.mark.parametrize("module", MODULES)
def test_the_network_is_the_hub_and_in_one_place(module: str) -> None:
    found = theirs(module, top=False)
    assert not found & NETWORK
    assert "huggingface_hub" not in found or module == "hub"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_executed(module: str) -> None:
    found = called(module)
    assert not found & {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    assert not found & {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}
    assert not theirs(module, top=False) & {"subprocess", "runpy", "code", "marshal", "shelve"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"cli"}))
def test_the_library_returns_and_raises_and_does_nothing_else(module: str) -> None:
    assert not called(module) & {"print", "sys.exit", "exit", "quit", "warnings.warn"}
    assert not theirs(module, top=False) & {"logging", "warnings"}
    for node in ast.walk(source(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"Exception", "everything"}, "an error of ours would pass unseen"


# what is really loaded ----------------------------------------------------------------------------

LOADED = """
import json, sys
from gralora_convert.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    assert not exit_.code, exit_.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def loaded(program: str, *arguments: str) -> set[str]:
    """The packages that are loaded after `program`."""
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names = result.stdout.splitlines()[-1]
    return set(ast.literal_eval(names))


def test_importing_the_disk_side_loads_nothing_heavy() -> None:
    light = sorted((WITHOUT_TORCH & set(MODULES)) - {"__init__", "__main__"})
    lines = [f"import gralora_convert.{module}" for module in light]
    show = "import sys; print(sorted({name.split('.')[0] for name in sys.modules}))"
    assert not loaded("; ".join([*lines, show])) & (HEAVY | {"peft"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["inspect", "fixtures/peft-0.21.2/llama-hybrid"],
        ["inspect", "fixtures/bases/llama-sharded", "--json"],
        ["validate", "fixtures/peft-0.21.2/llama-hybrid"],
    ],
    ids=" ".join,
)
def test_what_needs_headers_only_runs_without_torch(arguments: list[str]) -> None:
    assert not loaded(LOADED, *arguments) & {"torch", "transformers", "peft", "safetensors"}


def test_a_merge_loads_no_peft(tmp_path: Path) -> None:
    arguments = "fixtures/peft-0.21.2/llama-hybrid", "--base", "fixtures/bases/llama"
    found = loaded(LOADED, "merge", *arguments, "-o", str(tmp_path / "out"))
    assert "torch" in found
    assert "peft" not in found
