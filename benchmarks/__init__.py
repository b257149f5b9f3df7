"""Comparisons of kernels and networks with everything that a user would run instead, beside their results."""
