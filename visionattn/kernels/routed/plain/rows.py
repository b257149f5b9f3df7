"""Routed attention list by list: the keys of a list are gathered, and its queries attend to them.

Keys and values are laid out once as rows `[B * heads * regions, pixels, d]`, so that a listed region is one
contiguous row and gathering it a plain copy, already in the layout that the attention reads. The lists are
worked off in chunks whose gathered keys stay in the cache, long ones first, so that lists of a chunk are of
one length; training stores none of them, but gathers again in the backward pass.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.dense.plain.attention import attend, attend_lse
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.plain.pairs import (
    PairBias,
    add_gradient,
    lists_of_heads,
    present_keys,
    row_numbers,
)
from visionattn.kernels.routed.regions import from_rows, to_rows

# How many numbers of gathered keys or of logits are held at a time: on a CPU what the caches take (the best
# of 2**17 to 2**22 as measured), elsewhere what bounds memory without costing launches.
CPU_CHUNK, CHUNK = 2**18, 2**26


class _Chunk(NamedTuple):
    """Some lists: which rows of queries they belong to, the rows of keys on them `[lists, topk]`, what is
    added to their logits `[lists, 1 or pixels, keys]`, and the heads and entries of the bias in that."""

    rows: slice | Tensor
    listed: Tensor
    added: Tensor | None
    entries: tuple[Tensor, Tensor] | None


def attend_to_lists(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Output and, if asked for, log-sum-exp."""
    queries = to_rows(q, call.query_region)
    keys, values = (to_rows(x, call.region) for x in (k, v))
    out = torch.zeros_like(queries)
    lse = None
    if call.return_lse:
        lse = at_least_float32(queries.new_empty(0)).new_full((*queries.shape[:2], 1), float("-inf"))
    with without_autocast(q):
        for chunk in _chunks(q, k, call, keys):
            query, key, value = (
                x[:, None] for x in (queries[chunk.rows], *gather(chunk.listed, keys, values))
            )
            added = None if chunk.added is None else chunk.added[:, None]
            if lse is None:
                out[chunk.rows] = attend(query, key, value, added, call.scale).squeeze(1)
            else:
                part, log = attend_lse(query, key, value, added, call.scale)
                out[chunk.rows], lse[chunk.rows] = part.squeeze(1), log.squeeze(1)[..., None]
    maps = (out,) if lse is None else (out, lse)
    out, *lses = (from_rows(x, q, call.query_region) for x in maps)
    return out, *(x.squeeze(-1) for x in lses)


def gradients_of_lists(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    with_bias: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and, if wanted, the bias.

    With P the weights and dP = dO Vᵀ: dS = P * (dP - rowsum(P * dP) + dLSE), dQ = scale dS K,
    dK = scale dSᵀ Q, dV = Pᵀ dO, and the gradient of the bias is dS.
    """
    bias, scale = call.bias, call.scale
    # In half precision the sums over all lists that name a key would lose their small terms.
    queries, outs = (at_least_float32(to_rows(x, call.query_region)) for x in (q, grad_out))
    keys, values = (at_least_float32(to_rows(x, call.region)) for x in (k, v))
    lses = None if grad_lse is None else to_rows(grad_lse[..., None], call.query_region)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, keys, values))
    grad_bias = torch.zeros_like(bias.flatten(1)) if bias is not None and with_bias else None
    with without_autocast(q):
        for chunk in _chunks(q, k, call, keys):
            key, value = gather(chunk.listed, keys, values)
            query, grad = queries[chunk.rows] * scale, outs[chunk.rows]
            weights = query @ key.transpose(1, 2)
            if chunk.added is not None:
                weights += chunk.added
            weights = weights.softmax(-1)
            grad_logits = (grad @ value.transpose(1, 2)).mul_(weights)
            total = grad_logits.sum(-1, keepdim=True)
            grad_logits.addcmul_(weights, total if lses is None else total - lses[chunk.rows], value=-1)
            if grad_bias is not None and chunk.entries is not None:
                add_gradient(grad_bias, *chunk.entries, grad_logits)
            grad_q[chunk.rows] = (grad_logits @ key).mul_(scale)
            listed = chunk.listed.flatten()
            grad_k.index_add_(0, listed, (grad_logits.transpose(1, 2) @ query).view(-1, *keys.shape[1:]))
            grad_v.index_add_(0, listed, (weights.transpose(1, 2) @ grad).view(-1, *keys.shape[1:]))
    maps = ((grad_q, q, call.query_region), (grad_k, k, call.region), (grad_v, v, call.region))
    found = (from_rows(x.to(like.dtype), like, region) for x, like, region in maps)
    return *found, grad_bias if grad_bias is None or bias is None else grad_bias.view(bias.shape)


def gather(rows: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """The listed rows of each `[rows, pixels, d]` one after the other: `[lists, topk * pixels, d]`."""
    return (x.index_select(0, rows.flatten()).unflatten(0, rows.shape).flatten(1, 2) for x in tensors)


def _chunks(q: Tensor, k: Tensor, call: Call, keys: Tensor) -> Iterator[_Chunk]:
    """The lists that are not empty in chunks of about so many numbers, in gathered keys or in logits."""
    pixels, dim = keys.shape[1:]
    query_pixels = call.query_region[0] * call.query_region[1]
    limit = (CPU_CHUNK if keys.device.type == "cpu" else CHUNK) // (pixels * max(query_pixels, dim))
    indices = lists_of_heads(q, call)
    heads, rows = indices.shape[1:3]
    regions = len(keys) // max(indices.shape[0] * heads, 1)
    listed = row_numbers(indices, regions)
    order, lengths = None, None
    if not call.is_full and bool((indices < 0).any()):
        absent = (indices < 0).flatten(0, 2)
        # Padding goes behind, and long lists before short ones.
        absent, behind = absent.sort(dim=-1, stable=True)
        lengths, order = (~absent).sum(-1).sort(dim=-1, descending=True, stable=True)
        order = order[: int((lengths > 0).sum())]
        listed, lengths = listed.gather(1, behind)[order], lengths.tolist()
    present = present_keys(k, call)
    if present is not None:
        present = present.expand(q.shape[0], heads, -1, -1).flatten(0, 2)
        whole = present.all(-1)
    places = None if call.bias is None else PairBias(q, k, call.bias, call)
    start = 0
    while start < len(listed) and listed.shape[1]:
        width = listed.shape[1] if lengths is None else lengths[start]
        stop = min(start + max(limit // width, 1), len(listed))
        if lengths is not None and lengths[stop - 1] < width:
            # Chunks of one length need no mask, and are worth cutting short by a half.
            equal = bisect_right(lengths, -width, start, stop, key=operator.neg)
            stop = equal if 2 * (equal - start) >= stop - start else stop
        part = slice(start, stop)
        numbers, own = listed[part, :width], part if order is None else order[part]
        added = entries = None
        if places is not None:
            number = torch.arange(start, stop, device=q.device) if order is None else order[part]
            entries = number // rows % heads, places.entries((number % rows)[:, None], numbers % regions)
            added = places.take(*entries)
        visible = None
        if present is not None and not bool(whole[numbers].all()):
            visible = present[numbers].flatten(1)
        if lengths is not None and lengths[part.stop - 1] < width:
            some = torch.tensor(lengths[part], device=q.device)[:, None] > torch.arange(
                width, device=q.device
            )
            some = some[..., None].expand(-1, -1, pixels).flatten(1)
            visible = some if visible is None else visible & some
        if visible is not None:
            added = q.new_zeros(()) if added is None else added
            added = torch.where(visible[:, None], added, float("-inf"))
        yield _Chunk(own, numbers, added, entries)
        start = part.stop
