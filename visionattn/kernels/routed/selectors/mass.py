"""Regions by the attention that they truly receive: the search of AdaSpa (https://arxiv.org/abs/2502.21079)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import check_maps, pixels_inside, query_chunks, softmax_scale, to_rows
from visionattn.kernels.routed.selectors.pick import lists_of

# A head that keeps more than this share of its mass can do with fewer regions.
_WELL_KEPT = 0.8


@torch.no_grad()
def mass_regions(
    q: Tensor,
    k: Tensor,
    region_size: int | tuple[int, int],
    sparsity: float = 0.8,
    *,
    adapt_heads: bool = False,
    lse: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The regions that hold the most of the exact attention of each region, per head: AdaSpa.

    The mass of a key region is the mean over the query region's pixels of its softmax weights. A list holds
    `max(1, floor((1 - sparsity) * regions + 0.5))` regions. All pairs of pixels are compared, in chunks that
    are never stored together, so that this costs as much as attention itself: lists are meant to be kept for
    later layers or denoising steps, and to judge other selectors by. Float32 whatever the input and the
    autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        sparsity: the share of regions left out, at least 0 and below 1.
        adapt_heads: move regions from heads whose lists hold much of their mass to those whose lists hold
            little. The n best get a sparsity of `(1 + sparsity) / 2`, the n worst of `(3 * sparsity - 1) /
            2`; n counts the heads that hold more than 0.8 of their mass, and is at most half of all.
        lse: `[B, H, W, heads]`, log-sum-exp of the attention at an earlier step, in place of that of q and
            k; saves a pass. Masses then need not add up to 1.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, heads, regions, n]` int32, best first, ties by the lowest index, with `adapt_heads` -1 behind the
        end of a list. n is the length of the longest list, or, in a compiled graph with `adapt_heads`, the
        number of regions.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or an argument is out of its range.
    """
    region = check_maps("mass_regions", q, k, region_size)
    if not 0 <= sparsity < 1:
        raise ValueError(f"mass_regions: sparsity must be at least 0 and below 1, got {sparsity}")
    if lse is not None and lse.shape != q.shape[:4]:
        raise ValueError(
            f"mass_regions: lse must be [B, H, W, heads] = {tuple(q.shape[:4])}, got {tuple(lse.shape)}"
        )
    mass, order = mass_scores(q, k, region, lse, scale).sort(dim=-1, descending=True, stable=True)
    count = _kept(sparsity, mass.shape[-1])
    if not adapt_heads:
        return order[..., :count].to(torch.int32)
    counts = _adapted(mass, count, sparsity)
    rank = torch.arange(mass.shape[-1], device=q.device)
    return lists_of(order, rank < counts[..., None, None])


def mass_scores(
    q: Tensor,
    k: Tensor,
    region: tuple[int, int],
    lse: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The share of each region in the attention of each region `[B, heads, regions, regions]`."""
    batch, heads, scale = q.shape[0], q.shape[3], softmax_scale(q, scale)
    with without_autocast(q):
        inside = pixels_inside(q, region)
        regions, pixels = inside.shape
        queries, keys = (to_rows(at_least_float32(x), region) for x in (q, k))
        queries = (queries * scale).unflatten(0, (batch * heads, regions))
        keys = keys.unflatten(0, (batch * heads, regions)).flatten(1, 2).transpose(1, 2)
        hidden = queries.new_zeros(regions * pixels).masked_fill(~inside.flatten(), -math.inf)
        if lse is not None:
            logs = to_rows(at_least_float32(lse)[..., None], region).unflatten(0, (batch * heads, regions))
        found = []
        for chunk in query_chunks(q, regions, batch * heads * regions * pixels**2):
            logits = queries[:, chunk].flatten(1, 2) @ keys + hidden
            weights = logits.softmax(-1) if lse is None else (logits - logs[:, chunk].flatten(1, 2)).exp()
            weights = weights.unflatten(2, (regions, pixels)).sum(-1).unflatten(1, (-1, pixels))
            real = inside[chunk][..., None]
            found.append(weights.masked_fill(~real, 0).sum(2) / real.sum(1))
        return torch.cat(found, 1).unflatten(0, (batch, heads))


def _kept(sparsity: float, regions: int) -> int:
    return min(regions, max(1, math.floor((1 - sparsity) * regions + 0.5)))


def _adapted(mass: Tensor, count: int, sparsity: float) -> Tensor:
    """Regions per list `[B, heads]`, from masses sorted in descending order."""
    heads, regions = mass.shape[1], mass.shape[3]
    recall = mass[..., :count].sum((2, 3)) / mass.sum((2, 3))
    moved = (recall > _WELL_KEPT).sum(1, keepdim=True).clamp(max=heads // 2)
    rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    fewer, more = _kept((1 + sparsity) / 2, regions), _kept((3 * sparsity - 1) / 2, regions)
    counts = torch.where(rank < moved, fewer, count)
    return torch.where(rank >= heads - moved, more, counts)
