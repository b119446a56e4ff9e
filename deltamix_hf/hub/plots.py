"""Pictures of a delta repo: where the bits went, what is left of each layer, and its spectrum.

Figures are made without pyplot, so that nothing global changes and no display is needed. In a heat
map a layer type is a row and a depth a column: readable for thousands of matrices.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..checkpoint.report import MatrixReport, RepoReport, rank_sizes
from ..storage.sizes import KINDS

_COLOURS = ("#0072b2", "#e69f00", "#999999", "#009e73")  # apart for colour-blind eyes too
_LAYERS = 8  # spectra in one picture
_MOST_POINTS = 400  # of one spectrum: a 7B model's matrices have thousands of ranks
_MOST_NAMES = 60  # of layer types beside a heat map


def save_figures(report: RepoReport, folder: Path) -> list[Path]:
    """Write all figures as PNG into `folder`, made if it is not there, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for draw in (allocation_figure, bytes_figure, error_figure, spectrum_figure):
        paths.append(folder / f"{draw.__name__.removesuffix('_figure')}.png")
        paths[-1].write_bytes(png(draw(report)))
    return paths


def png(figure: Figure) -> bytes:
    """Render a figure as PNG, without the version of matplotlib in its metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def allocation_figure(report: RepoReport) -> Figure:
    """Draw bits stored for each weight, by layer type and depth, and MB by layer type."""
    types = report.by_type
    figure = Figure(figsize=(11, _height(len(types))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    title = f"Bits for each weight ({report.size.fraction} of bf16)"
    _heat_map(report, left, lambda m: m.bits_per_weight, Normalize(vmin=0), title)
    sums = [sum(m.bytes for m in group.values()) / 1e6 for group in types.values()]
    right.barh(range(len(types)), sums, color=_COLOURS[0])
    right.set(title="MB", ylim=left.get_ylim(), yticks=[])
    right.grid(axis="x", alpha=0.3)
    return figure


def bytes_figure(report: RepoReport) -> Figure:
    """Draw MB of each layer (matrices alike in name up to its number), stacked by kind."""
    rows, size = _layers(report), report.size
    widths = sum(matrix.metadata for matrix in report.matrices.values())
    rows["rest"] = {"overlay": size.overlay, "metadata": size.metadata - widths}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(rows))
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        heights = np.array([row.get(kind, 0) / 1e6 for row in rows.values()])
        axes.bar(range(len(rows)), heights, bottom=bottom, color=colour, label=kind)
        bottom += heights
    title = f"Bytes by layer: {size.total / 1e6:.2f} MB in all"
    axes.set(title=title, ylabel="MB", xlabel="layer; rest: norms, biases, headers of files")
    axes.margins(x=0.01)
    axes.set_ylim(0, 1.05 * bottom.max())
    step = max(1, len(rows) // 40)
    shown = [i for i, name in enumerate(rows) if i % step == 0 or not name[-1].isdigit()]
    names = list(rows)
    slanted = any(len(name) > 3 for name in names)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=45 if slanted else 0, ha="right")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    return figure


def error_figure(report: RepoReport) -> Figure:
    """Draw each matrix's relative error as compression recorded it, by layer type and depth."""
    figure = Figure(figsize=(9, _height(len(report.by_type))), layout="constrained")
    axes = figure.subplots()
    found = [m.error for m in report.matrices.values() if m.error]
    norm = LogNorm(min(found), max(found)) if found else Normalize(0, 1)
    _heat_map(report, axes, lambda m: m.error, norm, "Relative error of ΔW, in the layer's metric")
    return figure


def spectrum_figure(report: RepoReport) -> Figure:
    """Draw sizes and widths of the ranks kept, for some matrices spread over the model."""
    kept = [name for name, m in report.matrices.items() if m.rank]
    spread = np.unique(np.linspace(0, len(kept) - 1, _LAYERS).round().astype(int))
    chosen = [kept[i] for i in spread if kept]
    columns = min(4, max(1, len(chosen)))
    lines = max(1, -(-len(chosen) // columns))
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.9 * lines + 0.6), layout="constrained")
    figure.suptitle("Ranks kept: size |u||v| of each, coloured by the mean width of its two sides")
    labels = _labels(report.matrices)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    drawn = None
    for axes, name in zip(panels, chosen, strict=False):
        matrix = report.matrices[name]
        sizes = rank_sizes(report, name)
        order = sizes.argsort(descending=True)
        places = np.arange(1, len(order) + 1)
        widths = ((matrix.v_bits + matrix.u_bits) / 2)[order].numpy()
        keep = np.unique(np.linspace(0, len(order) - 1, _MOST_POINTS).astype(int))
        drawn = axes.scatter(
            places[keep], sizes[order].numpy()[keep], c=widths[keep], s=9, cmap="viridis",
            norm=Normalize(1, 8),
        )  # fmt: skip
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_title(labels[name], fontsize=8)
        axes.set_xlabel(f"rank, of {min(matrix.shape)}", fontsize=8)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    if drawn is not None:
        figure.colorbar(drawn, ax=list(panels), label="bits for each number", shrink=0.8)
    return figure


def _heat_map(
    report: RepoReport,
    axes: Axes,
    value: Callable[[MatrixReport], float | None],
    norm: Normalize,
    title: str,
) -> None:
    """Draw layer types as rows, depths as columns; a first column for what has no depth."""
    types = report.by_type or {"none": {}}
    depths = sorted({d for group in types.values() for d in group if d is not None})
    columns = [None] * any(None in group for group in types.values()) + depths
    grid = np.full((len(types), max(len(columns), 1)), np.nan)
    for row, group in enumerate(types.values()):
        for depth, matrix in group.items():
            found = value(matrix)
            grid[row, columns.index(depth)] = np.nan if found is None else found
    image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)
    names = list(_labels(types).values())
    named = range(0, len(types), -(-len(types) // _MOST_NAMES))
    axes.set_yticks(named, [names[i] for i in named], fontsize=8)
    shown = MaxNLocator(12, integer=True).tick_values(0, max(len(columns) - 1, 1))
    places = sorted({int(i) for i in shown if 0 <= i < len(columns)})
    labels = ["none" if columns[i] is None else str(columns[i]) for i in places]
    axes.set_xticks(places, labels)
    axes.set(title=title, xlabel="layer")


def _layers(report: RepoReport) -> dict[str, dict[str, int]]:
    """Sum bytes by kind of each layer, or matrix outside of layers; first what has no number.

    A layer is called by its number; where encoder and decoder both have one, by its whole name.
    """
    rows: dict[tuple[str, int | None], Counter[str]] = {}
    for kind, group in report.by_type.items():
        for depth, matrix in group.items():
            row = rows.setdefault((kind.partition("*")[0], depth), Counter())
            row.update({part: getattr(matrix, part) for part in ("payload", "scales", "metadata")})
    stacks = list(dict.fromkeys(stack for stack, depth in rows if depth is not None))
    prefixed = len(stacks) > 1

    def place(row: tuple[str, int | None]) -> tuple[int, int]:
        return (-1, 0) if row[1] is None else (stacks.index(row[0]), row[1])

    return {
        stack if depth is None else f"{stack * prefixed}{depth}": dict(rows[stack, depth])
        for stack, depth in sorted(rows, key=place)
    }


def _height(rows: int) -> float:
    return 1.6 + 0.32 * min(max(rows, 3), _MOST_NAMES)


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Shorten each name to what follows its first number or star, unless two would be alike."""
    ends = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part == "*" or part.isdigit()), 0)
        ends[name] = ".".join(parts[first:])
    seen = Counter(ends.values())
    return {name: end if seen[end] == 1 else name for name, end in ends.items()}
