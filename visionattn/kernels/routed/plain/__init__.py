"""Routed attention in fast plain PyTorch."""
