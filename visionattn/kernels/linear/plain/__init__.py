"""Linear and agent attention in fast plain PyTorch."""
