"""Code that the backends of an op share if torch's matrix products do most of its work. Called by these backends."""
