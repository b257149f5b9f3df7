"""Recurrent attention in fast plain PyTorch."""
