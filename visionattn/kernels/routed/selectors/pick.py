"""Picks: the regions on each list, from the scores of all regions.

Scores are `[B, heads or 1, query regions, key regions]`; a pick returns lists for `routed_attention`, int32
`[B, heads or 1, query regions, n]`, best first, ties by the lowest index, -1 behind the end of a list.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    lists = torch.where(kept, order, -1)[..., :max_regions].to(torch.int32)
    return lists if torch.compiler.is_compiling() else lists[..., : int(kept.flatten(0, -2).any(0).sum())]
