"""The fused forward pass of routed attention: keys and values are streamed by region number, never gathered.

One program computes a tile of one query region. The keys of its list form one long row, `topk` times the
pixels of a region; every step takes the next keys of that row, wherever on the map their regions lie, so that
small regions share a tile. The files of this folder are imported only when a kernel runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.fused.geometry import (
    bias_of_head,
    bias_of_keys,
    bias_of_queries,
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
)
from visionattn.kernels.triton_rows import LN_2, load_rows, store_rows, tile_options


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    lists,
    ends,
    list_counts,
    bias,
    out,
    lse,
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
    """Output and log-sum-exp of one tile of queries."""
    at = place(tl.program_id(0), query_regions, OWN)
    own = own_pixels(at, query_regions, OWN)
    q += at.batch * strides.b + at.head * strides.h
    query = load_rows(q, offset_of(own, strides), own.valid, HEAD_DIM, BLOCK_D)
    begin = at.batch * strides_k.b + at.head * strides_k.h
    lists, counts, count = list_of(
        lists, ends, list_counts, at.batch, at.head, at.region, sets, query_regions
    )
    bias = bias_of_head(bias, at.head, bias_strides)
    own_part = bias_of_queries(own, bias_strides)

    best = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    for start in range(0, count * key_regions.region_h * key_regions.region_w, OTHERS):
        others = listed_pixels(lists, start, count, counts, key_regions, OTHERS)
        offset = offset_of(others, strides_k)
        key = load_rows(k + begin, offset, others.valid, HEAD_DIM, BLOCK_D)
        part = bias_of_keys(others, bias_strides)
        logits = scores(query, key, own, others, bias, own_part, part, scale, PRECISION)
        logits = tl.where(others.valid[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        # As long as no key was seen, everything is -inf, and -inf - -inf is not a number.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(v + begin, offset, others.valid, HEAD_DIM, BLOCK_D)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        best = new_best

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    row = row_of(own, at.head, query_regions)
    image = rows_of_image(at.batch, query_regions)
    store_rows(out + image * HEAD_DIM, row * HEAD_DIM, own.valid, acc / total[:, None], HEAD_DIM, BLOCK_D)
    norm = tl.where(empty, float("-inf"), (best + tl.log2(total)) * LN_2)
    tl.store(lse + image + row, norm, mask=own.valid)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Output `[B, H, W, heads, d]`, log-sum-exp `[B, H, W, heads]` float32; arguments as in `op.py`."""
    *inputs, _, bias, numbers = prepare(q, k, v, call)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    region = call.query_region
    options = {**numbers, **tile_options(q, region[0] * region[1], call.bias is not None)}
    grid = (num_programs(q, region, options["OWN"]),)
    forward_kernel[grid](*inputs, bias, out, lse, call.scale, **options)
    return out, lse
