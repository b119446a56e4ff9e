"""What the tests of several workers have `torchrun` start: FINETUNED BASE OUTPUT RATIO."""

import sys

from tiny_pairs import calibration_ids

from deltamix_hf import DeltaMixConfig
from deltamix_hf.streaming import compress_streaming

finetuned, base, output, ratio = sys.argv[1:]
config = DeltaMixConfig(base, ratio=float(ratio), calibration=calibration_ids(), tune_steps=3)
compress_streaming(finetuned, output, config)
