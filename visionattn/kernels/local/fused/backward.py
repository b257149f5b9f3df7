"""The fused backward pass of local attention: no atomics, equal inputs give equal bits.

The first launch goes along keys as the forward pass does, for the gradient of the queries; it also writes Δ,
the sum that all weights of a query share. The second goes along the queries that see a tile of keys, a
rectangle in every pattern, so that a program owns what it adds up. Windows of up to 64 pixels take one
launch for everything, other biases one of their own: `bias.py`.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Sequence
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
from visionattn.kernels.local.fused.geometry import (
    anchored,
    choose_tiling,
    geometry,
    load_pixels,
    load_vectors,
    numbers_of,
    own_tile,
    place,
    store_vectors,
    stream,
    stream_length,
)
from visionattn.kernels.local.fused.scores import part_of_own, scores
from visionattn.kernels.local.fused.tiling import Owner
from visionattn.kernels.local.pattern import Call, Pattern
from visionattn.kernels.triton_rows import LOG2_E, equally_strided


@triton.jit
def shared_sum(grad, out, grad_lse, at, own, g, FORM: tl.constexpr):
    """Compute Δ of the own queries: the number that softmax subtracts from the gradients of their weights."""
    result = load_vectors(out, at, own, own.valid, g, FORM)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(numbers_of(grad_lse, at, own, g), mask=own.valid, other=0.0).to(tl.float32)
    return delta


@triton.jit
def query_kernel(q, k, v, bias, out, lse, grad_out, grad_lse, delta, grad_q, scale, g, FORM: tl.constexpr):
    """Compute Δ and the gradient of the queries of one tile."""
    at = place(tl.program_id(0), g)
    own = own_tile(at, g, FORM)
    query = load_pixels(q, at, own, own.valid, g, FORM)
    grad = load_vectors(grad_out, at, own, own.valid, g, FORM)
    drop = shared_sum(grad, out, grad_lse, at, own, g, FORM)
    tl.store(numbers_of(delta, at, own, g), drop, mask=own.valid)
    norm = tl.load(numbers_of(lse, at, own, g), mask=own.valid, other=float("inf")) * LOG2_E
    part = part_of_own(own, bias, at, g, FORM)
    acc = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    tiles = 1 if FORM.single else stream_length(own, FORM)
    for number in range(tiles):
        others = stream(number, own, at, FORM)
        key = load_pixels(k, at, others, others.valid, g, FORM)
        value = load_pixels(v, at, others, others.valid, g, FORM)
        logits = scores(query, key, own, others, bias, part, at, scale, g, FORM)
        weights = tl.exp2(logits - norm[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=FORM.precision)
        grad_logits = weights * (grad_weights - drop[:, None])
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=FORM.precision)
    store_vectors(grad_q, at, own, own.valid, acc * scale, g, FORM)


@triton.jit
def key_kernel(q, k, v, bias, lse, grad_out, delta, grad_k, grad_v, scale, g, FORM: tl.constexpr):
    """Compute the gradients of one tile of keys and values."""
    at = place(tl.program_id(0), g)
    own = own_tile(at, g, FORM)
    key = load_pixels(k, at, own, own.valid, g, FORM)
    value = load_pixels(v, at, own, own.valid, g, FORM)
    part = part_of_own(own, bias, at, g, FORM)
    acc_k = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    acc_v = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    tiles = 1 if FORM.single else stream_length(own, FORM)
    for number in range(tiles):
        others = stream(number, own, at, FORM)
        query = load_pixels(q, at, others, others.valid, g, FORM)
        grad = load_vectors(grad_out, at, others, others.valid, g, FORM)
        norm = tl.load(numbers_of(lse, at, others, g), mask=others.valid, other=float("inf")) * LOG2_E
        drop = tl.load(numbers_of(delta, at, others, g), mask=others.valid, other=0.0)
        logits = scores(key, query, own, others, bias, part, at, scale, g, FORM)
        weights = tl.exp2(logits - norm[None, :])
        acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=FORM.precision)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=FORM.precision)
        grad_logits = weights * (grad_weights - drop[None, :])
        acc_k = tl.dot(grad_logits.to(query.dtype), query, acc_k, input_precision=FORM.precision)
    store_vectors(grad_k, at, own, own.valid, acc_k * scale, g, FORM)
    store_vectors(grad_v, at, own, own.valid, acc_v, g, FORM)


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
    g,
    share,
    FORM: tl.constexpr,
):
    """Compute all gradients of every `share.slices`-th window of one head: five products instead of seven."""
    head = tl.program_id(0) % g.heads
    piece = tl.program_id(0) // g.heads
    acc = tl.zeros([FORM.own, FORM.others], tl.float32)
    for step in range(piece, share.steps, share.slices):
        at = place(step * g.heads + head, g)
        own = own_tile(at, g, FORM)
        others = anchored(0, 0, own, at, share.start, g, FORM)
        query = load_pixels(q, at, own, own.valid, g, FORM)
        key = load_pixels(k, at, others, others.valid, g, FORM)
        value = load_pixels(v, at, others, others.valid, g, FORM)
        grad = load_vectors(grad_out, at, own, own.valid, g, FORM)
        drop = shared_sum(grad, out, grad_lse, at, own, g, FORM)
        norm = tl.load(numbers_of(lse, at, own, g), mask=own.valid, other=float("inf")) * LOG2_E
        part = part_of_own(own, bias, at, g, FORM)
        logits = scores(query, key, own, others, bias, part, at, scale, g, FORM)
        weights = tl.exp2(logits - norm[:, None])
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=FORM.precision)
        grad_logits = weights * (grad_weights - drop[:, None])
        acc += grad_logits
        rounded = grad_logits.to(key.dtype)
        dq = tl.dot(rounded, key, input_precision=FORM.precision) * scale
        dk = tl.dot(tl.trans(rounded), query, input_precision=FORM.precision) * scale
        dv = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=FORM.precision)
        store_vectors(grad_q, at, own, own.valid, dq, g, FORM)
        store_vectors(grad_k, at, others, others.valid, dk, g, FORM)
        store_vectors(grad_v, at, others, others.valid, dv, g, FORM)
    if partial is not None:
        store_partial(partial, tl.program_id(0), acc, FORM)


def backward(
    grads: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    wanted: Sequence[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of q, k, v, contiguous, and if wanted that of the bias.

    Args:
        grads: gradients of the output and of the log-sum-exp; one of them may be None.
        outputs: output and log-sum-exp, as the forward pass gave them.
        wanted: whether the gradients of q, k, v and the bias are wanted; only the last is left out.
        q: queries, keys, values and `call` as the forward pass had them.
        k: keys.
        v: values.
        call: all else.
    """
    (out, lse), (pattern, bias, scale, _) = outputs, call
    q, k, v = equally_strided(q, k, v)
    bias, bias_gradient = None if bias is None else bias.contiguous(), wanted[3]
    # The gradient of a sum is an expanded number.
    grad_out, grad_lse = (None if grad is None else grad.contiguous() for grad in grads)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if not q.shape[0]:
        return grad_q, grad_k, grad_v, None if bias is None else torch.zeros_like(bias)
    shared = {"q": q, "k": k, "v": v, "bias": bias, "lse": lse, "grad_out": grad_out, "scale": scale}
    of_queries = {"out": out, "grad_lse": grad_lse, "grad_q": grad_q}
    of_keys = {"grad_k": grad_k, "grad_v": grad_v}
    pairs = pair_tiling(q, bias, pattern, bias_gradient)
    if pairs.is_closed:
        partial = sum_pairs(window_kernel, pairs, pattern, bias_gradient, **shared, **of_queries, **of_keys)
    else:
        delta = torch.empty_like(lse)
        _launch(query_kernel, "query", pattern, **shared, **of_queries, delta=delta)
        _launch(key_kernel, "key", pattern, **shared, **of_keys, delta=delta)
        partial = None
        if bias_gradient:
            partial = sum_pairs(bias_kernel, pairs, pattern, bias_gradient, **shared, delta=delta)
    grad_bias = None if bias is None or partial is None else gradient_of_bias(partial, pairs, pattern, bias)
    return grad_q, grad_k, grad_v, grad_bias


def _launch(
    kernel: Any, owner: Owner, pattern: Pattern, q: Tensor, bias: Tensor | None, **arguments: Any
) -> None:
    """Run a kernel, a program for every tile of every head of every image."""
    tiles, options = choose_tiling(q, bias, pattern, owner)
    grid = (tiles.programs * q.shape[0] * q.shape[3],)
    kernel[grid](q=q, bias=bias, g=geometry(q, bias, pattern, tiles), **arguments, **options)
