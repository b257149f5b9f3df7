"""2-D attention as functions on tensors: torch only, and Triton where a fused kernel runs.

Layout, bias and scale: `local/op.py`. Which implementation a call runs and why: `explain`; `use_backend` or
the environment variable `VISIONATTN_BACKEND` forces one.
"""

from visionattn.kernels.dense.op import dense_attention
from visionattn.kernels.dispatch import BACKENDS, Choice, explain, use_backend
from visionattn.kernels.linear.op import agent_attention, linear_attention
from visionattn.kernels.local.op import (
    grid_attention,
    neighborhood_attention,
    overlapping_window_attention,
    window_attention,
)
from visionattn.kernels.merge import merge_attention
from visionattn.kernels.product.op import product
from visionattn.kernels.routed.blocks import Blocks, block_attention, sort_blocks
from visionattn.kernels.routed.lists import union_regions
from visionattn.kernels.routed.op import routed_attention
from visionattn.kernels.routed.selectors.affinity import topk_regions
from visionattn.kernels.routed.selectors.antidiagonal import antidiagonal_regions

__all__ = [
    "BACKENDS",
    "Blocks",
    "Choice",
    "agent_attention",
    "antidiagonal_regions",
    "block_attention",
    "dense_attention",
    "explain",
    "grid_attention",
    "linear_attention",
    "merge_attention",
    "neighborhood_attention",
    "overlapping_window_attention",
    "product",
    "routed_attention",
    "sort_blocks",
    "topk_regions",
    "union_regions",
    "use_backend",
    "window_attention",
]
