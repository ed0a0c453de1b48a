"""Benchmarks: what the ops and the training step cost, beside what people use today."""
