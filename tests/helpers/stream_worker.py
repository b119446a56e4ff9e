"""What the tests of several workers have `torchrun` start: FINETUNED BASE OUTPUT..."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_pairs import calibration_ids, make_config, quick

from deltamix_hf.integration.compress_repo import compress_streaming


def main(finetuned: Path | str, base: Path | str, *outputs: Path | str) -> None:
    """Compress into each output, one after the other."""
    options = quick("deltamix-kl") | {"calibration": calibration_ids()}
    for output in outputs:
        compress_streaming(finetuned, output, make_config(base, ratio=0.25, **options))


if __name__ == "__main__":
    main(*sys.argv[1:])
