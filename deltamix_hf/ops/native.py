"""The delta product on a CPU by `native.c`, which decodes packed codes in registers.

Where look-ups (`lookup.py`) write every level as float32 and read it again, here a level meets the
rows it multiplies in a register: a byte of codes is read once for up to eight rows. Several deltas,
each with rows of its own, make one call. A row's bits depend neither on the rows beside it nor on
the number of threads, up to `MANY_ROWS` rows of one delta; more are multiplied by BLAS, with
factors decoded once.
"""

import ctypes
from array import array
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from ..quantization.packed_delta import PackedDelta
from ..quantization.packed_layout import DTYPES, part_shapes, scale_counts
from .native_build import Unusable, build
from .packed_op import state_of

MANY_ROWS = 32  # of one delta, from which on decoding once and BLAS is faster
_SCRATCH = (0, 0)  # what `native.c` fills in itself
_FIELDS = 11  # of an `Item` that do not differ from call to call; then rows, x, tokens, y, scratch
_TOLERANCE = 1e-4  # of the largest output; errors are 1e-6, a wrong bit or scale is above 0.01

logger = logging.get_logger(__name__)

Words = tuple[int, ...]
"""The fields of an `Item` in `native.c` but rows, x and y: numbers and addresses, 8 bytes each."""

_found: list[ctypes.CDLL | None] = []  # the library, once it was asked for
_building = Lock()
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by `v`, which lives with its model


def library() -> ctypes.CDLL | None:
    """Return the built `native.c`; None where there is none, which is said once."""
    if not _found:
        if type(torch.empty(0)) is not Tensor:  # while a compiler traces, it cannot be tried
            return None
        with _building:
            if not _found:
                _found.append(_build())
    return _found[0]


def _build() -> ctypes.CDLL | None:
    try:
        return build(_check)
    except Unusable as error:
        logger.warning(
            "no native op for deltas on a CPU: %s; table look-ups run instead, two to ten times "
            "slower", error,
        )  # fmt: skip
        return None


def words_of(packed: PackedDelta) -> list[Words | None] | None:
    """Return a matrix, or each expert's or None, as `native.c` takes it; None: it cannot read it.

    It knows the Gaussian codebook, and scale groups of 8 elements or more whose size is a power
    of 2. Raises ValueError for tensors that do not have the sizes of their layout.
    """
    here: Any = packed.v.data_ptr(), packed.u.data_ptr(), packed.ranks.data_ptr(), packed.runs
    if packed.counts is not None:  # the runs are in there
        here += state_of(packed.ranks), state_of(packed.counts)
    found = _known.get(packed.v)
    if found is None or found[0] != here:
        kept: list[array[int]] = []
        words = _each_words(packed, kept) if _can_read(packed) else None
        found = _known[packed.v] = here, words, kept
    return found[1]


def _can_read(packed: PackedDelta) -> bool:
    groups = all(g % 8 == 0 and g & (g - 1) == 0 for g in packed.group_sizes)
    held = packed.tensors.values()
    plain = all(t.device.type == "cpu" and readable(t) and t.is_contiguous() for t in held)
    return packed.zeros is None and groups and plain


def _each_words(packed: PackedDelta, kept: "list[array[int]]") -> list[Words | None]:
    found: list[Words | None] = []
    for own in packed.untied().split():
        if own is None:
            found.append(None)
            continue
        layout = own.m, own.n, own.runs, own.group_sizes
        for part, shape in part_shapes(*layout, own.quantizer).items():
            held = own.tensors[part]
            if tuple(held.shape) != shape or held.dtype != DTYPES[part]:  # it would read elsewhere
                raise ValueError(
                    f"packed tensor {part} is {held.dtype} {list(held.shape)}, its layout needs "
                    f"{DTYPES[part]} {list(shape)}"
                )
        kept.append(array("i", [number for run in own.runs for number in run]))
        bits = [size.bit_length() - 1 if size else 0 for size in own.group_sizes]
        parts = (tensor.data_ptr() for tensor in (own.v, own.u, own.ranks))
        sizes = own.rank, len(own.runs), own.ranks.shape[1], own.n, own.m
        found.append((*parts, kept[-1].buffer_info()[0], *sizes, *bits))
    return found


def readable(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory of its own: no fake, no subclass, none within `vmap`."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def products(
    x: Tensor, parts: Sequence[tuple[Words | None, int]], transposed: bool = False
) -> Tensor:
    """Multiply x [S, n], so many rows by each part in turn, in one call: [S, m] in x's dtype.

    Each row gives (x·V̂ᵀ)·Ûᵀ, or, `transposed`, (x·Û)·V̂ [n] for x [m]; 0 where a part is None. One
    at least is not. Raises ValueError for rows of another length.
    """
    wide = x.float().contiguous().resolve_neg()
    known = [words for words, _ in parts if words is not None]
    entered, length = known[0][7 + transposed], known[0][8 - transposed]
    if any(words[7 + transposed] != wide.shape[1] for words in known):
        raise ValueError(f"x is {list(x.shape)}, the deltas multiply rows of {entered}")
    y = wide.new_empty(len(x), length)
    x_start, y_start = wide.data_ptr(), y.data_ptr()
    items, start = array("q"), 0
    for words, count in parts:
        if words is None:
            y[start : start + count] = 0
        elif count > MANY_ROWS:
            some = slice(start, start + count)
            with torch.autocast("cpu", enabled=False):
                h = wide[some] @ _decoded(words, int(transposed)).T
                torch.mm(h, _decoded(words, int(not transposed)), out=y[some])
        elif count:
            here = x_start + 4 * start * entered, 0, y_start + 4 * start * length
            items.extend((*words, count, *here, *_SCRATCH))
        start += count
    _call(items, transposed)
    return y.to(x.dtype)


def add_products(outputs: Sequence[Tensor], x: Tensor, each: Sequence[Words]) -> None:
    """Add to outputs [..., m] what several deltas make of one x [..., n], in place, in one call.

    Raises ValueError for rows of another length.
    """
    flat = x.reshape(-1, x.shape[-1])
    fits = all(y.dtype == torch.float32 and y.is_contiguous() for y in outputs)
    if not fits or len(flat) > MANY_ROWS:
        for y, words in zip(outputs, each, strict=True):
            y += products(flat, [(words, len(flat))]).view(y.shape)
        return
    wide = flat.float().contiguous().resolve_neg()
    start, items = wide.data_ptr(), array("q")
    for y, words in zip(outputs, each, strict=True):
        if words[7] != wide.shape[1]:
            raise ValueError(f"x is {list(x.shape)}, a delta multiplies rows of {words[7]}")
        items.extend((*words, len(wide), start, 0, y.data_ptr(), *_SCRATCH))
    _call(items, False, add=True)


def rows(index: Tensor, parts: Sequence[tuple[Words | None, int]]) -> Tensor:
    """Decode rows of Û·V̂: entries of `index` int64 [S], so many of each part in turn.

    Returns float32 [S, n]. Raises IndexError for an index outside 0 .. m − 1.
    """
    flat = index.contiguous()
    n, m = next(words[7:9] for words, _ in parts if words is not None)
    y = torch.empty(len(flat), n, dtype=torch.float32, device="cpu")
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < m:
        raise IndexError(f"an index is outside 0..{m - 1}, the rows of the embedding")
    items, start = array("q"), 0
    for words, count in parts:
        if words is None:
            y[start : start + count] = 0
        elif count:
            tokens, out = flat.data_ptr() + 8 * start, y.data_ptr() + 4 * start * n
            items.extend((*words, count, 0, tokens, out, *_SCRATCH))
        start += count
    _call(items, True)  # from U to V
    return y


def _call(items: "array[int]", transposed: bool, add: bool = False) -> None:
    """Run the products of all items; MemoryError if there is no room for what is between them."""
    count = len(items) // (_FIELDS + 4 + len(_SCRATCH))
    if count:
        address, threads = items.buffer_info()[0], torch.get_num_threads()
        if _built().dm_products(count, address, transposed, add, threads):
            raise MemoryError("no memory for a product with packed factors")


def _decoded(words: Words, side: int) -> Tensor:
    """Decode V̂ (side 0) or Ûᵀ (1), float32 [k, length]."""
    out = torch.empty(words[4], words[7 + side], dtype=torch.float32, device="cpu")
    item = array("q", (*words, 0, 0, 0, 0, *_SCRATCH))
    _built().dm_decode(item.buffer_info()[0], side, out.data_ptr(), torch.get_num_threads())
    return out


def _built() -> ctypes.CDLL:
    found = library()
    assert found is not None, "who calls has asked `dispatch.choose`"
    return found


def _check(found: ctypes.CDLL) -> None:
    """Compare products of every width with float64; Unusable if they differ."""
    numbers = (ctypes.c_int,) * 3
    found.dm_products.argtypes = ctypes.c_int64, ctypes.c_void_p, *numbers
    found.dm_decode.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
    found.dm_decode.restype = None
    random, (m, n) = torch.Generator("cpu").manual_seed(0), (75, 203)
    ours: Any = {"device": "cpu", "generator": random}  # whatever the defaults are
    runs = [(2, width, 9 - width) for width in range(8, 0, -1)]
    for group_sizes in (0, 0), (16, 32):
        groups = sum(scale_counts(m, n, group_sizes))
        v, u = (
            torch.randint(256, (72, -(-size // 8)), dtype=torch.uint8, **ours) for size in (n, m)
        )
        ranks = torch.rand(16, 1 + groups, dtype=torch.float32, **ours).bfloat16()
        packed = PackedDelta(m, n, group_sizes, runs, v, u, ranks.view(torch.int16))
        exact, kept = packed.dense().double(), list["array[int]"]()
        (words,) = _each_words(packed, kept)
        assert words is not None
        for rows, transposed in (1, 0), (1, 1), (13, 0), (13, 1):
            factor = exact if transposed else exact.T
            x = torch.randn(rows, len(factor), dtype=torch.float32, **ours)
            y = x.new_full((rows, factor.shape[1]), torch.nan)
            here = rows, x.data_ptr(), 0, y.data_ptr()
            item = array("q", (*words, *here, *_SCRATCH))
            found.dm_products(1, item.buffer_info()[0], transposed, 0, 1)
            expected = x.double() @ factor
            error = float((y - expected).abs().max() / expected.abs().max())
            if not error <= _TOLERANCE:
                raise Unusable(f"its products are off by {error:.2g} of the largest")
