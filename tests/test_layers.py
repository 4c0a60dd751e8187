"""The five rules of the house: who may import whom, from where, and what each room alone does."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gralora_convert"
ORDER = (
    {"errors", "version", "doors", "system"},
    {"disk", "delta"},
    {"adapters"},
    {"output"},
    {"models"},
    {"base"},
    {"verbs"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
COMPUTING = {"conversion", "extraction", "updates", "differences", "layers", "shaping", "spectra"}
FOREIGN = {
    "torch", "safetensors", "transformers", "huggingface_hub", "numpy", "click", "tqdm", "regex",
    "matplotlib",
}  # fmt: skip
SOME_SYSTEMS = {
    "copy_file_range", "eventfd", "fallocate", "memfd_create", "platform", "posix_fadvise",
    "posix_fallocate", "process_cpu_count", "renameat2", "sched_getaffinity", "sched_setaffinity",
    "sendfile", "setns", "splice", "unshare",
}  # fmt: skip
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "asyncio"}


@cache
def source(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def room(name: str) -> str:
    return name.split(".")[0]


def imported(node: ast.AST, *, lazy: bool = True, types: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) of every import; without those inside functions, or for types only."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from ((alias.name, "") for alias in names)
            case ast.ImportFrom(module=str(name), level=0, names=names):
                yield from ((name, alias.name) for alias in names)
            case ast.ImportFrom():
                raise AssertionError("relative import")
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not types:
                pass
            case ast.FunctionDef() | ast.Lambda() if not lazy:
                pass
            case _:
                yield from imported(child, lazy=lazy, types=types)


def ours(module: str) -> Iterator[tuple[str, str]]:
    """(path below the package, name) of every import of ours, wherever it stands."""
    for path, name in imported(source(module)):
        if path == "gralora_convert":
            yield name, ""
        elif path.startswith("gralora_convert."):
            yield path.removeprefix("gralora_convert."), name


def theirs(module: str, *, lazy: bool = True, types: bool = True) -> set[str]:
    found = {room(path) for path, _ in imported(source(module), lazy=lazy, types=types)}
    return found - {"gralora_convert"}


def texts(module: str) -> list[str]:
    """The string constants of a module, in f-strings too, that are no docstrings."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        node.body[0].value
        for node in ast.walk(source(module))
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(source(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node not in docstrings
    ]


def called(module: str) -> set[str]:
    """The dotted names of everything that is called in a module."""
    nodes = (node for node in ast.walk(source(module)) if isinstance(node, ast.Call))
    return {ast.unparse(node.func) for node in nodes}


# 1. Import only what stands to the left; disk and delta do not know each other --------------------


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for name, _ in ours(module):
        if room(name) != room(module):
            assert FLOOR[room(name)] < FLOOR[room(module)], f"{module} imports {name}"


def test_no_module_imports_itself_over_others() -> None:
    names = {module.removesuffix(".__init__") for module in MODULES}
    below = {
        module.removesuffix(".__init__"): {
            f"{path}.{name}" if f"{path}.{name}" in names else path for path, name in ours(module)
        }
        & names
        for module in MODULES
    }
    while leaves := {module for module, found in below.items() if not found}:
        below = {m: found - leaves for m, found in below.items() if m not in leaves}
    assert not below, f"a circle among {sorted(below)}"


# 2. From outside a room, its door; inside, its modules --------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_a_room_is_entered_by_its_door(module: str) -> None:
    for name, below in ours(module):
        if room(name) == room(module):
            assert f"{name}.{below}".removesuffix(".") in MODULES or "." in name, "its own door"
        else:
            assert "." not in name, f"{module} imports {name}, behind the door of {room(name)}"


# 3. torch at the top: delta, models, one of output, the verbs that compute -----------------------


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_loaded_by_what_computes(module: str) -> None:
    computes = (
        room(module) in ("delta", "models")
        or module == "output.adapter_files"
        or module.startswith("verbs.verification.")
        or (room(module) == "verbs" and module.split(".")[1] in COMPUTING)
    )
    heavy = {"torch", "delta", "models"} & (
        theirs(module, lazy=False, types=False)
        | {
            path.removeprefix("gralora_convert.")
            for path, _ in imported(source(module), lazy=False, types=False)
        }
    )
    assert computes or not heavy
    assert "transformers" not in theirs(module, lazy=False, types=False), "it takes seconds"


LOADED = """
import json, sys
from gralora_convert.cli.entry import main
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    assert not exit_.code, exit_.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["merge", "--help"],
        ["inspect", "fixtures/peft-0.21.2/llama-hybrid"],
        ["inspect", "fixtures/bases/llama-sharded", "--json"],
        ["validate", "fixtures/peft-0.21.2/llama-hybrid"],
        [
            *"merge fixtures/peft-0.21.2/llama-hybrid --base fixtures/bases/llama -o x".split(),
            "--dry-run",
        ],
    ],
    ids=" ".join,
)
def test_what_needs_headers_only_runs_without_torch(arguments: list[str]) -> None:
    assert not loaded(*arguments) & {"torch", "transformers", "peft", "safetensors"}


def test_a_merge_loads_torch_and_no_peft(tmp_path: Path) -> None:
    arguments = "fixtures/peft-0.21.2/llama-hybrid", "--base", "fixtures/bases/llama"
    found = loaded("merge", *arguments, "-o", str(tmp_path / "out"))
    assert "torch" in found
    assert "peft" not in found


def loaded(*arguments: str) -> set[str]:
    """The packages that are loaded after a command."""
    result = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


# 4. One room each: the network, files, transformers, writing, printing, PEFT's names --------------


@pytest.mark.parametrize("module", MODULES)
def test_what_one_room_does_no_other_does(module: str) -> None:
    found, calls, where = theirs(module), called(module), room(module)
    assert found <= set(sys.stdlib_module_names) | FOREIGN, "a dependency that users do not have"
    assert not found & NETWORK
    assert "huggingface_hub" not in found or where == "disk"
    assert "transformers" not in found or where in ("models", "base")
    if where == "delta":
        files = {"os", "io", "pathlib", "json", "mmap", "shutil", "tempfile", "safetensors"}
        assert not found & files
        assert "open" not in calls
    if where not in ("output", "system"):
        assert not calls & {"os.replace", "os.rename", "os.pwrite", "os.copy_file_range"}
    if where != "cli":
        assert not calls & {"print", "sys.exit", "exit", "quit", "warnings.warn"}
        assert not found & {"logging", "warnings", "click"}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "system"])
def test_one_module_knows_what_only_some_systems_offer(module: str) -> None:
    nodes = ast.walk(source(module))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & SOME_SYSTEMS
    assert not theirs(module) & {"ctypes", "platform"}
    assert not [text for text in texts(module) if text.startswith(("/proc", "/sys", "/dev"))]


@pytest.mark.parametrize("module", MODULES)
def test_nothing_of_an_input_is_executed(module: str) -> None:
    calls = called(module)
    assert not calls & {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    assert not calls & {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}
    assert not theirs(module) & {"subprocess", "runpy", "code", "marshal", "shelve"}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) != "cli"])
def test_the_library_hides_no_failure(module: str) -> None:
    for node in ast.walk(source(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"Exception", "everything"}, "an error of ours would pass unseen"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) != "cli"])
def test_messages_of_the_library_spell_no_option_of_the_command_line(module: str) -> None:
    assert not [text for text in texts(module) if re.search(r"(?<![\w-])--[a-z]", text)]


# 5. Verbs do not import one another; cli computes nothing -----------------------------------------


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "verbs"])
def test_no_verb_knows_another(module: str) -> None:
    verbs = {"inspection", "validation", "merging", "conversion", "extraction", "verification"}
    mine = module.split(".")[1]
    for name, _ in ours(module):
        if room(name) == "verbs" and mine in verbs:
            assert name.split(".")[1] not in verbs - {mine}, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "cli"])
def test_the_command_line_computes_nothing(module: str) -> None:
    assert not theirs(module) & {"torch", "numpy", "transformers", "safetensors"} or (
        module == "cli.plots"  # numbers for matplotlib
    )
