"""Fused softmax attention of few queries over many keys, or of many over few, with a bias and its gradient.

Both halves of agent attention. Where queries (or, in the backward pass, keys) are too few to occupy a device,
the other side is split: every program sums a part of it, and the parts are added in one order. No atomics:
equal inputs give equal bits. This file is imported only when a kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.merge import merge_attention
from visionattn.kernels.triton_rows import (
    LN_2,
    LOG2_E,
    equally_strided,
    load_rows,
    store_rows,
    tile_options,
)

# As many programs keep the largest present devices busy; splitting further costs memory for the parts.
_PROGRAMS = 512
# A split of fewer rows costs more in merging than it saves.
_LEAST_ROWS = 256


@triton.jit
def place(program, heads, rows, TILE: tl.constexpr):
    """Which image (int64), head and rows a program works on, and which of the rows exist."""
    tiles = tl.cdiv(rows, TILE)
    row = program % tiles * TILE + tl.arange(0, TILE)
    batch = (program // (tiles * heads)).to(tl.int64)
    return batch, program // tiles % heads, row, row < rows


@triton.jit
def load_bias(bias, row, valid, key, seen, stride_q, stride_k):
    """A tile of the bias, in units of the binary logarithm."""
    pointers = bias + row[:, None] * stride_q + key[None, :] * stride_k
    return tl.load(pointers, mask=valid[:, None] & seen[None, :], other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    scale,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    heads,
    queries,
    keys,
    per_split,
    images,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of one tile of queries over one split of the keys."""
    batch, head, row, valid = place(tl.program_id(0), heads, queries, BLOCK_Q)
    split = tl.program_id(1)
    query = load_rows(q + batch * stride_qb + head * stride_qh, row * stride_qn, valid, HEAD_DIM, BLOCK_D)
    begin = batch * stride_kb + head * stride_kh
    bias += head.to(tl.int64) * bias_stride_h

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, keys), BLOCK_K):
        number = start + tl.arange(0, BLOCK_K)
        seen = number < keys
        key = load_rows(k + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
        if BIASED:
            logits += load_bias(bias, row, valid, number, seen, bias_stride_q, bias_stride_k)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        # A bias may hide all keys of a tile, and -inf - -inf is not a number.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(v + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        best = new_best

    image = (split * images + batch) * queries * heads
    place_of_row = row * heads + head
    acc = acc / total[:, None]
    store_rows(out + image * HEAD_DIM, place_of_row * HEAD_DIM, valid, acc, HEAD_DIM, BLOCK_D)
    tl.store(lse + image + place_of_row, (best + tl.log2(total)) * LN_2, mask=valid)


@triton.jit
def tile_gradients(
    query,
    key,
    value,
    grad,
    norm,
    drop,
    bias,
    row,
    valid,
    number,
    seen,
    scale,
    bias_stride_q,
    bias_stride_k,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights P of a tile and gradients of its logits, P * (dO Vᵀ - Δ)."""
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E)
    if BIASED:
        logits += load_bias(bias, row, valid, number, seen, bias_stride_q, bias_stride_k)
    weights = tl.exp2(tl.where(seen[None, :], logits - norm[:, None], float("-inf")))
    grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    return weights, weights * (grad_weights - drop[:, None])


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
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    heads,
    queries,
    keys,
    per_split,
    images,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one tile of queries from one split of the keys; the first split also writes Δ."""
    batch, head, row, valid = place(tl.program_id(0), heads, queries, BLOCK_Q)
    split = tl.program_id(1)
    query = load_rows(q + batch * stride_qb + head * stride_qh, row * stride_qn, valid, HEAD_DIM, BLOCK_D)
    begin = batch * stride_kb + head * stride_kh
    bias += head.to(tl.int64) * bias_stride_h
    image = batch * queries * heads
    place_of_row = row * heads + head
    grad = load_rows(grad_out + image * HEAD_DIM, place_of_row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    result = load_rows(out + image * HEAD_DIM, place_of_row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
    drop = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    drop -= tl.load(grad_lse + image + place_of_row, mask=valid, other=0.0)
    if split == 0:
        tl.store(delta + image + place_of_row, drop, mask=valid)
    norm = tl.load(lse + image + place_of_row, mask=valid, other=float("inf")) * LOG2_E

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, keys), BLOCK_K):
        number = start + tl.arange(0, BLOCK_K)
        seen = number < keys
        key = load_rows(k + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
        _weights, grad_logits = tile_gradients(
            query,
            key,
            value,
            grad,
            norm,
            drop,
            bias,
            row,
            valid,
            number,
            seen,
            scale,
            bias_stride_q,
            bias_stride_k,
            BIASED,
            PRECISION,
        )
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION)
    grad_q += (split * images + batch) * queries * heads * HEAD_DIM
    store_rows(grad_q, place_of_row * HEAD_DIM, valid, acc * scale, HEAD_DIM, BLOCK_D)


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
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    heads,
    queries,
    keys,
    per_split,
    images,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys and values (`BLOCK_Q` of them) from one split of the queries."""
    batch, head, number, seen = place(tl.program_id(0), heads, keys, BLOCK_Q)
    split = tl.program_id(1)
    begin = batch * stride_kb + head * stride_kh
    key = load_rows(k + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
    value = load_rows(v + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
    bias += head.to(tl.int64) * bias_stride_h
    q += batch * stride_qb + head * stride_qh
    image = batch * queries * heads

    acc_k = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, queries), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        valid = row < queries
        place_of_row = row * heads + head
        query = load_rows(q, row * stride_qn, valid, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out + image * HEAD_DIM, place_of_row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + image + place_of_row, mask=valid, other=float("inf")) * LOG2_E
        drop = tl.load(delta + image + place_of_row, mask=valid, other=0.0)
        weights, grad_logits = tile_gradients(
            query,
            key,
            value,
            grad,
            norm,
            drop,
            bias,
            row,
            valid,
            number,
            seen,
            scale,
            bias_stride_q,
            bias_stride_k,
            BIASED,
            PRECISION,
        )
        acc_v = tl.dot(tl.trans(weights).to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        acc_k = tl.dot(tl.trans(grad_logits).to(query.dtype), query, acc_k, input_precision=PRECISION)
    image = (split * images + batch) * keys * heads * HEAD_DIM
    offset = (number * heads + head) * HEAD_DIM
    store_rows(grad_k + image, offset, seen, acc_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_v + image, offset, seen, acc_v, HEAD_DIM, BLOCK_D)


@triton.jit
def bias_kernel(
    q,
    k,
    v,
    bias,
    lse,
    grad_out,
    delta,
    grad_bias,
    scale,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    heads,
    queries,
    keys,
    per_split,
    images,
    BIASED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one tile of the bias: one program goes through all images."""
    _first, head, row, valid = place(tl.program_id(0), heads, queries, BLOCK_Q)
    number = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    seen = number < keys
    bias += head.to(tl.int64) * bias_stride_h
    place_of_row = row * heads + head

    acc = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i in range(images):
        batch = tl.cast(i, tl.int64)
        image = batch * queries * heads
        begin = batch * stride_kb + head * stride_kh
        query = load_rows(q + batch * stride_qb + head * stride_qh, row * stride_qn, valid, HEAD_DIM, BLOCK_D)
        key = load_rows(k + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
        value = load_rows(v + begin, number * stride_kn, seen, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_out + image * HEAD_DIM, place_of_row * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
        norm = tl.load(lse + image + place_of_row, mask=valid, other=float("inf")) * LOG2_E
        drop = tl.load(delta + image + place_of_row, mask=valid, other=0.0)
        _weights, grad_logits = tile_gradients(
            query,
            key,
            value,
            grad,
            norm,
            drop,
            bias,
            row,
            valid,
            number,
            seen,
            scale,
            bias_stride_q,
            bias_stride_k,
            BIASED,
            PRECISION,
        )
        acc += grad_logits
    pointers = grad_bias + head.to(tl.int64) * bias_stride_h
    pointers += row[:, None] * bias_stride_q + number[None, :] * bias_stride_k
    tl.store(pointers, acc.to(grad_bias.dtype.element_ty), mask=valid[:, None] & seen[None, :])


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, queries, heads, d]` and log-sum-exp `[B, queries, heads]`; arguments as in `library.py`."""
    (q,), (k, v) = equally_strided(q), equally_strided(k, v)
    options = {**geometry(q, k, bias), **launch_options(q)}
    programs = num_programs(q, options["BLOCK_Q"])
    splits, options["per_split"] = split_rows(programs, k.shape[1], options["BLOCK_K"])
    # Parts are merged before they are rounded.
    out = torch.empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    lse = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[(programs, splits)](q, k, v, q if bias is None else bias, out, lse, scale, **options)
    if splits == 1:
        return out[0], lse[0]
    merged, total = merge_attention(out.unbind(), lse.unbind())
    return merged.to(q.dtype), total


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous, and of the bias, strided as it is; no elements without one."""
    (q,), (k, v) = equally_strided(q), equally_strided(k, v)
    # The gradient of a sum is an expanded number.
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    if bias is not None and grad_bias.stride() != bias.stride():
        bias = torch.empty_like(bias).copy_(bias)
    shape = geometry(q, k, bias)
    table = q if bias is None else bias
    delta = torch.empty_like(lse)

    options = {**shape, **launch_options(q, backward=True)}
    programs = num_programs(q, options["BLOCK_Q"])
    splits, options["per_split"] = split_rows(programs, k.shape[1], options["BLOCK_K"])
    grad_q = _parts(q, splits)
    query_kernel[(programs, splits)](
        q, k, v, table, out, lse, grad_out, grad_lse, delta, grad_q, scale, **options
    )
    if bias is not None:
        grid = (num_programs(q[:1], options["BLOCK_Q"]), triton.cdiv(k.shape[1], options["BLOCK_K"]))
        bias_kernel[grid](q, k, v, bias, lse, grad_out, delta, grad_bias, scale, **options)

    options = {**shape, **launch_options(k, backward=True)}
    programs = num_programs(k, options["BLOCK_Q"])
    splits, options["per_split"] = split_rows(programs, q.shape[1], options["BLOCK_K"])
    grad_k, grad_v = _parts(k, splits), _parts(v, splits)
    key_kernel[(programs, splits)](q, k, v, table, lse, grad_out, delta, grad_k, grad_v, scale, **options)
    return _joined(grad_q, q), _joined(grad_k, k), _joined(grad_v, v), grad_bias


def geometry(q: Tensor, k: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """The integers that all kernels take, but for the length of a split."""
    strides = (0, 0, 0) if bias is None else bias.stride()
    return {
        **dict(zip(("stride_qb", "stride_qn", "stride_qh"), q.stride())),
        **dict(zip(("stride_kb", "stride_kn", "stride_kh"), k.stride())),
        **dict(zip(("bias_stride_h", "bias_stride_q", "bias_stride_k"), strides)),
        "heads": q.shape[2],
        "queries": q.shape[1],
        "keys": k.shape[1],
        "per_split": 0,
        "images": q.shape[0],
        "BIASED": bias is not None,
    }


def launch_options(
    x: Tensor, backward: bool = False, hip: bool = torch.version.hip is not None
) -> dict[str, Any]:
    """Tiles, warps and precision for programs that own rows of `[B, rows, heads, d]`."""
    options = tile_options(x, x.shape[1], hip=hip)
    own = options.pop("OWN")
    # A tile of the bias and its pointers take the registers of a wider tile of keys.
    options["BLOCK_K"] = min(options.pop("OTHERS"), 32)
    options["BLOCK_Q"] = 16 if options["BLOCK_D"] > 128 and not hip else own
    return options


def num_programs(x: Tensor, tile: int) -> int:
    """Tiles of the rows of `[B, rows, heads, d]`."""
    return x.shape[0] * x.shape[2] * triton.cdiv(x.shape[1], tile)


def split_rows(programs: int, rows: int, block: int) -> tuple[int, int]:
    """Into how many splits so many rows are cut, and the rows of a split: a multiple of the block."""
    wanted = min(_PROGRAMS // max(programs, 1), rows // _LEAST_ROWS)
    per_split = block * triton.cdiv(triton.cdiv(rows, max(wanted, 1)), block)
    return triton.cdiv(rows, per_split), per_split


def _parts(x: Tensor, splits: int) -> Tensor:
    dtype = x.dtype if splits == 1 else torch.float32
    return torch.empty(splits, *x.shape, dtype=dtype, device=x.device)


def _joined(parts: Tensor, x: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)
