"""Calibration: text or tokens, runs of the fine-tune over them, and their second moments.

`data.calibration_batches` gives token ids, if need be written by the fine-tune (`self_text`).
`statistics.collect` runs a loaded model over them and returns C and G of every layer;
`blockwise.BlockwisePass` does the same block by block from files. `block_chain.BlockChain` runs the
blocks of a model one after the other, for whoever changes them in between.
"""
