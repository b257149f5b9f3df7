"""Which regions a region attends to. Every selector returns index lists for `routed_attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.checks import pair
from visionattn.kernels.precision import without_autocast
from visionattn.kernels.routed.regions import to_rows


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
    _check_maps("topk_regions", q, k)
    if topk < 1:
        raise ValueError(f"topk_regions: topk must be at least 1, got {topk}")
    region = pair("region_size", region_size)
    with without_autocast(q):
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
    # Two sums, for PyTorch's sum over two separate axes at once is ten times slower on a CPU.
    return (x.sum(4).sum(2) / (region[0] * region[1])).flatten(1, 2)


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
    _check_maps("antidiagonal_regions", q, k)
    if not 0 < threshold <= 1:
        raise ValueError(f"antidiagonal_regions: threshold must be above 0 and at most 1, got {threshold}")
    for name, value in (("stride", stride), ("max_regions", max_regions)):
        if value is not None and value < 1:
            raise ValueError(f"antidiagonal_regions: {name} must be at least 1, got {value}")
    region = pair("region_size", region_size)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q):
        share = _antidiagonal_shares(q, k, region, stride, factor)
    share, order = share.sort(dim=-1, descending=True, stable=True)
    # A region is needed as long as those before it fall short; the best one always is.
    kept = share.cumsum(-1) - share < (threshold if threshold < 1 else math.inf)
    kept[..., 0] = True
    lists = torch.where(kept, order, -1)[..., :max_regions].to(torch.int32)
    return lists if torch.compiler.is_compiling() else lists[..., : int(kept.sum(-1).max())]


def _antidiagonal_shares(q: Tensor, k: Tensor, region: tuple[int, int], stride: int, scale: float) -> Tensor:
    """The estimated share of each region in the attention of each region `[B, heads, regions, regions]`."""
    batch, _, _, heads, _ = q.shape
    pixels = torch.ones_like(q[:1, ..., :1, :1])
    queries, keys, inside = (_groups(x, region, stride) for x in (q, k, pixels))
    queries, keys = (x.unflatten(0, (batch, heads, -1)) for x in (queries.flip(2), keys))
    regions, groups = keys.shape[2:4]
    queries, keys = (x.flatten(4).flatten(2, 3) for x in (queries, keys))
    logits = queries @ keys.transpose(2, 3) * (scale / stride)
    # Groups of nothing but pixels beyond the map are no keys, and as queries do not count.
    inside = inside.flatten(2).any(-1)
    weights = logits.masked_fill(~inside.flatten(), float("-inf")).softmax(-1)
    weights = weights.unflatten(3, (regions, groups)).sum(-1).unflatten(2, (regions, groups))
    return (weights * inside[..., None]).sum(3) / inside.sum(1)[:, None]


def _groups(x: Tensor, region: tuple[int, int], stride: int) -> Tensor:
    """`[B * heads * regions, groups, stride, d]` of `[B, H, W, heads, d]`, zeros where there is no pixel."""
    rows = to_rows(x if x.dtype == torch.float64 else x.float(), region)
    return F.pad(rows, (0, 0, 0, -rows.shape[1] % stride)).unflatten(1, (-1, stride))


def _check_maps(name: str, q: Tensor, k: Tensor) -> None:
    if q.dim() != 5 or q.shape != k.shape:
        raise ValueError(
            f"{name}: q and k must be [B, H, W, heads, head_dim] of one shape, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not torch.is_floating_point(q) or not all(q.shape[1:]):
        raise ValueError(
            f"{name}: q and k must be of a floating-point dtype and only their batch may be empty, got "
            f"{q.dtype} of shape {tuple(q.shape)}"
        )
