"""Which part of a packed matrix belongs where in a layer of vLLM.

A layer of vLLM may hold several matrices one below the other (q, k and v; gate and up), and under
tensor parallelism a rank holds some rows of each (column-parallel layers and vocabularies) or some
columns (row-parallel ones). vLLM names the matrices of a layer "q", "k", "v", or by number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from ..errors import DeltaMixError
from ..nn.tensor_parallel import part_of
from ..quantization.packed_delta import PackedDelta

Shard = str | int | tuple[int, ...] | None  # which matrices of a layer; None: all, stored as one
_QKV = {"q": 0, "k": 1, "v": 2}
# Subclasses may share rows out in other ways.
_KNOWN = (
    *(ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear),
    *(RowParallelLinear, VocabParallelEmbedding, ParallelLMHead),
)


@dataclass(frozen=True)
class Piece:
    """A packed delta to some of a layer's outputs on this rank: [len(outputs), inputs here]."""

    outputs: slice
    packed: PackedDelta


@dataclass(frozen=True)
class _Matrix:
    """One of a layer's matrices: its rows in the model, and which of them this rank holds."""

    rows: int
    here: range


def pieces(
    layer: nn.Module, shard: Shard, tensors: Mapping[str, Tensor], group_size: int
) -> list[Piece]:
    """Cut this rank's part out of the packed tensors of one stored matrix.

    Raises DeltaMixError if they do not fit the layer, or the layer cannot be shared out.
    """
    if layer.tp_size != 1 and type(layer) not in _KNOWN:
        raise DeltaMixError(
            f"how tensor parallelism shares out a {type(layer).__name__} is not known here: use "
            "--tensor-parallel-size 1, or serve the merged model ('deltamix merge')"
        )
    matrices = _matrices(layer)
    wanted = _wanted(shard, len(matrices))
    m, n = sum(matrices[i].rows for i in wanted), int(layer.input_size)  # type: ignore[arg-type]
    packed = PackedDelta.checked(m, n, group_size, tensors)
    columns, found, above = _columns(layer), [], 0
    for i in wanted:
        first = sum(len(matrix.here) for matrix in matrices[:i])
        here = matrices[i].here
        if here:  # a rank may hold nothing but the padding of a vocabulary
            rows = torch.arange(above + here.start, above + here.stop)
            part = part_of(packed, rows, torch.arange(columns.start, columns.stop))
            found.append(Piece(slice(first, first + len(here)), part))
        above += matrices[i].rows
    return found


def _wanted(shard: Shard, count: int) -> list[int]:
    if shard is None:
        return list(range(count))
    if isinstance(shard, tuple):
        return list(shard)
    return [_QKV[shard] if isinstance(shard, str) else shard]


def _matrices(layer: Any) -> list[_Matrix]:
    if isinstance(layer, VocabParallelEmbedding):
        held = layer.shard_indices
        return [
            _Matrix(
                layer.org_vocab_size, range(held.org_vocab_start_index, held.org_vocab_end_index)
            )
        ]
    local = layer.output_partition_sizes
    if isinstance(layer, QKVParallelLinear):  # heads of k and v may be on several ranks each
        kv = layer.total_num_kv_heads
        rows = [layer.total_num_heads * layer.head_size, kv * layer.head_size]
        rows.append(kv * layer.v_head_size)
        ranks = [layer.tp_rank] + 2 * [layer.tp_rank // layer.num_kv_head_replicas]
    elif isinstance(layer, ColumnParallelLinear):
        rows, ranks = [size * layer.tp_size for size in local], [layer.tp_rank] * len(local)
    else:
        rows, ranks = local, [0] * len(local)
    return [
        _Matrix(whole, range(rank * size, rank * size + size))
        for whole, rank, size in zip(rows, ranks, local, strict=True)
    ]


def _columns(layer: Any) -> range:
    if isinstance(layer, RowParallelLinear):
        size = layer.input_size_per_partition
        return range(layer.tp_rank * size, layer.tp_rank * size + size)
    return range(layer.input_size)
