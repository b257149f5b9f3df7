"""Which regions a region attends to. Every selector returns index lists for `routed_attention`."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import pair


@torch.no_grad()
def topk_regions(q: Tensor, k: Tensor, region_size: int | tuple[int, int], topk: int) -> Tensor:
    """The `topk` regions of largest affinity for each region: the routing of BiFormer, eq. 3 to 5.

    A region is described by the mean of its queries and of its keys, all heads together; the affinity of two
    regions is the product of the descriptors. Means and affinities are float32 whatever the input and the
    autocast state: rounding the means to bfloat16 changes a tenth of the decisions. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a region in pixels, or (height, width). At the border a region may be smaller;
            its means run over the pixels it has.
        topk: regions per list, at most the number of regions.

    Returns:
        `[B, 1, regions, min(topk, regions)]` int32, best first, ties by the lowest index; regions in
        row-major order.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or region_size or topk is not positive.
    """
    if q.dim() != 5 or q.shape != k.shape:
        raise ValueError(
            f"topk_regions: q and k must be [B, H, W, heads, head_dim] of one shape, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not torch.is_floating_point(q) or not all(q.shape[1:]):
        raise ValueError(
            f"topk_regions: q and k must be of a floating-point dtype and only their batch may be empty, got "
            f"{q.dtype} of shape {tuple(q.shape)}"
        )
    if topk < 1:
        raise ValueError(f"topk_regions: topk must be at least 1, got {topk}")
    region = pair("region_size", region_size)
    # Autocast has no state for some devices, "meta" among them.
    known = torch.amp.is_autocast_available(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if known else nullcontext():
        query, key = region_means(q, region), region_means(k, region)
        affinity = query @ key.transpose(1, 2)
    # torch.topk leaves the order of ties open; a stable sort does not.
    order = affinity.sort(dim=-1, descending=True, stable=True).indices
    return order[:, None, :, :topk].to(torch.int32)


def region_means(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean of each region of `[B, H, W, heads, d]` in float32 (float64 stays): `[B, regions, heads * d]`."""
    x = x.flatten(3)
    x = x if x.dtype == torch.float64 else x.float()
    height, width = x.shape[1:3]
    if height % region[0] or width % region[1]:
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), region, ceil_mode=True, count_include_pad=False)
        return x.flatten(2).transpose(1, 2)
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    return x.mean((2, 4)).flatten(1, 2)
