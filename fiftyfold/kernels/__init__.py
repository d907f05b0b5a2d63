"""How fast: bit packing and low-bit products."""

from fiftyfold.kernels import triton
from fiftyfold.kernels.backends import register_backend

register_backend("cuda", triton.find_backend)
