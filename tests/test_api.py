"""What `import gralora_convert as gc` offers: its page, short reprs, dtypes as torch has them."""

import re
from pathlib import Path

import pytest
import torch

import gralora_convert as gc
from tests.api import PAGE, page

ADAPTER, BASE = "fixtures/peft-0.21.2/llama-all-linear", "fixtures/bases/llama"


def test_the_page_has_every_public_name_and_is_current() -> None:
    """`python -m tests.api` writes it."""
    listed = re.findall(r"^\* `gc\.(\w+)[^`]*`: \S", PAGE.read_text(), re.M)
    assert sorted(listed) == sorted(gc.__all__)
    assert PAGE.read_text() == page()


def test_a_value_is_told_in_a_line() -> None:
    adapter, plan = gc.Adapter.open(ADAPTER), gc.merge(ADAPTER, base=BASE)
    values = adapter, plan, gc.Checkpoint.open(BASE), gc.inspect(ADAPTER)
    assert max(len(repr(value)) for value in values) < 150
    assert repr(plan) == "Plan('merge', 21 tensors, 21,856 bytes)"
    assert f"{len(adapter.modules)} modules" in repr(adapter)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_may_be_that_of_torch(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    merged = [gc.merge(ADAPTER, base=BASE, dtype=d) for d in (name, dtype)]
    converted = [gc.convert(ADAPTER, to="lora", dtype=d) for d in (name, dtype)]
    for one, other in (merged, converted):
        assert one.fingerprint() == other.fingerprint()
    assert merged[1].write(tmp_path / "merged")["dtype"] == name
    assert converted[1].write(tmp_path / "lora")["dtype"] == name
    extracted = gc.extract(base=BASE, tuned=tmp_path / "merged", to="lora", dtype=dtype)
    assert {part.dtype for part in extracted.files[0].parts if "lora" in part.name} == {
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[name]
    }
    with pytest.raises(gc.ConvertError, match="is none of keep, float32"):
        gc.merge(ADAPTER, base=BASE, dtype=torch.int8)
