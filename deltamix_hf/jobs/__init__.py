"""Long runs: parts that survive a restart, several workers, weights on demand, clocks."""
