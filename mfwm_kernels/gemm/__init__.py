"""What the backends of an op share where torch's matrix products do most of it: chunks of rows, and the backward."""
