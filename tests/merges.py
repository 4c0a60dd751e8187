"""Right and wrong merges of small models: made here with torch alone, so that what `verify` says of
them can be checked against what was done."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gralora_convert.adapters.keys import key_of
from gralora_convert.delta.forms import Gralora
from gralora_convert.delta.products import dense
from tests.builders import random_delta, write_adapter, write_model

Tensors = dict[str, torch.Tensor]
SHAPES = {
    f"layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {"q": (48, 48), "v": (48, 48), "up": (96, 48)}.items()
}
BIASED, HEAD = "layers.0.up", "head.weight"


@dataclass(frozen=True)
class Setting:
    """A base, an adapter with a trained bias and a trained head, and where they are on disk."""

    folder: Path
    base: Tensors
    deltas: Mapping[str, Gralora]
    values: Tensors
    transposed: bool = False
    dtype: torch.dtype | None = None

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight as it is stored: (in, out) in a model of Conv1D layers."""
        return tensor.T if self.transposed else tensor

    def added(self, deltas: Mapping[str, torch.Tensor]) -> Tensors:
        """base + deltas (out, in) in float32 or wider, rounded once, and the trained values."""
        merged = {name: t.to(self.dtype or t.dtype) for name, t in self.base.items()}
        for name, delta in deltas.items():
            weight = self.base[f"{name}.weight"]
            total = weight.double() + self.stored(delta).double()
            merged[f"{name}.weight"] = total.float().to(self.dtype or weight.dtype)
        return merged | {n: t.to(self.dtype or t.dtype) for n, t in self.values.items()}

    def right(self) -> Tensors:
        return self.added({name: dense(delta) for name, delta in self.deltas.items()})

    def every(self, change: Callable[[Gralora], torch.Tensor]) -> Tensors:
        """A merge in which each module gets what `change` makes of its delta."""
        return self.added({name: change(delta) for name, delta in self.deltas.items()})

    def write(self, merged: Tensors) -> Path:
        return write_model(self.folder / "merged", merged)


def setting(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    rho: float = 0.03,
    k: int = 2,
    hybrid_r: int = 4,
    seed: int = 0,
    transposed: bool = False,
    factors: torch.dtype = torch.float32,
    written: torch.dtype | None = None,
) -> Setting:
    """A setting on disk with |delta| / |W| = rho for every module."""
    g = torch.Generator().manual_seed(seed)
    base: Tensors = {}
    for name, (rows, columns) in SHAPES.items():
        shape = (columns, rows) if transposed else (rows, columns)
        base[f"{name}.weight"] = torch.randn(shape, generator=g).to(dtype)
    base[f"{BIASED}.bias"] = torch.randn(96, generator=g).to(dtype)
    base["norm.weight"] = torch.randn(48, generator=g).to(dtype)
    base["embed_tokens.weight"] = torch.randn(10, 48, generator=g).to(dtype)
    base[HEAD] = torch.randn(10, 48, generator=g).to(dtype)
    write_model(folder / "base", base)
    deltas = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        delta = random_delta(*shape, r=16, k=k, hybrid_r=hybrid_r, alpha=24.0, seed=seed * 100 + i)
        size = rho * float(base[f"{name}.weight"].double().norm() / dense(delta).double().norm())
        b = None if delta.general_B is None else (delta.general_B * size).to(factors)
        a = None if delta.general_A is None else delta.general_A.to(factors)
        B = (delta.B * size).to(factors)
        deltas[name] = Gralora(delta.A.to(factors), B, delta.scaling, a, b)
    values = {
        f"{BIASED}.bias": torch.randn(96, generator=g).to(dtype),
        HEAD: torch.randn(10, 48, generator=g).to(dtype),
    }
    adapter = write_adapter(
        folder / "adapter", deltas, bias="gralora_only", modules_to_save=["head"],
        fan_in_fan_out=transposed,
    )  # fmt: skip
    path = adapter / "adapter_model.safetensors"
    names = {
        key_of(BIASED, "bias"): values[f"{BIASED}.bias"],
        key_of(HEAD, "parameter"): values[HEAD],
        **{
            key_of(name, "bias"): base[f"{name}.bias"]
            for name in SHAPES
            if name != BIASED and f"{name}.bias" in base
        },
    }
    save_file(load_file(path) | names, path, metadata={"format": "pt"})
    return Setting(folder, base, deltas, values, transposed, written)


@dataclass(frozen=True)
class Wrong:
    """A way to merge wrongly: what it makes, words of the verdict, and the one module or tensor
    that is wrong (None: all adapted modules)."""

    make: Callable[[Setting], Tensors]
    words: tuple[str, ...]
    only: str | None = None
    needs_hybrid: bool = False
    needs_blocks: bool = True
    fits: Callable[[Setting], bool] = lambda setting: True


def plain(delta: Gralora) -> Gralora:
    """The delta without its general part."""
    return Gralora(delta.A, delta.B, delta.scaling)


def _blocks(delta: Gralora) -> torch.Tensor:
    """[j, n, o, i] of the blocks alone."""
    matrix, k = dense(plain(delta)), delta.k
    return matrix.view(k, matrix.shape[0] // k, k, -1).permute(0, 2, 1, 3).clone()


def _with_blocks(delta: Gralora, blocks: torch.Tensor) -> torch.Tensor:
    general = dense(delta) - dense(plain(delta))
    return blocks.permute(0, 2, 1, 3).reshape_as(general) + general


def transposed_blocks(delta: Gralora) -> torch.Tensor:
    return _with_blocks(delta, _blocks(delta).transpose(0, 1))


def columns_reversed(delta: Gralora) -> torch.Tensor:
    return _with_blocks(delta, _blocks(delta).flip(1))


def rows_reversed(delta: Gralora) -> torch.Tensor:
    return _with_blocks(delta, _blocks(delta).flip(0))


def a_reversed(delta: Gralora) -> torch.Tensor:
    return dense(replace(delta, A=delta.A.flip(0)))


def slots_of_a(delta: Gralora) -> torch.Tensor:
    k, m, r = delta.A.shape
    return dense(replace(delta, A=delta.A.view(k, m, r // k, k).transpose(2, 3).reshape(k, m, r)))


def slots_of_b(delta: Gralora) -> torch.Tensor:
    k, r, p = delta.B.shape
    return dense(replace(delta, B=delta.B.view(k, r // k, k, p).transpose(1, 2).reshape(k, r, p)))


def unpermuted(delta: Gralora) -> torch.Tensor:
    general = dense(delta) - dense(plain(delta))
    parts = [(a @ b).T * delta.scaling for a, b in zip(delta.A, delta.B, strict=True)]
    diagonal: torch.Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return diagonal + general


def block_missing(delta: Gralora) -> torch.Tensor:
    matrix, k = dense(delta), delta.k
    p, m = matrix.shape[0] // k, matrix.shape[1] // k
    matrix[p : 2 * p, :m] = 0
    return matrix


def slots_swapped(delta: Gralora) -> torch.Tensor:
    A = delta.A.clone()
    A[0, :, [0, 1]] = A[0, :, [1, 0]]
    return dense(replace(delta, A=A))


def alpha_over_r(delta: Gralora) -> torch.Tensor:
    return dense(delta) * ((delta.r + delta.hybrid_r) / delta.r)


def hybrid_twice(delta: Gralora) -> torch.Tensor:
    return 2 * dense(delta) - dense(plain(delta))


def _one(
    name: str, change: Callable[[Setting, torch.Tensor], torch.Tensor]
) -> Callable[[Setting], Tensors]:
    def make(setting: Setting) -> Tensors:
        merged = setting.right()
        return merged | {name: change(setting, merged[name])}

    return make


def _flipped_bit(setting: Setting, tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    raw = changed.view(torch.int32 if tensor.itemsize == 4 else torch.int16)
    raw.view(-1)[3] ^= 1
    return changed


def _with_nan(setting: Setting, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_put(
        (torch.tensor(3), torch.tensor(4)), torch.tensor(float("nan")).to(tensor)
    )


def _moved(order: Mapping[str, str]) -> Callable[[Setting], Tensors]:
    """Modules that get the delta of another one."""

    def make(setting: Setting) -> Tensors:
        deltas = {name: dense(delta) for name, delta in setting.deltas.items()}
        return setting.added({name: deltas[order.get(name, name)] for name in deltas})

    return make


def _wrong_base(setting: Setting) -> Tensors:
    g = torch.Generator().manual_seed(99)
    other = {
        name: (t.double() * (1 + 1e-3 * torch.randn(t.shape, generator=g, dtype=torch.double))).to(
            t
        )
        for name, t in setting.base.items()
    }
    return replace(setting, base=other).right()


def _rounded_delta(setting: Setting) -> Tensors:
    return setting.every(lambda delta: dense(delta).bfloat16().float())


def _through_half(setting: Setting) -> Tensors:
    right = replace(setting, dtype=torch.float16).right()
    adapted = {f"{name}.weight" for name in setting.deltas}
    return setting.right() | {n: t.to(setting.base[n]) for n, t in right.items() if n in adapted}


def _without(name: str) -> Callable[[Setting], Tensors]:
    return lambda setting: {n: t for n, t in setting.right().items() if n != name}


def _only(tensors: Tensors, modules: Collection[str]) -> Tensors:
    return {n: t for n, t in tensors.items() if n.removesuffix(".weight") in modules}


UP = "layers.1.up"
SHIFTED = {"layers.0.up": "layers.1.up", "layers.1.up": "layers.0.up"} | {
    f"layers.{i}.{name}": f"layers.{1 - i}.{name}" for i in (0, 1) for name in ("q", "v")
}
SWAPPED = {
    f"layers.{i}.{one}": f"layers.{i}.{other}"
    for i in (0, 1)
    for one, other in (("q", "v"), ("v", "q"))
}
QV = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")

WRONG: Mapping[str, Wrong] = {
    "transposed blocks": Wrong(lambda s: s.every(transposed_blocks), ("blocks are transposed",)),
    "slot order of A": Wrong(lambda s: s.every(slots_of_a), ("rank slots of A",)),
    "slot order of B": Wrong(lambda s: s.every(slots_of_b), ("rank slots of B",)),
    "block columns reversed": Wrong(lambda s: s.every(columns_reversed), ("columns are in rev",)),
    "block rows reversed": Wrong(lambda s: s.every(rows_reversed), ("rows are in rev",)),
    "blocks of A reversed": Wrong(lambda s: s.every(a_reversed), ("A are in reversed",)),
    "one block missing": Wrong(lambda s: s.every(block_missing), ("(1, 0) is missing",)),
    "no permutation": Wrong(lambda s: s.every(unpermuted), ("not permuted",)),
    "two slots swapped": Wrong(lambda s: s.every(slots_swapped), ("blocks, ", "wrong (row block")),
    "alpha / r": Wrong(lambda s: s.every(alpha_over_r), ("alpha / r",), needs_hybrid=True),
    "no scaling": Wrong(
        lambda s: s.every(lambda d: dense(replace(d, scaling=1.0))),
        ("off by a factor", "1 instead"), needs_blocks=False,
    ),
    "1 % too much": Wrong(
        lambda s: s.every(lambda d: dense(d) * 1.01), ("off by a factor of 1.0",),
        needs_blocks=False,
    ),
    "hybrid missing": Wrong(
        lambda s: s.every(lambda d: dense(plain(d))), ("hybrid part is missing",), needs_hybrid=True
    ),
    "hybrid twice": Wrong(
        lambda s: s.every(hybrid_twice), ("hybrid part is applied twice",), needs_hybrid=True
    ),
    "twice": Wrong(
        lambda s: s.every(lambda d: 2 * dense(d)), ("applied twice",), needs_blocks=False
    ),
    "not applied": Wrong(
        lambda s: s.every(lambda d: 0 * dense(d)), ("not applied",), needs_blocks=False
    ),
    "sign": Wrong(lambda s: s.every(lambda d: -dense(d)), ("sign",), needs_blocks=False),
    "a module left out": Wrong(
        _one(f"{UP}.weight", lambda s, t: s.base[f"{UP}.weight"].to(t)), ("not applied",), UP,
        needs_blocks=False,
    ),
    "layers shifted": Wrong(_moved(SHIFTED), ("holds the update of layers.",), needs_blocks=False),
    "q and v swapped": Wrong(
        _moved(SWAPPED), ("holds the update of layers.",), "q and v", needs_blocks=False
    ),
    "wrong base": Wrong(_wrong_base, ("another base",), "everything", needs_blocks=False),
    "an untouched bit": Wrong(
        _one("norm.weight", _flipped_bit), ("no adapter touches it",), "norm", needs_blocks=False
    ),
    "an adapted element": Wrong(
        _one(f"{UP}.weight", lambda s, t: t.index_put((torch.tensor(3), torch.tensor(4)),
             t[3, 4] * 1.5)), ("1 of 4608 elements differ, the first at [3, 4]",), UP,
        needs_blocks=False,
    ),
    "bias not replaced": Wrong(
        _one(f"{BIASED}.bias", lambda s, t: s.base[f"{BIASED}.bias"].to(t)),
        ("not replaced",), BIASED, needs_blocks=False,
    ),
    "bias added": Wrong(
        _one(f"{BIASED}.bias", lambda s, t: (s.base[f"{BIASED}.bias"].float() + t.float()).to(t)),
        ("added to the base's value",), BIASED, needs_blocks=False,
    ),
    "head not replaced": Wrong(
        _one(HEAD, lambda s, t: s.base[HEAD].to(t)), ("not replaced",), "head", needs_blocks=False
    ),
    "head added": Wrong(
        _one(HEAD, lambda s, t: (s.base[HEAD].float() + t.float()).to(t)),
        ("added to the base's value",), "head", needs_blocks=False,
    ),
    "delta rounded to bfloat16": Wrong(
        _rounded_delta, ("rounded more than once", "update was rounded to bfloat16"),
        needs_blocks=False, fits=lambda s: next(iter(s.deltas.values())).A.dtype == torch.float32,
    ),
    "through float16": Wrong(
        _through_half, ("rounded more than once", "rounded to float16"), needs_blocks=False,
        fits=lambda s: s.base[HEAD].dtype != torch.float16,
    ),
    "added transposed": Wrong(
        lambda s: s.right() | _only(s.added({n: dense(s.deltas[n]).T for n in QV}), QV),
        ("added transposed",), "q and v", needs_blocks=False,
    ),
    "NaN": Wrong(_one(f"{UP}.weight", _with_nan), ("NaN",), UP, needs_blocks=False),
    "a missing tensor": Wrong(_without("norm.weight"), ("is missing",), "norm", needs_blocks=False),
    "an adapted tensor missing": Wrong(
        _without(f"{UP}.weight"), ("is missing",), UP, needs_blocks=False
    ),
    "an extra tensor": Wrong(
        lambda s: s.right() | {"more.weight": torch.ones(3, 4)}, ("neither in base nor adapter",),
        "more", needs_blocks=False,
    ),
}  # fmt: skip


def wrong_modules(wrong: Wrong) -> set[str] | None:
    """The modules that a verdict must name, or None where that is all there is."""
    match wrong.only:
        case None:
            return set(SHAPES)
        case "q and v":
            return set(QV)
        case "everything":
            return None
        case name:
            return {name}


def applies(wrong: Wrong, setting: Setting) -> bool:
    """Whether this mistake is one, for this adapter."""
    delta = next(iter(setting.deltas.values()))
    blocks = delta.k > 1 or not wrong.needs_blocks
    return blocks and (delta.hybrid_r > 0 or not wrong.needs_hybrid) and wrong.fits(setting)
