"""Attention layers that several networks share, and that plug into others: modules on `[B, H, W, C]` maps."""

from .agent_attention import AgentAttention2d
from .bilevel_routing import BiLevelRoutingAttention
from .inline_attention import InLineAttention2d
from .linear_attention import LinearAttention2d
from .local_attention import NeighborhoodAttention2d, OverlappingWindowAttention2d
from .window_attention import WindowAttention2d

__all__ = [
    "AgentAttention2d",
    "BiLevelRoutingAttention",
    "InLineAttention2d",
    "LinearAttention2d",
    "NeighborhoodAttention2d",
    "OverlappingWindowAttention2d",
    "WindowAttention2d",
]
