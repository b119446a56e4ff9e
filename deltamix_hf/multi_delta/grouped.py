"""All rows' deltas at once: what a layer runs by the grouped kernels instead of a loop.

On a CPU that is one call of the native op, `add_together`.

On a GPU, a layer has a table of addresses by slot (`routing.py`): of packed factors and biases, or,
for norms, of the vectors that a delta puts in place of the base's. The launches read the table and
the plan of the batch on the device, so a captured CUDA graph follows when either changes. Deltas
the kernels do not know (min-max grids, whole weights) and gradients take the loop of
`RoutedDeltas`; a graph cannot, because it would keep the deltas it was recorded with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import DeltaMixError
from ..nn.delta_module import first_tensor
from ..nn.layers import DeltaEmbedding, DeltaLinear, is_linear, weight_of
from ..ops import native
from ..ops.dispatch import (
    NATIVE,
    TRITON,
    TRITON_DTYPES,
    capturing,
    choose,
    kernel_packed,
    triton_kernels,
)
from .routing import RowSlots


class FactorTable:
    """Packed factors and biases of a linear layer, or packed rows of an embedding."""

    def __init__(self, module: Any, device: torch.device):
        self.names: set[str] = set()  # the deltas that are in it
        m, n = module.weight.shape
        self.linear, self.dtype = isinstance(module, nn.Linear), module.weight.dtype
        size = module.dm_row_deltas.router.slots.size
        self.table = triton_kernels().Table(size, m, n, device, embedding=not self.linear)

    def enter(self, slot: int, packed: Any, overlay: dict[str, Tensor]) -> bool:
        """Fill a slot and return True, or clear it if there is nothing, or nothing known."""
        self.table.clear(slot)
        known = not overlay or (self.linear and overlay.keys() == {"bias"})
        if (packed is None and not overlay) or not known:
            return False
        factors = None if packed is None else kernel_packed(packed)
        return self.table.put(slot, factors, self.dtype, overlay.get("bias"))

    def is_long(self, x: Tensor, deltas: int) -> bool:
        """Whether x has so many rows a delta that dequantizing its factors for each is faster."""
        return self.linear and x.numel() > deltas * triton_kernels().DECODE_ROWS * x.shape[-1]

    def run(self, module: Any, x: Tensor, plan: RowSlots) -> Tensor:
        """Return the module's output, each row by its own delta."""
        k, y = triton_kernels(), module.plain(x).contiguous()
        self.table.captured |= capturing(x.device)
        rows = k.Rows(plan.order, plan.starts, plan.slots)
        if self.linear:
            k.grouped_add(y, x, self.table, rows, weight_of(module, "bias"))
        else:
            k.grouped_embed(y, x.long(), self.table, rows)
        return y


class VectorTable:
    """Vectors [n] of a norm, which multiplies or adds them to its rows of n; as `FactorTable`."""

    def __init__(self, module: Any, device: torch.device):
        self.names: set[str] = set()
        size = module.dm_row_deltas.router.slots.size
        self.addresses = {
            key: torch.zeros(size, dtype=torch.int64, device=device) for key in _tensors(module)
        }

    def enter(self, slot: int, packed: Any, overlay: dict[str, Tensor]) -> bool:
        for key, addresses in self.addresses.items():
            addresses[slot] = overlay[key].data_ptr() if key in overlay else 0
        return bool(overlay)

    def run(self, module: Any, x: Tensor, plan: RowSlots) -> Tensor:
        shape = plan.rows, *[1] * (x.dim() - 2), x.shape[-1]
        own = {
            key: triton_kernels().gather(getattr(module, key), addresses, plan.of_rows).view(shape)
            for key, addresses in self.addresses.items()
        }
        return module.with_tensors(own).plain(x)


LayerTable = FactorTable | VectorTable


def run_grouped(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the output by launches that serve all rows together; None: take the loop.

    Raises DeltaMixError if a CUDA graph is being recorded, and would keep its deltas.
    """
    x = first_tensor(args, kwargs)
    if x is None:
        return None
    recording = capturing(x.device)
    found = _run_grouped(module, x, recording) if len(args) == 1 and not kwargs else None
    if recording:
        deltas = module.dm_row_deltas
        deltas.captured = True
        if found is None and (deltas.packed or deltas.overlay):
            raise _not_in_a_graph(module)
    return found


def add_together(
    module: Any, y: Tensor, x: Tensor, groups: Sequence[tuple[str, Tensor]]
) -> set[str]:
    """Add deltas' parts to y [B, ..., m], the base's output for x [B, ...], in one native call.

    `groups` are names and rows, int64. Returns the names of those added, in place.
    """
    looked_up = isinstance(module, DeltaEmbedding) and module.dm_plain_class is nn.Embedding
    plain = module.dm_plain_class
    linear = plain is Conv1D or (isinstance(module, DeltaLinear) and is_linear(plain))
    unknown = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    runs = (looked_up or linear) and not unknown and y.dtype != torch.float64
    if not (runs and choose(x.device) == NATIVE and native.readable(x)):
        return set()
    deltas, own = module.dm_row_deltas, {"bias"} if linear else set()
    names: set[str] = set()
    order, parts = [], []
    tokens = y.shape[:-1].numel() // len(y)  # of a row
    for name, rows in groups:
        packed, overlay = deltas.packed.get(name), deltas.overlay.get(name, {})
        words = native.words_of(packed) if packed and overlay.keys() <= own else None
        if words is None:
            continue
        if overlay:  # the base's bias is in y
            y[rows] = module.with_tensors(overlay).plain(x[rows])
        names.add(name)
        order.append(rows)
        parts.append((words[0], len(rows) * tokens))
    if not names:
        return names
    places = torch.cat(order)
    if looked_up:
        added = native.rows(x[places].flatten().long(), parts).to(y.dtype)
    else:
        added = native.products(x[places].flatten(0, -2), parts)
    y.index_add_(0, places, added.view(len(places), *y.shape[1:]))
    return names


def refresh(module: Any, name: str) -> None:
    """Let the module's table follow after delta `name` came or went.

    Raises DeltaMixError if a CUDA graph was recorded, and it cannot run this delta.
    """
    deltas = module.dm_row_deltas
    table: LayerTable | None = deltas.table
    if table is not None:
        _enter(module, table, name)
    if deltas.touched(name) and deltas.captured and (table is None or name not in table.names):
        raise _not_in_a_graph(module)


def table_bytes(module: Any, packed: Any) -> int:
    """Count the bytes of a matrix' codes in a table's own order; `module` is None for an expert."""
    k, looked_up = triton_kernels(), isinstance(module, nn.Embedding)
    plain: Any = getattr(module, "dm_plain_class", type(module))
    linear = module is None or is_linear(plain)
    grouped = any(packed.group_sizes[: 1 if looked_up else 2])
    if k is None or packed.zeros is not None or grouped or not (linear or looked_up):
        return 0
    runs = [(count, u, v) if looked_up else (count, v, u) for count, v, u in packed.runs]
    widths = {b: k.prepack.padded(count) for b, count in k.prepack.width_counts(runs).items()}
    slots, columns = sum(widths.values()), -(-(packed.n if looked_up else packed.m) // 8)
    size = 128 + columns * sum(bits * count for bits, count in widths.items())
    if looked_up:  # its U stays as it is
        return size + 12 * slots
    tiles = k.decode_plan.v_tiles([runs], 0, slots - packed.rank)
    return size + len(packed.v) * k.prepack.padded(-(-packed.n // 8)) + 8 * slots + 16 * len(tiles)


def _enter(module: Any, table: LayerTable, name: str) -> None:
    """Enter delta `name` into the module's table as it now is, or clear its slot."""
    deltas = module.dm_row_deltas
    slot = deltas.router.slots.get(name)
    if slot is None:  # more deltas than slots
        return
    table.names.discard(name)
    if table.enter(slot, deltas.packed.get(name), deltas.overlay.get(name, {})):
        table.names.add(name)


def _run_grouped(module: Any, x: Tensor, recording: bool) -> Tensor | None:
    unknown = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    if choose(x.device) != TRITON or unknown or x.dim() == 0:
        return None
    deltas = module.dm_row_deltas
    if not deltas.tried and not recording:  # when it first runs: trying a norm takes a while
        deltas.table = triton_kernels().persistent(x.device, lambda: _new_table(module, x))
        deltas.tried = True
    table, router = deltas.table, deltas.router
    route, rows = router.route, x.shape[0]
    named = len(route.rows)
    by_row = rows % named == 0 and deltas.keeps_rows(module, x, named)
    if table is None or not (by_row or (route.alike and not recording)):
        return None
    here = {*deltas.packed, *deltas.overlay}
    plan = router.plan(rows, x.device)
    if not recording:
        here &= set(route.names)
        if not here or (isinstance(table, FactorTable) and table.is_long(x, len(here))):
            return None
    if rows == 0 or not here <= table.names:
        return None
    return table.run(module, x, plan)


def _new_table(module: Any, x: Tensor) -> LayerTable | None:
    weights, deltas = _tensors(module), module.dm_row_deltas
    if not all(t.dtype in TRITON_DTYPES and t.device == x.device for t in weights.values()):
        return None
    packs = isinstance(module, DeltaEmbedding) or is_linear(module.dm_plain_class)
    if not packs and (x.dim() < 2 or not _multiplies_rows(module, x)):
        return None
    table: LayerTable = (FactorTable if packs else VectorTable)(module, x.device)
    for name in {*deltas.packed, *deltas.overlay}:
        _enter(module, table, name)
    return table


def _tensors(module: Any) -> dict[str, Tensor]:
    return {key: t for key, t in module._parameters.items() if t is not None}


@torch.no_grad()
def _multiplies_rows(module: Any, x: Tensor) -> bool:
    """Whether vectors [rows, 1, n] in place of [n] give each row the same bits: tried out."""
    own, n = _tensors(module), x.shape[-1]
    if not own or module._modules or module._buffers or any(t.shape != (n,) for t in own.values()):
        return False
    probe = torch.linspace(-3, 3, 2 * n, device=x.device).to(x.dtype).view(2, 1, n)
    other = {key: t.flip(0) + 0.37 for key, t in own.items()}
    both = {key: torch.stack([t, other[key]])[:, None] for key, t in own.items()}
    try:
        found = module.with_tensors(both).plain(probe)
        alone = zip((own, other), probe, strict=True)
        each = [module.with_tensors(tensors).plain(row[None]) for tensors, row in alone]
        return torch.equal(found, torch.cat(each))
    except (RuntimeError, ValueError, TypeError):  # it does something else
        return False


def _not_in_a_graph(module: Any) -> DeltaMixError:
    return DeltaMixError(
        f"a CUDA graph would keep the deltas that a {module.dm_plain_class.__name__} had when it "
        "was recorded: choose the Triton kernels, run once without gradients before recording, and "
        "use no float32 model and no deltas on min-max grids or with whole weights"
    )
