"""From samples to statements: what a run says, and how surely.

A run gives latencies in order of time and a timeline of counts. Requests that share a server share its queue and its
batches, so neighbours resemble one another, and an interval that takes them for independent is too narrow by a factor
of two or three. `dependence` measures that from the lowest frequencies of the series, and everything within a run
builds on it: `means` (mean, share, rate) and `quantiles`, which refuses a percentile that the samples cannot carry.

Before that, `steady` finds where the warm-up ends and whether what follows stands still. After it, `replicates` joins
repeated runs, `goodput` says which requests kept an objective, `frontier` which configurations no other beats and with
what probability, `compare` whether B is worse than A, and `changepoint` since when a recurring measurement has changed.

Pure functions: no I/O, and the same numbers in give the same numbers out (what draws at random is seeded).

What 95 % intervals cover on simulated servers is in tests/bench/stats/test_coverage.py.
"""
