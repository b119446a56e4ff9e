"""Products with packed deltas: y = x·Wᵀ + (x·V̂ᵀ)·Ûᵀ as torch custom ops.

`low_rank` has those of one matrix, `experts` those of mixtures, `cpu` the fast ones for CPUs.
`packed_op` makes ops of functions that take a `PackedDelta`; `dispatch.choose` picks the
implementation; the one in plain torch is the reference.
"""
