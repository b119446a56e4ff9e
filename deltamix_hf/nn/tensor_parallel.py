"""Tensor parallelism: every process holds its part of each base weight, and of the delta to it.

transformers shards the base's weights by the model's plan while it loads them, and wraps the
layers' forwards. The packed factors are loaded whole; then each process cuts out what belongs to
its part of the weight: the rows of Û where the weight's rows are shared out (column-parallel, and
embeddings by token), the columns of V̂ where its columns are (row-parallel). The other factor stays
whole in every process. So a layer's own forward is right as it is: it adds its delta to the part of
the output, or the partial sum, that transformers gathers or sums up afterwards.

With p processes, a matrix [m, n] of k ranks takes k·(m/p + n) or k·(m + n/p) codes in each.
"""

import math
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import transformers_private
from ..config import DeltaMixConfig
from ..errors import DeltaMixError
from ..quantization import bitpacking
from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import PREFIX, packed_runs, scale_counts, zero_points
from .delta_module import own_deltas
from .layers import DeltaEmbedding, tied_tensors, weight_of

_SIZES = ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size")
_WHOLE = "replicate"  # transformers' own name for it, from some version on


def is_shard(tensor: Any) -> TypeGuard[Any]:
    """Tell whether a tensor is this process's part of one that several share (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def own(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor from all processes' parts; all of them must ask for it."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether several processes share the model's weights."""
    return any(is_shard(parameter) for parameter in model.parameters())


def wanted(model: PreTrainedModel) -> list[str]:
    """List how transformers is about to share the model out among processes: `tp_size`, ..."""
    config: Any = getattr(model.config, "distributed_config", None)
    return [name for name in _SIZES if (getattr(config, name, None) or 1) > 1]


def check_wanted(kinds: list[str], config: DeltaMixConfig, compressing: bool) -> None:
    """Raise DeltaMixError if it cannot be done with models shared out in these ways."""
    if not kinds:
        return
    if compressing:
        raise DeltaMixError(
            "compressing needs the whole fine-tune in one process: compress without tp_plan or "
            "distributed_config, save, and load the delta repo with tp_plan='auto'"
        )
    if other := [kind for kind in kinds if kind != "tp_size"]:
        raise DeltaMixError(
            f"a delta repo cannot be loaded with {other[0]} above 1: among processes it is shared "
            "out by tensor parallelism (tp_plan='auto') only"
        )
    if config.dequantize:
        raise DeltaMixError(
            "weights that several processes share cannot be merged with a delta: merge it in one "
            "process ('deltamix merge'), and load the dense model with tp_plan='auto'"
        )


def plan_packed(model: PreTrainedModel, resized: set[str]) -> None:
    """Make the model's plan fit a delta repo, whose packed tensors were just attached.

    Packed tensors are loaded whole. So is what `resized` names: transformers would cut the base's
    rows and the added rows apart before they are put together. Raises DeltaMixError if the caller's
    own plan shares out such a matrix.
    """
    styles: Any = transformers_private.tensor_parallel.ALL_PARALLEL_STYLES
    if _WHOLE not in styles:  # before transformers 5.21
        styles.register(_WHOLE, transformers_private.tensor_parallel.TensorParallelLayer())
    plan = model.tp_plan
    users = getattr(model.config.distributed_config, "tp_plan", None)  # joined to it later
    users = users if isinstance(users, dict) else {}
    if not (plan or users):
        return  # transformers says that there is none
    tensors = [twin for name in resized for twin in tied_tensors(model, f"{name}.weight")]
    resized = {tensor.removesuffix(".weight") for tensor in tensors}
    if taken := sorted(resized & users.keys()):
        raise DeltaMixError(
            f"{taken[0]} has other rows than the base's and is kept whole in every process: take "
            "it out of tp_plan"
        )
    plan.update(dict.fromkeys(resized & plan.keys(), _WHOLE))
    for name, module in own_deltas(model).items():
        # as plans have it: `model.layers.*.mlp.up_proj`
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        plan.update((f"{pattern}.{key}", _WHOLE) for key in module.delta_parameters())
    # transformers looks names up in named_parameters(), which lists what twins share once; it ties
    # them again after loading
    for twin in model.all_tied_weights_keys:
        owner, _, leaf = twin.rpartition(".")
        if leaf.startswith(PREFIX):
            tied = model.get_submodule(owner)
            placeholder = torch.empty_like(getattr(tied, leaf))
            tied.register_parameter(leaf, nn.Parameter(placeholder, requires_grad=False))


@torch.no_grad()
def keep_own_part(model: PreTrainedModel) -> None:
    """Cut every packed delta to the part of the weight that this process holds."""
    made: dict[int, PackedDelta] = {}  # twins share theirs
    for module in own_deltas(model).values():
        for leaf in module.dm_own:
            weight: Any = weight_of(module, leaf)
            if not is_shard(weight):
                continue
            if weight.dim() == 3 and len(_own(weight, 0)) < len(weight):
                raise DeltaMixError("experts with deltas cannot be shared out whole")
            sides = _own(weight, weight.dim() - 2), _own(weight, weight.dim() - 1)
            rows, columns = sides[::-1] if getattr(module, "is_transposed", False) else sides
            packed = module.packed(leaf)
            key = id(packed.v)
            if key not in made:
                found = [one and part_of(one, rows, columns) for one in packed.split()]
                made[key] = PackedDelta.join(found) if weight.dim() == 3 else cast(Any, found[0])
            module.hold(made[key], leaf)
            if isinstance(module, DeltaEmbedding) and len(rows) < weight.shape[0]:
                module.dm_first = int(rows[0])
            # transformers then hands the layer plain tensors, this process's part of them
            vars(module)["_hf_quantized_needs_local_tp"] = True


def _own(weight: Any, dim: int) -> Tensor:
    """Which of the indices along `dim` of a shared weight this process holds, int64 on the CPU."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    placements: list[Any] = []
    for placement in weight.placements:
        if getattr(placement, "dim", None) not in (dim, dim - weight.ndim):
            placements.append(Replicate())
        elif hasattr(placement, "split_factor"):
            placements.append(_StridedShard(0, split_factor=placement.split_factor))
        else:
            placements.append(Shard(0))
    index = torch.arange(weight.shape[dim], device=weight.device_mesh.device_type)
    mine = distribute_tensor(index, weight.device_mesh, placements, src_data_rank=None)
    return mine.to_local().cpu()


def part_of(factors: PackedDelta, rows: Tensor, columns: Tensor) -> PackedDelta:
    """Cut out the factors of (Û·V̂)[rows][:, columns]; both int64 and rising, no index twice."""
    if (len(rows), len(columns)) == (factors.m, factors.n):
        return factors
    device, runs, sides = factors.v.device, factors.runs, packed_runs(factors.runs)
    v_groups, v_size = _groups(columns, factors.group_sizes[0])
    u_groups, u_size = _groups(rows, factors.group_sizes[1])
    split, _ = scale_counts(factors.m, factors.n, factors.group_sizes)
    groups = torch.cat([v_groups, split + u_groups]).to(device)
    zeros = factors.zeros
    if zeros is not None:
        points = zero_points(zeros, runs, factors.ranks.shape[1] - 1)
        zeros = bitpacking.pack(points[:, groups], sides["zeros"])
    v = bitpacking.unpack(factors.v, sides["v"], factors.n)[:, columns.to(device)]
    u = bitpacking.unpack(factors.u, sides["u"], factors.m)[:, rows.to(device)]
    packed = bitpacking.pack(v, sides["v"]), bitpacking.pack(u, sides["u"])
    ranks = torch.cat([factors.ranks[:, :1], factors.ranks[:, 1:][:, groups]], 1)
    return PackedDelta(len(rows), len(columns), (v_size, u_size), runs, *packed, ranks, zeros)


def _groups(index: Tensor, size: int) -> tuple[Tensor, int]:
    """Scale groups of the elements `index`, and how many of those share one.

    A cut through a group leaves a shorter one; the greatest common divisor makes all alike.
    """
    group = index // size if size else torch.zeros_like(index)
    starts = (group[1:] != group[:-1]).nonzero().flatten() + 1
    length = math.gcd(*starts.tolist())
    return (group[::length], length) if length else (group[:1], 0)
