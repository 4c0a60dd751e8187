"""What went wrong in a merge: which update was added instead of the right one, or added how.

Each of the usual mistakes predicts what would be stored. The prediction that the stored weights
agree with, element by element, names the mistake; where none does, sums over the blocks say where
and by how much the weights are off.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import permutations

import torch
from torch import Tensor

from gralora_convert.delta.exact import permute_rows
from gralora_convert.delta.forms import Delta, Dense, Gralora, Lora, mapped, terms
from gralora_convert.delta.products import rows
from gralora_convert.delta.rounding import magnitude_rows, tolerance

AGREES = 0.02  # a prediction that misses more of the elements than this explains nothing
BETTER = 0.1  # and it must miss fewer than this share of those that the right one misses
LITTLE = 0.3  # less of what was added lies along D than this: it is not this update
LOCAL = 0.05  # a block is right when its error is below this share of the worst block's
FEW = 1e-3  # of the elements: too few for a mistake of the update
LISTED = 8
SHORT = (torch.bfloat16, torch.float16)

Sums = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Mistake:
    """One way to be wrong: `delta` is added (transposed, if `flipped`) by `sums`, which gives what
    is rounded to the stored dtype at the end."""

    name: str
    delta: Delta
    sums: Sums = torch.add
    flipped: bool = False


@dataclass(frozen=True)
class Evidence:
    """Rows of a stored matrix before and after the merge, float64: `runs` of rows of the delta (of
    its transpose, for `transposed`), and what is stored there, one run after the other."""

    delta: Delta
    runs: Sequence[tuple[int, int]]
    before: Tensor
    after: Tensor
    dtype: torch.dtype
    transposed: bool = False

    @cached_property
    def _magnitude(self) -> Tensor:
        """Room for the products of every mistake, some of which double the update."""
        parts = [magnitude_rows(self.delta, *r, transposed=self.transposed) for r in self.runs]
        return self.before.abs() + 4 * torch.cat(parts)

    def misses(self, mistake: Mistake) -> float:
        """The share of the elements that are no rounding of what `mistake` predicts."""
        across = self.transposed != mistake.flipped
        added = torch.cat([rows(mistake.delta, *run, transposed=across) for run in self.runs])
        expected = mistake.sums(self.before, added)
        bound = tolerance(
            self.after, expected, magnitude=self._magnitude, terms=terms(self.delta),
            dtype=self.dtype,
        )  # fmt: skip
        return float(((self.after - expected).abs() > bound).double().mean())

    def best(
        self, candidates: Iterable[Mistake], *, better: float = BETTER, agrees: float = AGREES
    ) -> Mistake | None:
        """The candidate that explains the weights, if one does."""
        limit = min(agrees, better * self.misses(Mistake("", self.delta)))
        found = None
        for candidate in candidates:
            misses = self.misses(candidate)
            if misses < limit:
                found, limit = candidate, misses
        return found


def mistakes(delta: Delta) -> Iterator[Mistake]:
    """The usual mistakes with an update, the commonest first."""
    yield from _rescaled(delta)
    if isinstance(delta, Gralora):
        yield from _parts(delta)
        if delta.k > 1:
            yield from _orders(delta)
    if delta.in_features == delta.out_features:
        yield Mistake("the update is added transposed", delta, flipped=True)
    yield from _thirds(delta)
    yield from _roundings(delta)


def _scaled(delta: Delta, factor: float) -> Delta:
    if isinstance(delta, Dense):
        return Dense(delta.weight * factor)
    return replace(delta, scaling=factor * delta.scaling)


def _rescaled(delta: Delta) -> Iterator[Mistake]:
    yield Mistake("the update is applied twice", _scaled(delta, 2))
    yield Mistake("the update is subtracted instead of added (sign)", _scaled(delta, -1))
    yield Mistake("the update is applied three times", _scaled(delta, 3))
    for name, scaling in _scalings(delta):
        if isinstance(delta, Dense) or scaling == delta.scaling or not delta.scaling:
            continue
        factor = scaling / delta.scaling
        yield Mistake(
            f"the scaling is off by a factor of {factor:.4g}: {name}",
            replace(delta, scaling=scaling),
        )


def _near(delta: Delta, factor: float) -> Iterator[Mistake]:
    """Scalings around a measured one, which coarse rounding makes uncertain."""
    for percent in (0.0, *(0.25 * step for step in range(-8, 9) if step)):
        near = factor * (1 + percent / 100)
        if abs(near - 1) > 1e-3:
            yield Mistake(f"the scaling is off by a factor of {near:.4g}", _scaled(delta, near))


def _scalings(delta: Delta) -> Iterator[tuple[str, float]]:
    """Other scalings that programs use, by name."""
    match delta:
        case Gralora():
            r, h, k = delta.r, delta.hybrid_r, delta.k
            alpha = delta.scaling * (r + h)
            own = "alpha / (r + hybrid_r)" if h else "alpha / r"
            if h:
                yield f"alpha / r instead of {own}", alpha / r
            yield f"1 instead of {own}", 1.0
            yield f"alpha instead of {own}", alpha
            yield f"alpha / sqrt(r + hybrid_r) instead of {own}", alpha / (r + h) ** 0.5
            yield f"alpha / (r / gralora_k) instead of {own}", alpha / delta.s
            yield f"alpha / (k r + hybrid_r) instead of {own}", alpha / (k * r + h)
            yield f"1 / (r + hybrid_r), without alpha, instead of {own}", 1 / (r + h)
        case Lora():
            yield "used without alpha / r", 1.0


def _parts(delta: Gralora) -> Iterator[Mistake]:
    if delta.general is None:
        return
    b = delta.general.B
    yield Mistake("the hybrid part is missing", replace(delta, general_A=None, general_B=None))
    yield Mistake("the hybrid part is applied twice", replace(delta, general_B=2 * b))
    yield Mistake("the hybrid part is subtracted (sign)", replace(delta, general_B=-b))
    yield Mistake("the blocks are missing", replace(delta, A=torch.zeros_like(delta.A)))
    yield Mistake("the blocks are applied twice", replace(delta, A=2 * delta.A))
    unscaled = replace(delta, general_B=b / delta.scaling) if delta.scaling else delta
    yield Mistake("the hybrid part is added without the scaling", unscaled)
    r, h = delta.r, delta.hybrid_r
    yield Mistake(
        "blocks and hybrid part are scaled by alpha / r and alpha / hybrid_r, each by its own rank",
        replace(delta, A=delta.A * ((r + h) / r), general_B=b * ((r + h) / h)),
    )


def _orders(delta: Gralora) -> Iterator[Mistake]:
    """The blocks, or the slots of the rank, in another order."""
    k, s, m, p = delta.k, delta.s, delta.A.shape[1], delta.B.shape[2]
    a4, b4 = delta.A.view(k, m, k, s), delta.B.view(k, k, s, p)  # n, i, j, t; j, n, t, o

    def ordered(name: str, a: Tensor, b: Tensor) -> Mistake:
        return Mistake(name, replace(delta, A=a.reshape_as(delta.A), B=b.reshape_as(delta.B)))

    yield ordered(
        "the blocks are transposed (row and column of each block swapped)",
        a4.permute(2, 1, 0, 3), b4.transpose(0, 1),
    )  # fmt: skip
    slots_a = delta.A.view(k, m, s, k).transpose(2, 3)
    slots_b = delta.B.view(k, s, k, p).transpose(1, 2)
    if s > 1:
        yield ordered("the rank slots of A are ordered (s, k) instead of (k, s)", slots_a, b4)
        yield ordered("the rank slots of B are ordered (s, k) instead of (k, s)", a4, slots_b)
        yield ordered("the rank slots are ordered (s, k) instead of (k, s)", slots_a, slots_b)
    yield ordered("the block columns are in reversed order", a4.flip(0), b4.flip(1))
    yield ordered("the block rows are in reversed order", a4.flip(2), b4.flip(0))
    yield ordered("the block rows and columns are in reversed order", a4.flip(0, 2), b4.flip(0, 1))
    yield ordered("the blocks of A are in reversed order", a4.flip(0), b4)
    yield ordered("the blocks of B are in reversed order", a4, b4.flip(0))
    yield ordered("the slots of A are in reversed order", a4.flip(2), b4)
    yield ordered("the slots of B are in reversed order", a4, b4.flip(1))
    diagonal = torch.zeros_like(a4)
    for j in range(k):
        diagonal[j, :, j] = a4[j, :, j]
    yield ordered("only the diagonal blocks are there", diagonal, b4)
    # Without the permutation each A[n] feeds B[n] with its whole rank: a LoRA of rank k r.
    a, b = delta.A.new_zeros(k, delta.r, k, m), delta.B.new_zeros(k, p, k, delta.r)
    for n in range(k):
        a[n, :, n], b[n, :, n] = delta.A[n].T, delta.B[n].T
    a, b = a.reshape(-1, k * m), b.reshape(k * p, -1)
    if (general := delta.general) is not None:
        a, b = torch.cat([a, general.A]), torch.cat([b, general.B], dim=1)
    yield Mistake(
        "the slots are not permuted between A and B (a block-diagonal update)",
        Lora(a, b, delta.scaling),
    )


def _thirds(delta: Delta) -> Iterator[Mistake]:
    """A fused query, key, value weight whose parts changed places."""
    if isinstance(delta, Dense) or delta.out_features % 3:
        return
    size = delta.out_features // 3
    for order in list(permutations(range(3)))[1:]:
        picked = [third * size + row for third in order for row in range(size)]
        yield Mistake(
            f"the thirds of the update (query, key, value?) are in the order {order}",
            permute_rows(delta, picked),
        )


def _roundings(delta: Delta) -> Iterator[Mistake]:
    """The right update, with a rounding too many on the way."""
    for dtype in SHORT:
        short = str(dtype).removeprefix("torch.")
        fewer = mapped(delta, partial(_through, dtype=dtype))
        for base, update, total, what in (
            (False, True, False, "the update was rounded to {} before it was added"),
            (False, False, True, "the sum was rounded to {} on the way"),
            (True, False, False, "the base was rounded to {} before the update was added"),
            (True, False, True, "base and sum were rounded to {}"),
            (True, True, True, "base, update and sum were rounded to {}"),
        ):
            sums = partial(_rounded_sum, dtype=dtype, base=base, update=update, total=total)
            yield Mistake(f"rounded more than once: {what.format(short)}", delta, sums)
        what = f"the factors were rounded to {short} before the update was computed"
        yield Mistake(f"rounded more than once: {what}", fewer)
        what = f"factors and update were rounded to {short} before it was added"
        sums = partial(_rounded_sum, dtype=dtype, base=False, update=True, total=False)
        yield Mistake(f"rounded more than once: {what}", fewer, sums)


def _rounded_sum(
    before: Tensor, added: Tensor, *, dtype: torch.dtype, base: bool, update: bool, total: bool
) -> Tensor:
    """The sum, with those of its terms and itself rounded to `dtype` that are asked for."""
    before = _through(before, dtype) if base else before
    result = before + (_through(added, dtype) if update else added)
    return _through(result, dtype) if total else result


def _through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values after a rounding to `dtype`, in their own."""
    return values.to(dtype).to(values.dtype)


@dataclass
class BlockSums:
    """Sums over a whole stored matrix, each (k, k) by [block row of out, block column of in]:

    <M-W, D> found and for the right rounding R, <D, D>, |M-R|^2, how many elements are out of
    their bound, and |M-W|^2. `right2` is |R-W|^2 over all blocks.
    """

    k: int
    found: Tensor = field(init=False)
    predicted: Tensor = field(init=False)
    energy: Tensor = field(init=False)
    error: Tensor = field(init=False)
    wrong: Tensor = field(init=False)
    moved: Tensor = field(init=False)
    right2: float = 0.0
    elements: int = 0
    first: tuple[int, int] | None = None  # row and column of the first element that is wrong

    def __post_init__(self) -> None:
        sums = torch.zeros(6, self.k, self.k, dtype=torch.float64)
        self.found, self.predicted, self.energy, self.error, self.wrong, self.moved = sums

    def add(
        self,
        moved: Tensor,
        right: Tensor,
        delta: Tensor,
        outside: Tensor,
        *,
        start: int,
        total: int,
        transposed: bool,
    ) -> None:
        """Adds rows `[start, start + len(delta))` of the `total` rows that the delta covers."""
        block = torch.arange(start, start + len(delta)) * self.k // total
        for sums, values in (
            (self.found, moved * delta),
            (self.predicted, right * delta),
            (self.energy, delta * delta),
            (self.error, (moved - right).square()),
            (self.wrong, outside.double()),
            (self.moved, moved.square()),
        ):
            by_column = values.view(len(delta), self.k, -1).sum(2)
            part = torch.zeros(self.k, self.k, dtype=torch.float64)
            part.index_add_(0, block, by_column)
            sums += part.T if transposed else part
        self.right2 += float(right.square().sum())
        self.elements += delta.numel()
        if self.first is None and bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            self.first = (start + row, column)

    @property
    def moved2(self) -> float:
        return float(self.moved.sum())

    @property
    def share(self) -> float:
        """c / c_pred over the whole module: 1 when right, 0 not applied, 2 twice, -1 subtracted."""
        predicted = float(self.predicted.sum())
        return float(self.found.sum()) / predicted if predicted else 1.0

    @property
    def explained(self) -> float:
        """How much of what was added lies along D, relative to a right merge (whose rounding noise
        does not): near 0 when something else was added."""
        if not self.moved2 or not self.right2:
            return 0.0
        found = float(self.found.sum()) ** 2 / self.moved2
        return found / (float(self.predicted.sum()) ** 2 / self.right2 or 1.0)

    def off(self) -> list[tuple[int, int]]:
        """The blocks that are wrong, as against the others."""
        relative = self.error / self.energy.clamp_min(1e-300)
        wrong = (relative > LOCAL * relative.max()) & (self.wrong > 0)
        return [(int(j), int(n)) for j, n in wrong.nonzero().tolist()]

    def are_missing(self, blocks: Sequence[tuple[int, int]]) -> bool:
        """Whether nothing of the update is in these blocks."""
        return all(float(self.moved[place]) < 0.01 * float(self.error[place]) for place in blocks)


def explain(
    evidence: Evidence,
    sums: BlockSums,
    others: Iterable[tuple[str, Callable[[], Delta]]] = (),
) -> str:
    """One clause on what happened to a module whose stored weights are wrong.

    `others` are the modules of the same shape that might have been confused with it, by name.
    """
    if not sums.moved2 or (sums.found.abs().sum() == 0 and sums.moved2 < 0.1 * sums.right2):
        return "the update is not applied"
    few = int(sums.wrong.sum())
    if found := evidence.best(mistakes(evidence.delta)):
        return found.name
    factor = sums.share
    if found := evidence.best(_near(evidence.delta, factor), better=0.5, agrees=1.0):
        return found.name
    if few <= max(1.0, FEW * sums.elements):
        return f"{few} of {sums.elements} elements differ, the first at {list(sums.first or ())}"
    if found := evidence.best((Mistake(name, load()) for name, load in others), better=0.5):
        return f"holds the update of {found.name} instead of its own"
    off, blocks = sums.off(), sums.k**2
    if 0 < len(off) < blocks:
        listed = ", ".join(str(place) for place in off[:LISTED])
        state = "missing" if sums.are_missing(off) else "wrong"
        verb = "is" if len(off) == 1 else "are"
        return f"of {blocks} blocks, {listed} {verb} {state} (row block, column block)"
    if sums.explained < LITTLE:
        return "another update was added: another adapter, or another base"
    if abs(factor - 1) > 0.05:
        return f"the scaling is off by a factor of {factor:.4g}, and not by this alone"
    return "the update is there, and something besides: another adapter, too, or another base"
