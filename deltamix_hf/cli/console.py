"""What all commands print with, and how an error looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..storage.sizes import SizeReport

out = Console()  # what a command is asked for
notes = Console(stderr=True)  # everything else: progress, warnings, errors

FAILED, INTERRUPTED = 1, 130  # exit statuses; 2 is typer's, for a command that cannot be read


def report(error: BaseException) -> int:
    """Print an error as one readable line on stderr; returns the exit status it deserves."""
    if isinstance(error, KeyboardInterrupt):
        notes.print("[red]interrupted[/red]: nothing was left half-written", highlight=False)
        return INTERRUPTED
    from ..errors import DeltaMixError, first_line

    what = first_line(error)
    what = what if isinstance(error, DeltaMixError) else f"{type(error).__name__}: {what}"
    hint = "" if isinstance(error, DeltaMixError) else " (--debug shows where)"
    notes.print(f"[red]error[/red]: {escape(what)}{hint}", highlight=False, soft_wrap=True)
    return FAILED


def megabytes(count: int) -> str:
    """Bytes as MB of 10^6, as everywhere in this project."""
    return f"{count / 1e6:.2f} MB"


def size_table(size: SizeReport) -> Table:
    """True bytes of a delta repo's weight files by kind, and the ratio they make."""
    from ..storage.sizes import KINDS

    table = Table(box=None, title="weight files", title_justify="left")
    table.add_column("")
    table.add_column("MB", justify="right")
    table.add_column("share", justify="right")
    for kind in KINDS:
        count = getattr(size, kind)
        table.add_row(kind, f"{count / 1e6:.2f}", f"{count / size.total:.1%}")
    table.add_row("all", f"{size.total / 1e6:.2f}", f"{size.ratio:.5f} of bf16")
    table.add_row("what differs, bf16", f"{size.reference / 1e6:.2f}", "")
    return table
