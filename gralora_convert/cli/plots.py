"""Pictures of an adapter and of a verification, by matplotlib (the extra `plot`).

Layers run to the right, kinds of modules downwards, so that any number of modules is one table.
Palettes are read by colour-blind eyes: viridis, purple to orange, Okabe and Ito.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_convert.adapters import split
from gralora_convert.errors import MisuseError, OutputError

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from gralora_convert.verbs import Anatomy, Equivalence, Spectrum

SUFFIXES = (".png", ".svg", ".pdf")
ENERGIES = (0.9, 0.99, 0.999)
# Okabe and Ito's palette without its yellow, which is faint on white
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^")


def require_drawable(path: str | Path) -> None:
    """Refuses early what cannot be drawn, before anything is computed.

    Raises:
        MisuseError: another suffix than .png, .svg, .pdf, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise MisuseError(
            f"--plot {str(path)!r} does not end in {', '.join(SUFFIXES)}",
            hint="The suffix chooses the format.",
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MisuseError(
            "--plot needs matplotlib, which is not installed",
            hint="Run: pip install 'gralora-convert[plot]'.",
        ) from error


def draw_anatomy(anatomy: "Anatomy", path: str | Path) -> None:
    """Norms by layer and module, block norms, spectra and the ranks that they need.

    Raises:
        MisuseError: as `require_drawable`.
        OutputError: the file cannot be written.
    """
    require_drawable(path)
    table = _Table([part.module for part in anatomy.parts])
    height = 3.2 + 0.3 * len(table.kinds)
    figure = _figure(13.5, 1.2 + 2 * height)
    norms, blocks, energy, ranks = figure.subplots(2, 2).flat
    parts = {part.module: part for part in anatomy.parts}
    _draw_norms(norms, table, parts, anatomy.is_relative)
    _draw_blocks(blocks, table, parts)
    _draw_spectra(energy, table, parts)
    _draw_ranks(ranks, table, parts, anatomy.exact_rank)
    count = len(parts)
    figure.suptitle(f"{_short(anatomy.name)}: {anatomy.title}; {count} modules", fontsize=13)
    _save(figure, Path(path))


def draw_equivalence(found: "Equivalence", path: str | Path) -> None:
    """The error of every module against its bound, and the rounding noise in its update.

    Raises:
        MisuseError: as `require_drawable`.
        OutputError: the file cannot be written.
    """
    require_drawable(path)
    by_worst = sorted(found.rows, key=lambda row: (row.worst, row.survival is not None))
    rows = {row.module or row.tensor: row for row in by_worst}  # of a module's tensors the worst
    table = _Table(list(rows))
    figure = _figure(13.5, 2.4 + 0.42 * len(table.kinds))
    errors, noise = figure.subplots(1, 2)
    ratios = table.grid(lambda module: min(rows[module].worst, 1e6))
    # rounding stays below 1; more is an error, which stands out in the other hue
    image = errors.imshow(_log(ratios), cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto")
    _colour_bar(image, errors, "largest |difference| / rounding bound", (-2, 0, 2),
                ("≤ 0.01", "1", "≥ 100"))  # fmt: skip
    _mark(errors, ratios > found.slack)
    wrong = len(found.wrong)
    table.label(
        errors, f"Error by module ({f'{wrong} wrong: x' if wrong else 'all within the bound'})"
    )

    def noise_of(module: str) -> float:
        row = rows[module]  # what is wrong by more than rounding says nothing about its cost
        is_right = row.survival is not None and row.worst <= found.slack
        return 100 * row.survival.noise if is_right and row.survival else float("nan")

    costs = table.grid(noise_of)
    top = max([1.0, *costs[costs == costs]])  # a scale below 1 % would make noise of nothing
    image = noise.imshow(costs, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    _colour_bar(image, noise, "rounding noise / update, %")
    of = " (right modules only)" if wrong else ""
    table.label(noise, f"What the stored dtype costs{of}")
    what = " + ".join(("base", *found.titles))
    figure.suptitle(f"{what} against the merged checkpoint: {found.verdict}", fontsize=13)
    _save(figure, Path(path))


def draw_trade(
    anatomy: "Anatomy", written: Mapping[str, int], limits: Mapping[str, int], path: str | Path
) -> None:
    """The error of a LoRA against its rank, the rank that was written (of modules with ranks of
    their own from the mean to the largest), and the largest ranks of servers, as far as these
    ranks go.

    Raises:
        MisuseError: as `require_drawable`.
        OutputError: the file cannot be written.
    """
    import numpy

    require_drawable(path)
    figure = _figure(9, 5.2)
    axes = figure.subplots()
    ranks = numpy.arange(max(len(part.tails) for part in anatomy.parts))
    left = numpy.zeros((len(anatomy.parts), len(ranks)))
    for row, part in enumerate(anatomy.parts):
        left[row, : len(part.tails)] = part.tails.numpy()
    whole = numpy.sqrt(left.sum(axis=0) / (left[:, 0].sum() or 1.0))
    norms = left[:, :1].copy()
    norms[norms == 0] = 1
    worst = numpy.sqrt((left / norms).max(axis=0))
    for errors, label, colour, dash in (
        (whole, "all modules", COLOURS[0], "-"), (worst, "worst module", COLOURS[4], "--"),
    ):  # fmt: skip
        axes.semilogy(ranks, numpy.maximum(errors, 1e-9), dash, color=colour, lw=1.8, label=label)
    held = [written[part.module] for part in anatomy.parts]
    lost = sum(left[row, min(n, len(ranks) - 1)] for row, n in enumerate(held))
    r, error = max(held), (lost / (left[:, 0].sum() or 1.0)) ** 0.5
    mean = sum(held) / len(held)
    label = f"r={r}" if min(held) == r else f"ranks {min(held)} to {r}, mean {mean:.3g}"
    axes.plot([mean, r], [max(error, 1e-3)] * 2, "o-", color="#000000", ms=7,
              label=f"written: {label}; error {error:.3g}")  # fmt: skip
    axes.set_ylim(1e-3, 1.2)
    axes.set_xlim(0, max(anatomy.exact_rank, r) * 1.04)
    for (server, rank), dash in zip(limits.items(), DASHES[1:], strict=False):
        if rank < axes.get_xlim()[1]:
            axes.axvline(rank, color="#666666", lw=1, ls=dash, label=f"{server}: at most {rank}")
    axes.set_xlabel("rank of the LoRA")
    axes.set_ylabel("relative error of the update (Frobenius)")
    axes.set_title(f"{_short(anatomy.name)}: exact from r={anatomy.exact_rank}", fontsize=11)
    axes.grid(color="#dddddd", lw=0.6)
    axes.legend(fontsize=8, frameon=False)
    _save(figure, Path(path))


# tables -------------------------------------------------------------------------------------------


class _Table:
    """Modules by kind (rows) and layer (columns); those outside of layers (heads, embeddings) have
    a column of their own before them."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.places = {module: split(module) for module in modules}
        self.kinds = list(dict.fromkeys(kind for kind, _ in self.places.values()))
        layers = [layer for _, layer in self.places.values() if layer is not None]
        self.first, self.last = min(layers, default=0), max(layers, default=-1)
        self.outside = int(len(layers) < len(self.places) or not layers)

    @property
    def columns(self) -> list[str]:
        return ["-"] * self.outside + [str(layer) for layer in range(self.first, self.last + 1)]

    def of_kind(self, kind: str) -> list[str]:
        return [module for module, place in self.places.items() if place[0] == kind]

    def cell(self, module: str) -> tuple[int, int]:
        kind, layer = self.places[module]
        column = 0 if layer is None else layer - self.first + self.outside
        return self.kinds.index(kind), column

    def grid(self, value: Callable[[str], float]) -> "numpy.ndarray":
        """kinds x layers; NaN where there is no module."""
        import numpy

        grid = numpy.full((len(self.kinds), len(self.columns)), numpy.nan)
        for module in self.places:
            cell = self.cell(module)
            # modules that differ in a second number (experts) share a cell: the largest counts
            grid[cell] = numpy.fmax(grid[cell], value(module))
        return grid

    def label(self, axes: "Axes", title: str, scale: int = 1) -> None:
        """Names of kinds and numbers of layers for cells of `scale` pixels."""
        names = _without_common_start(self.kinds)
        middles = [scale * i + (scale - 1) / 2 for i in range(len(names))]
        axes.set_yticks(middles, names, fontsize=8)
        count = len(self.columns)
        step = next(s for s in (1, 2, 5, 10, 20, 50, count) if count <= 16 * s)
        shown = range(0, count, step)
        axes.set_xticks([scale * i + (scale - 1) / 2 for i in shown],
                        [self.columns[i] for i in shown], fontsize=8)  # fmt: skip
        axes.set_xlabel("layer (-: outside of layers)" if self.outside else "layer")
        axes.set_title(title, fontsize=11)


def _without_common_start(names: Sequence[str]) -> list[str]:
    """`self_attn.q_proj` of `model.layers.self_attn.q_proj`."""
    words = [name.split(".") for name in names]
    common = 0
    while all(len(w) > common + 1 and w[common] == words[0][common] for w in words):
        common += 1
    return [".".join(w[common:]) for w in words]


# panels of an adapter -----------------------------------------------------------------------------


def _draw_norms(
    axes: "Axes", table: _Table, parts: Mapping[str, "Spectrum"], is_relative: bool
) -> None:
    def value(module: str) -> float:
        part = parts[module]
        return 100 * part.relative if is_relative and part.relative is not None else part.norm

    image = axes.imshow(table.grid(value), cmap="viridis", vmin=0, aspect="auto")
    unit = "‖ΔW‖ / ‖W‖ (Frobenius), %" if is_relative else "‖ΔW‖ (Frobenius)"
    _colour_bar(image, axes, unit)
    table.label(axes, "Size of the update" + (" against the base weight" if is_relative else ""))


def _draw_blocks(axes: "Axes", table: _Table, parts: Mapping[str, "Spectrum"]) -> None:
    """Each module as its k x k blocks, against the root mean square of them."""
    import numpy

    k = max(part.blocks.shape[0] for part in parts.values())
    rows, columns = len(table.kinds), len(table.columns)
    mosaic = numpy.full((rows * k, columns * k), numpy.nan)
    for module, part in parts.items():
        row, column = table.cell(module)
        norms = part.blocks.numpy()
        mean = float(numpy.sqrt((norms**2).mean())) or 1.0
        mosaic[row * k : (row + 1) * k, column * k : (column + 1) * k] = norms / mean
    with numpy.errstate(divide="ignore"):
        image = axes.imshow(numpy.log2(mosaic).clip(-2, 2), cmap="PuOr_r", vmin=-2, vmax=2,
                            aspect="auto", interpolation="nearest")  # fmt: skip
    axes.hlines([i * k - 0.5 for i in range(1, rows)], -0.5, columns * k - 0.5, "white", lw=1.5)
    axes.vlines([i * k - 0.5 for i in range(1, columns)], -0.5, rows * k - 0.5, "white", lw=1.5)
    _colour_bar(image, axes, "norm of a block / mean of its module",
                (-2, -1, 0, 1, 2), ("≤ ¼", "½", "1", "2", "≥ 4"))  # fmt: skip
    table.label(axes, f"Blocks: each module as its {k} x {k} blocks", k)


def _draw_spectra(axes: "Axes", table: _Table, parts: Mapping[str, "Spectrum"]) -> None:
    """What the best LoRA of each rank leaves out, as the median over the layers."""
    import numpy

    longest = 1
    kinds = table.kinds if len(table.kinds) <= len(COLOURS) else None
    groups = {kind: table.of_kind(kind) for kind in kinds} if kinds else {"all": list(parts)}
    for i, modules in enumerate(groups.values()):
        length = max(len(parts[m].tails) for m in modules)
        left = numpy.zeros((len(modules), length))
        for row, module in enumerate(modules):
            tails = parts[module].tails.numpy()
            left[row, : len(tails)] = tails / (tails[0] or 1.0)
        median = numpy.median(left, axis=0)
        longest = max(longest, int((median > 1e-4).sum()))
        label = _without_common_start(table.kinds)[i] if kinds else "median of all"
        axes.semilogy(numpy.arange(length), numpy.maximum(median, 1e-9), label=label, lw=1.6,
                      color=COLOURS[i % len(COLOURS)], ls=DASHES[i % len(DASHES)])  # fmt: skip
        if not kinds:
            axes.fill_between(range(length), left.min(axis=0), left.max(axis=0), alpha=0.2,
                              color=COLOURS[i])  # fmt: skip
    for energy in ENERGIES:
        axes.axhline(1 - energy, color="#666666", lw=0.8)
        axes.annotate(f" {energy:.1%} held".replace(".0%", "%"), (1.0, 1 - energy),
                      xycoords=("axes fraction", "data"), va="center",
                      fontsize=8, color="#444444")  # fmt: skip
    axes.set_ylim(3e-4, 1.1)
    axes.set_xlim(0, longest * 1.02)
    axes.set_xlabel("rank of the best LoRA")
    axes.set_ylabel("share of ‖ΔW‖² left out")
    axes.set_title("Spectrum (median over layers)", fontsize=11)
    axes.legend(fontsize=8, loc="lower left", frameon=False)


def _draw_ranks(axes: "Axes", table: _Table, parts: Mapping[str, "Spectrum"], exact: int) -> None:
    """The rank that each kind needs: the median over its layers, and their range."""
    import numpy

    for i, energy in enumerate(ENERGIES):
        for row, kind in enumerate(table.kinds):
            ranks = [parts[module].rank_for(energy) for module in table.of_kind(kind)]
            y = row + 0.22 * (i - 1)
            axes.plot([min(ranks), max(ranks)], [y, y], color=COLOURS[i], lw=2, alpha=0.5)
            axes.plot(numpy.median(ranks), y, MARKERS[i], color=COLOURS[i], ms=6,
                      label=f"{energy:.1%}".replace(".0%", "%") if row == 0 else None)  # fmt: skip
    axes.axvline(exact, color="#000000", lw=1, ls=":")
    axes.annotate(f"exact: {exact}", (exact, 1.01), xycoords=("data", "axes fraction"),
                  ha="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(table.kinds)), _without_common_start(table.kinds), fontsize=8)
    axes.set_ylim(len(table.kinds) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("rank of a LoRA that holds this share of ‖ΔW‖² (line: range over layers)")
    axes.set_title("Rank needed", fontsize=11)
    axes.legend(fontsize=8, loc="lower left", title="share", title_fontsize=8)


# matplotlib ---------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"...{name[-77:]}"


def _log(values: "numpy.ndarray") -> "numpy.ndarray":
    import numpy

    with numpy.errstate(divide="ignore"):
        logarithms: numpy.ndarray = numpy.log10(values).clip(-2, 2)
    return logarithms


def _mark(axes: "Axes", wrong: "numpy.ndarray") -> None:
    """A cross on each wrong cell: not told by colour alone."""
    for row, column in zip(*wrong.nonzero(), strict=True):
        axes.plot(column, row, "x", color="black", ms=7, mew=1.6)


def _colour_bar(
    image: "AxesImage",
    axes: "Axes",
    label: str,
    ticks: Sequence[float] = (),
    names: Sequence[str] = (),
) -> None:
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if ticks:
        bar.set_ticks(list(ticks), labels=list(names))


def _save(figure: "Figure", path: Path) -> None:
    """The picture at `path`, complete or not at all, the same bytes on every run."""
    import matplotlib

    kind = path.suffix.lower()[1:]
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "gralora-convert", "svg.fonttype": "path"}):
        figure.savefig(data, format=kind, metadata=undated[kind])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data.getvalue())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from error
