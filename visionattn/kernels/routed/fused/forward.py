"""The fused forward pass of routed attention: keys and values are streamed by region number, never gathered.

One program computes a tile of one query region. The keys of its list form one long row, `topk` times the
pixels of a region; every step takes the next keys of that row, wherever on the map their regions lie, so that
small regions share a tile. This file and `triton_backward.py` are imported only when a kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.triton_rows import (
    LN_2,
    LOG2_E,
    equally_strided,
    load_rows,
    padded_head_dim,
    precision,
    store_rows,
)


@triton.jit
def place(program, heads, regions, pixels, TILE: tl.constexpr):
    """Which image (int64), head, region and first pixel of the region a program works on."""
    tiles = tl.cdiv(pixels, TILE)
    first = program % tiles * TILE
    region = program // tiles % regions
    head = program // (tiles * regions) % heads
    return (program // (tiles * regions * heads)).to(tl.int64), head, region, first


@triton.jit
def position(region, pixel, height, width, region_h, region_w, regions_x):
    """Row and column of a pixel of a region, and whether it lies on the map."""
    y = region // regions_x * region_h + pixel // region_w
    x = region % regions_x * region_w + pixel % region_w
    return y, x, (y < height) & (x < width)


@triton.jit
def load_bias(bias, row, column, row_valid, column_valid):
    """The bias of pairs `[rows, columns]`, in the units of the logits; its place is a sum of one of each."""
    mask = row_valid[:, None] & column_valid[None, :]
    return tl.load(bias + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    lists,
    bias,
    out,
    lse,
    scale,
    stride_b,
    stride_y,
    stride_x,
    stride_h,
    list_stride_b,
    list_stride_h,
    heads,
    height,
    width,
    region_h,
    region_w,
    regions_x,
    regions,
    topk,
    bias_start,
    bias_stride_h,
    bias_stride_qy,
    bias_stride_qx,
    bias_stride_ky,
    bias_stride_kx,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of one tile of queries."""
    pixels = region_h * region_w
    batch, head, region, first = place(tl.program_id(0), heads, regions, pixels, BLOCK_Q)
    pixel = first + tl.arange(0, BLOCK_Q)
    y, x, valid = position(region, pixel, height, width, region_h, region_w, regions_x)
    valid = valid & (pixel < pixels)
    begin = batch * stride_b + head * stride_h
    query = load_rows(q + begin, y * stride_y + x * stride_x, valid, HEAD_DIM, BLOCK_D)
    lists += batch * list_stride_b + head * list_stride_h + region * topk
    bias_of_row = bias_start + y * bias_stride_qy + x * bias_stride_qx
    bias_of_head = head.to(tl.int64) * bias_stride_h

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, topk * pixels, BLOCK_K):
        number = start + tl.arange(0, BLOCK_K)
        listed = tl.load(lists + number // pixels, mask=number < topk * pixels, other=-1)
        key_y, key_x, seen = position(listed, number % pixels, height, width, region_h, region_w, regions_x)
        seen = seen & (listed >= 0)
        offset = key_y * stride_y + key_x * stride_x
        key = load_rows(k + begin, offset, seen, HEAD_DIM, BLOCK_D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        if HAS_BIAS:
            bias_of_key = key_y * bias_stride_ky + key_x * bias_stride_kx
            logits += load_bias(bias + bias_of_head, bias_of_row, bias_of_key, valid, seen)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        # As long as no key was seen, everything is -inf, and -inf - -inf is not a number.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(v + begin, offset, seen, HEAD_DIM, BLOCK_D)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        best = new_best

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    row = (y * width + x) * heads + head
    image = batch * height * width * heads
    store_rows(out + image * HEAD_DIM, row * HEAD_DIM, valid, acc / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + image + row, tl.where(empty, float("-inf"), (best + tl.log2(total)) * LN_2), mask=valid)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    region: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, W, heads, d]`, log-sum-exp `[B, H, W, heads]` float32; arguments as in `library.py`."""
    q, k, v = equally_strided(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    options = {
        **geometry(q, indices, region),
        **bias_geometry(bias, q),
        **launch_options(q, region, bias is not None),
    }
    grid = (num_programs(q, region, options["BLOCK_Q"]),)
    forward_kernel[grid](q, k, v, indices, bias, out, lse, scale, **options)
    return out, lse


def geometry(q: Tensor, indices: Tensor, region: tuple[int, int]) -> dict[str, Any]:
    """The integers that all kernels take."""
    height, width, heads = q.shape[1:4]
    regions, topk = indices.shape[2:]
    return {
        **dict(zip(("stride_b", "stride_y", "stride_x", "stride_h"), q.stride())),
        "list_stride_b": indices.stride(0),
        "list_stride_h": indices.stride(1) if indices.shape[1] > 1 else 0,
        "heads": heads,
        "height": height,
        "width": width,
        "region_h": region[0],
        "region_w": region[1],
        "regions_x": -(-width // region[1]),
        "regions": regions,
        "topk": topk,
    }


def bias_geometry(bias: Tensor | None, q: Tensor) -> dict[str, Any]:
    """Where the bias of a pair stands: a start and a stride for each coordinate of its query and its key.

    The bias is contiguous, a relative table or dense.
    """
    height, width = q.shape[1:3]
    names = ("start", "stride_h", "stride_qy", "stride_qx", "stride_ky", "stride_kx")
    if bias is None:
        places = (0,) * 6
    elif bias.shape[1:] == (2 * height - 1, 2 * width - 1):
        row = 2 * width - 1
        places = ((height - 1) * row + width - 1, bias.stride(0), -row, -1, row, 1)
    else:
        places = (0, bias.stride(0), width * height * width, height * width, width, 1)
    return {"HAS_BIAS": bias is not None, **{f"bias_{n}": p for n, p in zip(names, places)}}


def num_programs(q: Tensor, region: tuple[int, int], tile: int) -> int:
    """Tiles of all regions, heads and images."""
    batch, height, width, heads, _ = q.shape
    regions = -(-height // region[0]) * -(-width // region[1])
    return batch * heads * regions * -(-(region[0] * region[1]) // tile)


def launch_options(
    q: Tensor,
    region: tuple[int, int],
    has_bias: bool = False,
    backward: bool = False,
    hip: bool = torch.version.hip is not None,
) -> dict[str, Any]:
    """Tiles, warps and precision for these shapes.

    `BLOCK_Q` vectors of a region are a program's own, `BLOCK_K` at a time are streamed. Chosen so that the
    compiled kernels keep their numbers in registers; the tests assert it.
    """
    dim = padded_head_dim(q)
    single = q.dtype == torch.float32
    # Products in float32 do not run on matrix units and take registers for their operands.
    widest = 32 if dim > 128 or single else 64
    own = min(max(16, triton.next_power_of_2(region[0] * region[1])), widest)
    if dim > 128 and not hip:
        warps = 8
    elif own < 64:
        warps = 4 if dim > 64 or single else 2
    else:
        warps = 4 if hip or dim <= (32 if backward else 64) else 8
    return {
        "HEAD_DIM": q.shape[4],
        "BLOCK_D": dim,
        "BLOCK_Q": own,
        # The places of a bias are held beside the logits.
        "BLOCK_K": 32 if dim > 64 or single or has_bias else 64,
        "PRECISION": precision(q),
        "num_warps": warps,
        "num_stages": 1 if dim > 64 or single else 2,
    }
