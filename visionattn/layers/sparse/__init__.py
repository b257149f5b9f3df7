"""Attention layers that compute a part of the attention exactly, and the rest in another way."""
