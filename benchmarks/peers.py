"""PEFT's own GraLoRA tests with our code in PEFT's place:

    python -m benchmarks.peers FOLDER [--page docs/peers.md] [--way NAME] [--only EXPRESSION]

Takes the source distribution of the installed PEFT from the package index into FOLDER, and runs its
tests of GraLoRA as they are, then once for each way of `benchmarks.peers_plugin`. The models that
they load from the Hub are made here, tiny and random, of the same architecture, and put into a Hub
cache in FOLDER under the names that the tests know; what needs more of the Hub is counted so.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import tiny

Rows = Mapping[str, Mapping[str, Any]]
FAMILIES = {
    "custom models": "test_custom_models.py",
    "feature extraction": "test_feature_extraction_models.py",
    "classification": "test_seq_classifier.py",
    "encoder-decoder": "test_encoder_decoder_models.py",
    "decoders": "test_decoder_models.py",
}
WAYS = "forward", "delta", "merge", "convert", "attach"
CAUSAL = "AutoModelForCausalLM"
MODELS = {  # by the name on the Hub: auto class, model type
    "peft-internal-testing/tiny-random-OPTForCausalLM": (CAUSAL, "opt"),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (CAUSAL, "gpt2"),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (CAUSAL, "gptj"),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, "llama"),
    "peft-internal-testing/tiny-dummy-qwen2": (CAUSAL, "qwen2"),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (CAUSAL, "gemma3_text"),
    "hf-internal-testing/tiny-random-gpt2": (CAUSAL, "gpt2"),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (CAUSAL, "mistral"),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "AutoModelForSeq2SeqLM", "t5",
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "AutoModelForSeq2SeqLM", "bart",
    ),
    "peft-internal-testing/tiny-random-BertModel": ("AutoModel", "bert"),
    "peft-internal-testing/tiny-random-RobertaModel": ("AutoModel", "roberta"),
    "peft-internal-testing/tiny-random-DebertaModel": ("AutoModel", "deberta"),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("AutoModel", "deberta-v2"),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "AutoModelForSequenceClassification", "bert",
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "AutoModelForSequenceClassification", "roberta",
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "AutoModelForSequenceClassification", "llama",
    ),
}  # fmt: skip


def source(folder: Path) -> Path:
    """The unpacked source distribution of the PEFT that is installed."""
    name = f"peft-{version('peft')}"
    if not (folder / name / "tests").is_dir():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "-d", folder, name.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    (folder / name / "tests/__init__.py").touch()  # they import each other
    return folder / name


def models(cache: Path) -> None:
    """Fills a Hub cache with the models of the tests."""
    for name, (auto, model_type) in MODELS.items():
        snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        if not snapshot.exists():
            (snapshot.parent.parent / "refs").mkdir(parents=True)
            (snapshot.parent.parent / "refs/main").write_text("0")
            model = tiny.build(auto, model_type)
            if model.config.is_encoder_decoder:
                model.generation_config.decoder_start_token_id = 0
            model.save_pretrained(snapshot)


def run(way: str, tests: Path, folder: Path, only: str) -> None:
    """Writes the outcomes of PEFT's tests that name GraLoRA, over those of an earlier run."""
    results, new = folder / f"{way}.json", folder / "new" / f"{way}.json"
    new.parent.mkdir(exist_ok=True)
    here = str(Path(__file__).parent.parent)
    environment = {
        **os.environ, "PEERS_WAY": way, "PEERS_RESULTS": str(new), "PYTHONPATH": here,
        "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    options = "-q -p benchmarks.peers_plugin -o addopts= --tb=short -W ignore::FutureWarning"
    pytest = [sys.executable, "-m", "pytest", *options.split(), "-k", f"gralora and ({only})"]
    files = [f"tests/{file}" for file in FAMILIES.values()]
    with (folder / f"{way}.log").open("w") as log:
        subprocess.run(
            [*pytest, *files],
            cwd=tests.parent, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    rows = json.loads(results.read_text()) if results.exists() else {}
    results.write_text(json.dumps(rows | json.loads(new.read_text()), indent=1))


def table(runs: Mapping[str, Rows]) -> str:
    """Passes where PEFT passes; how many of these tests came to our code."""
    ways = [way for way in WAYS if way in runs]
    lines = [
        f"| tests | of GraLoRA | need the Hub | skipped | PEFT passes | {' | '.join(ways)} |",
        f"|---|{'---:|' * (4 + len(ways))}",
    ]
    for family, file in FAMILIES.items():
        theirs = {test: row["outcome"] for test, row in runs["peft"].items() if file in test}
        passed = [test for test, outcome in theirs.items() if outcome == "passed"]
        outcomes = list(theirs.values())
        cells = [len(theirs), outcomes.count("hub"), outcomes.count("skipped"), len(passed)]
        for way in ways:
            ours = [runs[way].get(test, {"outcome": "", "calls": 0}) for test in passed]
            right = sum(row["outcome"] == "passed" for row in ours)
            at_work = sum(row["calls"] > 0 for row in ours)
            cells.append(f"{right} ({at_work})")
        lines.append(f"| {family} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def differences(runs: Mapping[str, Rows]) -> list[str]:
    """Every test that PEFT passes and one of ours does not, with its last line."""
    found = []
    for way, rows in runs.items():
        for test, theirs in runs["peft"].items():
            row = rows.get(test, {"outcome": "not run", "text": ""})
            if theirs["outcome"] == "passed" != row["outcome"]:
                said = [line for line in row["text"].splitlines() if line.startswith("E ")]
                found.append(f"{way}: {test}: {row['outcome']} {(said or [''])[0]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, help="where the table is renewed")
    parser.add_argument("--way", action="append", choices=("peft", *WAYS), help="run only these")
    parser.add_argument("--only", default="gralora", help="of the tests, as pytest's -k says it")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = source(folder) / "tests"
    models(folder / "hub")
    for way in options.way or ("peft", *WAYS):
        run(way, tests, folder, options.only)
    made = [way for way in ("peft", *WAYS) if (folder / f"{way}.json").exists()]
    runs = {way: json.loads((folder / f"{way}.json").read_text()) for way in made}
    found = table(runs)
    print(found, *differences(runs), sep="\n")
    if options.page:
        git = ["git", "rev-parse", "--short", "HEAD"]
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        said = (
            f"{datetime.now(UTC):%Y-%m-%d}, revision {revision}; peft {version('peft')}, "
            f"transformers {version('transformers')}, torch {torch.__version__}."
        )
        text = options.page.read_text()
        for mark, new in (("run", said), ("table", found)):
            text = re.sub(
                f"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)", rf"\g<1>{new}\n\2", text,
                flags=re.DOTALL,
            )  # fmt: skip
        options.page.write_text(text)


if __name__ == "__main__":
    main()
