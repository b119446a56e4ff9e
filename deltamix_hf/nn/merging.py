"""Trading memory for time while one delta is in use: W_base + Û·V̂ kept beside the packed factors.

Every layer is then one dense product, at the price of one more copy of the packed matrices. The
base and the factors stay as they are, so the model can still be saved as a delta, and dropping the
cache restores the packed product. Unlike `model.dequantize()`, nothing is lost; unlike it, nothing
is freed either.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from ..errors import DeltaMixError
from .delta_module import DeltaModule, merged_name, own_deltas
from .layers import weight_of


def cache_merged(model: nn.Module, enabled: bool = True) -> int:
    """Keep (or, with `enabled=False`, drop) merged weights for every packed matrix of `model`.

    Merged weights have the base weight's dtype and device, and move with the model. They are not
    saved. Tied modules share one; moving the model afterwards gives each its own.

    Returns:
        Bytes the cache takes.

    Raises:
        DeltaMixError: a matrix is offloaded; nothing is cached then.
    """
    if not enabled:
        for module in own_deltas(model).values():
            for leaf in module.dm_own:
                module._buffers.pop(merged_name(leaf), None)
        return 0
    made: dict[int, Tensor] = {}
    advice = "merged weights are cached for models that are in memory"
    for module, leaf, merged in merged_weights(model, advice):
        module.register_buffer(merged_name(leaf), merged, persistent=False)
        made[id(merged)] = merged
    return sum(tensor.numel() * tensor.element_size() for tensor in made.values())


def merged_weights(model: nn.Module, advice: str) -> Iterator[tuple[DeltaModule, str, Tensor]]:
    """Yield every module, weight name and merged weight of a model; tied ones share one tensor.

    Raises DeltaMixError, which ends in `advice`, if a weight is offloaded.
    """
    weights = [(n, m, leaf) for n, m in own_deltas(model).items() for leaf in m.dm_own]
    for name, module, leaf in weights:
        if weight_of(module, leaf).device.type == "meta":
            whole = name if leaf == "weight" else f"{name}.{leaf}"
            raise DeltaMixError(f"{whole} is offloaded; {advice}")
    made: dict[int, Tensor] = {}
    for _, module, leaf in weights:
        if (key := id(weight_of(module, leaf))) not in made:
            made[key] = module.merged_weight(leaf=leaf)
        yield module, leaf, made[key]
