"""The fused forward pass of local attention: one launch, keys read where they lie on the map.

One program computes a tile of queries of one head. Modules with kernels are imported when one runs.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.geometry import (
    choose_tiling,
    geometry,
    load_pixels,
    numbers_of,
    own_tile,
    place,
    store_vectors,
    stream,
    stream_length,
)
from visionattn.kernels.local.fused.scores import part_of_own, scores
from visionattn.kernels.local.pattern import Call
from visionattn.kernels.triton_rows import LN_2, equally_strided


@triton.jit
def forward_kernel(q, k, v, bias, out, lse, scale, g, FORM: tl.constexpr):
    """Compute output and log-sum-exp of one tile of queries."""
    at = place(tl.program_id(0), g)
    own = own_tile(at, g, FORM)
    query = load_pixels(q, at, own, own.valid, g, FORM)
    part = part_of_own(own, bias, at, g, FORM)
    best = tl.full([FORM.own], float("-inf"), tl.float32)
    total = tl.zeros([FORM.own], tl.float32)
    acc = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    tiles = 1 if FORM.single else stream_length(own, FORM)
    for number in range(tiles):
        others = stream(number, own, at, FORM)
        key = load_pixels(k, at, others, others.valid, g, FORM)
        logits = scores(query, key, own, others, bias, part, at, scale, g, FORM)
        value = load_pixels(v, at, others, others.valid, g, FORM)
        if FORM.single:
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
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=FORM.precision)
    store_vectors(out, at, own, own.valid, acc / total[:, None], g, FORM)
    tl.store(numbers_of(lse, at, own, g), (best + tl.log2(total)) * LN_2, mask=own.valid)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Compute the output `[B, H, W, heads, d]` and the log-sum-exp `[B, H, W, heads]`, in float32."""
    q, k, v = equally_strided(q, k, v)
    pattern, bias = call.pattern, None if call.bias is None else call.bias.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    tiles, options = choose_tiling(q, bias, pattern, "query")
    if q.shape[0]:
        grid = (tiles.programs * q.shape[0] * q.shape[3],)
        g = geometry(q, bias, pattern, tiles)
        forward_kernel[grid](q, k, v, bias, out, lse, call.scale, g, **options)
    return out, lse
