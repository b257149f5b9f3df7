"""The fused backward pass of routed attention: two launches, no atomics.

The first goes along the lists as the forward pass does, for the gradient of the queries; it also writes Δ.
The second goes along reverse lists, the query regions that list a key region, for the gradients of keys and
values: every program owns its keys, so that sums are made in one order and equal inputs give equal bits.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.fused.bias import bias_gradient
from visionattn.kernels.routed.fused.geometry import (
    bias_of_head,
    bias_of_keys,
    bias_of_queries,
    counts_of_head,
    list_of,
    listed_pixels,
    num_programs,
    offset_of,
    own_pixels,
    place,
    prepare,
    row_of,
    rows_of_image,
    scores,
    set_of_lists,
)
from visionattn.kernels.triton_rows import LOG2_E, load_rows, store_rows, tile_options


@triton.jit
def query_kernel(
    q,
    k,
    v,
    lists,
    ends,
    list_counts,
    bias,
    out,
    lse,
    grad_out,
    grad_lse,
    delta,
    grad_q,
    scale,
    strides,
    strides_k,
    query_regions,
    key_regions,
    sets,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Δ and the gradient of the queries of one tile."""
    at = place(tl.program_id(0), query_regions, OWN)
    own = own_pixels(at, query_regions, OWN)
    q += at.batch * strides.b + at.head * strides.h
    query = load_rows(q, offset_of(own, strides), own.valid, HEAD_DIM, BLOCK_D)
    begin = at.batch * strides_k.b + at.head * strides_k.h
    row = row_of(own, at.head, query_regions)
    image = rows_of_image(at.batch, query_regions)
    grad = load_rows(grad_out + image * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
    result = load_rows(out + image * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
    drop = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    if grad_lse is not None:
        drop -= tl.load(grad_lse + image + row, mask=own.valid, other=0.0)
    tl.store(delta + image + row, drop, mask=own.valid)
    # An empty list has the log-sum-exp -inf; all its weights are masked below.
    norm = tl.load(lse + image + row, mask=own.valid, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm) * LOG2_E
    lists, counts, count = list_of(
        lists, ends, list_counts, at.batch, at.head, at.region, sets, query_regions
    )
    bias = bias_of_head(bias, at.head, bias_strides)
    own_part = bias_of_queries(own, bias_strides)

    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, count * key_regions.region_h * key_regions.region_w, OTHERS):
        others = listed_pixels(lists, start, count, counts, key_regions, OTHERS)
        offset = offset_of(others, strides_k)
        key = load_rows(k + begin, offset, others.valid, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, offset, others.valid, HEAD_DIM, BLOCK_D)
        part = bias_of_keys(others, bias_strides)
        logits = scores(query, key, own, others, bias, own_part, part, scale, PRECISION)
        weights = tl.exp2(tl.where(others.valid[None, :], logits - norm[:, None], float("-inf")))
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    store_rows(grad_q + image * HEAD_DIM, row * HEAD_DIM, own.valid, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def key_kernel(
    q,
    k,
    v,
    starts,
    listing,
    counts,
    bias,
    lse,
    grad_out,
    delta,
    grad_k,
    grad_v,
    scale,
    strides,
    strides_k,
    query_regions,
    key_regions,
    sets,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys and values, along the queries whose lists name its region."""
    at = place(tl.program_id(0), key_regions, OWN)
    own = own_pixels(at, key_regions, OWN)
    present = own.valid
    counts = counts_of_head(counts, at.batch, at.head, sets, key_regions)
    if counts is not None:
        present = present & (at.first + tl.arange(0, OWN) < tl.load(counts + at.region))
    begin = at.batch * strides_k.b + at.head * strides_k.h
    key = load_rows(k + begin, offset_of(own, strides_k), present, HEAD_DIM, BLOCK_D)
    value = load_rows(v + begin, offset_of(own, strides_k), present, HEAD_DIM, BLOCK_D)
    lists = set_of_lists(at.batch, at.head, sets)
    # A set of reverse lists has one start per region and one end more.
    starts += lists * (key_regions.count + 1) + at.region
    first = tl.load(starts)
    count = tl.load(starts + 1) - first
    listing += lists * query_regions.count * sets.topk + first
    image = rows_of_image(at.batch, query_regions)
    q += at.batch * strides.b + at.head * strides.h
    grad_out += image * HEAD_DIM
    lse += image
    delta += image
    bias = bias_of_head(bias, at.head, bias_strides)
    own_part = bias_of_keys(own, bias_strides)

    acc_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, count * query_regions.region_h * query_regions.region_w, OTHERS):
        others = listed_pixels(listing, start, count, None, query_regions, OTHERS)
        row = row_of(others, at.head, query_regions)
        query = load_rows(q, offset_of(others, strides), others.valid, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row * HEAD_DIM, others.valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + row, mask=others.valid, other=float("inf")) * LOG2_E
        if counts is not None:
            # Queries of which every listed key is absent have no weights.
            norm = tl.where(norm == float("-inf"), float("inf"), norm)
        drop = tl.load(delta + row, mask=others.valid, other=0.0)
        part = bias_of_queries(others, bias_strides)
        logits = scores(key, query, own, others, bias, own_part, part, scale, PRECISION)
        weights = tl.exp2(logits - norm[None, :])
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[None, :])
        acc_k = tl.dot(grad_logits.to(query.dtype), query, acc_k, input_precision=PRECISION)
    if counts is not None:
        acc_k = tl.where(present[:, None], acc_k, 0.0)
        acc_v = tl.where(present[:, None], acc_v, 0.0)
    row = row_of(own, at.head, key_regions)
    image = rows_of_image(at.batch, key_regions)
    store_rows(grad_k + image * HEAD_DIM, row * HEAD_DIM, own.valid, acc_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + image * HEAD_DIM, row * HEAD_DIM, own.valid, acc_v, HEAD_DIM, BLOCK_D)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    outputs: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, contiguous, and of the bias if wanted; `outputs` are those of `forward`."""
    q, k, v, lists, ends, list_counts, counts, bias, numbers = inputs = prepare(q, k, v, call)
    # The gradient of a sum is an expanded number.
    grad_out, grad_lse = grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    out, lse = outputs
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)

    def launched(x: Tensor, region: Sequence[int]) -> tuple[tuple[int], dict[str, Any]]:
        tiles = tile_options(q, region[0] * region[1], bias is not None, backward=True)
        return (num_programs(x, region, tiles["OWN"]),), {**numbers, **tiles}

    grid, options = launched(q, call.query_region)
    more = out, lse, grad_out, grad_lse, delta, grad_q, call.scale
    query_kernel[grid](q, k, v, lists, ends, list_counts, bias, *more, **options)
    starts, listing = reverse_lists(lists, numbers["key_regions"].count)
    grid, options = launched(k, call.region)
    more = lse, grad_out, delta, grad_k, grad_v, call.scale
    key_kernel[grid](q, k, v, starts, listing, counts, bias, *more, **options)
    if bias is None or not with_bias:
        return grad_q, grad_k, grad_v, None
    return grad_q, grad_k, grad_v, bias_gradient(inputs, lse, grad_out, delta, call.scale)


def reverse_lists(indices: Tensor, regions: int) -> tuple[Tensor, Tensor]:
    """The query regions that list each key region.

    Args:
        indices: `[B, lists, rows, topk]`, -1 for padding.
        regions: how many key regions there are.

    Returns:
        `starts` `[B, lists, regions + 1]` int32 and `queries` `[B, lists, rows * topk]` int32: from number
        `starts[..., r]` to before `starts[..., r + 1]` stand the regions that list region r, ascending.
    """
    # Padding goes behind everything.
    flat = torch.where(indices < 0, regions, indices).flatten(2)
    listed, order = flat.sort(dim=-1, stable=True)
    bounds = torch.arange(regions + 1, dtype=flat.dtype, device=flat.device).expand(*flat.shape[:2], -1)
    starts = torch.searchsorted(listed, bounds.contiguous(), out_int32=True)
    return starts, (order // max(indices.shape[3], 1)).to(torch.int32)
