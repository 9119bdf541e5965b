"""Code that the backends of an op share if torch's matrix products do most of its work. Called by these backends.

Tensors are split by split_with_sizes, because Tensor.split is Python around it and takes 2 us more.
"""
