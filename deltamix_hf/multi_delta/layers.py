"""Named deltas of one layer, and which rows of a call take which.

The base's product is made for the whole batch, as the plain base makes it, and each delta adds its
part to its rows: rows of the base stay what they are, bit for bit. Whatever a delta stores whole
(norms, biases, heads) is routed the same way: the module is run once more on that delta's rows with
that delta's tensors in place of the base's.

Of fused experts, rows that take the same delta are computed together. Not all of them at once: the
kernels' tables tell rows apart by one number, here the expert, and these rows differ by delta too.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import DeltaMixError
from ..nn import compiled
from ..nn.delta_module import DeltaModule, first_tensor, joined_class
from ..nn.experts import DeltaExperts, is_experts
from ..nn.layers import change_class, delta_class, routable_class, weight_of
from ..quantization.packed_delta import PackedDelta
from .grouped import add_together, run_grouped
from .routing import PackedRoute, Route, Router
from .row_layout import EACH, SHARED

PARAMETRIZED = "parametrizations"  # where torch keeps what it computes a weight of
Args = tuple[Any, ...]  # of a module's call
Kwargs = dict[str, Any]
ExpertDeltas = dict[str, PackedDelta]  # a delta to one module of experts, by 3-D parameter
Overlay = dict[str, Tensor]  # name of a parameter or buffer of one module -> its value


class RoutedDeltas:
    """What each delta, by name, puts beside one layer's base weights or in their place."""

    def __init__(self, router: Router, layout: str):
        self.router = router  # says which rows take which delta
        self.layout = layout  # of rows in what the module gets, by `row_layout.observe`
        self.packed: dict[str, PackedDelta | ExpertDeltas] = {}
        self.overlay: dict[str, Overlay] = {}  # without the weight, if the delta packs it
        self.table: Any = None  # a `grouped.LayerTable`, once `tried` what the kernels can do
        self.tried = self.captured = False  # captured: a CUDA graph was recorded with it

    def keeps_rows(self, module: DeltaModule, x: Tensor, batch: int) -> bool:
        """Whether x has as many entries for each row of the batch, in order, or one for all."""
        length = len(x) if x.dim() else 0
        if self.layout and isinstance(module, nn.Embedding) and length in (1, batch):
            # Positions, for all rows or for each. BART's embedding gets tokens and looks them up.
            own = module.dm_plain_class is not nn.Embedding
            return own or length == batch or self.layout == SHARED
        return self.layout == EACH and length > 0 and length % batch == 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "table": None, "tried": False, "captured": False}  # new addresses

    def run(self, module: DeltaModule, args: Args, kwargs: Kwargs) -> Any:
        """Return the output of `module` by the route now in force."""
        route = self.router.route
        if isinstance(route, PackedRoute) and not route.alike:
            seen = route.kept if module is route.head else route.tokens
            return self._by_token(module, seen, args, kwargs)
        together = run_grouped(module, args, kwargs)
        if together is not None:
            return together
        if not any(map(self.touched, route.names)):
            return module.plain(*args, **kwargs)
        if route.alike:
            return self.output(module, route.names[0], None, args, kwargs)
        return self._by_row(module, route, args, kwargs)

    def run_compiled(self, module: DeltaModule, x: Tensor) -> Tensor:
        """Return the output for x [rows, ...], whose rows may be those that were named, repeated.

        Raises DeltaMixError if the module sees one row for the whole batch.
        """
        route = self.router.route
        fits = x.dim() > 0 and x.shape[0] % len(route.rows) == 0
        route = route.of_batch(x.shape[0]) if fits else route
        route.compiled = True
        with self.router.using(route):
            y: Tensor = self.run(module, (x,), {})
        if y.shape[:1] != x.shape[:1]:
            raise DeltaMixError(
                f"a {module.dm_plain_class.__name__} sees one row for the whole batch, which a "
                "compiled model cannot give different deltas: pass one for each row (position_ids)"
            )
        return y

    def touched(self, delta: str) -> bool:
        """Whether a delta changes this layer."""
        return delta in self.packed or delta in self.overlay

    def changes_weight(self) -> bool:
        """Whether the route in force puts something beside the weight or in its place."""
        names = self.router.route.names
        return any(n in self.packed or "weight" in self.overlay.get(n, {}) for n in names)

    def changes_bias(self) -> bool:
        """Whether the route in force puts something in the bias's place."""
        return any("bias" in self.overlay.get(name, {}) for name in self.router.route.names)

    def weight(self, module: DeltaModule) -> Tensor:
        """Return the module's weight by the route in force; DeltaMixError if rows differ."""
        if not self.changes_weight():
            return weight_of(module)
        delta = self._one_delta(module)
        whole = self.overlay.get(delta, {}).get("weight")
        return module.merged_weight(other=self.packed[delta]) if whole is None else whole

    def bias(self, module: DeltaModule, base: Any) -> Any:
        """Return the module's bias [m] by the route in force; DeltaMixError if rows differ."""
        if not self.changes_bias():
            return base
        return self.overlay[self._one_delta(module)]["bias"]

    def _one_delta(self, module: DeltaModule) -> str:
        """Return the delta of all rows, for who reads a weight; DeltaMixError if rows differ."""
        route = self.router.route
        if not route.alike:
            raise DeltaMixError(
                f"the weight of a {module.dm_plain_class.__name__} is read, not its output, which "
                "cannot differ by row: give all rows the same delta"
            )
        return route.names[0]

    def output(self, module: DeltaModule, delta: str, base: Any, args: Args, kwargs: Kwargs) -> Any:
        """Return the output with one delta; `base`, if known, is that of the base's tensors."""
        overlay = self.overlay.get(delta, {})
        with self.router.using(Route([delta])):  # children see these rows alone
            base = None if overlay else base
            shadow, packed = module.with_tensors(overlay), self.packed.get(delta)
            return shadow.with_delta(packed, base, *args, **kwargs)

    def _by_row(self, module: DeltaModule, route: Route, args: Args, kwargs: Kwargs) -> Any:
        """Return the output for rows with different deltas, one after the other."""
        if not (args or kwargs):  # it makes a weight
            self._one_delta(module)  # raises
        with self.router.using(Route([None]) if PARAMETRIZED in module._modules else None):
            y = module.plain(*args, **kwargs)
        x, batch = first_tensor(args, kwargs), len(route.rows)
        router = len(args) == 1 and not kwargs and not any(module.children())
        known = isinstance(y, Tensor) or (router and isinstance(y, tuple) and _has_rows(y, batch))
        if isinstance(y, dict):  # of a part with a parameter of its own (wav2vec 2.0's mask)
            caches = y.get("past_key_values") or kwargs.get("past_key_values")  # it would run twice
            known = not caches and _has_rows(y, batch) and len(tree_leaves(y)[0]) == batch
        if not (known and self.keeps_rows(module, x, batch)):
            raise DeltaMixError(
                f"a {module.dm_plain_class.__name__} that maps {list(x.shape)} to a "
                f"{type(y).__name__} does not see the {batch} rows of the batch apart; give all "
                "rows the same delta"
            )
        if (length := len(x)) == 1 < batch:  # positions, say
            y = y.expand(batch, *y.shape[1:])
        size = len(tree_leaves(y)[0])
        taken, given = (route.groups(n, x.device) for n in (max(length, batch), size))
        done = add_together(module, y, x, taken) if length == size else set()
        for (delta, rows), (_, places) in zip(taken, given, strict=True):
            if self.touched(delta) and delta not in done:
                chosen = _each(_pick, args, kwargs, rows, length)
                base = y[places] if isinstance(y, Tensor) else None
                y = _placed(y, places, self.output(module, delta, base, *chosen))
        return y

    def _by_token(self, module: DeltaModule, route: Route, args: Args, kwargs: Kwargs) -> Any:
        """Return the output for one row of many tokens, as if each token were a row of its own."""
        if not any(map(self.touched, route.names)):
            return module.plain(*args, **kwargs)
        x, length = first_tensor(args, kwargs), len(route.rows)
        found = [dim for dim, size in enumerate(x.shape) if size == length]
        with self.router.using(route):
            if route.alike or x.shape[0] > 1:  # alike, or flattened: rows already
                return self.run(module, args, kwargs)
            if not found:
                raise DeltaMixError(
                    f"a {module.dm_plain_class.__name__} that sees {list(x.shape)} does not see "
                    f"the {length} tokens of the batch apart; give all requests the same delta"
                )
            # [1, tokens, heads, ...] and [1, heads, tokens, ...] both have the tokens outermost
            # in memory, which tells them apart where there are as many heads as tokens.
            dim = max(found, key=x.stride)
            turned = _each(_to_front, args, kwargs, dim, length)
            return self.run(module, *turned).movedim(0, dim)

    def check_loaded(self, module: DeltaModule, state: dict[str, Tensor], prefix: str) -> None:
        """Raise DeltaMixError for another value of what deltas replace: nobody would see it."""
        for leaf in {leaf for overlay in self.overlay.values() for leaf in overlay}:
            found, own = state.get(f"{prefix}{leaf}"), module._parameters.get(leaf)
            if found is not None and own is not None and not found.to(own).equal(own):
                raise DeltaMixError(
                    f"{prefix}{leaf} of the base is to be replaced (an adapter's biases?), and a "
                    "delta has another in its place: load the delta repo alone"
                )

    def moved(self, module: DeltaModule, fn: Callable[[Tensor], Tensor]) -> None:
        """Send everything through `fn`, or after the module's tensors, which went through it."""
        self.table, self.tried, self.captured = None, False, False  # new addresses
        for overlay in self.overlay.values():
            overlay.update({key: fn(value) for key, value in overlay.items()})
        own = (*module._parameters.values(), *module._buffers.values())
        devices = [tensor.device for tensor in own if tensor is not None]
        for packed in self.packed.values() if devices else ():
            for one in packed.values() if isinstance(packed, dict) else [packed]:
                one.move(devices[0])  # in place: tied modules share it


def make_routed(module: nn.Module, router: Router, layout: str) -> DeltaModule:
    """Change the class of a module of the base in place, so that it takes named deltas."""
    cls = type(module)
    experts = is_experts(module)
    change_class(module, joined_class(cls, (DeltaExperts, cls)) if experts else routable_class(cls))
    assert isinstance(module, DeltaModule)
    module.dm_row_deltas = RoutedDeltas(router, layout)
    module.dm_number = compiled.register(module)
    module.__dict__["dm_visible"] = delta_class(cls) is not None
    return module


def _has_rows(y: Any, batch: int) -> bool:
    """Whether it is what routers of experts give: tensors with as many rows each, for any row."""
    found = tree_leaves(y)
    known = all(isinstance(t, Tensor) and t.dim() for t in found)
    sizes = {len(t) for t in found if known}
    return known and len(sizes) == 1 and max(sizes) % batch == 0


def _placed(y: Any, rows: Tensor, part: Any) -> Any:
    """`y`, one tensor or several, with `part` in these rows."""

    def place(ours: Tensor, its: Tensor) -> Tensor:
        return ours.index_copy(0, rows, its.expand(len(rows), *its.shape[1:]).to(ours.dtype))

    return tree_map(place, y, part)


def _each(fn: Callable[..., Any], args: Args, kwargs: Kwargs, *how: Any) -> tuple[Args, Kwargs]:
    """The arguments of a call, all sent through `fn`."""
    named = {key: fn(value, *how) for key, value in kwargs.items()}
    return tuple(fn(value, *how) for value in args), named


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
