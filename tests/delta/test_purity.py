"""No function of the mathematics changes its arguments, whatever their dtype and layout."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gralora_convert.delta as mathematics
from gralora_convert.delta import BlockSums, Delta, Dense, Evidence, Gralora, Lora, Stack
from gralora_convert.delta.products import add_rows_

OUT, IN, K, R, H = 12, 8, 2, 4, 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Maker:
    """Arguments of one dtype, contiguous or as views whose elements do not lie in order."""

    def __init__(self, dtype: torch.dtype, contiguous: bool) -> None:
        self.dtype, self.contiguous = dtype, contiguous
        self.draw = torch.Generator().manual_seed(0)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.draw, dtype=torch.float64) / 4
        values = values.to(dtype or self.dtype)
        if self.contiguous:
            return values
        room = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=values.dtype)
        room[..., ::2] = values
        return room[..., ::2]

    def gralora(self) -> Gralora:
        return Gralora(self.tensor(K, IN // K, R), self.tensor(K, R, OUT // K), 0.5)

    def hybrid(self) -> Gralora:
        plain = self.gralora()
        return Gralora(plain.A, plain.B, 0.5, self.tensor(H, IN), self.tensor(OUT, H))

    def lora(self) -> Lora:
        return Lora(self.tensor(R, IN), self.tensor(OUT, R), 0.5)

    def dense(self) -> Dense:
        return Dense(self.tensor(OUT, IN))

    def wide(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.float64)

    def deltas(self) -> list[Delta]:
        return [self.gralora(), self.hybrid(), self.lora(), self.dense()]

    def factored(self) -> list[Gralora | Lora]:
        return [self.gralora(), self.hybrid(), self.lora()]


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def each(function: Callable[..., Any], deltas: list[Any], *more: Any) -> Iterator[Call]:
    for delta in deltas:
        yield function, (delta, *more)


def calls(make: Maker) -> Iterator[Call]:
    """Every public function of the mathematics with arguments of all kinds that it takes."""
    m, draw = mathematics, torch.Generator().manual_seed(1)
    for across in (False, True):
        for function in (m.rows, m.magnitude_rows):
            for dtype in (torch.float64, torch.float32):
                call = partial(function, transposed=across)
                yield from each(call, make.deltas(), 1, 7, dtype)
        for dtype in (torch.float64, torch.float32):
            for delta in make.factored():

                def added(delta: Any, dtype: torch.dtype = dtype, across: bool = across) -> None:
                    size = (IN, OUT) if across else (OUT, IN)
                    tile = torch.zeros(size, dtype=dtype)
                    Stack(delta, dtype, transposed=across).add_rows_(tile, 0, weight=-2.0)
                    add_rows_(tile, delta, 0, transposed=across, weight=3.0)

                yield added, (delta,)
    of_any: list[Callable[..., Any]] = [
        m.terms,
        m.squared_norm,
        m.dense,
        m.spectra,
        m.tensors_of,
    ]
    for one in of_any:
        yield from each(one, make.deltas())
    yield from each(m.to_device, make.deltas(), "cpu")
    yield from each(m.forward_path, make.deltas(), make.wide(3, IN))
    ends = torch.tensor([0, OUT - 1]), torch.tensor([IN - 1, 0])
    yield from each(m.elements, make.factored(), *ends)
    for blockwise in (m.block_norms, m.energies):
        yield from each(blockwise, [make.gralora(), make.lora()])
    for to in ("lora", "gralora", "hybrid"):
        yield from each(m.exact_rank, make.deltas(), to, K)
    yield from each(partial(m.to_lora, dtype=make.dtype), make.deltas(), 3)
    yield from each(partial(m.to_gralora, dtype=make.dtype), make.deltas(), K, R)
    yield from each(partial(m.to_hybrid, sweeps=1, dtype=make.dtype), make.deltas(), K, R, H)
    yield from each(m.with_scaling, make.factored(), -2.0)
    yield from each(m.permute_rows, make.factored(), tuple(reversed(range(OUT))))
    yield from each(m.gralora_to_lora, [make.gralora(), make.hybrid()])
    yield m.gralora_to_hybrid, (make.gralora(), H, draw)
    yield m.hybrid_to_gralora, (make.hybrid(),)
    yield m.lora_to_gralora, (make.lora(), K)
    yield m.lora_to_hybrid, (make.lora(), K, R, draw)
    yield m.pad, (make.gralora(), 2 * R, draw)
    yield m.pad_lora, (make.lora(), 2 * R, draw)
    yield m.direct_sum, ([make.tensor(2, 3), make.tensor(3, 2)],)
    plain = make.hybrid()
    yield m.delta_weight, (plain.A, plain.B, 0.5, plain.general_A, plain.general_B)
    yield m.gralora_product, (make.tensor(3, IN), plain.A, plain.B)
    yield m.is_finite, (make.tensor(3, 2),)
    yield m.dora, (make.tensor(OUT, IN), make.lora(), make.tensor(OUT))
    yield m.without_start, (make.lora(), make.lora())
    for start in ("pissa", "olora"):
        yield partial(m.start_of, transposed=False), (make.tensor(OUT, IN), start, R, 0.5)
    for shape in (m.Shape("lora", 1, 3, 0, 1.0), m.Shape("gralora", K, R, 0, 1.0),
                  m.Shape("hybrid", K, R, H, 1.0)):  # fmt: skip
        yield from each(m.resize, make.deltas(), shape)
        yield from each(m.least_rank, make.deltas(), shape.kind, K, shape.hybrid_r)
    same = make.lora()
    yield partial(m.stored, verify=True), ("module", same, m.Fit(same, 0.0, 1.0), make.dtype)
    yield m.smallest_rank, ([make.wide(4).square()], 1e9)
    yield from checks(make)


def checks(make: Maker) -> Iterator[Call]:
    """What compares a stored matrix with the one that it should be."""
    m, size = mathematics, (OUT, IN)
    stored = torch.float32 if make.dtype == torch.float64 else make.dtype
    for to in (stored, make.dtype):
        yield m.half_ulp, (make.wide(*size), to)
        bound = partial(m.tolerance, terms=3, dtype=to, delta_dtype=torch.bfloat16)
        after, exact, magnitude, delta = (make.wide(*size) for _ in range(4))

        def tolerated(*given: Tensor, bound: Callable[..., Tensor] = bound) -> Tensor:
            return bound(*given[:2], magnitude=given[2], delta=given[3])

        def admitted(*given: Tensor, to: torch.dtype = to) -> Any:
            return m.admissible(
                *given[:2], magnitude=given[2], terms=3, dtype=to, delta_dtype=torch.bfloat16
            )

        yield tolerated, (after, exact, magnitude.abs(), delta)
        yield admitted, (exact, delta, magnitude.abs())
        lengths = partial(m.rounding_lengths, terms=3, dtype=to, dim=1)
        yield lengths, (after, delta)
        yield m.worst_ratio, (after, exact, magnitude.abs())
        yield m.survival, (after, exact, delta)
    for quick in (False, True):
        for delta_ in make.factored():
            before, after = make.wide(*size), make.wide(*size)

            def compared(one: Tensor, two: Tensor, delta: Any, quick: bool = quick) -> Any:
                addends = [m.Addend(delta, slice(0, OUT), 0, weight=-2.0)] * 2
                return m.compare(one, two, addends, dtype=stored, quick=quick)

            yield compared, (before, after, delta_)
    for wrong in make.deltas():
        before = make.wide(*size)
        after = (before + 2 * m.rows(wrong, 0, OUT)).to(make.dtype).double()

        def explained(delta: Delta, before: Tensor, after: Tensor) -> str:
            sums = BlockSums(K)
            outside = torch.ones(size, dtype=torch.bool)
            added = m.rows(delta, 0, OUT)
            sums.add(after - before, added, added, outside, start=0, total=OUT, transposed=False)
            seen = Evidence(delta, [(0, OUT)], before, after, make.dtype)
            return m.explain(seen, sums, [("another", lambda: delta)])

        yield explained, (wrong, before, after)


# Values, types, and functions that take no tensor.
OTHERS = {
    "EXACT", "BlockSums", "Delta", "Dense", "Evidence", "Fit", "Gralora", "Kind", "Lora", "Loss",
    "Made", "Method", "Shape", "Start", "Survival", "Stack", "effort", "loss_json", "relative",
    "Addend", "Verdict", "device_for", "require_device", "require_divisible", "Wanted",
}  # fmt: skip
CLOSED_OVER = {"explain", "tolerance", "admissible", "compare", "add_rows_"}


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def name_of(function: Callable[..., Any]) -> str:
    return name_of(function.func) if isinstance(function, partial) else function.__name__


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_no_function_changes_its_arguments(dtype: torch.dtype, contiguous: bool) -> None:
    """float64 above all: there `.double()` is the tensor itself, and not a copy."""
    for function, given in calls(Maker(dtype, contiguous)):
        held = list(tensors_in(given))
        before = [tensor.clone() for tensor in held]
        function(*given)
        for one, other in zip(held, before, strict=True):
            assert torch.equal(one, other), name_of(function)


def test_every_public_function_is_held_to_it() -> None:
    called = {name_of(function) for function, _ in calls(Maker(torch.float32, contiguous=True))}
    assert called | OTHERS | CLOSED_OVER >= set(mathematics.__all__)
