"""Launchers of the C++ kernels in csrc/cpu, a module per op: checked arguments -> pointers, sizes and strides.

The kernels read inputs of any strides in place. They run on torch's number of threads.
"""
