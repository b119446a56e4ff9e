"""Names that this package shares with transformers and the Hub; importing it imports nothing."""

QUANT_METHOD = "deltamix"
# In the config.json of a delta repo, where transformers looks for the name of the weight file:
# without us it refuses this one, and so says what is missing.
NOTICE = "this is a delta repo, which needs `pip install deltamix-hf` or `import deltamix_hf`"
