"""`deltamix push`: a delta repo goes to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from .console import TrustRemoteCode, out


def push(
    folder: Annotated[Path, typer.Argument(help="The delta repo, a local folder.")],
    repo_id: Annotated[str, typer.Argument(help="Where to on the Hub: name or org/name.")],
    base: Annotated[
        str | None,
        typer.Option(help="Hub id of the base, if the delta was made from a local copy of it."),
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a new repo private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Upload the delta, its config and tokenizer, and a model card made from what was measured.

    Log in with `hf auth login` first.

    Example: deltamix push my-delta me/my-delta --base org/base
    """
    from ..hub.push import push_folder

    address = push_folder(
        folder,
        repo_id,
        base=base,
        private=private or None,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    out.print(f"Pushed: {address}", highlight=False, soft_wrap=True)
