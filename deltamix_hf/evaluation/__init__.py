"""Evaluation: how far a compressed model is from its fine-tune, and a fine-tune from its base."""
