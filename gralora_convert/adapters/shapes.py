"""Do the tensors of one module agree with each other and with the config? Shapes and dtypes only.

    GraLoRA  gralora_A (k, in/k, r), gralora_B (k, r, out/k)
    Hybrid   ... and gralora_A_general (h, in), gralora_B_general (out, h)
    LoRA     lora_A (r, in), lora_B (out, r)

After PEFT 0.21.2, tuners/gralora/layer.py and tuners/lora/layer.py.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from gralora_convert.adapters.config import CONFIG_NAME, LoraConfig
from gralora_convert.adapters.keys import Method, Role, key_of
from gralora_convert.adapters.rules import NEEDS_BASE
from gralora_convert.disk import FLOATING, TensorSpec
from gralora_convert.errors import Finding, error, note, warning

Roles = Mapping[Role, TensorSpec]


def gralora_shape_findings(
    modules: Mapping[str, Roles], config: Mapping[str, object]
) -> Iterator[Finding]:
    """What is wrong with the shapes of GraLoRA modules; `config` are the fields of one, absent ones
    as PEFT takes them."""
    r, k, h = config.get("r", 32), config.get("gralora_k", 2), config.get("hybrid_r", 0)
    if type(r) is not int or type(k) is not int or type(h) is not int or r == 0:
        return  # the config alone is refused
    has_general = any(roles.keys() & {"general_A", "general_B"} for roles in modules.values())
    if h > 0 and modules and not has_general:
        yield error(
            "hybrid-rank-mismatch", CONFIG_NAME, f"hybrid_r is {h}, but no module has "
            "gralora_A_general and gralora_B_general",
        )  # fmt: skip
    # a transposed module stands out among others; if none has the config's r, the config is wrong
    has_rank = any("A" in x and x["A"].shape[2:] == (r,) for x in modules.values())
    for module, roles in modules.items():
        if any(not spec.nbytes for spec in roles.values()):
            yield _empty(module)
            continue
        needed: tuple[Role, ...] = ("A", "B")
        if roles.keys() & {"general_A", "general_B"} or (has_general and h > 0):
            needed = ("A", "B", "general_A", "general_B")
        yield from _missing(module, roles, needed, "gralora")
        yield from _block_findings(module, roles, r, k, has_rank)
        yield from _general_findings(module, roles, h)


def _empty(name: str) -> Finding:
    return error(
        "tensor-empty", name, "has a tensor without elements",
        "Saved from one rank of a sharded run? Gather the parameters before saving.",
    )  # fmt: skip


def _missing(
    module: str, roles: Roles, needed: Iterable[Role], method: Method
) -> Iterator[Finding]:
    for role in needed:
        if role not in roles:
            yield error(
                "missing-tensor", module, f"{key_of(module, role, method)} is missing",
                "PEFT would fill it with its initial value, which may be random.",
            )  # fmt: skip


def _block_findings(module: str, roles: Roles, r: int, k: int, has_rank: bool) -> Iterator[Finding]:
    if "A" not in roles or "B" not in roles:
        return
    a, b = roles["A"].shape, roles["B"].shape
    found = f"gralora_A {a}, gralora_B {b}"
    agree = len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1]
    if not agree or (has_rank and a[2] != r and a[1] == b[2] == r):
        yield error(
            "tensor-shape", module, f"{found}; with r={r} and gralora_k={k}, "
            f"({k}, in/{k}, {r}) and ({k}, {r}, out/{k}) were needed",
            "Transposed or swapped?",
        )  # fmt: skip
        return
    if a[0] != k:
        yield error("k-mismatch", module, f"{found}: k is {a[0]}, gralora_k of the config is {k}")
    if a[2] != r:
        yield error("rank-mismatch", module, f"{found}: r is {a[2]}, r of the config is {r}")


def _general_findings(module: str, roles: Roles, h: int) -> Iterator[Finding]:
    if "general_A" not in roles or "general_B" not in roles:
        return
    a, b = roles["general_A"].shape, roles["general_B"].shape
    found = f"gralora_A_general {a}, gralora_B_general {b}"
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not _fits(roles, a[1], b[0]):
        yield error("tensor-shape", module, f"{found}; ({h}, in) and (out, {h}) were needed")
    elif a[0] != h:
        yield error(
            "hybrid-rank-mismatch", module,
            f"{found}: hybrid_r is {a[0]}, hybrid_r of the config is {h}",
        )  # fmt: skip


def _fits(roles: Roles, in_features: int, out_features: int) -> bool:
    a, b = roles.get("A"), roles.get("B")
    return (a is None or len(a.shape) != 3 or a.shape[0] * a.shape[1] == in_features) and (
        b is None or len(b.shape) != 3 or b.shape[0] * b.shape[2] == out_features
    )


def lora_shape_findings(
    modules: Mapping[str, Roles], config: LoraConfig | None
) -> Iterator[Finding]:
    """What is wrong with the shapes of LoRA modules."""
    for module, roles in modules.items():
        if any(not spec.nbytes for spec in roles.values()):
            yield _empty(module)
            continue
        a_role: Role = "A"
        b_role: Role = "B"
        if roles.keys() & {"embedding_A", "embedding_B"}:
            a_role, b_role = "embedding_A", "embedding_B"
        yield from _missing(module, roles, (a_role, b_role), "lora")
        if a_role not in roles or b_role not in roles:
            continue
        yield from _pair_findings(module, *lora_shapes(module, roles, config), config)


def lora_shapes(
    module: str, roles: Roles, config: LoraConfig | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B once block-diagonal factors are whole."""
    a = roles["embedding_A" if "embedding_A" in roles else "A"].shape
    b = roles["embedding_B" if "embedding_B" in roles else "B"].shape
    if config is None or not _is_readable(config) or len(a) != 2 or len(b) != 2:
        return a, b
    a_blocks, b_blocks = config.diagonal(module)
    return (a[0], a[1] * a_blocks), (b[0], b[1] * b_blocks)


def _is_readable(config: LoraConfig) -> bool:
    """Whether the factors have the layout of a plain LoRA."""
    return set(config.unsupported_features()) <= NEEDS_BASE


def _pair_findings(
    module: str, a: tuple[int, ...], b: tuple[int, ...], config: LoraConfig | None
) -> Iterator[Finding]:
    found = f"lora_A {a}, lora_B {b}"
    plain = config is None or _is_readable(config)  # others have other layouts
    if len(a) < 2 or len(b) < 2 or (plain and a[0] != b[1]) or not _same_kind(a, b):
        yield error("tensor-shape", module, f"{found}; (r, in) and (out, r) were needed")
    elif (
        plain
        and config is not None
        and any(
            size % blocks
            for size, blocks in zip((a[0], b[0]), config.diagonal(module), strict=True)
        )
    ):
        yield error("tensor-shape", module, f"{found} cannot be cut into blocks (use_bdlora)")
    elif plain and config is not None and a[0] != (rank := _rank(config, module, a, b)):
        yield error("rank-mismatch", module, f"{found}: r is {a[0]}, r of the config is {rank}")


def _rank(config: LoraConfig, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The rank that the factors have. A decomposition of the weight has no more than the weight,
    and PEFT puts it in the place of factors of the config's r (0.21.2, tuners/lora/layer.py,
    `pissa_init` and `olora_init`, when it makes the adapter and again when it loads it)."""
    rank = config.rank(module)
    return min(rank, a[1], b[0]) if config.init_lora_weights in ("pissa", "olora") else rank


def _same_kind(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Two matrices, or the factors of a convolution: (r, in, *kernel) and (out, r, 1, ...)."""
    return len(a) == len(b) and all(size == 1 for size in b[2:])


def is_convolution(roles: Roles) -> bool:
    """Whether LoRA factors are those of a convolution."""
    return "A" in roles and len(roles["A"].shape) > 2


def tensor_findings(
    factors: Iterable[TensorSpec], biases: Collection[TensorSpec], saved: Iterable[TensorSpec]
) -> Iterator[Finding]:
    """Dtypes that cannot hold factors or biases, or hold them badly; tensors left empty."""
    found: dict[str, str] = {}
    for spec in factors:
        found[spec.dtype] = spec.file.name
        if spec.dtype.startswith("F") and spec.dtype not in FLOATING:
            yield warning(
                "tensor-dtype-lossy", spec.name, f"has dtype {spec.dtype}, too coarse for it"
            )
        elif spec.dtype not in FLOATING:
            yield _wrong_dtype(spec)
    if len(found) > 1:
        name = next(iter(found.values()))
        yield note("tensor-dtype-mixed", name, f"holds {', '.join(sorted(found))}")
    for spec in biases:
        if spec.dtype not in FLOATING:
            yield _wrong_dtype(spec)
    for spec in (*biases, *saved):
        if not spec.nbytes:
            yield _empty(spec.name)


def _wrong_dtype(spec: TensorSpec) -> Finding:
    return error("tensor-dtype", spec.name, f"has dtype {spec.dtype}, a floating one was needed")
