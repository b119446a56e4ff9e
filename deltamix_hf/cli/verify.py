"""`deltamix verify`: whether a delta repo can be trusted to load, and with which base."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from .console import FAILED, Base, DeltaRepo, out


def verify(
    repo: DeltaRepo,
    base: Base = None,
    quick: Annotated[
        bool, typer.Option(help="Compare only the names of the base's tensors, not their bytes.")
    ] = False,
) -> None:
    """Check files, format, tensors and the base; exit status 1 if anything is wrong.

    Example: deltamix verify my-delta --base org/base
    """
    from ..checkpoint.validation import verify_repo

    problems = 0
    for check in verify_repo(repo, base, quick):
        mark = "[green]ok[/green]    " if check.problem is None else "[red]wrong[/red] "
        why = "" if check.problem is None else f": {check.problem}"
        out.print(f"{mark} {escape(check.what + why)}", highlight=False, soft_wrap=True)
        problems += check.problem is not None
    if problems:
        raise typer.Exit(FAILED)
