"""Attention layers that several networks share, and that plug into others: modules on `[B, H, W, C]` maps."""

from visionattn.layers.agent_attention import AgentAttention2d
from visionattn.layers.bilevel_routing import BiLevelRoutingAttention
from visionattn.layers.inline_attention import InLineAttention2d
from visionattn.layers.linear_attention import LinearAttention2d
from visionattn.layers.local_attention import NeighborhoodAttention2d, OverlappingWindowAttention2d
from visionattn.layers.routed_attention import RoutedAttention2d
from visionattn.layers.sparse.native_sparse import NativeSparseAttention2d
from visionattn.layers.sparse.prefix_state import PrefixStateAttention2d
from visionattn.layers.sparse.sparse_linear import SparseLinearAttention2d
from visionattn.layers.window_attention import WindowAttention2d

__all__ = [
    "AgentAttention2d",
    "BiLevelRoutingAttention",
    "InLineAttention2d",
    "LinearAttention2d",
    "NativeSparseAttention2d",
    "NeighborhoodAttention2d",
    "OverlappingWindowAttention2d",
    "PrefixStateAttention2d",
    "RoutedAttention2d",
    "SparseLinearAttention2d",
    "WindowAttention2d",
]
