"""Trading memory for time while one delta is in use: W_base + Û·V̂ kept beside the packed factors.

Every layer is then one dense product, at the price of one more copy of the packed matrices. The
base and the factors stay as they are, so the model can still be saved as a delta, and dropping the
cache restores the packed product. Unlike `model.dequantize()`, nothing is lost; unlike it, nothing
is freed either.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import DeltaMixError
from .experts import delta_experts
from .layers import delta_modules, weight_of


def cache_merged(model: nn.Module, enabled: bool = True) -> int:
    """Keep (or, with `enabled=False`, drop) merged weights for every packed matrix of `model`.

    Merged weights have the base weight's dtype and device, and move with the model. They are not
    saved. Tied modules share one; moving the model afterwards gives each its own.

    Returns:
        Bytes the cache takes.

    Raises:
        DeltaMixError: a matrix is offloaded; nothing is cached then.
    """
    modules = delta_modules(model)
    experts = delta_experts(model)
    if not enabled:
        for module in modules.values():
            module.dm_merged = None
        for mixture in experts.values():
            mixture.drop_merged()
        return 0
    weights = {name: weight_of(module) for name, module in modules.items()}
    for name, mixture in experts.items():
        weights |= {f"{name}.{leaf}": weight for leaf, weight in mixture.frozen_weights().items()}
    for name, weight in weights.items():
        if weight.device.type == "meta":
            raise DeltaMixError(
                f"{name} is offloaded; merged weights are cached for models that are in memory"
            )
    made: dict[int, Tensor] = {}
    for module in modules.values():
        key = id(weight_of(module))
        if key not in made:
            made[key] = module.merged_weight()
        module.dm_merged = made[key]
    kept = [*made.values()]
    for mixture in experts.values():
        kept += mixture.keep_merged()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)
