"""Attention layers that several networks share, and that plug into others: modules on `[B, H, W, C]` maps."""

from visionattn.layers.agent_attention import AgentAttention2d
from visionattn.layers.bilevel_routing import BiLevelRoutingAttention
from visionattn.layers.context_mixing import ContextMixingBlock
from visionattn.layers.inline_attention import InLineAttention2d
from visionattn.layers.linear_attention import LinearAttention2d
from visionattn.layers.local_attention import (
    HaloAttention2d,
    NeighborhoodAttention2d,
    OverlappingWindowAttention2d,
    WindowAttention2d,
)
from visionattn.layers.recurrent.decay import DecayAttention2d, DeltaAttention2d
from visionattn.layers.recurrent.lightnet import LightNetAttention2d, MapPositions
from visionattn.layers.recurrent.local_linear import LocalLinearAttention2d
from visionattn.layers.recurrent.selective_scan import SelectiveScan2d
from visionattn.layers.reweighting import GaussianReweighting, MixtureOfHeads
from visionattn.layers.routed_attention import RoutedAttention2d
from visionattn.layers.sparse.native_sparse import NativeSparseAttention2d
from visionattn.layers.sparse.prefix_state import PrefixStateAttention2d
from visionattn.layers.sparse.sparse_linear import SparseLinearAttention2d
from visionattn.layers.sparse_query import SparseQueryAttention2d
from visionattn.layers.windows.varied_window import VariedSizeWindowAttention2d

__all__ = [
    "AgentAttention2d",
    "BiLevelRoutingAttention",
    "ContextMixingBlock",
    "DecayAttention2d",
    "DeltaAttention2d",
    "GaussianReweighting",
    "HaloAttention2d",
    "InLineAttention2d",
    "LightNetAttention2d",
    "LinearAttention2d",
    "LocalLinearAttention2d",
    "MapPositions",
    "MixtureOfHeads",
    "NativeSparseAttention2d",
    "NeighborhoodAttention2d",
    "OverlappingWindowAttention2d",
    "PrefixStateAttention2d",
    "RoutedAttention2d",
    "SelectiveScan2d",
    "SparseLinearAttention2d",
    "SparseQueryAttention2d",
    "VariedSizeWindowAttention2d",
    "WindowAttention2d",
]
