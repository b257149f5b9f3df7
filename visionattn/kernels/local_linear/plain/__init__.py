"""Local linear attention in fast plain PyTorch."""
