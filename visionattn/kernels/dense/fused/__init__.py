"""Dense attention by fused Triton kernels."""
