"""Modules that hold packed deltas beside frozen base weights, alone or across processes."""
