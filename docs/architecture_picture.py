"""Draws docs/images/architecture.png from the imports of the code: `make docs` runs it.

The packages stand on the diagonal in the order of the layers in pyproject.toml. A number in the row
of one package and the column of another counts imports between their modules, also those inside
functions. All numbers lie above the diagonal: nothing imports what stands above it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import grimp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE = "deltamix_hf"
BLUE, PALE = "#0072b2", "#d6e6f2"
WIDTH = 1.9  # of a box; a cell is 1 wide


def layers() -> list[str]:
    """Read the packages of the contract on layers in pyproject.toml, from top to bottom."""
    text = (ROOT / "pyproject.toml").read_text()
    (found,) = re.findall(r"^layers = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    names = [name.strip() for part in re.findall(r'"(.*?)"', found) for name in part.split("|")]
    drawn = ("config", "method")  # the other modules at the top are used by all
    return [name for name in names if (ROOT / PACKAGE / name).is_dir() or name in drawn]


def imports(names: list[str]) -> Counter[tuple[str, str]]:
    """Count the imports between modules of different packages by importer and imported."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    counts: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            one, two = (name.split(".")[1:2] for name in (module, other))
            if one != two and one and two and {one[0], two[0]} <= set(names):
                counts[one[0], two[0]] += 1
    return counts


def size(name: str) -> str:
    """Say how many modules and lines a package has."""
    path = ROOT / PACKAGE / name
    files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    modules = len([file for file in files if file.name != "__init__.py"])
    return f"{modules} module{'s' * (modules > 1)}, {lines:,} lines"


def draw() -> Figure:
    names = layers()
    counts = imports(names)
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.2, len(names) + WIDTH), ylim=(len(names) - 0.1, -0.9))
    axes.set_axis_off()
    for (one, two), count in sorted(counts.items()):
        _arrow(axes, names.index(one), names.index(two), count)
    for place, name in enumerate(names):
        shape = FancyBboxPatch(
            (place, place - 0.32), WIDTH, 0.64, boxstyle="round,pad=0.02", fc=PALE, ec=BLUE
        )
        axes.add_patch(shape)
        middle = place + WIDTH / 2
        axes.text(middle, place - 0.1, name, ha="center", va="center", fontsize=11, weight="bold")
        axes.text(middle, place + 0.17, size(name), ha="center", va="center", fontsize=7)
    caption = "A row imports its columns; numbers count imports between modules. Nothing points up."
    axes.text(len(names) + WIDTH, -0.75, caption, ha="right", fontsize=11)
    return figure


def _arrow(axes: Axes, row: int, column: int, count: int) -> None:
    """Draw a line from one box to the right and down into another, the count at its corner."""
    x = column + (1.45 if row % 2 else 1.15)
    style = {"color": "#cccccc", "lw": 0.8, "zorder": 0}
    axes.plot([row + WIDTH, x], [row, row], **style)
    axes.annotate(
        "", (x, column - 0.34), (x, row), arrowprops={"arrowstyle": "->", **style}, zorder=0
    )
    shade = 0.25 + 0.75 * min(count, 12) / 12
    axes.text(
        x, row, str(count), ha="center", va="center", fontsize=8, color="white",
        bbox={"boxstyle": "circle,pad=0.25", "fc": BLUE, "ec": "none", "alpha": shade},
    )  # fmt: skip


if __name__ == "__main__":
    path = ROOT / "docs" / "images" / "architecture.png"
    draw().savefig(path, dpi=110, metadata={"Software": None})
    print(path)
