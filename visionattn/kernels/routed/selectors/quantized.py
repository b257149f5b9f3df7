"""Regions by logits of few bits: SALE (https://arxiv.org/abs/2505.24179)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import (
    check_maps,
    check_shares,
    pixels_inside,
    query_chunks,
    region_grid,
    softmax_scale,
    to_rows,
)
from visionattn.kernels.routed.selectors.pick import pick_kept


@torch.no_grad()
def quantized_regions(
    q: Tensor,
    k: Tensor,
    region_size: int | tuple[int, int],
    threshold: float,
    *,
    local: int = 1,
    sinks: int = 0,
    bits: int = 4,
    scale: float | None = None,
) -> Tensor:
    """The regions with a weight above `threshold` of what the base regions hold together, per head: SALE.

    The base of a region is always listed: regions nearby and the first of the map. For the others all logits
    are computed from queries and keys of `bits` bits, after the mean of the map is taken off both (that of
    the queries stays in full precision); the largest, relative to the exact sum of the base, decides. The
    published threshold, 0.004, is for causal text; on maps of photographs 0.05 lists about half of the
    regions, 0.2 a third. Compares all pairs of pixels. Float32 whatever the input and the autocast state.
    Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        threshold: the least weight of a listed region's best pair of pixels, where the weights of the base
            add up to 1; above 0, at most 1.
        local: regions less than so far away, in rows and in columns, are in the base: 1 is the own region,
            0 none.
        sinks: so many regions, the first of the map, are in the base.
        bits: of the integers, at least 2.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, heads, regions, n]` int32, by descending weight, ties by the lowest index, -1 behind the end of a
        list. n is the length of the longest list, or, in a compiled graph, the number of regions.

    Raises:
        ValueError: shapes differ, the maps are empty or of integers, an argument is out of its range, or the
            base is empty.
    """
    region = check_maps("quantized_regions", q, k, region_size)
    check_shares("quantized_regions", threshold=threshold)
    _check_base(local, sinks)
    if not 2 <= bits <= 16:
        raise ValueError(f"quantized_regions: bits must lie in 2 .. 16, got {bits}")
    scores = quantized_scores(q, k, region, local, sinks, bits, scale)
    return pick_kept(scores, (scores > threshold) | _base(q, region, local, sinks))


def quantized_scores(
    q: Tensor,
    k: Tensor,
    region: tuple[int, int],
    local: int = 1,
    sinks: int = 0,
    bits: int = 4,
    scale: float | None = None,
) -> Tensor:
    """The largest weight of pixels of two regions `[B, heads, regions, regions]`; the base has a sum of 1."""
    batch, heads, scale = q.shape[0], q.shape[3], softmax_scale(q, scale)
    with without_autocast(q):
        inside, base = pixels_inside(q, region), _base(q, region, local, sinks)
        regions, pixels = inside.shape
        q, k = at_least_float32(q) * scale, at_least_float32(k)
        k = k - k.mean((1, 2), keepdim=True)
        mean = q.mean((1, 2), keepdim=True)
        rows = (_rounded(q - mean, bits), _rounded(k, bits), (mean * k).sum(-1, keepdim=True), q, k)
        coarse_q, coarse_k, offset, q, k = (
            to_rows(x, region).unflatten(0, (batch * heads, regions)) for x in rows
        )
        coarse_k = coarse_k.flatten(1, 2).transpose(1, 2)
        offset = offset.flatten(1).masked_fill(~inside.flatten(), -math.inf)[:, None]
        # The base has a size that is known beforehand, also in a compiled graph.
        listed = pick_kept(base.to(q.dtype), base)[:, : (2 * local - 1) ** 2 + sinks]
        found = []
        for chunk in query_chunks(q, regions, batch * heads * regions * pixels**2):
            logits = coarse_q[:, chunk].flatten(1, 2) @ coarse_k + offset
            largest = logits.unflatten(2, (regions, pixels)).amax(-1).unflatten(1, (-1, pixels))
            largest = largest - _base_lse(q[:, chunk], k, listed[chunk], inside)[..., None]
            found.append(largest.masked_fill(~inside[chunk][..., None], -math.inf).amax(2))
        return torch.cat(found, 1).exp().unflatten(0, (batch, heads))


def _check_base(local: int, sinks: int) -> None:
    if local < 0 or sinks < 0 or not local + sinks:
        raise ValueError(
            "quantized_regions: local and sinks must be at least 0, and one of them 1 or more, got "
            f"{local} and {sinks}"
        )


def _base(q: Tensor, region: tuple[int, int], local: int, sinks: int) -> Tensor:
    """Which regions are in the base of which `[regions, regions]`."""
    y, x = region_grid(q.shape[1], q.shape[2], region, q.device)
    distance = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    return (distance < local) | (torch.arange(len(y), device=q.device) < sinks)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """`x` rounded to multiples of one step per pixel and head, the largest of them `2 ** (bits - 1) - 1`."""
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = step.masked_fill(step == 0, 1)
    return (x / step).round() * step


def _base_lse(q: Tensor, k: Tensor, listed: Tensor, inside: Tensor) -> Tensor:
    """Log-sum-exp of query rows `[n, regions, pixels, d]` over the keys of the listed regions."""
    keys = k[:, listed.clamp(min=0)].flatten(2, 3)
    visible = (inside[listed.clamp(min=0)] & (listed >= 0)[..., None]).flatten(1)
    logits = q @ keys.transpose(2, 3)
    return logits.masked_fill(~visible[:, None], -math.inf).logsumexp(-1)
