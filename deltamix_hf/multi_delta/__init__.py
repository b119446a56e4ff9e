"""Many deltas on one base in one process: which delta for which row, resident or in reserve."""
