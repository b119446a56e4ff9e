"""`deltamix inspect` and `deltamix verify`: what a delta repo holds, and whether it is sound."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import one_line
from .console import (
    FAILED,
    AsJson,
    Base,
    DeltaRepo,
    TrustRemoteCode,
    make_table,
    out,
    size_table,
)

if TYPE_CHECKING:
    from ..checkpoint.report import RepoReport


class Order(str, Enum):
    """Columns that the table can be sorted by; `model`: as the model runs."""

    model = "model"
    bytes = "bytes"
    bits = "bits"
    error = "error"


def inspect(
    repo: DeltaRepo,
    plot: Annotated[
        Path | None, typer.Option(help="Folder to write PNG plots into, made if need be.")
    ] = None,
    as_json: AsJson = False,
    sort: Annotated[Order, typer.Option(help="Order of the layers.")] = Order.model,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Ranks, widths, bytes and error of every layer, from the files alone.

    Example: deltamix inspect my-delta --plot plots
    """
    from ..checkpoint.report import inspect_repo

    report = inspect_repo(repo, trust_remote_code)
    paths = []
    if plot is not None:  # before the table, which may end at a `| head`
        from ..hub.plots import save_figures

        paths = save_figures(report, plot)
    if as_json:
        out.print_json(json.dumps(_figures(report)), ensure_ascii=True)
    else:
        for line in _origin(report):
            out.print(one_line(line), highlight=False, soft_wrap=True, markup=False)
        _print_whole(_layers(report, sort))
        out.print()
        out.print(size_table(report.size))
        if paths:
            out.print("\nWritten:", ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def verify(
    repo: DeltaRepo,
    base: Base = None,
    quick: Annotated[
        bool, typer.Option(help="Compare only the names of the base's tensors, not their bytes.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check files, format, tensors and the base; exit status 1 if anything is wrong.

    Example: deltamix verify my-delta --base org/base
    """
    from ..checkpoint.validation import verify_repo

    problems = 0
    for check in verify_repo(repo, base, quick, trust_remote_code):
        mark = "[green]ok[/green]    " if check.problem is None else "[red]wrong[/red] "
        why = "" if check.problem is None else f": {check.problem}"
        out.print(f"{mark} {escape(one_line(check.what + why))}", highlight=False, soft_wrap=True)
        problems += check.problem is not None
    if problems:
        raise typer.Exit(FAILED)


def _origin(report: RepoReport) -> list[str]:
    config, measured = report.config, report.config.measured
    revision = f" at {config.base_revision[:12]}" if config.base_revision else ""
    lines = [
        f"base: {config.base_model}{revision}, {len(config.base_fingerprints)} tensors pinned",
        f"method: {config.method.name}, calibrated on: {config.calibration_source}",
    ]
    if {"kl", "positions"} <= measured.keys():
        lines.append(
            f"KL to the fine-tune: {measured['kl']:.2g} nats for each of "
            f"{measured['positions']} predictions not tuned on"
        )
    return [*lines, ""]


def _layers(report: RepoReport, sort: Order) -> Table:
    caption = (
        "Bits: stored for each weight. Error: |ΔW − Û·V̂|² / |ΔW|², in the metric of the layer's "
        "inputs. Widths: ranks × bits of V / bits of U"
    )
    columns = ("shape", "ranks", "kB", "scales", "bits", "error")
    table = make_table("layer", *columns, caption=caption)
    table.add_column("widths")
    rows = list(report.matrices.items())
    if sort is not Order.model:
        key = "bits_per_weight" if sort is Order.bits else sort.value
        rows.sort(key=lambda row: -(getattr(row[1], key) or 0))
    for name, matrix in rows:
        widths = [f"{count}×{v}/{u}" for (v, u), count in matrix.widths.items()]
        table.add_row(
            name,
            f"{matrix.shape[0]}×{matrix.shape[1]}",
            f"{matrix.rank} of {min(matrix.shape)}",
            f"{matrix.bytes / 1e3:.1f}",
            f"{matrix.scales / 1e3:.1f}",
            f"{matrix.bits_per_weight:.2f}",
            "" if matrix.error is None else f"{matrix.error:.1e}",
            " ".join(widths) or "as in the base",
        )
    count = len(report.overlay)
    if count:
        table.add_row(f"{count} tensors stored whole", "", "", f"{report.size.overlay / 1e3:.1f}")
    return table


def _print_whole(table: Table) -> None:
    """Print a matrix a line, however narrow the terminal.

    The widths come last, so that a terminal of 80 columns breaks the lines before them.
    """
    widest = out.measure(table, options=out.options.update(max_width=10_000)).maximum
    Console(width=widest).print(table, crop=False)


def _figures(report: RepoReport) -> dict[str, Any]:
    from ..storage.sizes import KINDS

    config, size = report.config, report.size
    keys = ("rank", "payload", "scales", "metadata", "error")
    return {
        "base_model": config.base_model,
        "base_revision": config.base_revision,
        "method": config.method.name,
        "format_version": config.format_version,
        "calibration_source": config.calibration_source,
        "measured": config.measured,
        "bytes": {kind: getattr(size, kind) for kind in (*KINDS, "total", "reference")},
        "ratio": size.ratio,
        "matrices": {
            name: {
                "shape": list(matrix.shape),
                "widths": [[v, u, count] for (v, u), count in matrix.widths.items()],
                **{key: getattr(matrix, key) for key in keys},
            }
            for name, matrix in report.matrices.items()
        },
        "overlay": {
            name: {"dtype": dtype, "shape": list(shape), "bytes": count}
            for name, (dtype, shape, count) in report.overlay.items()
        },
    }
