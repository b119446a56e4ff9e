"""`deltamix merge`: the dense fine-tune back from a delta repo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import DeltaMixError
from .console import megabytes, out


def merge(
    repo: Annotated[str, typer.Argument(help="The delta repo: a folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for the dense model.")],
    base: Annotated[
        str | None, typer.Option(help="Where its base is, if not where the repo says.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
) -> None:
    """Write base and delta as one plain model that needs nothing of ours.

    Example: deltamix merge me/my-delta --output my-model
    """
    if output.exists() and not overwrite:
        raise DeltaMixError(
            f"{output} exists already; give another --output, or --overwrite to replace it"
        )
    from ..checkpoint.model_class import is_delta, read_config
    from ..integration.saving import copy_companions, written_whole
    from ..storage.sizes import weight_files
    from .models import load_model

    if not is_delta(read_config(repo)):
        raise DeltaMixError(f"{repo!r} is not a delta repo: it holds a whole model")
    model = load_model(repo, base, dequantize=True)
    with written_whole(output) as folder:
        model.save_pretrained(folder)
        copy_companions(repo, folder)
    size = sum(file.stat().st_size for file in weight_files(output))
    out.print(f"Written to {output}: {megabytes(size)} of weight files", highlight=False)
