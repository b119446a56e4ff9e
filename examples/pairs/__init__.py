"""Real base/fine-tune pairs, built from packages on PyPI (no model hub is needed)."""
