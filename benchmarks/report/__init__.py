"""RESULTS.md: tables and pictures of what the benchmarks have left."""
