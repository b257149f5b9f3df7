"""Regions by an estimate of their attention from antidiagonals: XAttention
(https://arxiv.org/abs/2503.16428)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import check_counts, check_maps, check_shares, to_rows
from visionattn.kernels.routed.selectors.pick import pick_share


@torch.no_grad()
def antidiagonal_regions(
    q: Tensor,
    k: Tensor,
    region_size: int | tuple[int, int],
    threshold: float,
    *,
    stride: int = 8,
    max_regions: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The fewest regions that hold `threshold` of the attention, by XAttention's antidiagonal estimate.

    The pixels of a region are taken in row-major order, `stride` at a time. The logits of such a group of
    queries and a group of keys are summed along the antidiagonal alone, which crosses every row and every
    column of the square; a softmax over all groups of keys estimates the attention (XAttention,
    https://arxiv.org/abs/2503.16428, algorithm 1, without the causal mask). Float32 whatever the input and
    the autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        threshold: the share of the estimated attention of a region that its list holds, above 0; 1 lists all.
        stride: pixels in a group; the estimate costs `1 / stride` of the attention among all pixels.
        max_regions: the longest list allowed; all regions by default.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, heads, regions, n]` int32, best first, ties by the lowest index, -1 behind the end of a list. n
        is the length of the longest list, or, in a compiled graph, of the longest allowed.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or an argument is out of its range.
    """
    region = check_maps("antidiagonal_regions", q, k, region_size)
    check_shares("antidiagonal_regions", threshold=threshold)
    check_counts("antidiagonal_regions", stride=stride, max_regions=max_regions)
    return pick_share(antidiagonal_scores(q, k, region, stride, scale), threshold, max_regions)


def antidiagonal_scores(
    q: Tensor, k: Tensor, region: tuple[int, int], stride: int = 8, scale: float | None = None
) -> Tensor:
    """The estimated share of each region in the attention of each region `[B, heads, regions, regions]`."""
    batch, height, width, heads, dim = q.shape
    factor = (dim**-0.5 if scale is None else scale) / stride
    pixels = q.new_ones((1, height, width, 1, 1))
    with without_autocast(q):
        queries, keys, inside = (_groups(x, region, stride) for x in (q, k, pixels))
        regions, groups = inside.shape[:2]
        queries, keys = (x.unflatten(0, (batch, heads, regions)) for x in (queries.flip(2), keys))
        queries, keys = (x.flatten(4).flatten(2, 3) for x in (queries, keys))
        logits = queries @ keys.transpose(2, 3) * factor
        # Groups of nothing but pixels beyond the map are no keys, and as queries do not count.
        inside = inside.flatten(2).any(-1)
        weights = logits.masked_fill(~inside.flatten(), float("-inf")).softmax(-1)
        weights = weights.unflatten(3, (regions, groups)).sum(-1).unflatten(2, (regions, groups))
        return (weights * inside[..., None]).sum(3) / inside.sum(1)[:, None]


def _groups(x: Tensor, region: tuple[int, int], stride: int) -> Tensor:
    """`[B * heads * regions, groups, stride, d]` of `[B, H, W, heads, d]`, zeros where there is no pixel."""
    rows = to_rows(at_least_float32(x), region)
    return F.pad(rows, (0, 0, 0, -rows.shape[1] % stride)).unflatten(1, (-1, stride))
