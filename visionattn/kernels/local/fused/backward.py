"""The fused backward pass of local attention: no atomics, equal inputs give equal bits.

The first launch goes along keys as the forward pass does, for the gradient of the queries; it also writes Δ,
the sum that all weights of a query share. The second goes along the queries that see a tile of keys, a
rectangle in every pattern, so that a program owns what it adds up. Windows of up to 64 pixels take one
launch for everything, other biases one of their own: `triton_bias.py`.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.bias import (
    bias_kernel,
    gradient_of_bias,
    pair_tiling,
    store_partial,
    sum_pairs,
)
from visionattn.kernels.local.fused.forward import geometry
from visionattn.kernels.local.fused.geometry import (
    anchored,
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
from visionattn.kernels.local.fused.tiling import Owner
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import LOG2_E, equally_strided, load_rows, store_rows


@triton.jit
def shared_sum(grad, out, grad_lse, first, row, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Δ of the queries in rows from `first` on: what the softmax subtracts from their weights' gradients."""
    result = load_rows(out + first * HEAD_DIM, row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + first + row, mask=valid, other=0.0).to(tl.float32)
    return delta


@triton.jit
def query_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    grad_out,
    grad_lse,
    delta,
    grad_q,
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
    """Δ and the gradient of the queries of one tile."""
    at = place(tl.program_id(0), heads, y, x)
    own = own_tile(at, y, x, False, OWN)
    begin = base_of(at, strides)
    query = load_rows(q + begin, offset_of(own.y, own.x, strides, y, x), own.valid, HEAD_DIM, BLOCK_D)
    first = base_of(at, rows)
    row = offset_of(own.y, own.x, rows, y, x)
    grad = load_rows(grad_out + first * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
    drop = shared_sum(grad, out, grad_lse, first, row, own.valid, HEAD_DIM, BLOCK_D)
    tl.store(delta + first + row, drop, mask=own.valid)
    norm = tl.load(lse + first + row, mask=own.valid, other=float("inf")) * LOG2_E
    part = own.y
    if bias is not None:
        bias += at.head * bias_entries
        part = part_of_queries(own.y, own.x, at, y, x, bias_columns, DENSE)

    acc = tl.zeros([OWN, BLOCK_D], tl.float32)
    tiles = 1 if SINGLE else stream_length(own, STRIP, OTHERS)
    for number in range(tiles):
        others = stream(number, own, at, MASK, ZERO, STRIP, OTHERS)
        offset = offset_of(others.y, others.x, strides, y, x)
        key = load_rows(k + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
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
        weights = tl.exp2(logits - norm[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    store_rows(grad_q + first * HEAD_DIM, row * HEAD_DIM, own.valid, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def key_kernel(
    q,
    k,
    v,
    bias,
    lse,
    grad_out,
    delta,
    grad_k,
    grad_v,
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
    """Gradients of one tile of keys and values."""
    at = place(tl.program_id(0), heads, y, x)
    own = own_tile(at, y, x, True, OWN)
    begin = base_of(at, strides)
    offset = offset_of(own.y, own.x, strides, y, x)
    key = load_rows(k + begin, offset, own.valid, HEAD_DIM, BLOCK_D)
    value = load_rows(v + begin, offset, own.valid, HEAD_DIM, BLOCK_D)
    first = base_of(at, rows)
    if bias is not None:
        bias += at.head * bias_entries
    part = part_of_keys(own.y, own.x, bias_columns)

    acc_k = tl.zeros([OWN, BLOCK_D], tl.float32)
    acc_v = tl.zeros([OWN, BLOCK_D], tl.float32)
    tiles = 1 if SINGLE else stream_length(own, STRIP, OTHERS)
    for number in range(tiles):
        others = stream(number, own, at, MASK, False, STRIP, OTHERS)
        row = offset_of(others.y, others.x, rows, y, x)
        query = load_rows(
            q + begin, offset_of(others.y, others.x, strides, y, x), others.seen, HEAD_DIM, BLOCK_D
        )
        grad = load_rows(grad_out + first * HEAD_DIM, row * HEAD_DIM, others.seen, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first + row, mask=others.seen, other=float("inf")) * LOG2_E
        drop = tl.load(delta + first + row, mask=others.seen, other=0.0)
        query_part = others.y
        if bias is not None:
            query_part = part_of_queries(others.y, others.x, at, y, x, bias_columns, DENSE)
        logits = scores(
            key,
            query,
            own,
            others,
            bias,
            bias_entries - 1,
            part,
            query_part,
            scale,
            MASK,
            STRIP,
            OTHERS,
            PRECISION,
        )
        weights = tl.exp2(logits - norm[None, :])
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[None, :])
        acc_k = tl.dot(grad_logits.to(query.dtype), query, acc_k, input_precision=PRECISION)
    row = offset_of(own.y, own.x, rows, y, x)
    store_rows(grad_k + first * HEAD_DIM, row * HEAD_DIM, own.valid, acc_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + first * HEAD_DIM, row * HEAD_DIM, own.valid, acc_v, HEAD_DIM, BLOCK_D)


@triton.jit
def window_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    grad_out,
    grad_lse,
    grad_q,
    grad_k,
    grad_v,
    partial,
    scale,
    strides,
    rows,
    y,
    x,
    heads,
    bias_entries,
    bias_columns,
    start,
    steps,
    slices,
    DENSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    STRIP: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of every `slices`-th window of one head: five products instead of seven."""
    head = tl.program_id(0) % heads
    piece = tl.program_id(0) // heads
    if bias is not None:
        bias += head * bias_entries
    acc = tl.zeros([OWN, OTHERS], tl.float32)
    for step in range(piece, steps, slices):
        at = place(step * heads + head, heads, y, x)
        own = own_tile(at, y, x, False, OWN)
        others = anchored(0, 0, own, at, y, x, start, DENSE, STRIP, OTHERS)
        begin = base_of(at, strides)
        offset = offset_of(others.y, others.x, strides, y, x)
        query = load_rows(q + begin, offset_of(own.y, own.x, strides, y, x), own.valid, HEAD_DIM, BLOCK_D)
        key = load_rows(k + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
        first = base_of(at, rows)
        row = offset_of(own.y, own.x, rows, y, x)
        grad = load_rows(grad_out + first * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
        drop = shared_sum(grad, out, grad_lse, first, row, own.valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + first + row, mask=own.valid, other=float("inf")) * LOG2_E
        part = own.y
        if bias is not None:
            part = part_of_queries(own.y, own.x, at, y, x, bias_columns, DENSE)
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
        weights = tl.exp2(logits - norm[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - drop[:, None])
        acc += grad_logits
        rounded = grad_logits.to(key.dtype)
        dq = tl.dot(rounded, key, input_precision=PRECISION) * scale
        dk = tl.dot(tl.trans(rounded), query, input_precision=PRECISION) * scale
        dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
        store_rows(grad_q + first * HEAD_DIM, row * HEAD_DIM, own.valid, dq, HEAD_DIM, BLOCK_D)
        key_row = offset_of(others.y, others.x, rows, y, x)
        store_rows(grad_k + first * HEAD_DIM, key_row * HEAD_DIM, others.inside, dk, HEAD_DIM, BLOCK_D)
        store_rows(grad_v + first * HEAD_DIM, key_row * HEAD_DIM, others.inside, dv, HEAD_DIM, BLOCK_D)
    if partial is not None:
        store_partial(partial, tl.program_id(0), acc, OWN, OTHERS)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    scale: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, contiguous, and if asked for of the bias; arguments as in `library.py`."""
    q, k, v = equally_strided(q, k, v)
    bias = None if bias is None else bias.contiguous()
    # The gradient of a sum is an expanded number.
    grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if not q.shape[0]:
        return grad_q, grad_k, grad_v, None if bias is None else torch.zeros_like(bias)
    shared = {"q": q, "k": k, "v": v, "bias": bias, "lse": lse, "grad_out": grad_out, "scale": scale}
    shared |= geometry(q, bias, pattern)
    of_queries = {"out": out, "grad_lse": grad_lse, "grad_q": grad_q}
    of_keys = {"grad_k": grad_k, "grad_v": grad_v}
    pairs = pair_tiling(q, bias, pattern, bias_gradient)
    if pairs.is_closed:
        partial = sum_pairs(window_kernel, pairs, bias_gradient, **shared, **of_queries, **of_keys)
    else:
        delta = torch.empty_like(lse)
        _launch(query_kernel, "query", pattern, **shared, **of_queries, delta=delta)
        _launch(key_kernel, "key", pattern, **shared, **of_keys, delta=delta)
        partial = None
        if bias_gradient:
            partial = sum_pairs(bias_kernel, pairs, bias_gradient, **shared, delta=delta)
    grad_bias = None if bias is None or partial is None else gradient_of_bias(partial, pairs, pattern, bias)
    return grad_q, grad_k, grad_v, grad_bias


def _launch(
    kernel: Any, owner: Owner, pattern: Pattern, q: Tensor, bias: Tensor | None, **arguments: Any
) -> None:
    """Run a kernel, a program for every tile of every head of every image."""
    tiles, options = choose_tiling(q, bias, pattern, owner)
    grid = (tiles.programs * q.shape[0] * q.shape[3],)
    kernel[grid](q=q, bias=bias, y=tiles.y, x=tiles.x, **arguments, **options)
