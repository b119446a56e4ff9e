"""Modules that hold packed deltas beside frozen base weights, alone or across processes.

`layers.attach` turns a linear layer or embedding into its delta counterpart in place, and
`delta_matrix.detach` turns it back; `experts.attach_experts` does so for 3-D weights of experts.
`shared_input` lets q, k and v share a product, `merging.cache_merged` keeps dense weights, and
`tensor_parallel` keeps each process's part.
"""
