"""Kernel benchmarks: ``python -m benchmarks`` runs them all and writes a result file."""
