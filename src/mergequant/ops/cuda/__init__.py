"""CUDA kernels: sources in `*.cu` and `*.cuh`, compiled at first use by NVRTC, launched through the driver API."""
