"""Local attention by fused Triton kernels."""
