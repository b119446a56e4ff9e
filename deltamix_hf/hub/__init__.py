"""The Hub: push a delta repo with its model card and pictures."""
