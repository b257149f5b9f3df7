"""Attention to selected regions: the selection apart from the attention over index lists."""
