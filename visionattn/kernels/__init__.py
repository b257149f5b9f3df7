"""2-D attention as functions on tensors: torch only, and Triton where a fused kernel runs.

Layout, bias and scale: `local/op.py`. Which implementation a call runs and why: `explain`; `use_backend` or
the environment variable `VISIONATTN_BACKEND` forces one.
"""

from visionattn.kernels.dense.op import dense_attention
from visionattn.kernels.dispatch import BACKENDS, Choice, explain, use_backend
from visionattn.kernels.gaussian import gaussian_reweighting
from visionattn.kernels.linear.op import agent_attention, linear_attention
from visionattn.kernels.local.op import (
    grid_attention,
    neighborhood_aggregation,
    neighborhood_attention,
    neighborhood_bias,
    neighborhood_scores,
    overlapping_window_attention,
    window_attention,
)
from visionattn.kernels.local_linear.op import local_linear_attention, parallax_attention
from visionattn.kernels.merge import merge_attention
from visionattn.kernels.product.op import product
from visionattn.kernels.routed.blocks import Blocks, block_attention, sort_blocks
from visionattn.kernels.routed.lists import union_regions
from visionattn.kernels.routed.op import routed_attention
from visionattn.kernels.routed.partitions import (
    Clusters,
    cluster_attention,
    kmeans_blocks,
    lsh_attention,
    lsh_codes,
    region_blocks,
)
from visionattn.kernels.routed.patterns import (
    layers_to_reach,
    power_regions,
    radial_regions,
    strided_regions,
    window_regions,
)
from visionattn.kernels.routed.selectors.affinity import topk_regions
from visionattn.kernels.routed.selectors.antidiagonal import antidiagonal_regions
from visionattn.kernels.routed.selectors.bounds import bound_regions
from visionattn.kernels.routed.selectors.chunks import topk_blocks
from visionattn.kernels.routed.selectors.dynamic_mask import dynamic_mask_keys
from visionattn.kernels.routed.selectors.gated import gated_regions
from visionattn.kernels.routed.selectors.hierarchical import hierarchical_regions
from visionattn.kernels.routed.selectors.mass import mass_regions
from visionattn.kernels.routed.selectors.nucleus import topp_blocks
from visionattn.kernels.routed.selectors.quantized import quantized_regions
from visionattn.kernels.routed.selectors.static import best_pattern
from visionattn.kernels.scan.op import (
    additive_decay_attention,
    decay_attention,
    delta_attention,
    linear_recurrence,
    selective_scan,
)

__all__ = [
    "BACKENDS",
    "Blocks",
    "Choice",
    "Clusters",
    "additive_decay_attention",
    "agent_attention",
    "antidiagonal_regions",
    "best_pattern",
    "block_attention",
    "bound_regions",
    "cluster_attention",
    "decay_attention",
    "delta_attention",
    "dense_attention",
    "dynamic_mask_keys",
    "explain",
    "gated_regions",
    "gaussian_reweighting",
    "grid_attention",
    "hierarchical_regions",
    "kmeans_blocks",
    "layers_to_reach",
    "linear_attention",
    "linear_recurrence",
    "local_linear_attention",
    "lsh_attention",
    "lsh_codes",
    "mass_regions",
    "merge_attention",
    "neighborhood_aggregation",
    "neighborhood_attention",
    "neighborhood_bias",
    "neighborhood_scores",
    "overlapping_window_attention",
    "parallax_attention",
    "power_regions",
    "product",
    "quantized_regions",
    "radial_regions",
    "region_blocks",
    "routed_attention",
    "selective_scan",
    "sort_blocks",
    "strided_regions",
    "topk_blocks",
    "topk_regions",
    "topp_blocks",
    "union_regions",
    "use_backend",
    "window_attention",
    "window_regions",
]
