"""Methods as presets of one pipeline: every part is a switch of `DeltaMixConfig`.

- `deltamix-kl`, the default: every part on. Its objective is the change of the model's output
  distribution (nats per token), not the error of single layers.
- `deltamix`: DeltaMix as published (arXiv 2506.11087).
- `delta-come`: Delta-CoMe as published (arXiv 2406.08903).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

ALLOCATIONS = ("bands", "matrix", "global")
CODEBOOKS = ("min-max", "gaussian")


@dataclass(frozen=True)
class Preset:
    """The switches of the pipeline, in the order in which it uses them."""

    # SVD of ΔW weighted by the input Gram (and the output Fisher, if on) instead of ΔW itself
    whiten: bool
    # metric on outputs: Fisher information G = E[g·gᵀ] of the fine-tune's own predictions
    fisher: bool
    # without text from the user, the share of both metrics that is ΔW's own second moments; 0: none
    delta_metric: float
    # who shares the budget: fixed bands of ranks, ranks of one matrix, or ranks of the whole model
    allocation: str
    # U and V of a rank may have different widths
    split_widths: bool
    # candidate widths; 0 drops a rank
    bits: tuple[int, ...]
    # uniform grid with zero points, or the Gaussian table without
    codebook: str
    # elements that share a scale; 0: one scale per rank vector
    group_size: int
    # elements of U that share a scale in embeddings, whose rows differ in size; 0: as `group_size`
    embedding_group_size: int
    # U is re-fitted to the full ΔW, given the rounded V
    correct_target: bool
    # later layers are fitted to undo what compressing the earlier ones did
    sequential: bool
    # scales undo the shrinking that rounding and truncation cause
    unbiased_gains: bool
    # a dropped rank is charged this many times its error in a global allocation
    drop_penalty: float
    # steps of tuning the stored scales by KL to the fine-tune
    tune_steps: int
    # tensors stored whole are rounded to bfloat16
    bf16_overlay: bool


PRESETS = {
    "deltamix-kl": Preset(
        whiten=True,
        fisher=True,
        delta_metric=0.3,
        allocation="global",
        split_widths=True,
        bits=(0, 2, 3, 4, 8),
        codebook="gaussian",
        group_size=0,
        embedding_group_size=128,
        correct_target=True,
        sequential=True,
        unbiased_gains=True,
        drop_penalty=4.0,
        tune_steps=40,
        bf16_overlay=True,
    ),
    "deltamix": Preset(
        whiten=False,
        fisher=False,
        delta_metric=0.0,
        allocation="matrix",
        split_widths=False,
        bits=(0, 2, 3, 4, 8),
        codebook="min-max",
        group_size=128,
        embedding_group_size=0,
        correct_target=True,
        sequential=False,
        unbiased_gains=False,
        drop_penalty=1.0,
        tune_steps=0,
        bf16_overlay=False,
    ),
    "delta-come": Preset(
        whiten=False,
        fisher=False,
        delta_metric=0.0,
        allocation="bands",
        split_widths=False,
        bits=(0, 2, 3, 8),
        codebook="min-max",
        group_size=128,
        embedding_group_size=0,
        correct_target=False,
        sequential=False,
        unbiased_gains=False,
        drop_penalty=1.0,
        tune_steps=0,
        bf16_overlay=False,
    ),
}
SWITCHES = tuple(field.name for field in fields(Preset))


def resolve(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Value of every switch: the given one, or the preset's where None was given.

    Another allocation than the preset's, which has no split widths, turns these off by itself.
    """
    preset = PRESETS[method]
    values = {
        name: getattr(preset, name) if given.get(name) is None else given[name] for name in SWITCHES
    }
    if given.get("split_widths") is None and values["allocation"] != "global":
        values["split_widths"] = False
    return values
