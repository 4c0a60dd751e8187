"""What `convert` and `extract` share: who makes a module when, and when results are refused."""

import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gralora_convert.adapters import LoraConfig
from gralora_convert.cli.summaries import adapter_summary
from gralora_convert.delta.fit import to_gralora, to_lora
from gralora_convert.delta.forms import Dense, Gralora, Lora
from gralora_convert.delta.resizing import Shape, require_same
from gralora_convert.errors import CheckFailedError
from gralora_convert.output.adapter_files import New, adapter_plan
from gralora_convert.output.plan import Plan
from gralora_convert.verbs.serving import Exported, refusals, serving_notes
from tests.builders import random_delta


class Factory:
    """Makes small LoRAs slowly, and keeps count."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.busy = self.most = 0
        self._lock = threading.Lock()

    def make(self, number: int) -> Lora:
        with self._lock:
            self.made.append(number)
            self.busy += 1
            self.most = max(self.most, self.busy)
        time.sleep(0.02)
        with self._lock:
            self.busy -= 1
        if number == 99:
            raise CheckFailedError("is number 99")
        return Lora(torch.full((2, 4), float(number)), torch.ones(6, 2), 1.0)


def plan(numbers: list[int], factory: Factory) -> Plan:
    outline = Shape("lora", 1, 2, 0, 1.0).outline(6, 4, torch.float32)
    modules = {f"m{n}": New(outline, partial(factory.make, n), 64) for n in numbers}
    return adapter_plan("convert", modules, {}, LoraConfig(r=2, target_modules=[*modules]), dict)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_each_module_is_made_once_by_all_workers(jobs: int, tmp_path: Path) -> None:
    factory = Factory()
    plan(list(range(8)), factory).write(tmp_path / "out", jobs=jobs)
    assert sorted(factory.made) == list(range(8))
    assert factory.most <= jobs
    if jobs > 1:
        assert factory.most > 1  # nobody waits for the second tensor of a module
    one = Factory()
    plan(list(range(8)), one).write(tmp_path / "one", jobs=1)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_failure_stops_all_and_leaves_nothing(jobs: int, tmp_path: Path) -> None:
    factory = Factory()
    with pytest.raises(CheckFailedError, match="number 99"):
        plan([0, 1, 99, 3, 4, 5, 6, 7, 8, 9, 10, 11], factory).write(tmp_path / "out", jobs=jobs)
    assert list(tmp_path.iterdir()) == []
    assert 11 not in factory.made


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 8), size=st.floats(-30, 30), seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_check_passes_what_is_right(
    rank: int, size: float, seed: int, dtype: torch.dtype
) -> None:
    """Also where both are nearly of rank one, so that few inputs say little."""
    g = torch.Generator().manual_seed(seed)
    values = torch.exp(torch.randn(12, generator=g) * 3)
    u, v = (torch.linalg.qr(torch.randn(12, 12, generator=g))[0] for _ in range(2))
    source = Dense((u * values @ v.T / values.max()).double() * 2.0 ** (size / 10))
    for fit in (to_lora(source, rank), to_gralora(source, 2, 2 * min(rank, 6))):
        made = fit.delta
        stored = (
            Lora(made.A.to(dtype), made.B.to(dtype), made.scaling)
            if isinstance(made, Lora)
            else Gralora(made.A.to(dtype), made.B.to(dtype), made.scaling)
        )
        require_same("m", source, stored, fit.error2, dtype)


@pytest.mark.parametrize("k", [1, 2])
def test_the_check_finds_what_is_wrong(k: int) -> None:
    source = random_delta(24, 16, r=4, k=k, hybrid_r=2)
    require_same("m", source, source, 0.0, torch.float32)
    wrong = [
        Gralora(source.A, source.B, source.scaling),
        Gralora(source.A, source.B, 1.01 * source.scaling, source.general_A, source.general_B),
        Gralora(source.A.flip(2), source.B, source.scaling, source.general_A, source.general_B),
    ]
    for made in wrong:
        with pytest.raises(CheckFailedError, match="gives other outputs"):
            require_same("m", source, made, 0.0, torch.float32)


@pytest.mark.parametrize(
    ("rank", "vllm"), [(1, 1), (2, 8), (48, 64), (256, 256), (257, 320), (512, 512), (513, None)]
)
def test_the_flags_fit_the_rank(rank: int, vllm: int | None) -> None:
    config = LoraConfig(r=rank, target_modules=["gate_proj"])
    lora = Exported(config, ["layers.0.mlp.gate_proj"])
    receipt: dict[str, object] = {
        "to": "lora", "r": rank, "k": 1, "hybrid_r": 0, "error": 0.0, "modules": [],
        "serving": refusals(lora),
    }  # fmt: skip
    text = "\n".join(adapter_summary(receipt, "OUT"))
    options = f"--model-path MODEL --dtype DTYPE --enable-lora --max-lora-rank {rank} "
    assert f"sglang serve {options}" in text
    assert ("vllm serve" in text) is (vllm is not None)
    assert ("not by vLLM, which takes ranks up to 512" in text) is (vllm is None)
    served = f"vllm serve MODEL --dtype DTYPE --enable-lora --max-lora-rank {vllm} "
    assert vllm is None or served in text
    notes = " ".join(serving_notes(lora))
    assert ("vLLM" in notes) is (rank > 512)
    assert ("LoRAX" in notes) is (rank > 128)
    assert "merge" in serving_notes(Exported(config, [], ["lm_head.weight"]))[-1]
