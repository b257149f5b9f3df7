"""Attention layers that several families share, and that plug into other networks."""

from .local_attention import NeighborhoodAttention2d, OverlappingWindowAttention2d, WindowAttention2d

__all__ = ["NeighborhoodAttention2d", "OverlappingWindowAttention2d", "WindowAttention2d"]
