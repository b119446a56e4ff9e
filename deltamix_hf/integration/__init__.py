"""transformers' hooks and the entry points: quantizer, saving, model methods, repos.

`registration` is imported by `import torch` in every process, so nothing is imported here.
"""
