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

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import DeltaMixError
from ..linalg.second_moments import Metric, SecondMoment, dense, diagonal
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


class Hooks:
    """Accumulates the moments of every use of the given modules while the model runs.

    Args:
        modules: what is observed, by name.
        fisher: measure gradients too.
        seed: of sketches, for moments that are merged with others'.
    """

    def __init__(self, modules: Mapping[str, nn.Module], fisher: bool, seed: int = 0):
        self.found: dict[str, LayerStatistics] = {}
        self.fisher, self.seed = fisher, seed
        self._last: tuple[Tensor | None, str] = (None, "")
        self._owner: dict[str, str] = {}  # the first of the modules that share their inputs
        self.handles = [
            module.register_forward_hook(self._hook(name)) for name, module in modules.items()
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0].detach()
            if name not in self.found:
                self.found[name] = self._start(name, module, args[0], y)
            layer = self.found[name]
            if layer.tokens is not None:
                layer.tokens += torch.bincount(x.reshape(-1), minlength=len(layer.tokens))
            elif self._owner[name] == name:
                layer.inputs.add(x)
            if layer.gradients is not None and y.requires_grad:
                y.register_hook(layer.gradients.add)

        return measure

    def _start(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> LayerStatistics:
        gradients = SecondMoment(y.shape[-1], seed=self.seed) if self.fisher else None
        if isinstance(module, nn.Embedding):
            rows = torch.zeros(module.num_embeddings, device=y.device)
            return LayerStatistics(SecondMoment(0), gradients, rows)
        # q/k/v and gate/up are called with the very same tensor object, one after the other
        if self._last[0] is not x:
            self._last = (x, name)
        owner = self._owner[name] = self._last[1]
        if owner != name:
            return LayerStatistics(self.found[owner].inputs, gradients)
        return LayerStatistics(SecondMoment(x.shape[-1], seed=self.seed), gradients)


def collect(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    fisher: bool,
    seed: int = 0,
    fewest: int = FEWEST,
) -> tuple[dict[str, LayerStatistics], int]:
    """Measure every module that is called; its statistics, and the number of scored predictions.

    Args:
        modules: layers and experts, by name.
        batches: token ids int64 [rows, length].
        fisher: measure gradients too.
        seed: of ε.
        fewest: tokens that an expert must have seen, or it is left out.

    Raises:
        DeltaMixError: the model gives NaN on the calibration data.
    """
    random = torch.Generator().manual_seed(seed)
    scored = 0
    with (
        observed_experts(modules, fisher) as experts,
        frozen(model),
        embeddings_need_gradients(model, fisher),
        torch.set_grad_enabled(fisher),
    ):
        hooks = Hooks(modules, fisher)  # after those that ask embeddings for gradients
        with attached(hooks.handles):
            for ids in logging.tqdm(batches, desc="Calibrating", unit="batch"):
                output = prediction(model(**inputs_of(model, ids)))
                if fisher:
                    scored += backward(output, len(batches), random)
    enough = {n: LayerStatistics(*m) for n, m in experts.items() if m[0].count >= fewest}
    found = hooks.found | enough
    check_finite(found)
    return found, scored


def check_finite(found: Mapping[str, LayerStatistics]) -> None:
    """Check that all moments are finite.

    Raises:
        DeltaMixError: names the first module with NaN.
    """
    # inputs first: gradients of all layers before the culprit are NaN too
    moments = [(name, layer.inputs) for name, layer in found.items()]
    moments += [(name, layer.gradients) for name, layer in found.items() if layer.gradients]
    for name, moment in moments:
        sums = [t for t in (moment.total, moment.squares) if t is not None]
        if not all(bool(torch.isfinite(t).all()) for t in sums):
            raise DeltaMixError(
                f"calibration gave NaN or infinite values at {name}: check the fine-tune"
            )


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context manager: remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def embeddings_need_gradients(model: nn.Module, needed: bool) -> Iterator[None]:
    """Context manager: let gradients flow to the output of every embedding."""
    handles = [  # every one: encoder and decoder may each have their own
        module.register_forward_hook(lambda module, args, y: y.requires_grad_(needed))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    with attached(handles):
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


def device_of(model: PreTrainedModel) -> torch.device:
    """Find where the model runs; `LazyWeights` says so, whose parameters are nowhere."""
    device: torch.device = getattr(model, "dm_device", model.device)
    return device


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Make the keyword arguments of a forward pass over token ids int64 [rows, length]."""
    ids = ids.to(device_of(model))
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False  # blocks are run again on their own: nothing may be remembered
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def prediction(output: Any) -> tuple[Tensor, bool]:
    """Take logits [predictions, classes] and True, or hidden states [tokens, d] and False."""
    logits = getattr(output, "logits", None)
    found = output[0] if logits is None else logits
    return found.reshape(-1, found.shape[-1]), logits is not None


def backward(
    output: tuple[Tensor, bool],
    batches: int,
    random: torch.Generator,
    after: Callable[[], None] = lambda: None,
) -> int:
    """Run a backward pass for every draw of ε, each followed by `after`.

    Args:
        output: of `prediction`.
        batches: how many there are in all, for fewer draws each.
        random: draws ε.

    Returns:
        The draws of all predictions together.
    """
    values, is_logits = output
    draws = min(_MOST_PER_PREDICTION, -(-_LEAST_DRAWS // (len(values) * batches)))
    for draw in range(draws):
        values.backward(_drawn(values.detach(), is_logits, random), retain_graph=draw + 1 < draws)
        after()
    return len(values) * draws


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


def metrics_of(uses: list[LayerStatistics], scored: int, inputs: Metric = None) -> Metrics:
    """Combine the statistics of all uses of a weight [m, n] (two for a tied embedding).

    `inputs` is its C [n, n], if that is known better.

    A₁⊗C₁ + A₂⊗C₂ has no exact Kronecker factors: each side becomes the sum of its parts, weighted
    by the trace of the other side. A use without gradients was measured on its inputs alone.
    """
    if inputs is not None:
        return Metrics(
            next((g for use in uses if (g := _fisher(use, scored)) is not None), None), inputs
        )
    found = [_of_use(use, scored) for use in uses]
    complete = [(diagonal(u.outputs), dense(u.inputs)) for u in found if u.outputs is not None]
    if len(found) == 1 or len(complete) < len(found):
        return next((use for use in found if use.inputs is not None), Metrics())
    both = [(a, c) for a, c in complete if a is not None and c is not None]
    outputs = torch.stack([a * c.trace() for a, c in both]).sum(0)
    inputs = torch.stack([c * a.sum() for a, c in both]).sum(0)
    return Metrics(outputs, inputs / outputs.sum())


def _fisher(use: LayerStatistics, scored: int) -> Metric:
    gradients = use.gradients
    if gradients is None or gradients.total is None:
        return None
    return gradients.mean(scored)


def _of_use(use: LayerStatistics, scored: int) -> Metrics:
    fisher = _fisher(use, scored)
    if use.tokens is None:
        return Metrics(fisher, use.inputs.mean())
    frequency = use.tokens / use.tokens.sum()
    return Metrics(frequency if fisher is not None else None, fisher)
