"""Attention layers that several networks share, and that plug into others: modules on `[B, H, W, C]` maps."""

from visionattn.layers.agent_attention import AgentAttention2d
from visionattn.layers.bilevel_routing import BiLevelRoutingAttention
from visionattn.layers.inline_attention import InLineAttention2d
from visionattn.layers.linear_attention import LinearAttention2d
from visionattn.layers.local_attention import NeighborhoodAttention2d, OverlappingWindowAttention2d
from visionattn.layers.routed_attention import RoutedAttention2d
from visionattn.layers.window_attention import WindowAttention2d

__all__ = [
    "AgentAttention2d",
    "BiLevelRoutingAttention",
    "InLineAttention2d",
    "LinearAttention2d",
    "NeighborhoodAttention2d",
    "OverlappingWindowAttention2d",
    "RoutedAttention2d",
    "WindowAttention2d",
]
