"""Faults against tiny runs: python -m benchmarks.faults"""
