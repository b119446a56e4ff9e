"""What compression measures on the uncompressed fine-tune: input Grams C and output Fisher G.

One pass over the calibration tokens. For a linear layer y = W·x,

    C = E[x·xᵀ]  [n, n]         G = E[g·gᵀ]  [m, m],  g = Jᵀ·(diag(p) − p·pᵀ)^½·ε,  ε ~ N(0, I)

with p the fine-tune's own prediction and J the derivative of its logits in y, which makes G ⊗ C the
(Kronecker-factored) Fisher information of W: ½·tr(Eᵀ·G·E·C) approximates
KL(fine-tune ‖ fine-tune + E) in nats per token. Labels drawn from p give the same G on average, but
where predictions are confident a few unlikely draws decide it: on the `rxnfp` classifier, 128 draws
missed half of its trace. A model without logits is scored by the square of the change of its last
hidden state.

An embedding is a linear layer on one-hot inputs: its rows are weighted by how often a token occurs,
its columns by G of its output. Where it is tied to an output layer, the two uses are added.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DeltaMixError
from ..linalg.second_moments import Metric, SecondMoment, dense, diagonal, shrunk
from ..nn.experts import Expert
from ..nn.probing import hooked, inputs_of
from .expert_statistics import FEWEST, observed_experts

# Draws of ε in all, at least; a classifier makes only one prediction a text.
_LEAST_DRAWS, _MOST_PER_PREDICTION = 1024, 4
DRAWN = 1 << 24  # elements at once: 2048 rows of 128256 classes would take 4 GB


@dataclass
class LayerStatistics:
    """Second moments of one use of one weight [m, n]; `None`: not measured."""

    inputs: SecondMoment
    gradients: SecondMoment | None
    tokens: Tensor | None = None  # embeddings: how often each row was used, [rows]


@dataclass(frozen=True)
class Metrics:
    """A on the m outputs and C on the n inputs of one matrix."""

    outputs: Metric = None
    inputs: Metric = None


@contextmanager
def observed(
    modules: Mapping[str, nn.Module], fisher: bool, seed: int = 0
) -> Iterator[dict[str, LayerStatistics]]:
    """Context manager: measure layers and experts, their gradients too with `fisher`, as they run.

    Yields the statistics, in the end of all modules that were called. `seed` is of sketches, for
    moments that are merged with others'. Raises DeltaMixError if some hold NaN.
    """
    found: dict[str, LayerStatistics] = {}
    last: tuple[Tensor | None, SecondMoment] = None, SecondMoment(0)
    adding: set[str] = set()  # the first of the modules that share their inputs

    def start(name: str, module: nn.Module, x: Tensor, y: Tensor) -> LayerStatistics:
        nonlocal last
        gradients = SecondMoment(y.shape[-1], seed=seed) if fisher else None
        if isinstance(module, nn.Embedding):
            rows = torch.zeros(module.num_embeddings, device=y.device)
            return LayerStatistics(SecondMoment(0), gradients, rows)
        # q/k/v and gate/up are called with the very same tensor object, one after the other
        if last[0] is not x:
            last = x, SecondMoment(x.shape[-1], seed=seed)
            adding.add(name)
        return LayerStatistics(last[1], gradients)

    def measure(name: str, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        if name not in found:
            found[name] = start(name, module, x, y)
        layer = found[name]
        if layer.tokens is not None:
            if len(signature(type(module).forward).parameters) > 2:  # OPT's and Bart's positions,
                x = torch.arange(len(layer.tokens), device=y.device)  # of a mask or shape: all rows
            layer.tokens += torch.bincount(x.reshape(-1), minlength=len(layer.tokens))
        elif name in adding:
            layer.inputs.add(x)
        if layer.gradients is not None and y.requires_grad:
            y.register_hook(layer.gradients.add)

    with hooked(modules, after=measure), observed_experts(modules, fisher, seed) as experts:
        yield found
    found |= {n: LayerStatistics(*moments) for n, moments in experts.items() if moments[0].count}
    _check_finite(found)


def collect(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    fisher: bool,
    seed: int = 0,
    fewest: int = FEWEST,
) -> tuple[dict[str, LayerStatistics], int]:
    """Measure every module that is called; its statistics, and the number of scored predictions.

    `modules` are layers and experts, by name, `batches` token ids int64 [rows, length]; `fisher`
    measures gradients too, with ε drawn by `seed`. Experts that saw less than `fewest` tokens are
    left out. Raises DeltaMixError if the model gives NaN on the calibration data.
    """
    random = torch.Generator().manual_seed(seed)
    scored = 0
    with output_gradients(model, fisher), observed(modules, fisher) as found:
        for ids in logging.tqdm(batches, desc="Calibrating", unit="batch"):
            output = prediction(model(**inputs_of(model, ids)))
            if fisher:
                scored += sampled_backward(output, len(batches), random)[0]
    few = [n for n in found if isinstance(modules[n], Expert) and found[n].inputs.count < fewest]
    return {name: layer for name, layer in found.items() if name not in few}, scored


def _check_finite(found: Mapping[str, LayerStatistics]) -> None:
    """Raise DeltaMixError for the first module with NaN."""
    # inputs first: gradients of all layers before the culprit are NaN too
    moments = [(name, layer.inputs) for name, layer in found.items()]
    moments += [(name, layer.gradients) for name, layer in found.items() if layer.gradients]
    for name, moment in moments:
        if not all(bool(torch.isfinite(t).all()) for t in moment.state()[0].values()):
            raise DeltaMixError(
                f"calibration gave NaN or infinite values at {name}: check the fine-tune"
            )


@contextmanager
def output_gradients(model: nn.Module, needed: bool) -> Iterator[None]:
    """Context manager: let gradients flow to outputs, but not to parameters, or turn them off.

    What measures embeddings comes after it: their outputs are asked for gradients by hooks.
    """

    def after(name: str, module: nn.Module, args: Any, y: Tensor) -> None:
        y.requires_grad_(needed)

    # every one: encoder and decoder may each have their own
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    with frozen(model), hooked(tables, after=after), torch.set_grad_enabled(needed):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context manager: no gradients of the model's own parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def prediction(output: Any) -> tuple[Tensor, bool]:
    """Take logits [predictions, classes] and True, or hidden states [tokens, d] and False."""
    logits = getattr(output, "logits", None)
    found = output[0] if logits is None else logits
    return found.reshape(-1, found.shape[-1]), logits is not None


def sampled_backward(
    output: tuple[Tensor, bool], batches: int, random: torch.Generator, leaf: Tensor | None = None
) -> tuple[int, list[Tensor]]:
    """Run a backward pass from a `prediction` for every draw of ε.

    Of `batches` in all, each needs so many draws fewer. Returns the draws of all its predictions
    together, and the gradients at `leaf`.
    """
    values, is_logits = output
    draws = min(_MOST_PER_PREDICTION, -(-_LEAST_DRAWS // (len(values) * batches)))
    gradients = (_drawn(values.detach(), is_logits, random) for _ in range(draws))
    return len(values) * draws, backward(values, gradients, draws, leaf)


def backward(
    output: Tensor, gradients: Iterable[Tensor], draws: int, leaf: Tensor | None = None
) -> list[Tensor]:
    """Take so many gradients of `output` back, one after the other; returns those at `leaf`."""
    found = []
    for draw, gradient in enumerate(gradients, 1):
        output.backward(gradient, retain_graph=draw < draws)
        if leaf is not None:
            assert leaf.grad is not None
            found.append(leaf.grad)
            leaf.grad = None
    return found


def _drawn(
    values: Tensor, is_logits: bool, random: torch.Generator, at_once: int = DRAWN
) -> Tensor:
    """(diag(p) − p·pᵀ)^½·ε of logits [predictions, classes], ε of hidden states."""
    drawn = torch.empty_like(values)
    size = max(1, at_once // values.shape[-1])
    for rows, out in zip(values.split(size), drawn.split(size), strict=True):
        noise = torch.randn(rows.shape, generator=random).to(rows.device)
        if is_logits:
            p = rows.float().softmax(-1)
            noise *= p.sqrt()
            noise -= p.mul_(noise.sum(-1, keepdim=True))
        out.copy_(noise)
    return drawn


def metrics_of(
    uses: list[LayerStatistics], scored: int, inputs: Metric = None, prior: float = 0.0
) -> Metrics:
    """Combine the statistics of all uses of a weight [m, n] (two for a tied embedding).

    `inputs` is its C [n, n], if that is known better. With a `prior`, metrics are drawn toward
    their mean, as if so many observations a dimension had shown it (`_drawn_in`).

    A₁⊗C₁ + A₂⊗C₂ has no exact Kronecker factors: each side becomes the sum of its parts, weighted
    by the trace of the other side. A use without gradients was measured on its inputs alone.
    """
    if inputs is not None:
        measured = (_fisher(use, scored, prior) for use in uses)
        seen = sum(use.inputs.count for use in uses)
        known = next((g for g in measured if g is not None), None)
        return Metrics(known, _drawn_in(inputs, seen, prior))
    found = [_of_use(use, scored, prior) for use in uses]
    complete = [(diagonal(u.outputs), dense(u.inputs)) for u in found if u.outputs is not None]
    if len(found) == 1 or len(complete) < len(found):
        return next((use for use in found if use.inputs is not None), Metrics())
    both = [(a, c) for a, c in complete if a is not None and c is not None]
    outputs = torch.stack([a * c.trace() for a, c in both]).sum(0)
    inputs = torch.stack([c * a.sum() for a, c in both]).sum(0)
    return Metrics(outputs, inputs / outputs.sum())


def _drawn_in(metric: Metric, seen: int, prior: float) -> Metric:
    """The posterior mean of a second moment [d, d] measured on `seen` observations.

    Under an inverse Wishart prior of mean c·I, c its mean diagonal, that is worth prior·d of them:
    (seen·M + prior·d·c·I) / (seen + prior·d). From few texts a metric has directions, and an
    embedding tokens, that cost nothing, and what the fine-tune does there would be lost.
    """
    known = diagonal(metric)
    if known is None or not prior:
        return metric
    return shrunk(metric, prior * len(known) / (seen + prior * len(known)))


def _fisher(use: LayerStatistics, scored: int, prior: float) -> Metric:
    gradients = use.gradients
    if gradients is None or gradients.total is None:
        return None
    return _drawn_in(gradients.mean(scored), scored, prior)


def _of_use(use: LayerStatistics, scored: int, prior: float) -> Metrics:
    fisher = _fisher(use, scored, prior)
    if use.tokens is None:
        return Metrics(fisher, _drawn_in(use.inputs.mean(), use.inputs.count, prior))
    seen = use.tokens.sum()
    frequency = _drawn_in(use.tokens / seen, int(seen), prior)
    return Metrics(frequency if fisher is not None else None, fisher)
