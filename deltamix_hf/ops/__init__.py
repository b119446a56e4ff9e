"""Products with packed deltas: y = x·Wᵀ + (x·V̂ᵀ)·Ûᵀ as torch custom ops.

`dispatch` chooses the implementation; the plain-torch one is the reference and the CPU path.
"""
