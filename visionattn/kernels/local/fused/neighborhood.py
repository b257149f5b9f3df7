"""The two halves of neighborhood attention, fused: logits, weighted sums, and what weights give to keys.

Each is the derivative of the other two, so three kernels are the forward and the backward passes of both. All
numbers of a pair of tiles are one product, those of pairs that do not see each other are left out when they
are read or written. No atomics.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.geometry import (
    base_of,
    choose_tiling,
    geometry,
    load_pixels,
    offset_of,
    own_tile,
    place,
    store_vectors,
    stream,
    stream_length,
)
from visionattn.kernels.local.fused.scores import origin_of, visible_pairs
from visionattn.kernels.local.fused.tiling import Owner
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import equally_strided

# Every number of a pair of tiles has an address, which takes two registers.
MOST_OTHERS = 32


@triton.jit
def weights_of(weights, at, g):
    """Point at the weights of the first pixel of a group."""
    return weights + base_of(at, g.rows) * (g.y.key_window * g.x.key_window)


@triton.jit
def place_of_queries(queries, at, g):
    """Compute where, from there, the weight of the key (0, 0) of its group would stand for each query."""
    rows = offset_of(queries, g.rows, g) * (g.y.key_window * g.x.key_window)
    return rows - origin_of(queries, at, g)


@triton.jit
def place_of_keys(keys, g):
    """Compute what a key adds to the place of its weight."""
    return keys.y * g.x.key_window + keys.x


@triton.jit
def scores_kernel(q, k, weights, scale, g, FORM: tl.constexpr):
    """Compute the products of one tile of queries with their keys."""
    at = place(tl.program_id(0), g)
    own = own_tile(at, g, FORM)
    query = load_pixels(q, at, own, own.valid, g, FORM)
    rows, weights = place_of_queries(own, at, g), weights_of(weights, at, g)
    tiles = 1 if FORM.single else stream_length(own, FORM)
    for number in range(tiles):
        others = stream(number, own, at, FORM)
        key = load_pixels(k, at, others, others.valid, g, FORM)
        products = tl.dot(query, tl.trans(key), input_precision=FORM.precision) * scale
        seen = visible_pairs(own, others) & own.valid[:, None]
        places = rows[:, None] + place_of_keys(others, g)[None, :]
        tl.store(weights + places, products.to(weights.dtype.element_ty), mask=seen)


@triton.jit
def aggregate_kernel(v, weights, out, scale, g, FORM: tl.constexpr):
    """Sum the values of one tile of queries."""
    at = place(tl.program_id(0), g)
    own = own_tile(at, g, FORM)
    rows, weights = place_of_queries(own, at, g), weights_of(weights, at, g)
    acc = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    tiles = 1 if FORM.single else stream_length(own, FORM)
    for number in range(tiles):
        others = stream(number, own, at, FORM)
        value = load_pixels(v, at, others, others.valid, g, FORM)
        seen = visible_pairs(own, others) & own.valid[:, None]
        places = rows[:, None] + place_of_keys(others, g)[None, :]
        part = tl.load(weights + places, mask=seen, other=0.0)
        acc = tl.dot(part.to(value.dtype), value, acc, input_precision=FORM.precision)
    store_vectors(out, at, own, own.valid, acc * scale, g, FORM)


@triton.jit
def distribute_kernel(q, weights, out, scale, g, FORM: tl.constexpr):
    """Sum, for one tile of keys, the queries that see them."""
    at = place(tl.program_id(0), g)
    own = own_tile(at, g, FORM)
    keys, weights = place_of_keys(own, g), weights_of(weights, at, g)
    acc = tl.zeros([FORM.own, FORM.block_d], tl.float32)
    tiles = 1 if FORM.single else stream_length(own, FORM)
    for number in range(tiles):
        others = stream(number, own, at, FORM)
        query = load_pixels(q, at, others, others.valid, g, FORM)
        seen = visible_pairs(own, others) & own.valid[:, None] & others.valid[None, :]
        places = place_of_queries(others, at, g)[None, :] + keys[:, None]
        part = tl.load(weights + places, mask=seen, other=0.0)
        acc = tl.dot(part.to(query.dtype), query, acc, input_precision=FORM.precision)
    store_vectors(out, at, own, own.valid, acc * scale, g, FORM)


def scores(
    q: Tensor, k: Tensor, pattern: Pattern, scale: float = 1.0, unseen: float = float("-inf")
) -> Tensor:
    """Compute `scale` times the products `[B, H, W, heads, keys]` of queries with their key windows.

    Keys of its window that a query does not see get the number `unseen`.
    """
    q, k = equally_strided(q, k)
    shape = (*q.shape[:4], pattern.y.key_window * pattern.x.key_window)
    weights = torch.empty(shape, dtype=q.dtype, device=q.device)
    if pattern.y.is_causal or pattern.x.is_causal:
        weights.fill_(unseen)
    _launch(scores_kernel, "query", pattern, q=q, k=k, weights=weights, scale=scale)
    return weights


def aggregate(v: Tensor, weights: Tensor, pattern: Pattern, scale: float = 1.0) -> Tensor:
    """Compute `scale` times the sums of the values of every key window `[B, H, W, heads, d]`."""
    return _sum(aggregate_kernel, "query", pattern, "v", v, weights, scale)


def distribute(q: Tensor, weights: Tensor, pattern: Pattern, scale: float = 1.0) -> Tensor:
    """Compute `scale` times the sums of the queries that see a key `[B, H, W, heads, d]`."""
    return _sum(distribute_kernel, "key", pattern, "q", q, weights, scale)


def _sum(
    kernel: Any, owner: Owner, pattern: Pattern, name: str, maps: Tensor, weights: Tensor, scale: float
) -> Tensor:
    (maps,) = equally_strided(maps)
    out = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    _launch(kernel, owner, pattern, **{name: maps}, weights=weights.contiguous(), out=out, scale=scale)
    return out


def _launch(kernel: Any, owner: Owner, pattern: Pattern, **arguments: Any) -> None:
    """Run a kernel, a program for every tile of every head of every image."""
    maps = next(iter(arguments.values()))
    tiles, options = choose_tiling(maps, None, pattern, owner, most_others=MOST_OTHERS)
    grid = (tiles.programs * maps.shape[0] * maps.shape[3],)
    if maps.shape[0]:
        kernel[grid](**arguments, g=geometry(maps, None, pattern, tiles), **options)
