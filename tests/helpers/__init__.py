"""Models and data that tests and benchmarks share."""
