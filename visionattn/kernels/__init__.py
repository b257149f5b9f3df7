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
    neighborhood_attention,
    overlapping_window_attention,
    window_attention,
)
from visionattn.kernels.local_linear.op import local_linear_attention, parallax_attention
from visionattn.kernels.merge import merge_attention
from visionattn.kernels.product.op import product
from visionattn.kernels.routed.op import routed_attention
from visionattn.kernels.routed.selectors.affinity import topk_regions
from visionattn.kernels.routed.selectors.antidiagonal import antidiagonal_regions
from visionattn.kernels.scan.op import (
    additive_decay_attention,
    decay_attention,
    delta_attention,
    linear_recurrence,
    selective_scan,
)

__all__ = [
    "BACKENDS",
    "Choice",
    "additive_decay_attention",
    "agent_attention",
    "antidiagonal_regions",
    "decay_attention",
    "delta_attention",
    "dense_attention",
    "explain",
    "gaussian_reweighting",
    "grid_attention",
    "linear_attention",
    "linear_recurrence",
    "local_linear_attention",
    "merge_attention",
    "neighborhood_attention",
    "overlapping_window_attention",
    "parallax_attention",
    "product",
    "routed_attention",
    "selective_scan",
    "topk_regions",
    "use_backend",
    "window_attention",
]
