"""Benchmarks: each prints its measurements and, with --json, writes them to a file."""
