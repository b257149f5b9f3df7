"""Routed attention key region by key region: the queries that list a region are gathered, and attend to it.

What regions of few queries want, a list for every pixel above all: gathering their keys would move a whole
region for a few products. Each pair of a list and a region on it gives a partial output, its largest logit
and the sum of its weights; those of a query are then merged, as for keys that are split over devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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

# Numbers of gathered queries or of logits, and of partial outputs, that are held at a time.
_CHUNK, _PARTIAL = 2**18, 2**22


class _Chunk(NamedTuple):
    """Some key regions with as many pairs each: their rows `[c]`, the numbers of their pairs and the rows of
    the queries in these `[c, n]` (behind the last where there is no pair), what is added to the logits
    `[c, n * query pixels or 1, key pixels]`, and the heads and entries of the bias in that."""

    keys: Tensor
    pairs: Tensor
    queries: Tensor
    added: Tensor | None
    entries: tuple[Tensor, Tensor] | None


class _Work:
    """The lists of a call and the chunks of their pairs."""

    def __init__(self, q: Tensor, k: Tensor, call: Call):
        indices = lists_of_heads(q, call)
        self.heads, self.rows, self.topk = indices.shape[1:]
        self.regions = -(-k.shape[1] // call.region[0]) * -(-k.shape[2] // call.region[1])
        self.pixels = call.query_region[0] * call.query_region[1], call.region[0] * call.region[1]
        self.dim = q.shape[4]
        self.key_rows = len(q) * self.heads * self.regions
        listed = row_numbers(indices, self.regions)
        self.listed = listed.masked_fill(indices.flatten(0, 2) < 0, self.key_rows)
        present = present_keys(k, call)
        self.present = None
        if present is not None:
            self.present = present.expand(len(q), self.heads, -1, -1).flatten(0, 2)
            self.whole = self.present.all(-1)
        self.bias = None if call.bias is None else PairBias(q, k, call.bias, call)

    def parts(self) -> Iterator[slice]:
        """The rows of queries in parts whose partial outputs are held together."""
        step = max(_PARTIAL // max(self.topk * self.pixels[0] * self.dim, 1), 1)
        return (slice(i, min(i + step, len(self.listed))) for i in range(0, len(self.listed), step))

    def chunks(self, part: slice) -> Iterator[_Chunk]:
        """The pairs of a part by key region, those with many pairs first."""
        listed, order = self.listed[part].flatten().sort(dim=0, stable=True)
        device = listed.device
        sizes = torch.bincount(listed, minlength=self.key_rows)[: self.key_rows]
        starts = sizes.cumsum(0) - sizes
        sizes, keys = sizes.sort(dim=0, descending=True, stable=True)
        starts, numbers = starts[keys], sizes.tolist()
        query_pixels, key_pixels = self.pixels
        widest = max(_CHUNK // (query_pixels * max(key_pixels, self.dim)), 1)
        first = 0
        while first < len(numbers) and numbers[first]:
            most, last = numbers[first], first + 1
            # Pairs that there are not, to fill up a chunk, are computed for nothing: a quarter at most.
            fits = max(widest // most, 1)
            while last < len(numbers) and last - first < fits and 4 * numbers[last] >= 3 * most:
                last += 1
            for begin in range(0, most, widest):
                place = torch.arange(begin, min(begin + widest, most), device=device)
                there = place < sizes[first:last, None]
                pairs = order[torch.where(there, starts[first:last, None] + place, 0)]
                pairs = torch.where(there, pairs, len(order))
                yield self._chunk(keys[first:last], pairs, part.start)
            first = last

    def _chunk(self, keys: Tensor, pairs: Tensor, start: int) -> _Chunk:
        queries = pairs // self.topk
        added = entries = None
        if self.bias is not None:
            # Rows behind the last have a bias as well, and no effect.
            pairs_of = self.bias.entries((queries + start) % self.rows, (keys % self.regions)[:, None])
            entries = keys // self.regions % self.heads, pairs_of
            added = self.bias.take(*entries)
        if self.present is not None and not bool(self.whole[keys].all()):
            present = self.present[keys][:, None]
            added = torch.zeros((), device=keys.device) if added is None else added
            added = torch.where(present, added, float("-inf"))
        return _Chunk(keys, pairs, queries, added, entries)


def attend_from_keys(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    work = _Work(q, k, call)
    queries = at_least_float32(to_rows(q, call.query_region))
    keys, values = (at_least_float32(to_rows(x, call.region)) for x in (k, v))
    out, lse = torch.empty_like(queries), queries.new_empty((*queries.shape[:2], 1))
    with without_autocast(q):
        for part in work.parts():
            out[part], lse[part] = _attend_part(work, part, queries[part] * call.scale, keys, values)
    lse = from_rows(lse, q, call.query_region).squeeze(-1)
    return from_rows(out.to(q.dtype), q, call.query_region), lse


def _attend_part(
    work: _Work, part: slice, queries: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    count, pixels, dim = queries.shape
    queries = _with_row_behind(queries, 0)
    slots = count * work.topk + 1
    outs = queries.new_zeros((slots, pixels, dim))
    largest = queries.new_full((slots, pixels), float("-inf"))
    sums = queries.new_zeros((slots, pixels))
    for chunk in work.chunks(part):
        logits = _logits(chunk, queries, keys)
        # Where all logits are -inf, their differences are not numbers.
        best = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
        weights = logits.sub_(best[..., None]).exp_()
        pairs = chunk.pairs.flatten()
        outs.index_copy_(0, pairs, (weights @ values[chunk.keys]).view(-1, pixels, dim))
        largest.index_copy_(0, pairs, best.view(-1, pixels))
        sums.index_copy_(0, pairs, weights.sum(-1).view(-1, pixels))
    outs, largest, sums = (x[:-1].unflatten(0, (count, work.topk)) for x in (outs, largest, sums))
    best = largest.amax(1) if work.topk else queries.new_full((count, pixels), float("-inf"))
    shares = (largest - best.clamp(min=torch.finfo(best.dtype).min)[:, None]).exp_()
    total = (shares * sums).sum(1)[..., None]
    out = outs.mul_(shares[..., None]).sum(1) / total.masked_fill(total == 0, 1)
    return out, (best[..., None] + total.log()).masked_fill(total == 0, float("-inf"))


def gradients_from_keys(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    with_bias: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and, if wanted, the bias, by the formulas of `rows.py`, from the outputs."""
    work, bias = _Work(q, k, call), call.bias
    out, lse = outputs
    drop = (at_least_float32(out) * grad_out).sum(-1)
    drop = drop if grad_lse is None else drop - grad_lse
    maps = q, grad_out, drop[..., None], lse[..., None].masked_fill((lse == float("-inf"))[..., None], 0)
    queries, grads, drops, lses = (at_least_float32(to_rows(x, call.query_region)) for x in maps)
    keys, values = (at_least_float32(to_rows(x, call.region)) for x in (k, v))
    grad_q, grad_k, grad_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    grad_bias = torch.zeros_like(bias.flatten(1)) if bias is not None and with_bias else None
    with without_autocast(q):
        for part in work.parts():
            query, grad, drop = (_with_row_behind(x[part], 0) for x in (queries * call.scale, grads, drops))
            norm = _with_row_behind(lses[part], float("inf"))
            found = torch.zeros_like(query)
            for chunk in work.chunks(part):
                own = chunk.queries.flatten()
                shape = (len(chunk.keys), -1)
                weights = _logits(chunk, query, keys).sub_(norm[own].reshape(*shape, 1)).exp_()
                asked, given = (x[own].view(*shape, work.dim) for x in (query, grad))
                grad_logits = given @ values[chunk.keys].transpose(1, 2)
                grad_logits = grad_logits.sub_(drop[own].reshape(*shape, 1)).mul_(weights)
                if grad_bias is not None and chunk.entries is not None:
                    add_gradient(grad_bias, *chunk.entries, grad_logits)
                grad_k[chunk.keys] += grad_logits.transpose(1, 2) @ asked
                grad_v[chunk.keys] += weights.transpose(1, 2) @ given
                found.index_add_(0, own, (grad_logits @ keys[chunk.keys]).view(-1, *found.shape[1:]))
            grad_q[part] = found[:-1].mul_(call.scale)
    results = ((grad_q, q, call.query_region), (grad_k, k, call.region), (grad_v, v, call.region))
    found = (from_rows(x.to(like.dtype), like, region) for x, like, region in results)
    return *found, grad_bias if grad_bias is None or bias is None else grad_bias.view(bias.shape)


def _with_row_behind(x: Tensor, value: float) -> Tensor:
    """Rows with one more of this value: what pairs that there are not read."""
    return torch.cat([x, x.new_full((1, *x.shape[1:]), value)])


def _logits(chunk: _Chunk, queries: Tensor, keys: Tensor) -> Tensor:
    """`[c, n * query pixels, key pixels]` of scaled queries."""
    own = queries[chunk.queries.flatten()].view(len(chunk.keys), -1, queries.shape[2])
    logits = own @ keys[chunk.keys].transpose(1, 2)
    return logits if chunk.added is None else logits.add_(chunk.added)
