"""Quantizers and the layers that train under them."""
