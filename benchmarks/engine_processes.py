"""vLLM, SGLang and llama.cpp as processes: each model, adapter and command in one of its own."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TOKENS, PROMPTS, LENGTH = 16, 6, 8
WAIT = 600.0  # seconds for a server to start

Run = list[tuple[list[int], list[float]]]  # tokens and their log-probabilities, prompt by prompt


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(4, 260, (PROMPTS, LENGTH - 1), generator=generator)
    return [[0, *row] for row in drawn.tolist()]


# The test models have a vocabulary of their own, which the converter cannot recognise: it is told.
# Each command runs in a process of its own: forked, so that torch is imported once.
CONVERTER = """
import contextlib, json, os, pathlib, runpy, sys, traceback
source = sys.argv[1]
sys.path[:0] = [source, source + "/gguf-py"]
import torch, transformers
from conversion import base, get_model_class

def carried_out(script, *words):
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    folder = next(w for w in words if pathlib.Path(w, "config.json").is_file())
    config = json.loads(pathlib.Path(folder, "config.json").read_text())
    for cls in get_model_class(config["architectures"][0]).__mro__:
        if "set_vocab" in vars(cls) and issubclass(cls, base.TextModel):
            cls.set_vocab = base.TextModel._set_vocab_gpt2
    sys.argv = [script, *words]
    runpy.run_path(source + "/" + script, run_name="__main__")

for line in sys.stdin:
    command, log = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 0
        with open(log, "w", buffering=1) as file, contextlib.redirect_stderr(file):
            try:
                carried_out(*command)
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Of each job (model, adapter or None, largest rank, prompts), in a process of its own: forked, so
# that vLLM is imported once.
WORKER = """
import json, os, sys, traceback
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import vllm, vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker
from vllm.lora.request import LoRARequest

def done(job):
    loras = {"enable_lora": True, "max_lora_rank": job["rank"], "max_loras": 1}
    more = loras if job["lora"] else {}
    model = vllm.LLM(job["model"], dtype=job["dtype"], max_model_len=64, max_num_seqs=4,
                     enforce_eager=True, **more)
    how = vllm.SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=True)
    asked = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    lora = LoRARequest("it", 1, job["lora"]) if job["lora"] else None
    told = []
    for answer in model.generate(asked, how, lora_request=lora, use_tqdm=False):
        out = answer.outputs[0]
        ids = list(out.token_ids)
        told.append([ids, [step[i].logprob for i, step in zip(ids, out.logprobs)]])
    return told

for job in json.load(open(sys.argv[1])):
    child = os.fork()
    if child == 0:
        try:
            answer = {"run": done(job)}
        except BaseException as problem:
            first = problem
            while first.__cause__ is not None:
                first = first.__cause__
            answer = {"refused": f"{type(first).__name__}: {first}"}
            traceback.print_exc()
        with open(job["answer"], "w") as file:
            json.dump(answer, file)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        with open(job["answer"], "w") as file:
            json.dump({"refused": f"ended by signal {status}"}, file)
"""


# What a CPU does not have: page-locked memory, for which SGLang asks torch, and the kernels of
# sglang-kernel (an empty module is in their place: who calls one is told that it is missing).
SHIM = """
import functools
import torch

def unpinned(make):
    @functools.wraps(make)
    def made(*args, **more):
        more.pop("pin_memory", None)
        return make(*args, **more)
    return made

for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
    setattr(torch, name, unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *_, **__: self
"""


# What vLLM's experts with LoRAs want of a GPU: Triton, whose interpreter runs the same kernels on a
# CPU; three compiled functions that only put rows in order, or add them; and its wrapper for GPUs.
# All but the experts' part of that takes 16 bits alone (lora_shrink_op.py): there the CPU's stays.
EXPERTS = """
import os, sys, types
os.environ["TRITON_INTERPRET"] = "1"
import triton.backends
active = types.SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=active)
import torch
import vllm._custom_ops as ops
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.platforms import current_platform

def by_expert(ids, experts, size, rows, labels):
    rows.fill_(ids.numel())
    end = 0
    for expert in range(experts):
        found = (ids.flatten() == expert).nonzero().flatten()
        rows[end : end + len(found)] = found
        start, end = end, end + -(-len(found) // size) * size
        labels[start // size : end // size] = expert
    return end

def align(ids, experts, size, rows, labels, count, expert_map=None, scatter=None):
    assert expert_map is None and scatter is None
    labels.fill_(0)
    count.fill_(by_expert(ids, experts, size, rows, labels))

def align_lora(ids, loras, experts, size, _, wide, high, rows, labels, counts, on, active, *more):
    assert more == (None,)
    for lora in active.tolist():
        if lora >= 0 and on[lora]:
            own = torch.where(loras[: len(ids), None] == lora, ids, -1)
            held = rows[lora * wide :][:wide], labels.view(-1)[lora * high :][:high]
            counts[lora] = by_expert(own, experts, size, *held)

class Wrapper(PunicaWrapperGPU):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.cpu = PunicaWrapperCPU(*args, **more)
        for name in ("shrink", "expand", "lora_embedding", "lora_linear", "lora_logits"):
            setattr(self, "add_" + name, getattr(self.cpu, "add_" + name))

    def update_metadata(self, *args, **more):
        super().update_metadata(*args, **more)
        self.cpu.update_metadata(*args, **more)

ops.moe_align_block_size, ops.moe_lora_align_block_size = align, align_lora
ops.moe_sum = lambda held, out, *_: out.copy_(held.sum(1))
sys.modules["wrapper"] = types.SimpleNamespace(Wrapper=Wrapper)
platform = type(current_platform)
platform.num_compute_units = classmethod(lambda cls, index=0: 4)
platform.get_punica_wrapper = classmethod(lambda cls: "wrapper.Wrapper")
"""


class RefusedError(Exception):
    """What an engine, or this tool, says when it does not serve something."""


@dataclass
class Engines:
    vllm: str
    source: str
    server: str
    sglang: str | None = None
    with_4: str | None = None
    only: str | None = None
    converter: "subprocess.Popen[str] | None" = None

    @property
    def names(self) -> list[str]:
        """The servers that there are, the slowest first."""
        if self.only:
            return [self.only.split()[0]]
        return ["sglang", "llama.cpp", "vllm"] if self.sglang else ["llama.cpp", "vllm"]

    def converted(self, words: Sequence[str], folder: Path) -> None:
        """Carries out a command of llama.cpp's converters."""
        if self.converter is None:
            self.converter = subprocess.Popen(
                [self.vllm, "-c", CONVERTER, self.source], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment(),
            )  # fmt: skip
        assert self.converter.stdin is not None
        assert self.converter.stdout is not None
        log = folder / "converter.log"
        self.converter.stdin.write(json.dumps([words, str(log)]) + "\n")
        self.converter.stdin.flush()
        if int(self.converter.stdout.readline()):
            raise RefusedError(_reason(log.read_text()))

    def typed(self, line: str, folder: Path) -> list[str]:
        """A printed line as it is carried out."""
        words = shlex.split(line.replace("MODEL", str(folder / "model")).replace("NAME", "it"))
        if words[0] == "vllm":
            return [str(Path(self.vllm).with_name("vllm")), *words[1:]]
        if words[0] == "sglang":
            return [str(self.sglang), *words[1:]]
        return [self.server, *words[1:]] if words[0] == "llama-server" else words

    def by_llama_cpp(self, lines: Sequence[str], folder: Path) -> Run:
        *before, last = [self.typed(line, folder) for line in lines]
        for command in before:
            self.converted(command[1:], folder)
        with _server([*last, "--ctx-size", "256", "--threads", "2"]) as port:
            return _by_llama_cpp(port)

    def by_sglang(self, line: str, folder: Path) -> Run:
        shim = folder / "shim"
        shim.mkdir(exist_ok=True)
        (shim / "sitecustomize.py").write_text(SHIM)
        (shim / "common_ops.py").touch()
        how = ["--device", "cpu", "--lora-backend", "torch_native", "--skip-server-warmup"]
        size = ["--max-total-tokens", "1024", "--max-running-requests", "4"]
        with _server([*self.typed(line, folder), *how, *size], shim) as port:
            return _by_sglang(port, {"lora_path": "it"} if "--lora-paths" in line else {})

    def by_vllm_server(self, line: str, folder: Path) -> Run:
        sizes = ["--max-model-len", "64", "--max-num-seqs", "4", "--enforce-eager"]
        how = [*sizes, "--return-tokens-as-token-ids"]
        with _server([*self.typed(line, folder), *how]) as port:
            return _by_vllm(port)

    def by_vllm(self, jobs: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Writes the answers of jobs where they want them."""
        with (folder / "vllm.log").open("w") as log:
            for before in ("", EXPERTS):
                own = [job for job in jobs if job["experts"] is bool(before)]
                (folder / "jobs.json").write_text(json.dumps(own))
                command = [self.vllm, "-c", before + WORKER, str(folder / "jobs.json")]
                subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, check=True, cwd=folder,
                    env=_environment(),
                )  # fmt: skip


def _environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    }  # fmt: skip


_REASON = re.compile(r"\bERROR:|\w+Error: |\berror: |\bE .*(failed|error)")


def _reason(text: str) -> str:
    """The line of an engine's log that says why, without places and times."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["(nothing)"]
    line = next((line for line in lines if _REASON.search(line)), lines[-1])
    start = re.search(r"\w+Error: |\bERROR:\S*?:|\berror: |\bE ", line)
    line = line if start is None else line[start.start() :]
    return re.sub(r"(?<![\w.])/\S*/", "", line)[:300].replace("|", "\\|")


@contextmanager
def _server(command: Sequence[str], shim: Path | None = None) -> Iterator[int]:
    """A server that answers, on a free port of this machine; it is ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    log = Path(f"/tmp/engine-{port}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent,
            env=_environment() | ({} if shim is None else {"PYTHONPATH": str(shim)}),
        )  # fmt: skip
    try:
        until = time.monotonic() + WAIT
        while not _answers(port):
            if process.poll() is not None:
                raise RefusedError(_reason(log.read_text(errors="replace")))
            if time.monotonic() > until:
                raise RefusedError(f"no answer within {WAIT:.0f} s")
            time.sleep(0.5)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.unlink()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _ask(port: int, path: str, question: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except OSError as problem:
        told = problem.read().decode() if isinstance(problem, urllib.error.HTTPError) else problem
        raise RefusedError(f"when asked: {str(told)[:200]}") from problem


def _by_vllm(port: int) -> Run:
    found: Run = []
    for prompt in prompts():
        told = _ask(port, "/v1/completions", {
            "model": "it", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
            "ignore_eos": True,
        })["choices"][0]["logprobs"]  # fmt: skip
        ids = [int(token.removeprefix("token_id:")) for token in told["tokens"]]
        found.append((ids, told["token_logprobs"]))
    return found


def _by_sglang(port: int, lora: Mapping[str, str]) -> Run:
    found: Run = []
    for prompt in prompts():
        told = _ask(port, "/generate", {
            "input_ids": prompt, "return_logprob": True, **lora,
            "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
        })["meta_info"]["output_token_logprobs"]  # fmt: skip
        found.append(([step[1] for step in told], [step[0] for step in told]))
    return found


def _by_llama_cpp(port: int) -> Run:
    found: Run = []
    for prompt in prompts():
        told = _ask(port, "/completion", {
            "prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 1,
            "cache_prompt": False, "ignore_eos": True,
        })["completion_probabilities"]  # fmt: skip
        found.append(([step["id"] for step in told], [step["logprob"] for step in told]))
    return found


def answer(file: Path) -> Run:
    """What a job of vLLM left.

    Raises:
        RefusedError: it says why not.
    """
    told = json.loads(file.read_text())
    if "refused" in told:
        raise RefusedError(_reason(told["refused"]))
    return [(ids, scores) for ids, scores in told["run"]]
