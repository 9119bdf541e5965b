"""What the backends of an op share where torch's matrix products do the bulk of it: chunks of rows, and the backward."""
