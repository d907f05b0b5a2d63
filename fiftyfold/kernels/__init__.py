"""How fast: bit packing and low-bit products."""
