"""Triton kernels, a module per op, imported on first use: Triton need not be installed to import the package."""
