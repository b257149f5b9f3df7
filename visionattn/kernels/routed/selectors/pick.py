"""Picks: the regions on each list, from the scores of all regions.

Scores are `[B, heads or 1, query regions, key regions]`; a pick returns lists for `routed_attention`, int32
`[B, heads or 1, query regions, n]`, best first, ties by the lowest index, -1 behind the end of a list.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionattn.kernels.routed.lists import cut_to_longest


def pick_topk(scores: Tensor, topk: int) -> Tensor:
    """The `topk` regions of the highest scores, or all where there are fewer: lists without padding."""
    # torch.topk leaves the order of ties open; a stable sort does not.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :topk].to(torch.int32)


def pick_share(shares: Tensor, threshold: float, max_regions: int | None = None) -> Tensor:
    """The fewest regions that together hold `threshold` of the shares, which add up to 1; 1 lists all.

    Lists are cut to `max_regions`, and to the longest of them; in a compiled graph only to the former, so
    that their length does not depend on the data.
    """
    shares, order = shares.sort(dim=-1, descending=True, stable=True)
    # A region is needed as long as those before it fall short; the best one always is.
    kept = shares.cumsum(-1) - shares < (threshold if threshold < 1 else math.inf)
    kept[..., 0] = True
    return lists_of(order[..., :max_regions], kept[..., :max_regions])


def pick_kept(scores: Tensor, kept: Tensor) -> Tensor:
    """The regions that a mask of the same shape keeps; their scores are finite."""
    scores, order = scores.masked_fill(~kept, -math.inf).sort(dim=-1, descending=True, stable=True)
    return lists_of(order, scores > -math.inf)


def lists_of(order: Tensor, kept: Tensor) -> Tensor:
    """Lists of regions in this order, those kept before the others, cut to the longest."""
    return cut_to_longest(torch.where(kept, order, -1).to(torch.int32))
