"""transformers' hooks and the entry points: quantizer, saving, model methods, repos.

`quantizer.DeltaMixHfQuantizer` compresses and loads within `from_pretrained`, `saving` writes and
pushes what it made, `model_methods` are the methods of every model (`load_delta` and its like), and
`compress_repo.compress_streaming` compresses from files. `registration` is imported by
`import torch` in every process, so nothing is imported here.
"""
