"""What all commands share: their options, how they print, and how an error looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import DeltaMixError, first_line

if TYPE_CHECKING:
    from ..storage.sizes import SizeReport

DeltaRepo = Annotated[str, typer.Argument(help="The delta repo: a folder or Hub id.")]
Repo = Annotated[str, typer.Argument(help="A delta repo or a whole model: a folder or Hub id.")]
Base = Annotated[
    str | None, typer.Option(help="Where the base is, if not where the delta repo says.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run the code that a repo brings along for its model: read it first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an output that exists.")]

out = Console()  # what a command is asked for
notes = Console(stderr=True)  # everything else: progress, warnings, errors

FAILED, INTERRUPTED = 1, 130  # exit statuses; 2 is typer's, for a command that cannot be read


def report(error: BaseException) -> int:
    """Print an error as one readable line on stderr and return the exit status it deserves."""
    if isinstance(error, KeyboardInterrupt):
        notes.print("[red]interrupted[/red]: nothing was left half-written", highlight=False)
        return INTERRUPTED
    what = first_line(error)
    if not isinstance(error, DeltaMixError):
        what = f"{type(error).__name__}: {what} (--debug shows where)"
    notes.print(f"[red]error[/red]: {escape(what)}", highlight=False, soft_wrap=True)
    return FAILED


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise a DeltaMixError if an output exists and is not to be overwritten."""
    if output.exists() and not overwrite:
        raise DeltaMixError(
            f"{output} exists already; give another --output, or --overwrite to replace it"
        )


def make_table(first: str, *columns: str, **options: Any) -> Table:
    """Make an empty table: its first column to the left, all others to the right."""
    table = Table(box=None, title_justify="left", caption_justify="left", **options)
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def size_table(size: SizeReport) -> Table:
    """Tabulate the bytes of a delta repo's weight files by kind, and the ratio they make."""
    from ..storage.sizes import KINDS

    table = make_table("", "MB", "share", title="weight files")
    for kind in KINDS:
        count = getattr(size, kind)
        table.add_row(kind, f"{count / 1e6:.2f}", f"{count / size.total:.1%}")
    table.add_row("all", f"{size.total / 1e6:.2f}", f"{size.ratio:.5f} of bf16")
    table.add_row("what differs, bf16", f"{size.reference / 1e6:.2f}", "")
    return table
