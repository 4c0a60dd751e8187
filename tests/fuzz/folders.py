"""Whole folders, mutated, through every command of the command line.

What must hold for each input: an exit status of 0, 1 or 2 in bounded time and memory; no traceback;
one JSON document or printable lines; the inputs untouched, nothing executed; and what was written
loads wherever its inputs load, and passes `verify`.
"""

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from gralora_convert.cli.entry import main
from tests.fuzz.mutations import mutate

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
PAIRS: Sequence[tuple[str, str]] = (
    *((f"peft-0.21.2/llama-{name}", "bases/llama") for name in (
        "gralora", "hybrid", "k1", "k4", "all-linear", "regex", "layers", "saved-head", "pickle",
    )),
    ("peft-0.21.2/llama-hybrid", "bases/llama-sharded"),
    ("peft-0.21.2/llama-bf16", "bases/llama-bf16"),
    ("peft-0.21.2/llama-tied-head", "bases/llama-tied"),
    ("peft-0.21.2/gpt2-gralora", "bases/gpt2"),
    ("peft-0.21.2/gpt2-bias-all", "bases/gpt2"),
    ("peft-0.21.2/bert-classifier", "bases/bert"),
    ("peft-0.21.2/lora", "bases/llama"),
    ("peft-0.21.2/lora-patterns", "bases/llama"),
)  # fmt: skip
SECONDS = 30  # for one command; a clean one takes a tenth of a second
ADDRESS_SPACE = 4 << 30  # beyond what is mapped when the first input starts
LONGEST_LINE = 20_000


class HangError(BaseException):
    """A command that took longer than `SECONDS`."""


def fuzz(seed: int) -> tuple[Counter[str], list[str]]:
    """One mutated pair of folders: how the commands ended, and what went wrong."""
    _quiet()
    with _scratch() as folder:
        case = Case(folder, Random(seed))
        case.run()
    done = "; ".join(case.done)
    return case.statuses, [f"input {seed} ({done}): {failure}" for failure in case.failures]


def limit_memory() -> None:
    """Makes absurd allocations fail in this process, as on a small machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    before = Path.cwd()
    with tempfile.TemporaryDirectory(dir=memory) as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


class Case:
    """One mutated adapter and base."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder, self.random = folder, random
        self.statuses = Counter[str]()
        self.failures: list[str] = []
        adapter, base = random.choice(PAIRS)
        self.adapter, self.base = folder / "adapter", folder / "base"
        shutil.copytree(FIXTURES / adapter, self.adapter)
        shutil.copytree(FIXTURES / base, self.base)
        first, second = random.choice(((1, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (3, 3)))
        self.done = [*mutate(random, self.adapter, first), *mutate(random, self.base, second)]

    def run(self) -> None:
        before = _snapshot(self.adapter), _snapshot(self.base)
        valid = self._command("validate", self.adapter, "--base", self.base, self._style()) == 0
        self._command("validate", self.adapter)
        self._command("inspect", self.random.choice((self.adapter, self.base)), "--json")
        merged = self._merge()
        if (merged == 0) and not valid:
            self.failures.append("merged although validate says no")
        self._convert(valid)
        if self.random.random() < 0.2:
            self._extract()
        if (_snapshot(self.adapter), _snapshot(self.base)) != before:
            self.failures.append("an input was changed")
        known = {"adapter", "base", "merged", "converted", "extracted"}
        left = {path.name for path in self.folder.iterdir()} - known
        if left:
            self.failures.append(f"left behind or executed: {sorted(left)}")

    def _style(self) -> str:
        return self.random.choice(("--json", "--format=github", "--format=text"))

    def _merge(self) -> int:
        options = self.random.choice((
            [], ["--dtype", "bfloat16"], ["--shard-size", "10kB"], ["--json"], ["--jobs", "2"],
        ))  # fmt: skip
        output = self.folder / "merged"
        status = self._command("merge", self.adapter, "--base", self.base, "-o", output, *options)
        if status == 0:
            arguments = self.adapter, "--base", self.base, "--merged", output
            if self._command("verify", *arguments, "--level", "weights", "--json") != 0:
                self.failures.append(f"verify does not accept the merge ({self.output.strip()})")
            self._require_model(output)
        elif output.exists():
            self.failures.append("a refused merge left an output")
        return status

    def _convert(self, valid: bool) -> None:
        to = self.random.choice((["lora"], ["gralora", "--k", "2"], ["hybrid"], ["gralora"]))
        output = self.folder / "converted"
        status = self._command("convert", self.adapter, "--to", *to, "-o", output)
        if status == 0:
            for path in output.glob("*.safetensors"):
                load_file(path)
            if self._command("validate", output) != 0:
                self.failures.append(f"the converted adapter is not valid ({self.output.strip()})")
            if valid:
                self._require_adapter(output)

    def _extract(self) -> None:
        tuned = self.folder / ("merged" if (self.folder / "merged").exists() else "base")
        arguments = "--base", self.base, "--tuned", tuned, "--to", "gralora", "--r", 4
        output = self.folder / "extracted"
        if self._command("extract", *arguments, "-o", output) == 0:
            for path in output.glob("*.safetensors"):
                load_file(path)

    # what came out --------------------------------------------------------------------------------

    def _require_model(self, output: Path) -> None:
        for path in output.glob("*.safetensors"):
            load_file(path)
        if self._loads(self.base):
            problem = self._problem(output)
            if problem:
                self.failures.append(f"the base loads in transformers, the merge not: {problem}")

    def _require_adapter(self, output: Path) -> None:
        if self._peft_problem(self.adapter) is None:
            problem = self._peft_problem(output)
            if problem:
                self.failures.append(f"the adapter loads in PEFT, the converted not: {problem}")

    def _loads(self, folder: Path) -> bool:
        return self._problem(folder) is None

    def _problem(self, folder: Path) -> str | None:
        """Why transformers does not load a model, or None. Whatever it raises is its verdict."""
        try:
            config = json.loads((folder / "config.json").read_text())
            cls = getattr(transformers, config["architectures"][0])
            _, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:500]
        wrong = {name: value for name, value in info.items() if value}
        return f"{wrong}"[:500] if wrong else None

    def _peft_problem(self, folder: Path) -> str | None:
        try:
            config = json.loads((self.base / "config.json").read_text())
            cls = getattr(transformers, config["architectures"][0])
            model = cls.from_pretrained(self.base, local_files_only=True)
            loaded = PeftModel.from_pretrained(model, folder)
            result = loaded.load_adapter(folder, "default")
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:500]
        missing = [key for key in result.missing_keys if "lora" in key]
        unexpected = result.unexpected_keys
        return f"{missing[:2]} {unexpected[:2]}" if missing or unexpected else None

    # one command ----------------------------------------------------------------------------------

    def _command(self, *arguments: object) -> int:
        """Runs one command and holds its end against the rules; the status."""
        given = [str(argument) for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        status: object = None
        signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(given)
        except SystemExit as exit_:
            status = exit_.code
        except HangError:
            status = "a hang"
            err.write(traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.output = out.getvalue() + err.getvalue()
        self.statuses[f"{given[0]} {status}"] += 1
        line = " ".join(given)
        if status not in (0, 1, 2) or "Traceback" in self.output:
            self.failures.append(f"{line}: {status}\n{err.getvalue()[-3000:]}")
        elif "--json" in given:
            self._require_json(line, out.getvalue())
        else:
            self._require_lines(line, out.getvalue() + err.getvalue())
        if status in (1, 2) and not self.output.strip():
            self.failures.append(f"{line}: {status} without a word")
        return status if isinstance(status, int) else 70

    def _require_json(self, line: str, text: str) -> None:
        try:
            text.encode()
            json.loads(text, parse_constant=_no_constant)
        except ValueError as error:
            self.failures.append(f"{line}: no JSON document ({error}): {text[:200]!r}")

    def _require_lines(self, line: str, text: str) -> None:
        for shown in text.split("\n"):
            if not shown.isprintable():
                self.failures.append(f"{line}: prints {shown[:300]!r}")
            if len(shown) > LONGEST_LINE:
                self.failures.append(f"{line}: a line of {len(shown)} characters: {shown[:100]}")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _hang(*_: object) -> None:
    raise HangError


def _snapshot(folder: Path) -> dict[str, object]:
    """Everything in a folder, without following links or opening what is no plain file."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        small = path.is_file() and not path.is_symlink() and status.st_size < 1 << 24
        data = path.read_bytes() if small else None
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns, data
    return found


torch.set_num_threads(1)
