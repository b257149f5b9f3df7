"""Local attention in fast plain PyTorch."""
