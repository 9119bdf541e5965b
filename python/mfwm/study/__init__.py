"""Studies: the same training in several ways, on several worlds and with several seeds, and what the difference is."""
