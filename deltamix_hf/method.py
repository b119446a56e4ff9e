"""`Method`: the parts of the compression pipeline that can be switched, and three named choices.

- `deltamix-kl`, the default: every part on. Its objective is the change of the model's output
  distribution (nats per token), not the error of single layers.
- `deltamix`: DeltaMix as published (arXiv 2506.11087).
- `delta-come`: Delta-CoMe as published (arXiv 2406.08903).
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from .errors import DeltaMixError
from .quantization.packed_layout import GROUP_EXPONENTS, GroupSizes
from .quantization.quantizer import QUANTIZERS, Quantizer

ALLOCATIONS = ("bands", "matrix", "global")
DEFAULT_METHOD = "deltamix-kl"
_LONGEST_GROUP = 2**30
_EMBEDDING_GROUPS = (0, *(2**e for e in GROUP_EXPONENTS))


def require(name: str, value: Any, fits: bool, what: str) -> None:
    """Raise a DeltaMixError that names an option and its value unless it fits."""
    if not fits:
        raise DeltaMixError(f"{name} is {value!r}; it must be {what}")


def is_number(value: Any) -> bool:
    """Whether this is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_int(name: str, value: Any, least: int) -> None:
    """Raise a DeltaMixError unless this is a whole number of at least `least`."""
    whole = isinstance(value, int) and is_number(value)
    require(name, value, whole and value >= least, f"a whole number of at least {least}")


def _widths(bits: Any) -> tuple[int, ...]:
    """Candidate widths, sorted; raises DeltaMixError for others than 0 to 8, or 0 alone."""
    try:
        widths = sorted(set(bits))
    except TypeError:
        widths = []
    fits = any(widths) and not any(isinstance(b, bool) or b not in range(9) for b in widths)
    require("bits", bits, fits, "candidate widths from 0 to 8, at least one above 0")
    return tuple(int(b) for b in widths)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The switches of the pipeline, in the order in which it uses them; defaults as in `deltamix`.

    Change one of the three with `dataclasses.replace(METHODS["deltamix-kl"], tune_steps=0)`.

    Args:
        name: which of `METHODS` this is, or was changed from; `config.json` says so.
        whiten: take the SVD of ΔW weighted by the layer's metric instead of ΔW itself.
        fisher: weigh output errors by what they do to the model's predictions: the Fisher
            information G = E[g·gᵀ] of the fine-tune's own.
        delta_metric: the share of both metrics that is taken from ΔW itself, 0 to 1, if
            `calibration` is `None` or `"self"`.
        prior: observations that the mean of a metric is worth, for each of its dimensions: what few
            texts did not show is not taken for worthless.
        allocation: who shares the budget: `"bands"` (fixed bands of ranks), `"matrix"` (the ranks
            of a matrix; each matrix gets the same ratio) or `"global"` (all ranks of the model).
        split_widths: U and V of a rank may have different widths (`allocation="global"`).
        bits: candidate widths, each 0 to 8; 0 drops a rank. Kept sorted.
        codebook: `"min-max"` (uniform, with zero points) or `"gaussian"`.
        group_size: weights that share a scale; 0 means one scale per rank vector.
        embedding_group_size: elements of U that share a scale in embeddings, whose rows differ in
            size as tokens differ in use; a power of two from 16, or 0 for as elsewhere.
        correct_target: re-fit U to the full ΔW given the rounded V.
        sequential: fit each layer to what the compressed layers before it hand on.
        unbiased_gains: scale ranks so that rounding shrinks nothing.
        drop_penalty: a dropped rank counts as this many times its error (`allocation="global"`).
        tune_steps: steps of tuning the stored scales by KL to the fine-tune; 0 for none.
        bf16_overlay: round tensors that are stored whole to bfloat16.

    Raises:
        DeltaMixError: a value is out of range; the message names it.
    """

    name: str
    whiten: bool = False
    fisher: bool = False
    delta_metric: float = 0.0
    prior: float = 0.0
    allocation: str = "matrix"
    split_widths: bool = False
    bits: tuple[int, ...] = (0, 2, 3, 4, 8)
    codebook: str = "min-max"
    group_size: int = 128
    embedding_group_size: int = 0
    correct_target: bool = True
    sequential: bool = False
    unbiased_gains: bool = False
    drop_penalty: float = 1.0
    tune_steps: int = 0
    bf16_overlay: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(field.default, bool):
                value = getattr(self, field.name)
                require(field.name, value, isinstance(value, bool), "True or False")
        for name, choices in (("allocation", ALLOCATIONS), ("codebook", tuple(QUANTIZERS))):
            value = getattr(self, name)
            require(name, value, value in choices, f"one of {list(choices)}")
        object.__setattr__(self, "bits", _widths(self.bits))
        for name in ("group_size", "embedding_group_size", "tune_steps"):
            require_int(name, getattr(self, name), 0)
        size = self.group_size
        require("group_size", size, size <= _LONGEST_GROUP, "at most 2^30 (0: no groups)")
        size, groups = self.embedding_group_size, _EMBEDDING_GROUPS
        powers = f"0 or a power of two from {groups[1]} to {groups[-1]}"
        require("embedding_group_size", size, size in groups, powers)
        penalty, share = self.drop_penalty, self.delta_metric
        finite = is_number(penalty) and 1 <= penalty < math.inf
        require("drop_penalty", penalty, finite, "a finite number of at least 1")
        prior = self.prior
        require("prior", prior, is_number(prior) and 0 <= prior < math.inf, "a number from 0")
        require("delta_metric", share, is_number(share) and 0 <= share <= 1, "a number from 0 to 1")
        if self.split_widths and self.allocation != "global":
            raise DeltaMixError('split_widths=True needs allocation="global"')
        if self.allocation == "bands" and self.codebook != "min-max":
            raise DeltaMixError('allocation="bands" needs codebook="min-max"')

    @property
    def quantizer(self) -> Quantizer:
        """What rounds the rank vectors: that of `codebook`."""
        return QUANTIZERS[self.codebook]

    def group_sizes(self, embedding: bool) -> GroupSizes:
        """Elements of V and of U that share a scale, in an embedding or any other matrix."""
        own = self.embedding_group_size if embedding else 0
        return self.group_size, own or self.group_size


_OURS = Method(
    name="deltamix-kl",
    whiten=True,
    fisher=True,
    delta_metric=0.3,
    prior=1.0,
    allocation="global",
    split_widths=True,
    codebook="gaussian",
    group_size=0,
    embedding_group_size=128,
    sequential=True,
    unbiased_gains=True,
    drop_penalty=4.0,
    tune_steps=40,
    bf16_overlay=True,
)
_DELTA_COME = Method(name="delta-come", allocation="bands", bits=(0, 2, 3, 8), correct_target=False)
METHODS = {method.name: method for method in (_OURS, Method(name="deltamix"), _DELTA_COME)}
SWITCHES = tuple(field.name for field in fields(Method) if field.name != "name")


def find_method(method: Any) -> Method:
    """The method of this name, or the `Method` given; DeltaMixError for a name there is not."""
    name = method.name if isinstance(method, Method) else method
    require("method", name, isinstance(name, str) and name in METHODS, f"one of {list(METHODS)}")
    return method if isinstance(method, Method) else METHODS[name]
