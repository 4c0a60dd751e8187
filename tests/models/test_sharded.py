"""Attached models under FSDP 1, in real processes of torch.distributed."""

import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from gralora_convert import Adapter, Gralora, attach
from gralora_convert.errors import MisuseError
folder, rank, world, original = sys.argv[1], *map(int, sys.argv[2:])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(2, 4)
delta = Gralora(torch.randn(2, 2, 2), torch.randn(2, 2, 3), 0.5)
handle = attach(model, {"0": delta}, trainable=bool(original))
if not original:
    model.requires_grad_(False)  # what FSDP 1 asks for then
wanted = model(x)
sharded = FSDP(model, use_orig_params=bool(original), device_id=torch.device("cpu"))

def save(name):
    handle.save_pretrained(f"{folder}/{name}-{rank}")
    saved = Adapter.open(f"{folder}/{name}-{rank}").delta("0")
    assert torch.equal(saved.A, delta.A) and torch.equal(saved.B, delta.B)

try:
    save("before")
    print("whole")
except MisuseError as refusal:
    print(refusal)
assert torch.allclose(sharded(x), wanted, atol=1e-6)
with FSDP.summon_full_params(sharded):
    save("summoned")
state = sharded.state_dict()
assert set(state) == {
    "0.base_layer.weight", "0.base_layer.bias", "0.adapters.default.A", "0.adapters.default.B"
}
other = nn.Sequential(nn.Linear(4, 6))
attach(other, {"0": Gralora(delta.A * 0, delta.B, 0.5)})
other.load_state_dict(state)
assert torch.allclose(other(x), wanted, atol=1e-6)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("original", [0, 1], ids=["flat", "use_orig_params"])
@pytest.mark.parametrize("world", [1, 2])
def test_fsdp_1_saves_whole_values_or_says_how(world: int, original: int, tmp_path: Path) -> None:
    line = [sys.executable, "-W", "ignore", "-c", WORK, str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*line, str(rank), str(world), str(original)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    for process in ranks:
        said, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        assert said == "whole\n" if world == 1 else "summon_full_params(model)" in said
