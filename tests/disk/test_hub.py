"""Names on the Hub: the cache, a download from a Hub on the loopback, and clear refusals."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gralora_convert.adapters.adapter import Adapter
from gralora_convert.disk.hub import HubName, cached, parse_name
from tests.builders import random_delta, write_adapter

ROOT = Path(__file__).parent.parent.parent
FIXTURES = ROOT / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA, BASE = FIXTURES / "peft-0.21.2/llama-hybrid", FIXTURES / "bases/llama"


def store(cache: Path, repository: str, source: Path, revision: str = "main") -> Path:
    """A repository in the cache, as huggingface_hub lays it out: refs, snapshots, blobs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)
    (folder / "blobs").mkdir()
    for i, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob, link = folder / "blobs" / f"{i:064x}", snapshot / path.relative_to(source)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def command(
    *arguments: object, cache: Path, online: str = "", cwd: Path
) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: huggingface_hub reads its settings at import."""
    settings = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    settings |= (
        {"HF_ENDPOINT": online, "HF_HUB_OFFLINE": "0"} if online else {"HF_HUB_OFFLINE": "1"}
    )
    return subprocess.run(
        [sys.executable, "-m", "gralora_convert", *map(str, arguments)],
        env=os.environ | settings | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        cwd=cwd, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("gpt2", HubName("gpt2")),
        ("org/model", HubName("org/model")),
        ("org/model@v1.0", HubName("org/model", "v1.0")),
        ("org/model@refs/pr/3", HubName("org/model", "refs/pr/3")),
        ("org/model@v1/sub/folder", HubName("org/model", "v1", "sub/folder")),
        ("hf://org/model", HubName("org/model")),
        ("hf://org/model@v1", HubName("org/model", "v1")),
        ("hf://org/model/last", HubName("org/model", None, "last")),
        ("a/b/c", None), ("./a", None), ("../a/b", None), ("/a/b", None), ("a b", None),
        ("a/b@", None), ("a/b@x/../..", None), ("hf://a/b/../c", None), ("", None), ("a\n/b", None),
    ],
)  # fmt: skip
def test_names(text: str, found: HubName | None) -> None:
    assert parse_name(text) == found


def test_what_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = store(tmp_path, "org/base", BASE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached("org/base", "config.json") == held / "config.json"
    assert cached(str(BASE), "config.json") == BASE / "config.json"
    for name in ("org/other", "../x", "org/base@v2", "org/base/x", "a\0b", "x" * 5000):
        assert cached(name, "config.json") is None
    assert cached("org/base", "adapter_config.json") is None


def test_a_chain_over_the_cache(tmp_path: Path) -> None:
    """The base that an adapter names is an adapter in the cache, whose base is there, too."""
    cache = tmp_path / "hub"
    sft = copy_based_on(tmp_path / "sft", LLAMA, "org/base")
    dpo = copy_based_on(tmp_path / "dpo", FIXTURES / "peft-0.21.2/llama-k4", "org/sft")
    store(cache, "org/base", BASE)
    store(cache, "org/sft", sft)
    refused = command("merge", dpo, "--base", "org/base", "-o", "out", cache=cache, cwd=tmp_path)
    assert refused.returncode == 2
    assert "was trained on the adapter" in refused.stderr
    told = command("validate", dpo, cache=cache, cwd=tmp_path)
    assert told.returncode == 0, told.stdout
    assert "base-not-checked" not in told.stdout  # the model at the end is here, and was looked at
    for output, arguments in (("a", [dpo]), ("b", [sft, dpo, "--base", "org/base"])):
        made = command("merge", *arguments, "-o", output, cache=cache, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    first, second = (tmp_path / f / "model.safetensors" for f in "ab")
    assert first.read_bytes() == second.read_bytes()


def copy_based_on(folder: Path, source: Path, base: str) -> Path:
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values))
    return folder


def test_adapter_and_base_of_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    store(cache, "org/base", BASE)
    store(cache, "org/tuned", LLAMA, revision="v2")
    shown = command("inspect", "org/tuned@v2", cache=cache, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("org/tuned@v2: Hybrid GraLoRA adapter")
    merged = command("merge", "org/tuned@v2", "--base", "org/base", "-o", "out", cache=cache,
                     cwd=tmp_path)  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    card = (tmp_path / "out/README.md").read_text()
    assert 'base_model: "org/base"\nbase_model_relation: finetune\n' in card
    assert "# org/base with org/tuned" in card


def test_a_folder_in_a_repository(tmp_path: Path) -> None:
    write_adapter(tmp_path / "source/last", {"layers.0.up": random_delta(32, 24)})
    store(tmp_path / "hub", "org/tuned", tmp_path / "source")
    found = command("validate", "hf://org/tuned/last", cache=tmp_path / "hub", cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    missing = command("validate", "hf://org/tuned/first", cache=tmp_path / "hub", cwd=tmp_path)
    assert missing.returncode == 2


def test_the_revision_of_the_config_is_that_of_the_base(tmp_path: Path) -> None:
    def source(name: str, revision: str | None) -> str | None:
        write_adapter(tmp_path, {"a": random_delta(8, 8)}, base_model_name_or_path=name,
                      revision=revision)  # fmt: skip
        return Adapter.open(tmp_path).base_source

    assert source("org/base", "v1") == "org/base@v1"
    assert source("org/base", None) == "org/base"
    assert source(str(tmp_path), "v1") == str(tmp_path)
    assert source("./somewhere/else", "v1") == "./somewhere/else"


def test_offline_the_way_out_is_told(tmp_path: Path) -> None:
    found = command("inspect", "org/tuned", cache=tmp_path, cwd=tmp_path)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "HF_HUB_OFFLINE" in line
    assert "hf download org/tuned" in line


# a Hub on the loopback ----------------------------------------------------------------------------


@dataclass
class Hub:
    """What the Hub's HTTP interface answers, for the files of some folders."""

    url: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        words = path.partition("?")[0].strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if api else words[:2])
        if name == "org/gated":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask"}, b"{}"
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        folder = self.repositories[name]
        revision = words[5] if api and len(words) > 5 else COMMIT if api else words[3]
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if api and words[4:5] == ["tree"]:
            rows = [{"type": "file", "path": n, "oid": f"{i:040x}",
                     "size": (folder / n).stat().st_size} for i, n in enumerate(names)]  # fmt: skip
            return 200, {}, json.dumps(rows).encode()
        if api:
            siblings = [{"rfilename": n} for n in names]
            return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        file = "/".join(words[4:])
        data = (folder / file).read_bytes()
        return 200, {"ETag": f'"{names.index(file):040x}"', "X-Repo-Commit": COMMIT}, data


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_not_in_the_cache_is_downloaded_once(tmp_path: Path, hub: Hub) -> None:
    hub.repositories = {"org/tuned": LLAMA, "org/base": BASE}
    arguments = ("validate", "org/tuned", "--base", "org/base")
    first = command(*arguments, cache=tmp_path / "hub", online=hub.url, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert any("adapter_model.safetensors" in path for path in hub.asked)
    hub.asked.clear()
    again = command(*arguments, cache=tmp_path / "hub", online=hub.url, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert not hub.asked, "the cache comes first"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/nowhere", "the Hub has no model of this name"),
        ("org/gated", "is gated on the Hub"),
        ("org/tuned@v9", "has no revision 'v9'"),
    ],
)
def test_why_it_could_not_be_had(name: str, words: str, tmp_path: Path, hub: Hub) -> None:
    hub.repositories = {"org/tuned": LLAMA}
    found = command("inspect", name, cache=tmp_path / "hub", online=hub.url, cwd=tmp_path)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert words in line
    assert line.startswith(f"error: {name}: ")


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    found = command("inspect", "org/tuned", cache=tmp_path, online="http://127.0.0.1:1",
                    cwd=tmp_path)  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("error: org/tuned: ")


def test_a_misspelt_path_is_told_before_the_hub_is_asked(tmp_path: Path) -> None:
    """Names that differ as those of models do are asked for: another number, a word more."""
    shutil.copytree(BASE, tmp_path / "runs/llama-7b")
    nowhere = "http://127.0.0.1:9"
    arguments = "merge", LLAMA, "-o", tmp_path / "out", "--base"

    def told(name: str) -> str:
        done = command(*arguments, name, cache=tmp_path / "hub", online=nowhere, cwd=tmp_path)
        assert done.returncode == 2
        return done.stderr

    assert "no such file or folder. Did you mean runs/llama-7b? For the" in told("runs/lama-7b")
    for name in ("runs/llama-8b", "runs/llama-7b-chat", "rusn/llama-7b"):
        assert "could be had from the Hub" in told(name)
        assert "Did you mean runs/llama-7b?" in told(name)
    assert "could be had from the Hub" in told("hf://runs/lama-7b")
    assert "Did you mean" not in told("hf://runs/lama-7b")
    assert f"Did you mean {tmp_path}/runs/llama-7b?" in told(f"{tmp_path}/run/llama7b")
    adapter = command(
        "validate", "./runs/lama-7b", cache=tmp_path / "hub", online=nowhere, cwd=tmp_path
    )
    assert "Did you mean runs/llama-7b?" in adapter.stderr


def test_a_base_that_only_the_adapter_names(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "adapter")
    done = command("merge", "adapter", "-o", "out", cache=tmp_path / "hub", cwd=tmp_path)
    assert done.returncode == 2
    assert "this base is named in adapter_config.json" in done.stderr
    assert "give --base" in done.stderr
    given = command(
        "merge", "adapter", "--base", "./no", "-o", "out", cache=tmp_path / "hub", cwd=tmp_path
    )
    assert "adapter_config.json" not in given.stderr
