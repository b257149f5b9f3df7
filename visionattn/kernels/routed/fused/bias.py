"""The gradient of the bias of routed attention, without atomics.

A program owns a pair of rows of the map (dense bias) or all pairs of rows of one distance (relative table),
a tile of their columns and a head. It adds the gradients of the logits over images and, for a table, over the
rows, in one order; the columns of a table are then summed along the diagonals of the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.fused.geometry import (
    Pixels,
    Prepared,
    bias_of_head,
    bias_of_keys,
    bias_of_queries,
    counts_of_head,
    is_table,
    offset_of,
    region_of,
    row_of,
    rows_of_image,
    scores,
    set_of_lists,
)
from visionattn.kernels.routed.lists import listed_regions
from visionattn.kernels.triton_rows import LOG2_E, load_rows, padded_head_dim, precision


@triton.jit
def bias_kernel(
    q,
    k,
    v,
    listed,
    counts,
    bias,
    lse,
    grad_out,
    delta,
    grad_bias,
    scale,
    batch,
    strides,
    strides_k,
    query_regions,
    key_regions,
    sets,
    bias_strides,
    IS_TABLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`grad_bias` `[heads, row pairs or distances, width, key width]`: `BLOCK` by `BLOCK` columns."""
    width, height, key_width = query_regions.width, query_regions.height, key_regions.width
    tiles, key_tiles = tl.cdiv(width, BLOCK), tl.cdiv(key_width, BLOCK)
    program = tl.program_id(0)
    x = program % tiles * BLOCK + tl.arange(0, BLOCK)
    key_x = program // tiles % key_tiles * BLOCK + tl.arange(0, BLOCK)
    entry = program // (tiles * key_tiles)
    if IS_TABLE:
        entries = 2 * height - 1
        distance = entry % entries - (height - 1)
        first = tl.maximum(0, -distance)
        last = tl.minimum(height, height - distance)
    else:
        entries = height * key_regions.height
        first = entry % entries // key_regions.height
        last = first + 1
        distance = entry % entries % key_regions.height - first
    head = entry // entries
    bias = bias_of_head(bias, head, bias_strides)

    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(batch * (last - first)):
        image = (step // (last - first)).to(tl.int64)
        y = first + step % (last - first)
        queries = Pixels(y, x, x < width)
        keys = Pixels(y + distance, key_x, key_x < key_width)
        begin = image * strides.b + head * strides.h
        query = load_rows(q + begin, offset_of(queries, strides), queries.valid, HEAD_DIM, BLOCK_D)
        begin = image * strides_k.b + head * strides_k.h
        key = load_rows(k + begin, offset_of(keys, strides_k), keys.valid, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, offset_of(keys, strides_k), keys.valid, HEAD_DIM, BLOCK_D)
        row = row_of(queries, head, query_regions)
        start = rows_of_image(image, query_regions)
        grad = load_rows(grad_out + start * HEAD_DIM, row * HEAD_DIM, queries.valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + start + row, mask=queries.valid, other=float("inf")) * LOG2_E
        drop = tl.load(delta + start + row, mask=queries.valid, other=0.0)
        region = region_of(queries, query_regions)
        key_region = region_of(keys, key_regions)
        own_lists = listed + set_of_lists(image, head, sets) * query_regions.count * key_regions.count
        seen = tl.load(
            own_lists + region[:, None] * key_regions.count + key_region[None, :],
            mask=queries.valid[:, None] & keys.valid[None, :],
            other=0,
        )
        own_counts = counts_of_head(counts, image, head, sets, key_regions)
        if own_counts is not None:
            place = keys.y % key_regions.region_h * key_regions.region_w + key_x % key_regions.region_w
            present = place < tl.load(own_counts + key_region, mask=keys.valid, other=0)
            seen = tl.where(present[None, :], seen, 0)
        own_part, part = bias_of_queries(queries, bias_strides), bias_of_keys(keys, bias_strides)
        logits = scores(query, key, queries, keys, bias, own_part, part, scale, PRECISION)
        weights = tl.exp2(tl.where(seen != 0, logits - norm[:, None], float("-inf")))
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        acc += weights * (grad_weights - drop[:, None])
    tile = grad_bias + entry.to(tl.int64) * width * key_width
    mask = (x < width)[:, None] & (key_x < key_width)[None, :]
    tl.store(tile + x[:, None] * key_width + key_x[None, :], acc, mask=mask)


def bias_gradient(
    inputs: Prepared, lse: Tensor, grad_out: Tensor, delta: Tensor, scale: float
) -> Tensor | None:
    """The gradient of a table or of a dense bias, in its shape and dtype."""
    q, k, v, lists, _, _, counts, bias, numbers = inputs
    if bias is None:
        return None
    batch, height, width, heads, _ = q.shape
    relative = is_table(bias, q)
    entries = 2 * height - 1 if relative else height * k.shape[1]
    sums = torch.empty((heads, entries, width, k.shape[2]), dtype=torch.float32, device=q.device)
    options = {**numbers, **bias_launch_options(q, relative)}
    block = options["BLOCK"]
    grid = (heads * entries * triton.cdiv(width, block) * triton.cdiv(k.shape[2], block),)
    listed = listed_regions(lists, numbers["key_regions"].count).to(torch.int8).contiguous()
    bias_kernel[grid](q, k, v, listed, counts, bias, lse, grad_out, delta, sums, scale, batch, **options)
    if relative:
        return _sum_of_diagonals(sums).to(bias.dtype)
    sums = sums.unflatten(1, (height, k.shape[1])).transpose(2, 3)
    return sums.reshape(bias.shape).to(bias.dtype)


def bias_launch_options(q: Tensor, relative: bool) -> dict[str, Any]:
    """Tiles, warps and precision of `bias_kernel` for these shapes."""
    dim = padded_head_dim(q)
    single = q.dtype == torch.float32
    widest = 16 if dim > 128 else 32 if dim > 64 or single else 64
    return {
        "IS_TABLE": relative,
        "HEAD_DIM": q.shape[4],
        "BLOCK_D": dim,
        "BLOCK": min(max(16, triton.next_power_of_2(q.shape[2])), widest),
        "PRECISION": precision(q),
        "num_warps": 8,
        "num_stages": 1,
    }


def _sum_of_diagonals(tiles: Tensor) -> Tensor:
    """`[..., 2 * n - 1]` of `[..., n, n]`: entry `n - 1 + d` is the sum over all column - row = d."""
    n = tiles.shape[-1]
    # A row of 2n - 1 numbers is one shorter than a padded one: reading in such rows shifts each by one.
    rows = F.pad(tiles.flip(-2), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]
    return rows.unflatten(-1, (n, 2 * n - 1)).sum(-2)
