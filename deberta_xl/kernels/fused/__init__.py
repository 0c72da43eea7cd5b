"""Disentangled attention in fused Triton kernels, for NVIDIA GPUs: `attention.py` has the function."""
