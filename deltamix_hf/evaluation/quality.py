"""How much of a fine-tune a compressed model keeps.

- KL(fine-tune ‖ model), nats per token, compares methods: exact match of answers cannot tell gentle
  variants apart, and layer-wise error does not predict quality at all (docs/log.md).
- NLL of the true answers, nats per token, and its exponential, perplexity. `gain_kept` turns it, or
  any other score, into a share of what fine-tuning gained over the base.

A batch is a dict of int64 tensors [rows, length]: `input_ids`, optionally `attention_mask` (1 =
real token) and `labels` (-100 = not scored). Without labels every real token but the first of a
row is scored. Causal models predict the next token; models with [rows, classes] logits are
classifiers, each row counts as one token, and labels, if any, are [rows].
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers.utils import logging

from ..errors import DeltaMixError

Batch = Mapping[str, Tensor]
IGNORED = -100  # the label of a token that is not scored, as everywhere in transformers
_ROWS_AT_ONCE = 256  # two float32 [256, 49152] log-softmax buffers take 100 MB


@dataclass(frozen=True)
class Metrics:
    """Means over the scored tokens.

    Attributes:
        nll: cross-entropy of the labels under the model, nats per token; NaN without labels.
        kl: KL(reference ‖ model), nats per token.
        agreement: share of tokens for which both models rank the same token first, 0 to 1.
        tokens: how many tokens were scored.
        accuracy: share of labels that are the model's first choice, 0 to 1; NaN without labels.
    """

    nll: float
    kl: float
    agreement: float
    tokens: int
    accuracy: float = math.nan

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that overflows."""
        return math.exp(self.nll) if not self.nll > 700 else math.inf


@torch.no_grad()
def scored_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] where a token is scored, and its true ids [tokens].

    The ids are -100 for a classifier without labels.
    """
    if model.training:
        raise DeltaMixError("the model is in training mode (dropout is on); call model.eval()")
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    labels = batch.get("labels")
    if logits.dim() == 2:  # classifier
        if labels is None:
            labels = torch.full((len(logits),), IGNORED)
        return logits, labels.to(logits.device)
    if labels is None:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        labels = batch["input_ids"].masked_fill(mask == 0, IGNORED)
    targets = labels[:, 1:].to(logits.device)
    scored = targets != IGNORED
    return logits[:, :-1][scored], targets[scored]


def reference_logits(model: nn.Module, batches: Iterable[Batch]) -> list[Tensor]:
    """Logits [tokens, vocabulary] of each batch on the CPU, in the model's dtype.

    Made once, they stand in for the reference model in `compare`, so that several compressed
    models can be judged without keeping the fine-tune in memory.
    """
    return [scored_logits(model, batch)[0].cpu() for batch in batches]


def compare(
    reference: nn.Module | Sequence[Tensor], model: nn.Module, batches: Sequence[Batch]
) -> Metrics:
    """Judge `model` against `reference`, the fine-tune or its `reference_logits`.

    Every batch runs once through each model. All means are over tokens, not over batches, so
    the result does not depend on how the texts were cut into batches.
    """
    if not isinstance(reference, nn.Module) and len(reference) != len(batches):
        raise DeltaMixError(
            f"{len(reference)} reference logits for {len(batches)} batches; "
            "make them with reference_logits(model, batches) from the same batches"
        )
    nll = kl = 0.0
    agreeing = right = tokens = labelled = 0
    for i, batch in enumerate(logging.tqdm(batches, desc="Judging", unit="batch")):
        found, targets = scored_logits(model, batch)
        wanted = (
            scored_logits(reference, batch)[0] if isinstance(reference, nn.Module) else reference[i]
        )
        if wanted.shape != found.shape:
            raise DeltaMixError(
                f"batch {i}: reference logits {tuple(wanted.shape)} but model logits "
                f"{tuple(found.shape)}; both models need the same vocabulary and batches"
            )
        chunks = (t.split(_ROWS_AT_ONCE) for t in (wanted, found, targets))
        for p, q, y in zip(*chunks, strict=True):
            p = log_softmax(p.to(q.device).float(), dim=-1)
            q = log_softmax(q.float(), dim=-1)
            kl += kl_div(q, p, reduction="sum", log_target=True).item()
            nll += nll_loss(q, y, ignore_index=IGNORED, reduction="sum").item()
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            right += int((q.argmax(-1) == y).sum())
            tokens += len(y)
            labelled += int((y != IGNORED).sum())
    if tokens == 0:
        raise DeltaMixError("no token is scored: give at least one batch with labels above -100")
    return Metrics(
        nll=nll / labelled if labelled else math.nan,
        kl=kl / tokens,
        agreement=agreeing / tokens,
        tokens=tokens,
        accuracy=right / labelled if labelled else math.nan,
    )


def gain_kept(base: float, finetuned: float, model: float) -> float:
    """Share of the fine-tune's gain that the model keeps: 0 = as the base, 1 = as the fine-tune.

    The three are one figure of three models, either way up (score or NLL). Below 0 is worse than
    the base, above 1 better than the fine-tune.
    """
    if finetuned == base:
        raise DeltaMixError(f"base and fine-tune both have {base}: there is no gain to keep")
    return (model - base) / (finetuned - base)
