"""Tuning of the stored scales by KL to the fine-tune: no extra bytes, a few passes of text.

Layer by layer, errors are at best uncorrelated; end to end they can cancel. Every rank's scale is
already stored, so it is multiplied by a gain exp(θ), trained with Adam (cosine learning rate) on

    KL(fine-tune ‖ compressed)  at some positions of the calibration text,

and folded back into the bfloat16 scales of U. The fine-tune's log-probabilities at these positions
are recorded before it is compressed. Every eighth text is kept out of training: if the gains do not
help there, they are dropped. (A classifier makes one prediction a text; 128 of them are too few for
two thousand scales, and at 1/16 tuning took rxnfp from KL 0.0012 to 0.0020.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration.block_chain import TensorList
from ..calibration.data import split_rows
from ..calibration.self_text import writes_text
from ..calibration.statistics import frozen, prediction
from ..jobs.resume_store import ResumeStore
from ..nn.delta_module import DeltaModule
from ..nn.layers import DeltaEmbedding, delta_modules, shape_of, weight_of
from ..nn.probing import inputs_of
from ..quantization import uniform
from ..quantization.packed_layout import scale_counts

LEARNING_RATE = 0.01
TOKENS_PER_STEP = 128
_KEEP_OUT = 8
_LEAST = -1e4  # log-probability of what a model rules out: finite, and exp of it is 0
_MOST_BYTES = 1_000_000_000


@dataclass(frozen=True)
class TuningBatch:
    """One calibration batch: token ids, scored positions and the fine-tune's log-probabilities."""

    ids: Tensor
    positions: Tensor
    wanted: Tensor


@dataclass
class TuningData:
    """The calibration text in steps, with what the fine-tune says to it; a part may be on disk."""

    pieces: Sequence[Tensor]
    positions: TensorList
    wanted: TensorList

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, i: int) -> TuningBatch:
        return TuningBatch(self.pieces[i], self.positions[i], self.wanted[i])


def tuning_pieces(model: PreTrainedModel, rows: Tensor) -> tuple[Tensor, ...]:
    """Split calibration rows [rows, length, ...] into what is run together.

    What a causal model predicts at the first tokens of a text does not depend on the rest, so of a
    long text they are enough: a step on 2048 tokens takes 16 times as long as one on 128.
    """
    length = TOKENS_PER_STEP if writes_text(model) else rows.shape[1]
    return split_rows(rows[:, :length], TOKENS_PER_STEP)


@torch.no_grad()
def tuning_batches(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    seed: int,
    tensor_list: Callable[[str], TensorList] = lambda name: [],
    outputs: Iterator[Any] | None = None,
    most_bytes: int = _MOST_BYTES,
) -> TuningData:
    """Run the fine-tune over the batches and keep its predictions at positions drawn by the seed.

    Batches are token ids int64 [rows, length]; `tensor_list` makes the lists that keep the rest, up
    to `most_bytes` of log-probabilities, float16. `outputs` are the model's for each piece in
    turn, if running it would be slow.
    """
    random = torch.Generator().manual_seed(seed)
    pieces = [piece for ids in batches for piece in tuning_pieces(model, ids)]
    data = TuningData(pieces, tensor_list("positions"), tensor_list("wanted"))
    if len(data) == len(data.pieces):
        return data
    data.positions.clear()
    data.wanted.clear()
    for ids in data.pieces:
        found = next(outputs) if outputs else model(**inputs_of(model, ids))
        values, is_logits = prediction(found)
        if not is_logits:
            return data  # nothing to compare distributions of
        most = max(1, most_bytes // (len(data.pieces) * values.shape[1] * 2))
        chosen = torch.randperm(len(values), generator=random)[:most].sort().values
        logs = values[chosen.to(values.device)].float().log_softmax(-1)
        data.positions.append(chosen)
        data.wanted.append(logs.clamp(min=_LEAST).half().cpu())
    return data


def tune(
    model: PreTrainedModel,
    data: TuningData,
    steps: int,
    store: ResumeStore | None = None,
    small: bool = False,
) -> list[float]:
    """Train the scales of all packed matrices in place; returns KL per step, nats per position.

    Goes on after the last step that `store` knows of. `small` unpacks the factors anew whenever a
    module runs: unpacked, all of them take half as much memory as the model.
    """
    modules = _tunable(model)
    if not data or not modules or not steps:
        return []
    owners = {id(ranks_of(m)): m for m in modules}  # tied modules share their gain
    gains = {
        key: torch.zeros(len(ranks_of(m)), device=ranks_of(m).device, requires_grad=True)
        for key, m in owners.items()
    }
    for module in modules:
        _open(module, gains[id(ranks_of(module))], small)
    try:
        with frozen(model):
            losses = _train(model, list(gains.values()), data, steps, store or ResumeStore())
    finally:
        for module in modules:
            module.__dict__.pop("forward")
    for key, module in owners.items():
        _fold(module, gains[key].detach().exp())
    return losses


def _train(
    model: PreTrainedModel, gains: list[Tensor], data: TuningData, steps: int, store: ResumeStore
) -> list[float]:
    """Adam on the gains; they end at 0 if they do not help on the texts kept out."""
    optimizer = torch.optim.Adam(gains, lr=LEARNING_RATE)
    losses: list[float] = []
    validation = validation_rows(data)
    train_ids = [i for i in range(len(data)) if i % _KEEP_OUT or not validation]
    position = 0
    if found := store.read("tuning"):
        tensors, (losses, position, before) = found
        _restore(optimizer, gains, tensors)
    else:
        before = _mean(model, validation)
    done, shown = len(losses), {"desc": "Tuning scales", "unit": "step"}
    for step in logging.tqdm(range(done, steps), total=steps, initial=done, **shown):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch: list[TuningBatch] = []
        tokens = 0
        while tokens < TOKENS_PER_STEP and len(batch) < len(train_ids):
            batch.append(data[train_ids[position % len(train_ids)]])
            tokens += batch[-1].ids.numel()
            position += 1
        scored = sum(len(item.positions) for item in batch)
        total = 0.0
        optimizer.zero_grad()
        for item in batch:
            loss = _divergence(model, item) / scored
            if loss.requires_grad:  # not where text meets no packed matrix
                loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
        store.write("tuning", _state(optimizer, gains), [losses, position, before])
    if not _mean(model, validation) <= before:  # worse, or NaN
        for gain in gains:
            gain.detach().zero_()
    return losses


def validation_rows(data: TuningData) -> list[TuningBatch]:
    """Read the texts that decide whether tuning helped, and are not trained on."""
    return [data[i] for i in range(0, len(data), _KEEP_OUT)] if len(data) > 1 else []


def validation_kl(model: PreTrainedModel, data: TuningData) -> dict[str, float]:
    """Measure KL(fine-tune ‖ model) on the texts kept out, in nats per position; {} without any."""
    validation = validation_rows(data)
    positions = sum(len(item.positions) for item in validation)
    kl = _mean(model, validation, exact=True)
    return {"kl": kl, "positions": positions} if positions else {}


def _state(optimizer: torch.optim.Optimizer, gains: list[Tensor]) -> dict[str, Tensor]:
    kept = [{"gain": gain, **optimizer.state[gain]} for gain in gains]
    return {f"{i}.{name}": value for i, state in enumerate(kept) for name, value in state.items()}


@torch.no_grad()
def _restore(
    optimizer: torch.optim.Optimizer, gains: list[Tensor], kept: dict[str, Tensor]
) -> None:
    states: dict[int, dict[str, Tensor]] = {}  # none of what text never met
    for key, value in kept.items():
        i, name = key.split(".")
        if name == "gain":
            gains[int(i)].copy_(value)
        else:
            states.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _tunable(model: PreTrainedModel) -> list[DeltaModule]:
    """Packed modules, but for embeddings with a forward of their own (Gemma) and their ties."""
    modules = delta_modules(model).values()
    embeddings = [m for m in modules if isinstance(m, DeltaEmbedding)]
    own = [id(ranks_of(m)) for m in embeddings if type(m) is not DeltaEmbedding]
    return [module for module in modules if id(ranks_of(module)) not in own]


def ranks_of(module: DeltaModule) -> Tensor:
    """Return the `dm_ranks` tensor int16 [k, 1 + groups], typed."""
    return cast(Tensor, module.dm_ranks)


@torch.no_grad()
def _mean(model: PreTrainedModel, data: Sequence[TuningBatch], exact: bool = False) -> float:
    """KL(fine-tune ‖ model), nats per scored position."""
    scored = sum(len(item.positions) for item in data)
    return sum(_divergence(model, item, exact).item() for item in data) / max(scored, 1)


def _divergence(model: PreTrainedModel, item: TuningBatch, exact: bool = False) -> Tensor:
    """Sum of KL(fine-tune ‖ model) over the scored positions.

    As predictions are kept, rounded and cut, it may be < 0; `exact` takes proper distributions.
    """
    values, _ = prediction(model(**inputs_of(model, item.ids)))
    values = values[item.positions.to(values.device)]
    if exact:
        found = values.double().log_softmax(-1)
        wanted = item.wanted.to(found).log_softmax(-1)
    else:
        found = values.float().log_softmax(-1).clamp(min=_LEAST)
        wanted = item.wanted.to(found)
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


def _open(module: DeltaModule, gain: Tensor, small: bool = False) -> None:
    """Let the module run on dense factors, its ranks multiplied by exp(gain) [k]."""
    dtype = weight_of(module).dtype

    def unpacked() -> tuple[Tensor, Tensor]:
        packed = module.packed()
        return packed.right().to(dtype), packed.left().to(dtype)  # [k, n], [k, m]

    kept = None if small else unpacked()

    def low_rank(x: Tensor) -> Tensor:
        right, left = kept or unpacked()
        if isinstance(module, DeltaEmbedding):
            return (left.T[x] * gain.exp().to(dtype)) @ right
        return (F.linear(x, right) * gain.exp().to(dtype)) @ left

    def forward(x: Tensor) -> Any:
        y = module.plain(x)
        return y + (low_rank(x) if kept else checkpoint(low_rank, x, use_reentrant=False))

    object.__setattr__(module, "forward", forward)


@torch.no_grad()
def _fold(module: DeltaModule, gains: Tensor) -> None:
    """Multiply the stored scales of U by `gains` [k]."""
    first = 1 + scale_counts(*shape_of(module), module.packed().group_sizes)[0]
    ranks = ranks_of(module)
    scales = uniform.scales_from_bits(ranks[:, first:].contiguous()) * gains[:, None]
    ranks[:, first:] = uniform.scales_to_bits(scales)
