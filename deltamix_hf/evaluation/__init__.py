"""Evaluation: how far a compressed model is from its fine-tune, and a fine-tune from its base.

`quality.compare` runs two models over batches and returns `Metrics` (KL, NLL, agreement);
`quality.gain_kept` turns a score into a share of the fine-tune's gain. `distance.measure` compares
files without running anything, for `deltamix diff`.
"""
