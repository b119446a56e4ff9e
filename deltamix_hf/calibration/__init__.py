"""Calibration: text or tokens, runs of the fine-tune over them, and their second moments."""
