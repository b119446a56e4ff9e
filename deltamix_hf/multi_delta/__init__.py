"""Many deltas on one base in one process: which delta for which row, resident or in reserve.

`manager.manager_of` gives a model its `DeltaManager`, which loads deltas and names them. A
`routing.Route` says which delta each row takes, `layers.make_routed` makes modules follow it where
`row_layout.observe` has seen rows apart, `item_features` does so for pictures and sound,
`end_tokens` ends each row by its own delta's tokens,
`grouped.run_grouped` serves all rows in one launch, and `pool.Pool` moves deltas in and out of
memory. `continuous_batching` is for the private parts of transformers that serve many requests.
"""
