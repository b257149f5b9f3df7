"""The fused backward pass of routed attention: two launches, no atomics.

The first goes along the lists as the forward pass does, for the gradient of the queries; it also writes Δ.
The second goes along reverse lists, the query regions that list a key region, for the gradients of keys and
values: every program owns its keys, so that sums are made in one order and equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.fused.bias import bias_gradient
from visionattn.kernels.routed.fused.forward import (
    bias_geometry,
    geometry,
    launch_options,
    load_bias,
    num_programs,
    place,
    position,
)
from visionattn.kernels.triton_rows import LOG2_E, equally_strided, load_rows, store_rows


@triton.jit
def query_kernel(
    q,
    k,
    v,
    lists,
    bias,
    out,
    lse,
    grad_out,
    grad_lse,
    delta,
    grad_q,
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
    """Δ and the gradient of the queries of one tile."""
    pixels = region_h * region_w
    batch, head, region, first = place(tl.program_id(0), heads, regions, pixels, BLOCK_Q)
    pixel = first + tl.arange(0, BLOCK_Q)
    y, x, valid = position(region, pixel, height, width, region_h, region_w, regions_x)
    valid = valid & (pixel < pixels)
    begin = batch * stride_b + head * stride_h
    query = load_rows(q + begin, y * stride_y + x * stride_x, valid, HEAD_DIM, BLOCK_D)
    row = (y * width + x) * heads + head
    image = batch * height * width * heads
    grad = load_rows(grad_out + image * HEAD_DIM, row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    result = load_rows(out + image * HEAD_DIM, row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    drop = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    drop -= tl.load(grad_lse + image + row, mask=valid, other=0.0)
    tl.store(delta + image + row, drop, mask=valid)
    # An empty list has the log-sum-exp -inf; all its weights are masked below.
    norm = tl.load(lse + image + row, mask=valid, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm) * LOG2_E
    lists += batch * list_stride_b + head * list_stride_h + region * topk
    bias_of_row = bias_start + y * bias_stride_qy + x * bias_stride_qx
    bias_of_head = head.to(tl.int64) * bias_stride_h

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, topk * pixels, BLOCK_K):
        number = start + tl.arange(0, BLOCK_K)
        listed = tl.load(lists + number // pixels, mask=number < topk * pixels, other=-1)
        key_y, key_x, seen = position(listed, number % pixels, height, width, region_h, region_w, regions_x)
        seen = seen & (listed >= 0)
        offset = key_y * stride_y + key_x * stride_x
        key = load_rows(k + begin, offset, seen, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, offset, seen, HEAD_DIM, BLOCK_D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        if HAS_BIAS:
            bias_of_key = key_y * bias_stride_ky + key_x * bias_stride_kx
            logits += load_bias(bias + bias_of_head, bias_of_row, bias_of_key, valid, seen)
        weights = tl.exp2(tl.where(seen[None, :], logits - norm[:, None], float("-inf")))
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    store_rows(grad_q + image * HEAD_DIM, row * HEAD_DIM, valid, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def key_kernel(
    q,
    k,
    v,
    starts,
    queries,
    bias,
    lse,
    grad_out,
    delta,
    grad_k,
    grad_v,
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
    """Gradients of one tile of keys and values: here `BLOCK_Q` is the tile of keys, `BLOCK_K` of queries."""
    pixels = region_h * region_w
    batch, head, region, first = place(tl.program_id(0), heads, regions, pixels, BLOCK_Q)
    pixel = first + tl.arange(0, BLOCK_Q)
    y, x, valid = position(region, pixel, height, width, region_h, region_w, regions_x)
    valid = valid & (pixel < pixels)
    begin = batch * stride_b + head * stride_h
    offset = y * stride_y + x * stride_x
    key = load_rows(k + begin, offset, valid, HEAD_DIM, BLOCK_D)
    value = load_rows(v + begin, offset, valid, HEAD_DIM, BLOCK_D)
    lists = batch * list_stride_b + head * list_stride_h
    # Each of the lists has one start per region and one end more.
    starts += lists // topk + lists // (regions * topk) + region
    start_of_list = tl.load(starts)
    count = (tl.load(starts + 1) - start_of_list) * pixels
    queries += lists + start_of_list
    image = batch * height * width * heads
    grad_out += image * HEAD_DIM
    lse += image
    delta += image
    bias_of_row = bias_start + y * bias_stride_ky + x * bias_stride_kx
    bias_of_head = head.to(tl.int64) * bias_stride_h

    acc_k = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_K):
        number = start + tl.arange(0, BLOCK_K)
        listing = tl.load(queries + number // pixels, mask=number < count, other=-1)
        query_y, query_x, asks = position(
            listing, number % pixels, height, width, region_h, region_w, regions_x
        )
        asks = asks & (listing >= 0)
        row = (query_y * width + query_x) * heads + head
        query = load_rows(q + begin, query_y * stride_y + query_x * stride_x, asks, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row * HEAD_DIM, asks, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + row, mask=asks, other=float("inf")) * LOG2_E
        drop = tl.load(delta + row, mask=asks, other=0.0)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * (scale * LOG2_E)
        if HAS_BIAS:
            bias_of_query = query_y * bias_stride_qy + query_x * bias_stride_qx
            logits += load_bias(bias + bias_of_head, bias_of_row, bias_of_query, valid, asks)
        weights = tl.exp2(logits - norm[None, :])
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[None, :])
        acc_k = tl.dot(grad_logits.to(query.dtype), query, acc_k, input_precision=PRECISION)
    row = (y * width + x) * heads + head
    store_rows(grad_k + image * HEAD_DIM, row * HEAD_DIM, valid, acc_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + image * HEAD_DIM, row * HEAD_DIM, valid, acc_v, HEAD_DIM, BLOCK_D)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    region: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias, contiguous; arguments as in `library.py`."""
    q, k, v = equally_strided(q, k, v)
    # The gradient of a sum is an expanded number.
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty_like(lse)
    shape = {**geometry(q, indices, region), **bias_geometry(bias, q)}
    options = {**shape, **launch_options(q, region, bias is not None, backward=True)}
    grid = (num_programs(q, region, options["BLOCK_Q"]),)
    query_kernel[grid](q, k, v, indices, bias, out, lse, grad_out, grad_lse, delta, grad_q, scale, **options)
    starts, queries = reverse_lists(indices)
    key_kernel[grid](q, k, v, starts, queries, bias, lse, grad_out, delta, grad_k, grad_v, scale, **options)
    if bias is None:
        return grad_q, grad_k, grad_v, None
    return grad_q, grad_k, grad_v, bias_gradient(q, k, v, indices, bias, lse, grad_out, delta, region, scale)


def reverse_lists(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Who lists a region.

    Args:
        indices: `[B, lists, regions, topk]`, -1 for padding.

    Returns:
        `starts` `[B, lists, regions + 1]` int32 and `queries` `[B, lists, regions * topk]` int32: from number
        `starts[..., r]` to before `starts[..., r + 1]` stand the regions that list region r, ascending.
    """
    regions, topk = indices.shape[2:]
    # Padding goes behind everything.
    flat = torch.where(indices < 0, regions, indices).flatten(2)
    listed, order = flat.sort(dim=-1, stable=True)
    bounds = torch.arange(regions + 1, dtype=flat.dtype, device=flat.device).expand(*flat.shape[:2], -1)
    starts = torch.searchsorted(listed, bounds.contiguous(), out_int32=True)
    return starts, (order // topk).to(torch.int32)
