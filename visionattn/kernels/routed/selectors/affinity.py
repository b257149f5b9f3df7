"""Regions by the affinity of their means: the routing of BiFormer (https://arxiv.org/abs/2303.08810)."""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.precision import without_autocast
from visionattn.kernels.routed.regions import check_counts, check_maps, region_means, split_heads
from visionattn.kernels.routed.selectors.pick import pick_topk


@torch.no_grad()
def topk_regions(
    q: Tensor, k: Tensor, region_size: int | tuple[int, int], topk: int, *, per_head: bool = False
) -> Tensor:
    """The `topk` regions of largest affinity for each region: the routing of BiFormer, eq. 3 to 5.

    A region is described by the mean of its queries and of its keys, all heads together; the affinity of two
    regions is the product of the descriptors. With `per_head` each head describes and chooses for itself, as
    in SLA (https://arxiv.org/abs/2509.24006) and the released selector of DHSA
    (https://arxiv.org/abs/2510.24606). Means and affinities are float32 whatever the input and the
    autocast state: rounding the means to bfloat16 changes a tenth of the decisions. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a region in pixels, or (height, width). At the border a region may be smaller;
            its means run over the pixels it has.
        topk: regions per list, at most the number of regions.
        per_head: whether each head has lists of its own.

    Returns:
        `[B, 1 or heads, regions, min(topk, regions)]` int32, best first, ties by the lowest index; regions in
        row-major order.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or region_size or topk is not positive.
    """
    region = check_maps("topk_regions", q, k, region_size)
    check_counts("topk_regions", topk=topk)
    return pick_topk(affinity_scores(q, k, region, per_head), topk)


def affinity_scores(q: Tensor, k: Tensor, region: tuple[int, int], per_head: bool = False) -> Tensor:
    """Products of regions' mean queries and mean keys `[B, 1 or heads, regions, regions]`; without `per_head`
    all heads together."""
    with without_autocast(q):
        query, key = (split_heads(region_means(x, region), q.shape[3] if per_head else 1) for x in (q, k))
        return query @ key.transpose(2, 3)
