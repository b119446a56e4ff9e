"""What the tests of several workers have `torchrun` start: FINETUNED BASE OUTPUT."""

import os
import sys

from tiny_pairs import calibration_ids, make_config, quick

from deltamix_hf.integration.compress_repo import compress_streaming


def main(finetuned: str | os.PathLike, base: str | os.PathLike, output: str | os.PathLike) -> None:
    options = quick("deltamix-kl") | {"calibration": calibration_ids()}
    compress_streaming(finetuned, output, make_config(base, ratio=0.25, **options))


if __name__ == "__main__":
    main(*sys.argv[1:])
