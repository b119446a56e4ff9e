"""Long runs: parts that survive a restart, several workers, weights on demand, clocks.

`resume_store.ResumeStore` keeps finished parts on disk, `workers.Workers` is the group of processes
that share a job, `weight_access.LazyWeights` reads a block's weights when it runs, and
`instruments.Stopwatch` counts seconds by stage. Nothing here knows what is compressed.
"""
