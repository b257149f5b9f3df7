"""Regions by a bound of their products: LServe (https://arxiv.org/abs/2502.14866)."""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import check_counts, check_maps, pixels_inside, to_rows
from visionattn.kernels.routed.selectors.pick import pick_topk


@torch.no_grad()
def bound_regions(q: Tensor, k: Tensor, region_size: int | tuple[int, int], topk: int) -> Tensor:
    """The `topk` regions whose keys might have the largest product with a query of each region, per head.

    Of a key region only the least and the largest value of every channel are kept; no key in it can have a
    larger product with a query than the box between them (the selection of LServe,
    https://arxiv.org/abs/2502.14866). The largest bound over the queries of a region counts. Boxes of many
    different keys are wide and the bounds loose: on maps of photographs this chooses worse than means do.
    Float32 whatever the input and the autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        topk: regions per list, at most the number of regions.

    Returns:
        `[B, heads, regions, min(topk, regions)]` int32, best first, ties by the lowest index.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or region_size or topk is not positive.
    """
    region = check_maps("bound_regions", q, k, region_size)
    check_counts("bound_regions", topk=topk)
    return pick_topk(bound_scores(q, k, region), topk)


def bound_scores(q: Tensor, k: Tensor, region: tuple[int, int]) -> Tensor:
    """Bounds of the products of two regions' queries and keys `[B, heads, regions, regions]`."""
    batch, heads = q.shape[0], q.shape[3]
    with without_autocast(q):
        inside = pixels_inside(q, region)
        queries, keys = (to_rows(at_least_float32(x), region) for x in (q, k))
        queries, keys = (x.unflatten(0, (batch, heads, len(inside))) for x in (queries, keys))
        outside = ~inside[..., None]
        least = keys.masked_fill(outside, float("inf")).amin(3)
        most = keys.masked_fill(outside, float("-inf")).amax(3)
        # The larger of q * least and q * most: that with most where q is positive, with least elsewhere.
        queries = torch.cat((queries.relu(), -(-queries).relu()), -1).flatten(2, 3)
        bounds = queries @ torch.cat((most, least), -1).transpose(2, 3)
        return bounds.unflatten(2, inside.shape).masked_fill(outside, float("-inf")).amax(3)
