"""`deltamix serve`: `transformers serve`, in a process that surely knows delta repos."""

from __future__ import annotations

import typer

from ..errors import DeltaMixError
from .console import Repo

# What is not for us is for transformers.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(context: typer.Context, repo: Repo) -> None:
    """Answer over HTTP as OpenAI's API does, at http://localhost:8000/v1 unless told otherwise.

    All options are those of `transformers serve`, and passed on to it.

    Example: deltamix serve my-delta --port 8001 --host 0.0.0.0
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise DeltaMixError('serving needs more packages: pip install "transformers[serving]"')
    from transformers.cli.transformers import app

    app(["serve", repo, *context.args], standalone_mode=False)
