"""Launchers of the C++ kernels in csrc/cpu, one module per op, called by autograd.call.

They pass checked arguments as pointers, sizes and strides. The kernels read inputs of any strides in place, and run on
as many threads as torch.
"""
