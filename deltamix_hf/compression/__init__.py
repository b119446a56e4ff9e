"""The compression job and its order: allocate, factorise, quantize, correct, tune.

`model.compress` is the entry: it takes a `runs.Source`, a loaded fine-tune or its files. `job.Job`
keeps the order, `matrix_pipeline.Compressor` does one matrix, `sequential.compress_blocks` fits
each block to what the compressed blocks before it hand on, and `scale_tuning.tune` comes last.
`budget.plan_budget` says what bytes there are for ranks.
"""
