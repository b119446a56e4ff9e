"""Fused experts with the packed deltas of many fine-tunes: each row's deltas, each token's experts.

Rows that take the same deltas are computed together. Not all of them at once: the kernels' tables
tell rows apart by one number, here the expert, and these rows differ by delta too.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .expert_ops import add_delta, base_product, experts_forward
from .experts import weight_of
from .packed_experts import PackedExperts
from .plans import Combination
from .routing import Route
from .tenant_modules import TenantModule


class ExpertDeltas(dict[str, PackedExperts]):
    """What one delta has for one module, by 3-D parameter."""

    def move(self, device: torch.device) -> None:
        """To `device`, in place."""
        for packed in self.values():
            packed.move(device)


class TenantExperts(TenantModule):
    """Experts whose projections have the row's own deltas; `dm_packed` holds `ExpertDeltas`."""

    def _combined(
        self,
        combination: Combination,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        base: Tensor | None,
    ) -> Any:
        module: Any = self._with(self._merged(combination))
        packed: dict[str, Any] = self.dm_packed
        deltas: list[ExpertDeltas] = [packed[name] for name in combination if name in packed]

        def project(name: str, x: Tensor, ends: Tensor) -> Tensor:
            y = base_product(module, name, weight_of(module, name), x, ends)
            for delta in deltas:
                if name in delta:
                    y = add_delta(y, delta[name], x, ends)
            return y

        compute: Any = partial(experts_forward, module, project=project)
        with self.dm_router.using(Route([combination])):  # children see these rows alone
            return compute(*args, **kwargs)


@cache
def tenant_experts_class(plain: Any) -> type[nn.Module]:
    """The tenant of an experts class."""
    return type(plain.__name__, (TenantExperts, plain), {})
