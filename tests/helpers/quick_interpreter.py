"""Triton's interpreter with less bookkeeping and the same numbers, bit for bit.

Numpy takes little of its time. At every call of a device function it patches all of
`triton.language`, which was done already when the launch began, and never takes that back: once a
launch for each module is enough, and halves the time. Types and shapes of blocks are made, named
and checked anew for every tensor; integers are added a second time in 64 bits, for an assertion
that only `debug` lets it make. Without both, ten files of tests that use kernels take 172 CPU
seconds in place of 343.
"""

from __future__ import annotations

import math
from typing import Any

from triton.language import core, semantic
from triton.runtime import interpreter

PLAIN = {int, float, bool, str, type(None), core.dtype, core.block_type, core.tensor}


def quicken() -> None:
    """Patch the interpreter of this process, for good; call it once."""
    assert not interpreter.InterpreterOptions().debug
    _patch_language_once()
    _keep_types()
    _keep_numpy_types()

    _broadcast_where_shapes_differ()
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


def _patch_language_once() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # namespaces of modules, in the launch that runs

    def patch_once(function: Any) -> Any:
        namespace = id(function.__globals__)
        if namespace in patched:
            return None
        patched.add(namespace)
        return patch(function)

    def launch_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched


def _keep_types() -> None:
    """One object for a shape, with its number of elements, and as tensors show it."""
    make, unwrap, equal = core.block_type.__init__, core._unwrap_if_constexpr, core.dtype.__eq__
    blocks: dict[Any, Any] = {}  # element, *shape -> attributes of the type
    shapes: dict[tuple[int, ...], Any] = {}
    shown: dict[int, Any] = {}  # by the id of a shape of `shapes`

    def show(shape: Any) -> Any:
        sizes = core.tuple([core.constexpr(size) for size in shape])
        return sizes, core.constexpr(math.prod(shape))

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        known = blocks.get((element_ty.name, *shape))
        if known is None:
            make(self, element_ty, shape)
            sizes = tuple(self.shape)
            shape = shapes.setdefault(sizes, self.shape)
            shown.setdefault(id(shape), show(shape))
            known = blocks[(element_ty.name, *sizes)] = shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.shape, self.numel = shown[id(type.shape)] if type.is_block() else scalar
        self.handle, self.type, self.dtype = handle, type, type.scalar

    scalar = show(())
    core.block_type.__init__ = block
    core.tensor.__init__ = tensor
    core._unwrap_if_constexpr = lambda o: o if type(o) in PLAIN else unwrap(o)
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _broadcast_where_shapes_differ() -> None:
    """Triton compares a tuple with a list, so it broadcasts whatever the shapes."""
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            shape = lhs.handle.data.shape
            if shape == rhs.handle.data.shape == tuple(lhs.type.shape):
                return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_others


def _keep_numpy_types() -> None:
    find, kept = interpreter._get_np_dtype, {}

    def numpy_type(dtype: Any) -> Any:
        name = dtype.name
        if name not in kept:
            kept[name] = find(dtype)
        return kept[name]

    interpreter._get_np_dtype = numpy_type
