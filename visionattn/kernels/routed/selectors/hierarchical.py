"""Regions by halving groups of them: HiP (https://arxiv.org/abs/2406.09827)."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.checks import pair
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import (
    check_counts,
    check_maps,
    pixels_inside,
    query_chunks,
    region_grid,
    to_rows,
)


@torch.no_grad()
def hierarchical_regions(
    q: Tensor,
    k: Tensor,
    region_size: int | tuple[int, int],
    topk: int,
    *,
    query_region_size: int | tuple[int, int] | None = None,
    order: Literal["z"] | None = None,
) -> Tensor:
    """About the `topk` regions of the largest single product, by a search that halves groups of regions: HiP.

    The regions, in a row, are cut into `topk` groups. Every group is halved, a half is judged by its first
    region alone, the `topk` best halves stay, and so on until a group is one region. A region is judged by
    the largest product of its keys with every second query of the query region. A list costs
    `2 * topk * log2(regions / topk)` regions looked at instead of all, and only about half of the true best
    ones are found on smooth maps, since the first region of a group says little about the others. Float32
    whatever the input and the autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a key region in pixels, or (height, width); a border region may be smaller.
        topk: regions per list.
        query_region_size: that of the query regions; `region_size` by default.
        order: how regions stand in a row: row by row, or `"z"`, in Z-order, in which groups are compact.

    Returns:
        `[B, heads, query regions, min(topk, regions)]` int32, best first, ties by the lowest place in the row
        of regions.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, or an argument is out of its range.
    """
    region = check_maps("hierarchical_regions", q, k, region_size)
    check_counts("hierarchical_regions", topk=topk)
    if order not in (None, "z"):
        raise ValueError(f"hierarchical_regions: order must be None or 'z', got {order!r}")
    query_region = region if query_region_size is None else pair("query_region_size", query_region_size)
    inside, queries_inside = pixels_inside(k, region), _sampled(pixels_inside(q, query_region))
    regions, heads = len(inside), q.shape[0] * q.shape[3]
    row = torch.arange(regions, device=q.device) if order is None else _z_order(q, region)
    with without_autocast(q):
        queries, keys = to_rows(at_least_float32(q), query_region), to_rows(at_least_float32(k), region)
        queries = queries.unflatten(0, (heads, len(queries_inside)))
        keys = keys.unflatten(0, (heads, regions))
        row = _Row(keys[:, row], inside[row], row)
        found = []
        held = 2 * min(topk, regions) * inside.shape[1] * (q.shape[4] + queries.shape[2])
        for chunk in query_chunks(q, queries.shape[1], heads * held):
            found.append(_search(queries[:, chunk], queries_inside[chunk], row, topk))
    return torch.cat(found, 1).unflatten(0, (q.shape[0], q.shape[3])).to(torch.int32)


class _Row(NamedTuple):
    """The regions in a row: keys `[B * heads, regions, pixels, d]`, which pixels there are `[regions,
    pixels]`, and the numbers of the regions `[regions]`."""

    keys: Tensor
    inside: Tensor
    numbers: Tensor


def _search(queries: Tensor, sampled: Tensor, row: _Row, topk: int) -> Tensor:
    """Lists `[B * heads, n, topk]` for queries `[B * heads, n, pixels, d]`, of which `sampled` count."""
    regions = len(row.numbers)
    count = min(topk, regions)
    bounds = torch.arange(count + 1, device=queries.device) * regions // count
    start, end = (x.expand(*queries.shape[:2], count) for x in (bounds[:-1], bounds[1:]))
    scores, size = _largest(queries, sampled, row, start), regions / count
    while size > 1:
        middle = start + (end - start) // 2
        start, end = torch.cat((start, middle), 2), torch.cat((middle, end), 2)
        # In the order of the row, so that among equal halves the first one stays.
        start, place = start.sort(dim=2, stable=True)
        end = end.gather(2, place)
        scores = _largest(queries, sampled, row, start).masked_fill(start == end, -math.inf)
        best = scores.sort(dim=2, descending=True, stable=True).indices[..., :count]
        start, end, scores = (x.gather(2, best) for x in (start, end, scores))
        size /= 2
    best = scores.sort(dim=2, descending=True, stable=True).indices
    return row.numbers[start.gather(2, best)]


def _largest(queries: Tensor, sampled: Tensor, row: _Row, start: Tensor) -> Tensor:
    """The largest products `[B * heads, n, m]` of query regions and the regions at these places."""
    head = torch.arange(len(start), device=start.device)[:, None, None]
    products = queries @ row.keys[head, start].flatten(2, 3).transpose(2, 3)
    products = products.unflatten(3, (start.shape[2], row.inside.shape[1]))
    products = products.masked_fill(~row.inside[start][:, :, None], -math.inf).amax(4)
    return products.masked_fill(~sampled[..., None], -math.inf).amax(2)


def _sampled(inside: Tensor) -> Tensor:
    """Every second of a region's own pixels `[regions, pixels]`, or the only one."""
    number = inside.cumsum(1) - 1
    return inside & ((number % 2 == 1) | (inside.sum(1, keepdim=True) == 1))


def _z_order(x: Tensor, region: tuple[int, int]) -> Tensor:
    """The numbers of the regions `[regions]` of a map along a Z-curve."""
    rows, columns = region_grid(x.shape[1], x.shape[2], region, x.device)
    place = torch.zeros_like(rows)
    for bit in range(16):
        place += ((rows >> bit & 1) << 2 * bit + 1) + ((columns >> bit & 1) << 2 * bit)
    return place.argsort(stable=True)
