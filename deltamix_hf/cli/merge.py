"""`deltamix merge`: the dense fine-tune back from a delta repo."""

from pathlib import Path
from typing import Annotated

import typer

from .console import Base, DeltaRepo, Overwrite, TrustRemoteCode, out, refuse_existing


def merge(
    repo: DeltaRepo,
    output: Annotated[Path, typer.Option(help="Folder for the dense model.")],
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Write base and delta as one plain model that needs nothing of ours.

    Example: deltamix merge me/my-delta --output my-model
    """
    refuse_existing(output, overwrite)
    from ..checkpoint.model_class import delta_config
    from ..integration.companions import copy_companions
    from ..storage.durable import written_whole
    from ..storage.sizes import weight_files
    from .models import load_model

    delta_config(repo, trust_remote_code)
    model = load_model(repo, base, True, trust_remote_code)
    with written_whole(output) as folder:
        model.save_pretrained(folder)
        copy_companions(repo, folder)
    size = sum(file.stat().st_size for file in weight_files(output))
    out.print(f"Written to {output}: {size / 1e6:.2f} MB of weight files", highlight=False)
