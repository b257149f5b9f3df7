"""The fused forward pass of local attention: one launch, keys read where they lie on the map.

One program computes a tile of queries of one head. This file and its neighbours named `triton` are imported
only when a kernel runs.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.geometry import (
    Strides,
    base_of,
    choose_tiling,
    offset_of,
    own_tile,
    part_of_keys,
    part_of_queries,
    place,
    scores,
    stream,
    stream_length,
)
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import LN_2, equally_strided, load_rows, store_rows


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    scale,
    strides,
    rows,
    y,
    x,
    heads,
    bias_entries,
    bias_columns,
    DENSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    STRIP: tl.constexpr,
    MASK: tl.constexpr,
    SINGLE: tl.constexpr,
    ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of one tile of queries."""
    at = place(tl.program_id(0), heads, y, x)
    own = own_tile(at, y, x, False, OWN)
    begin = base_of(at, strides)
    query = load_rows(q + begin, offset_of(own.y, own.x, strides, y, x), own.valid, HEAD_DIM, BLOCK_D)
    part = own.y
    if bias is not None:
        bias += at.head * bias_entries
        part = part_of_queries(own.y, own.x, at, y, x, bias_columns, DENSE)
    best = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    tiles = 1 if SINGLE else stream_length(own, STRIP, OTHERS)
    for number in range(tiles):
        others = stream(number, own, at, MASK, ZERO, STRIP, OTHERS)
        offset = offset_of(others.y, others.x, strides, y, x)
        key = load_rows(k + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
        key_part = part_of_keys(others.y, others.x, bias_columns)
        logits = scores(
            query,
            key,
            own,
            others,
            bias,
            bias_entries - 1,
            part,
            key_part,
            scale,
            MASK,
            STRIP,
            OTHERS,
            PRECISION,
        )
        value = load_rows(v + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
        if SINGLE:
            best = tl.max(logits, 1)
            weights = tl.exp2(logits - best[:, None])
            total = tl.sum(weights, 1)
        else:
            new_best = tl.maximum(best, tl.max(logits, 1))
            # As long as a query has met no key, everything is -inf, and -inf - -inf is not a number.
            finite = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(logits - finite[:, None])
            shrink = tl.exp2(best - finite)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            best = new_best
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)

    row = offset_of(own.y, own.x, rows, y, x)
    first = base_of(at, rows)
    store_rows(out + first * HEAD_DIM, row * HEAD_DIM, own.valid, acc / total[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse + first + row, (best + tl.log2(total)) * LN_2, mask=own.valid)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, W, heads, d]`, log-sum-exp `[B, H, W, heads]` float32; arguments as in `op.py`."""
    q, k, v = equally_strided(q, k, v)
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    tiles, options = choose_tiling(q, bias, pattern, "query")
    if q.shape[0]:
        grid = (tiles.programs * q.shape[0] * q.shape[3],)
        numbers = {**geometry(q, bias, pattern), "y": tiles.y, "x": tiles.x, **options}
        forward_kernel[grid](q, k, v, bias, out, lse, scale, **numbers)
    return out, lse


def geometry(q: Tensor, bias: Tensor | None, pattern: Pattern) -> dict[str, Any]:
    """What all kernels take of strides and bias; `rows` counts vectors of contiguous maps like `q`."""
    _, height, width, heads, _ = q.shape
    is_dense = bias is not None and bias.shape[1:] != pattern.table_shape
    return {
        "strides": Strides(*q.stride()[:4]),
        "rows": Strides(height * width * heads, width * heads, heads, 1),
        "heads": heads,
        "bias_entries": 0 if bias is None else bias[0].numel(),
        "bias_columns": pattern.x.key_window if is_dense else pattern.table_shape[1],
        "DENSE": is_dense,
    }
