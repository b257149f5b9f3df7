"""Linear attention by fused Triton kernels."""
