"""Each row's own vector, from a table of addresses: what norms multiply their rows with."""

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    base,  # [n]
    out,  # [rows, n]
    addresses,  # int64 [slots] of vectors [n]; 0: the base's
    of_rows,  # int32 [rows]: each row's slot; -1: the base
    n,
    BLOCK: tl.constexpr,
):
    """out[row] = the vector of the row's slot. Grid: rows, blocks of n."""
    row = tl.program_id(0)
    slot = tl.load(of_rows + row)
    own = tl.load(addresses + slot, mask=slot >= 0, other=0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < n
    value = tl.load(base + column, mask=live, other=0.0)
    if own != 0:
        own_at = own.to(tl.pointer_type(out.dtype.element_ty)) + column
        value = tl.load(own_at, mask=live, other=0.0)
    tl.store(out + row.to(tl.int64) * n + column, value, mask=live)
