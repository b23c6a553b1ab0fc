"""Benchmarks: ``python -m benchmarks`` runs the kernel benchmarks in bench_*.py and writes a result file."""
