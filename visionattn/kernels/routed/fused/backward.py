"""The fused backward pass of routed attention: two launches, no atomics.

The first goes along the lists as the forward pass does, for the gradient of the queries; it also writes Δ.
The second goes along reverse lists, the query regions that list a key region, for the gradients of keys and
values: every program owns its keys, so that sums are made in one order and equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.fused.bias import bias_gradient
from visionattn.kernels.routed.fused.geometry import (
    bias_of_head,
    bias_of_keys,
    bias_of_queries,
    geometry,
    listed_pixels,
    num_programs,
    offset_of,
    own_pixels,
    place,
    row_of,
    rows_of_image,
    scores,
    set_of_lists,
)
from visionattn.kernels.triton_rows import LOG2_E, equally_strided, load_rows, store_rows, tile_options


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
    strides,
    regions,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Δ and the gradient of the queries of one tile."""
    at = place(tl.program_id(0), regions, OWN)
    own = own_pixels(at, regions, OWN)
    begin = at.batch * strides.b + at.head * strides.h
    query = load_rows(q + begin, offset_of(own, strides), own.valid, HEAD_DIM, BLOCK_D)
    row = row_of(own, at.head, regions)
    image = rows_of_image(at.batch, regions)
    grad = load_rows(grad_out + image * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
    result = load_rows(out + image * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
    drop = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    if grad_lse is not None:
        drop -= tl.load(grad_lse + image + row, mask=own.valid, other=0.0)
    tl.store(delta + image + row, drop, mask=own.valid)
    # An empty list has the log-sum-exp -inf; all its weights are masked below.
    norm = tl.load(lse + image + row, mask=own.valid, other=0.0)
    norm = tl.where(norm == float("-inf"), 0.0, norm) * LOG2_E
    lists += (set_of_lists(at.batch, at.head, regions) * regions.count + at.region) * regions.topk
    bias = bias_of_head(bias, at.head, bias_strides)
    own_part = bias_of_queries(own, bias_strides)

    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, regions.topk * regions.region_h * regions.region_w, OTHERS):
        others = listed_pixels(lists, start, regions.topk, regions, OTHERS)
        offset = offset_of(others, strides)
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
    queries,
    bias,
    lse,
    grad_out,
    delta,
    grad_k,
    grad_v,
    scale,
    strides,
    regions,
    bias_strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys and values, along the queries whose lists name its region."""
    at = place(tl.program_id(0), regions, OWN)
    own = own_pixels(at, regions, OWN)
    begin = at.batch * strides.b + at.head * strides.h
    key = load_rows(k + begin, offset_of(own, strides), own.valid, HEAD_DIM, BLOCK_D)
    value = load_rows(v + begin, offset_of(own, strides), own.valid, HEAD_DIM, BLOCK_D)
    lists = set_of_lists(at.batch, at.head, regions)
    # A set of reverse lists has one start per region and one end more.
    starts += lists * (regions.count + 1) + at.region
    first = tl.load(starts)
    count = tl.load(starts + 1) - first
    queries += lists * regions.count * regions.topk + first
    image = rows_of_image(at.batch, regions)
    grad_out += image * HEAD_DIM
    lse += image
    delta += image
    bias = bias_of_head(bias, at.head, bias_strides)
    own_part = bias_of_keys(own, bias_strides)

    acc_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, count * regions.region_h * regions.region_w, OTHERS):
        others = listed_pixels(queries, start, count, regions, OTHERS)
        row = row_of(others, at.head, regions)
        query = load_rows(q + begin, offset_of(others, strides), others.valid, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out, row * HEAD_DIM, others.valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + row, mask=others.valid, other=float("inf")) * LOG2_E
        drop = tl.load(delta + row, mask=others.valid, other=0.0)
        part = bias_of_queries(others, bias_strides)
        logits = scores(key, query, own, others, bias, own_part, part, scale, PRECISION)
        weights = tl.exp2(logits - norm[None, :])
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[None, :])
        acc_k = tl.dot(grad_logits.to(query.dtype), query, acc_k, input_precision=PRECISION)
    row = row_of(own, at.head, regions)
    store_rows(grad_k + image * HEAD_DIM, row * HEAD_DIM, own.valid, acc_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + image * HEAD_DIM, row * HEAD_DIM, own.valid, acc_v, HEAD_DIM, BLOCK_D)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    outputs: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    region: Sequence[int],
    scale: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, contiguous, and of the bias if wanted; `outputs` are those of `forward`."""
    q, k, v = equally_strided(q, k, v)
    indices, bias = indices.to(torch.int32).contiguous(), None if bias is None else bias.contiguous()
    # The gradient of a sum is an expanded number.
    grad_out, grad_lse = grad_out.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    out, lse = outputs
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty_like(lse)
    numbers = geometry(q, indices, region, bias)
    options = {**numbers, **tile_options(q, region[0] * region[1], bias is not None, backward=True)}
    grid = (num_programs(q, region, options["OWN"]),)
    query_kernel[grid](q, k, v, indices, bias, out, lse, grad_out, grad_lse, delta, grad_q, scale, **options)
    starts, queries = reverse_lists(indices)
    key_kernel[grid](q, k, v, starts, queries, bias, lse, grad_out, delta, grad_k, grad_v, scale, **options)
    if bias is None or not with_bias:
        return grad_q, grad_k, grad_v, None
    grad_bias = bias_gradient(q, k, v, indices, bias, lse, grad_out, delta, scale, numbers)
    return grad_q, grad_k, grad_v, grad_bias


def reverse_lists(indices: Tensor) -> tuple[Tensor, Tensor]:
    """The query regions that list each key region.

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
