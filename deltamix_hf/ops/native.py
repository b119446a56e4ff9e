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


class _Known:
    """A matrix or all experts as `native.c` takes them, and the arrays whose addresses are there.

    `words` is None for what it cannot read.
    """

    def __init__(self, packed: PackedDelta, of: list[object]):
        self.of, self.words = of, None
        self.kept: list[array[int]] = []
        if packed.zeros is None and packed.v.device.type == "cpu" and self._known(packed):
            each = packed.untied().split()
            self.words = [None if own is None else self._words(own) for own in each]

    def _known(self, packed: PackedDelta) -> bool:
        """Whether the tensors have memory, and the groups sizes, that `native.c` can read."""
        groups = all(g % 8 == 0 and g & (g - 1) == 0 for g in packed.group_sizes)
        held = packed.tensors.values()
        return groups and all(readable(tensor) and tensor.is_contiguous() for tensor in held)

    def _words(self, packed: PackedDelta) -> Words:
        layout = packed.m, packed.n, packed.runs, packed.group_sizes
        for part, shape in part_shapes(*layout, packed.quantizer).items():
            held = packed.tensors[part]
            if tuple(held.shape) != shape or held.dtype != DTYPES[part]:  # it would read elsewhere
                raise ValueError(
                    f"packed tensor {part} is {held.dtype} {list(held.shape)}, its layout needs "
                    f"{DTYPES[part]} {list(shape)}"
                )
        runs = array("i", [number for run in packed.runs for number in run])
        self.kept.append(runs)
        bits = [size.bit_length() - 1 if size else 0 for size in packed.group_sizes]
        parts = (tensor.data_ptr() for tensor in (packed.v, packed.u, packed.ranks))
        sizes = packed.rank, len(packed.runs), packed.ranks.shape[1], packed.n, packed.m
        return *parts, runs.buffer_info()[0], *sizes, *bits


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


def takes(packed: PackedDelta, *inputs: Tensor) -> bool:
    """Tell whether it can multiply these inputs, which it must be able to read.

    It knows the Gaussian codebook, and scale groups of 8 elements or more whose size is a power
    of 2.
    """
    return all(map(readable, inputs)) and _known_of(packed).words is not None


def readable(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory of its own: no fake, no subclass, none within `vmap`."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


def low_rank(x: Tensor, packed: PackedDelta, transposed: bool = False) -> Tensor:
    """Multiply x [M, n]: (x·V̂ᵀ)·Ûᵀ [M, m] in x's dtype; `transposed`: x [M, m], (x·Û)·V̂ [M, n]."""
    return segments(x, [(packed, len(x))], transposed)


def segments(
    x: Tensor, deltas: Sequence[tuple[PackedDelta, int]], transposed: bool = False
) -> Tensor:
    """Multiply x [S, n], so many rows by each delta in turn, in one call: [S, m] in x's dtype."""
    parts = [(_words(packed)[0], count) for packed, count in deltas]
    return _segments(x, parts, _length(deltas[0][0], transposed), transposed)


def experts(x: Tensor, sizes: Sequence[int], packed: PackedDelta, transposed: bool) -> Tensor:
    """Multiply rows of x [S, n], `sizes` by each expert in turn: [S, m] in x's dtype."""
    parts = zip(_words(packed), sizes, strict=True)
    return _segments(x, list(parts), _length(packed, transposed), transposed)


def shared(x: Tensor, deltas: Sequence[PackedDelta]) -> list[Tensor]:
    """Multiply x [M, n] by several deltas in one call: [M, m] of each, in x's dtype."""
    if len(x) > MANY_ROWS:
        return [low_rank(x, packed) for packed in deltas]
    wide = _float(x)
    _check_length(wide, *(packed.n for packed in deltas))
    outputs = [wide.new_empty(len(x), packed.m) for packed in deltas]
    items = array("q")
    for packed, y in zip(deltas, outputs, strict=True):
        words = _words(packed)[0]
        if words is not None:
            items.extend((*words, len(x), wide.data_ptr(), 0, y.data_ptr(), *_SCRATCH))
    _call(items, False)
    return [y.to(x.dtype) for y in outputs]


def rows(index: Tensor, deltas: Sequence[tuple[PackedDelta, int]]) -> Tensor:
    """Decode rows of Û·V̂: entries of `index` int64 [S], so many of each delta in turn.

    Returns float32 [S, n]. Raises IndexError for an index outside 0 .. m − 1.
    """
    flat, (first, _) = index.contiguous(), deltas[0]
    y = torch.empty(len(flat), first.n, dtype=torch.float32, device="cpu")
    if not y.numel():
        return y
    if not 0 <= int(flat.min()) <= int(flat.max()) < first.m:
        raise IndexError(f"an index is outside 0..{first.m - 1}, the rows of the embedding")
    items, start = array("q"), 0
    for packed, count in deltas:
        words = _words(packed)[0]
        if words is None:
            y[start : start + count] = 0
        else:
            tokens, out = flat.data_ptr() + 8 * start, y.data_ptr() + 4 * start * packed.n
            items.extend((*words, count, 0, tokens, out, *_SCRATCH))
        start += count
    _call(items, True)  # from U to V
    return y


def _segments(
    x: Tensor, parts: Sequence[tuple[Words | None, int]], length: int, transposed: bool
) -> Tensor:
    wide = _float(x)
    _check_length(wide, *(words[7 + transposed] for words, _ in parts if words is not None))
    y = wide.new_empty(len(x), length)
    x_start, y_start = wide.data_ptr(), y.data_ptr()
    items, start = array("q"), 0
    for words, count in parts:
        if words is None:
            y[start : start + count] = 0
        elif count > MANY_ROWS:
            some = slice(start, start + count)
            h = wide[some] @ _decoded(words, int(transposed)).T
            torch.mm(h, _decoded(words, int(not transposed)), out=y[some])
        elif count:
            here = x_start + 4 * start * wide.shape[1], 0, y_start + 4 * start * length
            items.extend((*words, count, *here, *_SCRATCH))
        start += count
    _call(items, transposed)
    return y.to(x.dtype)


def _call(items: "array[int]", transposed: bool) -> None:
    """Run the products of all items; MemoryError if there is no room for what is between them."""
    count = len(items) // (_FIELDS + 4 + len(_SCRATCH))
    if count:
        address, threads = items.buffer_info()[0], torch.get_num_threads()
        if _built().dm_products(count, address, transposed, threads):
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


def _words(packed: PackedDelta) -> list[Words | None]:
    found = _known_of(packed).words
    assert found is not None, "who calls has asked `takes`"
    return found


def _known_of(packed: PackedDelta) -> _Known:
    """Look a delta up; it is read anew when its tensors have moved or changed."""
    of: list[object] = [state_of(tensor) for tensor in packed.tensors.values()]
    found = _known.get(packed.v)
    if found is None or found.of != of:
        found = _known[packed.v] = _Known(packed, of)
    return found


def _length(packed: PackedDelta, transposed: bool) -> int:
    return packed.n if transposed else packed.m


def _check_length(x: Tensor, *lengths: int) -> None:
    """Refuse rows of another length than the deltas', which would be read past their end."""
    if any(x.shape[1] != length for length in lengths):
        raise ValueError(f"x is {list(x.shape)}, the deltas multiply rows of {list(lengths)}")


def _float(x: Tensor) -> Tensor:
    return x.float().contiguous().resolve_neg()


def _check(found: ctypes.CDLL) -> None:
    """Compare products of every width with float64; Unusable if they differ."""
    found.dm_products.argtypes = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_int
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
        known, exact = _Known(packed, []), packed.dense().double()
        assert known.words and known.words[0]
        for rows, transposed in (1, 0), (1, 1), (13, 0), (13, 1):
            factor = exact if transposed else exact.T
            x = torch.randn(rows, len(factor), dtype=torch.float32, **ours)
            y = x.new_full((rows, factor.shape[1]), torch.nan)
            here = rows, x.data_ptr(), 0, y.data_ptr()
            item = array("q", (*known.words[0], *here, *_SCRATCH))
            found.dm_products(1, item.buffer_info()[0], transposed, 1)
            expected = x.double() @ factor
            error = float((y - expected).abs().max() / expected.abs().max())
            if not error <= _TOLERANCE:
                raise Unusable(f"its products are off by {error:.2g} of the largest")
