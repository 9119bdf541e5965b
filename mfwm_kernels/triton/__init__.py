"""Triton kernels and their launchers, one module per op, imported on first use because Triton is optional."""
