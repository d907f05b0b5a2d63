"""The kernels for NVIDIA GPUs, written in Triton; imported only where triton is installed."""
