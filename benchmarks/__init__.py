"""Side-by-side measurements: ours and a peer interleaved in one run, medians, ratios. ``python -m benchmarks.NAME``."""
