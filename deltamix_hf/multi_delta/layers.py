"""Layers that apply a different delta to each row of a batch.

The base's product is made for the whole batch, as the plain base makes it, and each delta adds its
part to its rows: rows of the base stay what they are, bit for bit. Whatever a delta stores whole
(norms, biases, heads) is routed the same way: the module is run once more on that delta's rows with
that delta's tensors in place of the base's.

Of fused experts, rows that take the same deltas are computed together. Not all of them at once: the
kernels' tables tell rows apart by one number, here the expert, and these rows differ by delta too.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import DeltaMixError
from ..nn.experts import weight_of
from ..nn.layers import change_class, reads_weight_itself
from ..ops.experts import add_delta, base_product, experts_forward
from ..ops.low_rank import cheapest, low_rank, low_rank_rows
from ..quantization.packed_delta import PackedDelta
from . import compiled
from .grouped import run_grouped
from .routing import PackedRoute, Route, Router

Overlay = dict[str, Tensor]  # name of a parameter or buffer of one module -> its value


class RoutedModule(nn.Module):
    """Base weights and, by name, what each delta puts beside them or in their place.

    Attributes:
        dm_router: says which rows take which deltas.
        dm_packed: delta name -> its packed factors for this weight.
        dm_overlay: delta name -> tensors in place of the base's; the weight is never among them if
            the delta packs it.
        dm_plain_class: whose forward makes the base's output.
        dm_has_batch: whether the first dimension of its input is the batch, or 1 for all rows
            alike. (T5's table of relative positions is looked up without one.)
        dm_number: its number among the modules that compiled code asks for.
        dm_table: a `grouped.Table`, once `dm_tried` what the kernels can do for it.
        dm_captured: a CUDA graph was recorded with it.
    """

    dm_router: Router
    dm_packed: dict[str, PackedDelta]
    dm_overlay: dict[str, Overlay]
    dm_plain_class: type[nn.Module]
    dm_number: int
    dm_has_batch: bool = True
    dm_table: Any = None
    dm_tried: bool = False
    dm_captured: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled.opaque(self, args, kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, by the route now in force."""
        route = self.dm_router.route
        if isinstance(route, PackedRoute) and not route.alike:
            return self._unpacked(route.seen_by(self), args, kwargs)
        together = run_grouped(self, args, kwargs)
        if together is not None:
            return together
        if route.alike:
            delta = route.rows[0]
            if delta is None or not self._touched(delta):
                return self._plain(self, args, kwargs)
            return self._with_delta(delta, args, kwargs, None)
        y = self._plain(self, args, kwargs)
        if not any(map(self._touched, route.names)):
            return y
        x, batch = _first_tensor(args, kwargs), len(route.rows)
        length = x.shape[0]
        flat = x.dim() == 2 and length % batch == 0
        router = len(args) == 1 and not kwargs and not any(self.children()) and _has_rows(y, batch)
        if not (
            (isinstance(y, Tensor) or router)
            and self.dm_has_batch
            and (length in (1, batch) or flat)
        ):
            raise DeltaMixError(
                f"a {self.dm_plain_class.__name__} that maps {list(x.shape)} to a "
                f"{type(y).__name__} does not see the {batch} rows of the batch apart; give all "
                "rows the same delta"
            )
        if length == 1 < batch:  # positions, say
            y = y.expand(batch, *y.shape[1:])
        size = (y if isinstance(y, Tensor) else y[0]).shape[0]
        taken, given = (route.groups(n, x.device) for n in (max(length, batch), size))
        for (delta, rows), (_, places) in zip(taken, given, strict=True):
            if self._touched(delta):
                chosen = tuple(_pick(value, rows, length) for value in args)
                named = {key: _pick(value, rows, length) for key, value in kwargs.items()}
                base = y[places] if isinstance(y, Tensor) else None
                y = _placed(y, places, self._with_delta(delta, chosen, named, base))
        return y

    def _unpacked(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output for one row of many tokens, as if each token were a row of its own."""
        if not any(map(self._touched, route.names)):
            return self._plain(self, args, kwargs)
        x, length = _first_tensor(args, kwargs), len(route.rows)
        found = [dim for dim, size in enumerate(x.shape) if size == length]
        with self.dm_router.using(route):
            if route.alike or x.shape[0] > 1:  # alike, or flattened: rows already
                return self.run(*args, **kwargs)
            if not found:
                raise DeltaMixError(
                    f"a {self.dm_plain_class.__name__} that sees {list(x.shape)} does not see the "
                    f"{length} tokens of the batch apart; give all requests the same delta"
                )
            # [1, tokens, heads, ...] and [1, heads, tokens, ...] both have the tokens outermost
            # in memory, which tells them apart where there are as many heads as tokens.
            dim = max(found, key=x.stride)
            chosen = [_to_front(value, dim, length) for value in args]
            named = {key: _to_front(value, dim, length) for key, value in kwargs.items()}
            return self.run(*chosen, **named).movedim(0, dim)

    def _touched(self, delta: str) -> bool:
        return delta in self.dm_packed or delta in self.dm_overlay

    def _with_delta(
        self,
        delta: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        base: Tensor | None,
    ) -> Any:
        """The output with a delta; `base`, if known, is that of the base's tensors."""
        overlay = self.dm_overlay.get(delta, {})
        if overlay or base is None:
            with self.dm_router.using(Route([delta])):  # children see these rows alone
                base = self._plain(self._with(overlay), args, kwargs)
        if delta in self.dm_packed:
            x = _first_tensor(args, kwargs)
            base = base + self._delta(self.dm_packed[delta], x).to(base.dtype)
        return base

    def _with(self, overlay: Overlay) -> nn.Module:
        """This module with other tensors; it shares everything else."""
        if not overlay:
            return self
        shadow = copy.copy(self)
        for kind in ("_parameters", "_buffers"):
            own = {key: overlay.get(key, value) for key, value in getattr(self, kind).items()}
            shadow.__dict__[kind] = own
        return shadow

    def _plain(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.dm_plain_class.forward(module, *args, **kwargs)

    def _delta(self, packed: PackedDelta, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dm_table, self.dm_tried, self.dm_captured = None, False, False  # new addresses
        tensors = [
            t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None
        ]
        for overlay in self.dm_overlay.values():
            overlay.update({key: fn(value) for key, value in overlay.items()})
        if tensors:
            device = tensors[0].device
            for packed in self.dm_packed.values():
                packed.move(device)  # in place: tied modules share it
        return self


class RoutedLinear(RoutedModule, nn.Linear):
    """y = x·W_baseᵀ + bias + (x·V̂ᵀ)·Ûᵀ with the row's own factors."""

    def _delta(self, packed: PackedDelta, x: Tensor) -> Tensor:
        return cheapest(low_rank)(x, *packed.op_arguments, transposed=False)


class RoutedConv1D(RoutedModule, Conv1D):
    """y = x·W_base + bias + (x·V̂ᵀ)·Ûᵀ with the row's own factors."""

    _delta = RoutedLinear._delta


class RoutedEmbedding(RoutedModule, nn.Embedding):
    """y = W_base[ids] + Û[ids]·V̂ with the row's own factors."""

    def _delta(self, packed: PackedDelta, x: Tensor) -> Tensor:
        return cheapest(low_rank_rows)(x.long(), *packed.op_arguments)


def make_routed(
    module: nn.Module, router: Router, kind: type[nn.Module] | None = None
) -> RoutedModule:
    """Change `module`'s class in place, so that deltas can be added to it; once is enough.

    The class is `kind`, or found by what the module is.

    A subclass of `nn.Embedding` keeps its own forward, whose `super().forward` meets ours: what it
    does to the rows (Gemma scales them) is done to the delta's too.
    """
    if isinstance(module, RoutedModule):
        return module
    cls: Any = type(module)
    plain: type[nn.Module] = cls
    tenant: type[nn.Module]
    if kind is not None:
        tenant = kind
    elif cls is nn.Linear:
        tenant = RoutedLinear
    elif cls is Conv1D:
        tenant = RoutedConv1D
    elif cls is nn.Embedding:
        tenant = RoutedEmbedding
    elif isinstance(module, nn.Embedding) and not reads_weight_itself(cls):
        tenant, plain = type(cls.__name__, (cls, RoutedEmbedding), {}), nn.Embedding
    elif isinstance(module, nn.Linear):  # quantized: it makes the base's product in its own way
        tenant, plain = _routed_linear(cls), cls
    else:
        tenant = _other_tenant(cls)
    change_class(module, tenant)
    assert isinstance(module, RoutedModule)
    module.dm_router, module.dm_packed, module.dm_overlay = router, {}, {}
    module.dm_plain_class, module.dm_number = plain, compiled.register(module)
    return module


@cache
def _routed_linear(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (RoutedLinear, cls), {})


@cache
def _other_tenant(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (RoutedModule, cls), {})


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _has_rows(y: Any, batch: int) -> bool:
    """Whether it is what routers of experts give: tensors with as many rows each, for any row."""
    sizes = {t.shape[:1] for t in y if isinstance(t, Tensor)} if isinstance(y, tuple) else set()
    tensors = isinstance(y, tuple) and all(isinstance(t, Tensor) for t in y)
    return tensors and len(sizes) == 1 and all(size and size[0] % batch == 0 for size in sizes)


def _placed(y: Any, rows: Tensor, part: Any) -> Any:
    """`y`, one tensor or several, with `part` in these rows."""
    if isinstance(y, tuple):
        return tuple(_placed(ours, rows, its) for ours, its in zip(y, part, strict=True))
    return y.index_copy(0, rows, part.expand(len(rows), *part.shape[1:]).to(y.dtype))


def _to_front(value: Any, dim: int, length: int) -> Any:
    """`value` with dimension `dim` first, if it has `length` entries there."""
    if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == length:
        return value.movedim(dim, 0)
    return value


def _pick(value: Any, rows: Tensor, length: int) -> Any:
    """The rows of what has `length` of them, more than one; anything else as it is."""
    if length > 1 and isinstance(value, Tensor) and value.dim() and value.shape[0] == length:
        return value[rows]
    return value


class ExpertDeltas(dict[str, PackedDelta]):
    """What one delta has for one module, by 3-D parameter."""

    def move(self, device: torch.device) -> None:
        """To `device`, in place."""
        for packed in self.values():
            packed.move(device)


class RoutedExperts(RoutedModule):
    """Experts whose projections have the row's own deltas; `dm_packed` holds `ExpertDeltas`."""

    def _with_delta(
        self,
        delta: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        base: Tensor | None,
    ) -> Any:
        module: Any = self._with(self.dm_overlay.get(delta, {}))
        packed: Any = self.dm_packed.get(delta, {})

        def project(name: str, x: Tensor, ends: Tensor) -> Tensor:
            y = base_product(module, name, weight_of(module, name), x, ends)
            return add_delta(y, packed[name], x, ends) if name in packed else y

        compute: Any = partial(experts_forward, module, project=project)
        with self.dm_router.using(Route([delta])):  # children see these rows alone
            return compute(*args, **kwargs)


@cache
def routed_experts_class(plain: Any) -> type[nn.Module]:
    """The tenant of an experts class."""
    return type(plain.__name__, (RoutedExperts, plain), {})
