"""Routed attention by fused Triton kernels."""
