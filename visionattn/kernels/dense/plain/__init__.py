"""Dense attention in fast plain PyTorch."""
