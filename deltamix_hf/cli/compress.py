"""`deltamix compress`: a fine-tune becomes a delta repo."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DeltaMixError
from .console import Overwrite, TrustRemoteCode, notes, out, refuse_existing, size_table


def compress(
    finetuned: Annotated[
        str, typer.Argument(help="The fine-tune or a PEFT adapter: a folder or Hub id.")
    ],
    base: Annotated[str, typer.Option(help="What it was fine-tuned from: a folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for the delta repo.")],
    ratio: Annotated[
        str | None,
        typer.Option(help="Budget: all bytes of the delta over the bf16 bytes that differ. [1/16]"),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="The same in bits for each weight that differs.")
    ] = None,
    megabytes: Annotated[float | None, typer.Option(help="The same in MB of 10^6 bytes.")] = None,
    method: Annotated[
        str, typer.Option(help="deltamix-kl, or as published: deltamix, delta-come.")
    ] = "deltamix-kl",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Texts like those the fine-tune is for: a .txt file (a text a line), a .jsonl "
            'file ({"text": ...}) or a data set of the Hub. Without any, the model writes its own.'
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option(
            help="Have one block of the model in memory at a time, everything else on disk."
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Compress a fine-tune against its base, to 1/16 of its bytes if nothing else is said.

    If it is interrupted, the same command goes on where it was.

    Example: deltamix compress me/my-finetune --base org/base --output my-delta

    Example: deltamix compress ./tuned --base ./base --output my-delta --ratio 1/32
    --calibration texts.jsonl

    Example: deltamix compress me/my-70b --base org/base-70b --output my-delta --low-memory

    Example: torchrun --nproc-per-node 8 -m deltamix_hf compress me/my-70b --base org/base-70b
    --output my-delta --low-memory
    """
    work = output.absolute().with_name(f".{output.name}.unfinished")
    refuse_existing(output, overwrite or work.exists())
    from .. import DeltaMixConfig
    from ..checkpoint.model_class import is_delta, read_config
    from ..integration.compress_repo import (
        compress_adapter,
        compress_streaming,
        is_adapter,
        most_bytes,
    )
    from ..jobs.workers import Workers
    from ..storage.durable import check_output
    from ..storage.untrusted_paths import repo_files
    from .models import best_device, from_pretrained

    workers = Workers.launched()
    if workers.size > 1 and not low_memory:
        raise DeltaMixError("several processes compress together with --low-memory only; add it")
    adapter = is_adapter(finetuned)
    if adapter and low_memory:
        raise DeltaMixError("an adapter is compressed in memory: leave --low-memory out")
    if not adapter and is_delta(read_config(finetuned, trust_remote_code)):
        raise DeltaMixError(f"{finetuned!r} is a delta repo already; give the fine-tune itself")
    settings = DeltaMixConfig(
        base_model=base,
        method=method,
        ratio=None if ratio is None else parse_ratio(ratio),
        bits_per_weight=bits,
        budget_bytes=None if megabytes is None else int(megabytes * 1e6),
        calibration=calibration,
        checkpoint_dir=work,
    )
    if work.exists() and not workers.rank:
        notes.print(f"going on with what {work} holds")
    try:
        if low_memory:
            device = best_device() or "cpu"
            model = compress_streaming(finetuned, output, settings, device, trust_remote_code)
            if workers.rank:
                return
        elif adapter:
            check_output(output)
            model = compress_adapter(finetuned, settings, trust_remote_code=trust_remote_code)
        else:
            check_output(output, most_bytes(repo_files(finetuned, {})[0], settings))
            model = from_pretrained(finetuned, trust_remote_code, quantization_config=settings)
    except KeyboardInterrupt:
        notes.print("The same command goes on from here. What is finished is kept in", work)
        raise
    if not low_memory:
        model.save_pretrained(output)
    _summary(model, output)


def parse_ratio(text: str) -> float:
    """Read '1/16' or '0.0625' as a number; DeltaMixError if it is neither."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise DeltaMixError(f"--ratio is {text!r}; give a number such as 1/16 or 0.0625") from error


def _summary(model: Any, folder: Path) -> None:
    from ..nn.experts import compressed_shapes
    from ..storage.sizes import size_report

    settings = model.config.quantization_config
    out.print(size_table(size_report(folder, compressed_shapes(model))))
    if kl := settings.measured.get("kl"):
        count = settings.measured["positions"]
        out.print(f"KL to the fine-tune on {count} predictions not tuned on: {kl:.2g} nats each")
    out.print(f"calibrated on: {settings.calibration_source}")
    out.print(f"\nWritten to {folder}. Next:", highlight=False)
    for command in (f"inspect {folder}", f"chat {folder}", f"push {folder} <you>/<name>"):
        out.print(f"  deltamix {command}", highlight=False, markup=False)
