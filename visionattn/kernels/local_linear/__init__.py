"""Attention that fits a line instead of a mean: local linear attention and its learned form."""
