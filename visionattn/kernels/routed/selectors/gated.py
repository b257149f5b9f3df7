"""Regions for every query by gates that compete within a pool: VMoBA (https://arxiv.org/abs/2506.23858)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.reference import places
from visionattn.kernels.routed.regions import (
    check_counts,
    check_maps,
    check_shares,
    region_means,
    split_heads,
)
from visionattn.kernels.routed.selectors.pick import pick_kept

Pool = Literal["query", "head", "region", "all"]
# Below such a range the gates of a pool are equal, and above such a sum they can be shares of it.
_EPSILON = 1e-6


@torch.no_grad()
def gated_regions(
    q: Tensor,
    k: Tensor,
    region_size: int | tuple[int, int],
    *,
    threshold: float | None = None,
    topk: int | None = None,
    pool: Pool = "head",
) -> Tensor:
    """Regions for every pixel, by its gates with the mean keys of all regions: VMoBA, and MoBA as a case.

    The gate of a query and a region is the product of the query and the mean key. Gates compete within a
    pool: with `threshold` the fewest of highest gate are kept that, with those of own regions, hold this
    share of the pool, gates being counted from the least of the pool; with `topk` so many per query are kept
    on average. The own region of a pixel is always listed. MoBA (https://arxiv.org/abs/2502.13189) is `topk`
    with the pool `"query"`. VMoBA lets regions change from layer to layer: on a map bands of rows, bands of
    columns and tiles, by `region_size`. Float32 whatever the input and the autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a key region in pixels, or (height, width); a border region may be smaller.
        threshold: the share of a pool's gates that is listed, above 0 and at most 1; 0.25 unless `topk` is
            given. Beside own regions at least one gate per pool is kept.
        topk: regions per query on average over the pool, the own one included.
        pool: which gates compete: those of a `"query"`, of all queries of a `"head"`, of a `"region"` with
            all queries and heads, or `"all"` of an image.

    Returns:
        `[B, heads, H * W, n]` int32, for `routed_attention(..., query_region_size=1)`; by descending gate,
        ties by the lowest index, -1 behind the end of a list. n is the length of the longest list, or, in a
        compiled graph, the number of regions.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, an argument is out of its range, both
            `threshold` and `topk` are given, or `topk` with the pool `"region"`.
    """
    region = check_maps("gated_regions", q, k, region_size)
    check_shares("gated_regions", threshold=threshold)
    check_counts("gated_regions", topk=topk)
    if pool not in get_args(Pool):
        raise ValueError(f"gated_regions: pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
    if topk is not None and (threshold is not None or pool == "region"):
        given = "threshold" if threshold is not None else "the pool 'region'"
        raise ValueError(f"gated_regions: topk={topk} does not go with {given}")
    gates = gate_scores(q, k, region)
    own, _ = places(q.shape[1:3], region, q.device)
    own = own[:, None] == torch.arange(gates.shape[3], device=q.device)
    own = own.expand_as(gates)
    # The gates of a pool stand in one row. Those of a region: regions, queries, heads.
    start = {"query": 3, "head": 2, "region": 2, "all": 1}[pool]
    pooled, own = (x.transpose(1, 3) if pool == "region" else x for x in (gates, own))
    shape, pooled, own = pooled.shape[start:], pooled.flatten(start), own.flatten(start)
    if topk is None:
        kept = _share(pooled, own, 0.25 if threshold is None else threshold)
    else:
        kept = _best(pooled, own, min(topk, gates.shape[3]) * math.prod(shape[:-1]))
    kept = kept.unflatten(start, shape)
    return pick_kept(gates, kept.transpose(1, 3) if pool == "region" else kept)


def gate_scores(q: Tensor, k: Tensor, region: tuple[int, int]) -> Tensor:
    """Products of queries and regions' mean keys `[B, heads, H * W, regions]`."""
    with without_autocast(q):
        means = split_heads(region_means(k, region), k.shape[3])
        return at_least_float32(q).flatten(1, 2).transpose(1, 2) @ means.transpose(2, 3)


def _share(gates: Tensor, own: Tensor, threshold: float) -> Tensor:
    """Which gates of each pool `[..., gates]` hold the threshold, beginning with the own ones."""
    least = gates.amin(-1, keepdim=True)
    extent = gates.amax(-1, keepdim=True) - least
    shares = (gates - least) / torch.where(extent <= _EPSILON, 1, extent)
    total = shares.sum(-1, keepdim=True) + _EPSILON
    missing = (threshold - shares.masked_fill(~own, 0).sum(-1, keepdim=True) / total).clamp(min=0)
    others, order = shares.masked_fill(own, 0).sort(dim=-1, descending=True, stable=True)
    # A gate is needed as long as those before it fall short; the best one always is.
    needed = others.cumsum(-1).roll(1, -1) / total < missing
    needed[..., 0] = True
    return torch.zeros_like(own).scatter(-1, order, needed) | own


def _best(gates: Tensor, own: Tensor, count: int) -> Tensor:
    """Which gates of each pool `[..., gates]` are the `count` best, the own ones before all others."""
    order = gates.masked_fill(own, math.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(own).scatter(-1, order[..., :count], True)
