"""The product of features and a weight matrix, by the faster of PyTorch's two matrix libraries."""
