"""Fused softmax attention of few queries over many keys, or of many over few, with a bias and its gradient.

Both halves of agent attention. Where queries (or, in the backward pass, keys) are too few to occupy a device,
the other side is split: every program sums a part of it, and the parts are added in one order. No atomics:
equal inputs give equal bits. This file is imported only when a kernel runs.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

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


class Strides(NamedTuple):
    """The strides of rows `[B, rows, heads, d]`, in numbers."""

    b: int
    n: int
    h: int


class BiasStrides(NamedTuple):
    """The strides of a bias `[heads, queries, keys]`, in numbers."""

    h: int
    q: int
    k: int


class Geometry(NamedTuple):
    """The numbers that all kernels take.

    Attributes:
        heads: attention heads.
        queries: rows of q.
        keys: rows of k and v.
        per_split: rows of the streamed side that one program streams.
        images: the batch.
        strides_q: of q.
        strides_k: of k and v.
        strides_out: of contiguous rows like q.
        strides_bias: of the bias.
    """

    heads: int
    queries: int
    keys: int
    per_split: int
    images: int
    strides_q: Strides
    strides_k: Strides
    strides_out: Strides
    strides_bias: BiasStrides


class Form(NamedTuple):
    """The constants that a kernel is compiled for: widths of a head and of its padding, rows of a program's
    own tile and of a streamed one, and how products of float32 are computed."""

    head_dim: int
    block_d: int
    own: int
    others: int
    precision: str


class Rows(NamedTuple):
    """Rows of a tile: their numbers, and which of them exist."""

    number: Any
    valid: Any


@triton.jit
def place(program, heads, rows, TILE: tl.constexpr):
    """Find image (int64) and head of a program, and its own tile of the rows."""
    tiles = tl.cdiv(rows, TILE)
    number = program % tiles * TILE + tl.arange(0, TILE)
    batch = (program // (tiles * heads)).to(tl.int64)
    return batch, program // tiles % heads, Rows(number, number < rows)


@triton.jit
def load(x, batch, head, rows, strides, FORM: tl.constexpr):
    """Load vectors `[rows, block_d]` of a head of an image."""
    x += batch * strides.b + head * strides.h
    return load_rows(x, rows.number * strides.n, rows.valid, FORM.head_dim, FORM.block_d)


@triton.jit
def store(x, image, head, rows, vectors, count, g, FORM: tl.constexpr):
    """Store what `load` loads, into contiguous rows of images of `count` rows."""
    x += image * count * g.heads * FORM.head_dim
    offset = (rows.number * g.heads + head) * FORM.head_dim
    store_rows(x, offset, rows.valid, vectors, FORM.head_dim, FORM.block_d)


@triton.jit
def numbers_of(x, batch, head, rows, g):
    """Where the numbers of queries stand in contiguous `[B, queries, heads]`."""
    return x + batch * g.queries * g.heads + rows.number * g.heads + head


@triton.jit
def scores(query, key, bias, head, rows, keys, scale, g, FORM: tl.constexpr):
    """Base-2 logits of a tile of queries and keys."""
    logits = tl.dot(query, tl.trans(key), input_precision=FORM.precision) * (scale * LOG2_E)
    if bias is not None:
        bias += head.to(tl.int64) * g.strides_bias.h
        pointers = bias + rows.number[:, None] * g.strides_bias.q + keys.number[None, :] * g.strides_bias.k
        mask = rows.valid[:, None] & keys.valid[None, :]
        logits += tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return logits


@triton.jit
def forward_kernel(q, k, v, bias, out, lse, scale, g, FORM: tl.constexpr):
    """Output and log-sum-exp of one tile of queries over one split of the keys."""
    batch, head, own = place(tl.program_id(0), g.heads, g.queries, FORM.own)
    split = tl.program_id(1)
    query = load(q, batch, head, own, g.strides_q, FORM)
    best = tl.full([FORM.own], float("-inf"), tl.float32)
    total = tl.zeros([FORM.own], tl.float32)
    acc = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    for start in range(split * g.per_split, tl.minimum((split + 1) * g.per_split, g.keys), FORM.others):
        number = start + tl.arange(0, FORM.others)
        keys = Rows(number, number < g.keys)
        key = load(k, batch, head, keys, g.strides_k, FORM)
        logits = scores(query, key, bias, head, own, keys, scale, g, FORM)
        logits = tl.where(keys.valid[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        # A bias may hide all keys of a tile, and -inf - -inf is not a number.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 1)
        value = load(v, batch, head, keys, g.strides_k, FORM)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=FORM.precision)
        best = new_best
    image = split * g.images + batch
    store(out, image, head, own, acc / total[:, None], g.queries, g, FORM)
    tl.store(numbers_of(lse, image, head, own, g), (best + tl.log2(total)) * LN_2, mask=own.valid)


@triton.jit
def tile_gradients(
    query, key, value, grad, norm, drop, bias, head, rows, keys, scale, g, FORM: tl.constexpr
):
    """Weights P of a tile and gradients of its logits, P * (dO Vᵀ - Δ)."""
    logits = scores(query, key, bias, head, rows, keys, scale, g, FORM)
    weights = tl.exp2(tl.where(keys.valid[None, :], logits - norm[:, None], float("-inf")))
    grad_weights = tl.dot(grad, tl.trans(value), input_precision=FORM.precision)
    return weights, weights * (grad_weights - drop[:, None])


@triton.jit
def load_norm(lse, delta, batch, head, rows, g):
    """Log-sum-exp, in units of the binary logarithm, and Δ of queries."""
    norm = tl.load(numbers_of(lse, batch, head, rows, g), mask=rows.valid, other=float("inf")) * LOG2_E
    return norm, tl.load(numbers_of(delta, batch, head, rows, g), mask=rows.valid, other=0.0)


@triton.jit
def query_kernel(
    q, k, v, bias, out, lse, grad_out, grad_lse, delta, grad_q, scale, g, FORM: tl.constexpr
):
    """Gradient of one tile of queries from one split of the keys; the first split also writes Δ."""
    batch, head, own = place(tl.program_id(0), g.heads, g.queries, FORM.own)
    split = tl.program_id(1)
    query = load(q, batch, head, own, g.strides_q, FORM)
    grad = load(grad_out, batch, head, own, g.strides_out, FORM)
    result = load(out, batch, head, own, g.strides_out, FORM)
    norm, grad_norm = load_norm(lse, grad_lse, batch, head, own, g)
    drop = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1) - grad_norm
    if split == 0:
        tl.store(numbers_of(delta, batch, head, own, g), drop, mask=own.valid)
    acc = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    for start in range(split * g.per_split, tl.minimum((split + 1) * g.per_split, g.keys), FORM.others):
        number = start + tl.arange(0, FORM.others)
        keys = Rows(number, number < g.keys)
        key, value = load(k, batch, head, keys, g.strides_k, FORM), load(v, batch, head, keys, g.strides_k, FORM)
        _weights, grad_logits = tile_gradients(
            query, key, value, grad, norm, drop, bias, head, own, keys, scale, g, FORM
        )
        acc = tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=FORM.precision)
    store(grad_q, split * g.images + batch, head, own, acc * scale, g.queries, g, FORM)


@triton.jit
def key_kernel(
    q, k, v, bias, lse, grad_out, delta, grad_k, grad_v, scale, g, FORM: tl.constexpr
):
    """Gradients of one tile of keys and values, the program's own, from one split of the queries."""
    batch, head, own = place(tl.program_id(0), g.heads, g.keys, FORM.own)
    split = tl.program_id(1)
    key, value = load(k, batch, head, own, g.strides_k, FORM), load(v, batch, head, own, g.strides_k, FORM)
    acc_k = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    acc_v = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    for start in range(split * g.per_split, tl.minimum((split + 1) * g.per_split, g.queries), FORM.others):
        number = start + tl.arange(0, FORM.others)
        rows = Rows(number, number < g.queries)
        query = load(q, batch, head, rows, g.strides_q, FORM)
        grad = load(grad_out, batch, head, rows, g.strides_out, FORM)
        norm, drop = load_norm(lse, delta, batch, head, rows, g)
        weights, grad_logits = tile_gradients(
            query, key, value, grad, norm, drop, bias, head, rows, own, scale, g, FORM
        )
        acc_v = tl.dot(tl.trans(weights).to(grad.dtype), grad, acc_v, input_precision=FORM.precision)
        acc_k = tl.dot(tl.trans(grad_logits).to(query.dtype), query, acc_k, input_precision=FORM.precision)
    image = split * g.images + batch
    store(grad_k, image, head, own, acc_k * scale, g.keys, g, FORM)
    store(grad_v, image, head, own, acc_v, g.keys, g, FORM)


@triton.jit
def bias_kernel(q, k, v, bias, lse, grad_out, delta, grad_bias, scale, g, FORM: tl.constexpr):
    """Gradient of one tile of the bias: one program goes through all images."""
    _first, head, own = place(tl.program_id(0), g.heads, g.queries, FORM.own)
    number = tl.program_id(1) * FORM.others + tl.arange(0, FORM.others)
    keys = Rows(number, number < g.keys)
    acc = tl.zeros([FORM.own, FORM.others], tl.float32)
    for i in range(g.images):
        batch = tl.cast(i, tl.int64)
        query = load(q, batch, head, own, g.strides_q, FORM)
        grad = load(grad_out, batch, head, own, g.strides_out, FORM)
        key, value = load(k, batch, head, keys, g.strides_k, FORM), load(v, batch, head, keys, g.strides_k, FORM)
        norm, drop = load_norm(lse, delta, batch, head, own, g)
        _weights, grad_logits = tile_gradients(
            query, key, value, grad, norm, drop, bias, head, own, keys, scale, g, FORM
        )
        acc += grad_logits
    pointers = grad_bias + head.to(tl.int64) * g.strides_bias.h
    pointers += own.number[:, None] * g.strides_bias.q + number[None, :] * g.strides_bias.k
    mask = own.valid[:, None] & keys.valid[None, :]
    tl.store(pointers, acc.to(grad_bias.dtype.element_ty), mask=mask)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, queries, heads, d]` and log-sum-exp `[B, queries, heads]`; arguments as in `library.py`."""
    (q,), (k, v) = equally_strided(q), equally_strided(k, v)
    options = launch_options(q)
    grid, g = _grid(q, k.shape[1], geometry(q, k, bias), options["FORM"])
    splits = grid[1]
    # Parts are merged before they are rounded.
    out = torch.empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    lse = torch.empty(splits, *q.shape[:3], dtype=torch.float32, device=q.device)
    forward_kernel[grid](q, k, v, bias, out, lse, scale, g, **options)
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
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, contiguous, and, if asked for, of the bias, strided as it is."""
    (q,), (k, v) = equally_strided(q), equally_strided(k, v)
    # The gradient of a sum is an expanded number.
    grad_out, grad_lse = grad_out.contiguous(), grad_lse.contiguous()
    grad_bias = torch.empty_like(bias) if bias is not None and bias_gradient else None
    if bias is not None and grad_bias is not None and grad_bias.stride() != bias.stride():
        bias = torch.empty_like(bias).copy_(bias)
    shape = geometry(q, k, bias)
    delta = torch.empty_like(lse)

    options = launch_options(q)
    grid, g = _grid(q, k.shape[1], shape, options["FORM"])
    grad_q = _parts(q, grid[1])
    query_kernel[grid](q, k, v, bias, out, lse, grad_out, grad_lse, delta, grad_q, scale, g, **options)
    if grad_bias is not None:
        form = options["FORM"]
        grid = num_programs(q[:1], form.own), triton.cdiv(k.shape[1], form.others)
        bias_kernel[grid](q, k, v, bias, lse, grad_out, delta, grad_bias, scale, g, **options)

    options = launch_options(k)
    grid, g = _grid(k, q.shape[1], shape, options["FORM"])
    grad_k, grad_v = _parts(k, grid[1]), _parts(v, grid[1])
    key_kernel[grid](q, k, v, bias, lse, grad_out, delta, grad_k, grad_v, scale, g, **options)
    return _joined(grad_q, q), _joined(grad_k, k), _joined(grad_v, v), grad_bias


def geometry(q: Tensor, k: Tensor, bias: Tensor | None) -> Geometry:
    """The numbers that all kernels take, but for the length of a split."""
    images, queries, heads, dim = q.shape
    out = Strides(queries * heads * dim, heads * dim, dim)
    bias_strides = BiasStrides(*((0, 0, 0) if bias is None else bias.stride()))
    strides = Strides(*q.stride()[:3]), Strides(*k.stride()[:3]), out, bias_strides
    return Geometry(heads, queries, k.shape[1], 0, images, *strides)


def launch_options(x: Tensor, hip: bool = torch.version.hip is not None) -> dict[str, Any]:
    """Tiles, warps and precision for programs that own rows of `[B, rows, heads, d]`."""
    tiles = tile_options(x, x.shape[1], hip=hip)
    dim = tiles["BLOCK_D"]
    own = 16 if dim > 128 and not hip else tiles["OWN"]
    # A tile of the bias and its pointers take the registers of a wider tile of keys.
    form = Form(tiles["HEAD_DIM"], dim, own, min(tiles["OTHERS"], 32), tiles["PRECISION"])
    return {"FORM": form, "num_warps": tiles["num_warps"], "num_stages": tiles["num_stages"]}


def _grid(own: Tensor, streamed: int, g: Geometry, form: Form) -> tuple[tuple[int, int], Geometry]:
    """Programs for the tiles of `own` and for splits of so many streamed rows, and the length of a split."""
    programs = num_programs(own, form.own)
    splits, per_split = split_rows(programs, streamed, form.others)
    return (programs, splits), g._replace(per_split=per_split)


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
