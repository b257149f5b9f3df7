"""Attention whose cost is linear in the number of pixels: linear forms and agent attention."""
