"""Logits of neighborhoods, and sums by given weights, in plain PyTorch: attention in two halves.

Three products, each the derivative of the others: queries with keys (logits), weights with values (the sum
at a query), and weights with queries (what they give back to a key). Each is a product of matrices per row of
queries: along the columns the weights of a tile of queries are written into a band, as wide as all keys of
the tile, so that one matrix of keys serves them all; along the rows every block of queries has its own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn._compat import is_functorch_active
from visionattn.kernels.local import reference
from visionattn.kernels.local.pattern import Axis, Pattern
from visionattn.kernels.local.plain.groups import by_groups
from visionattn.kernels.precision import without_autocast

# Columns of a tile, and numbers of the bands that are worked off together, which stay in the cache.
_TILE, _MOST = 16, 2**18


def neighborhood_scores(q: Tensor, k: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """Compute the logits `[B, H, W, heads, keys]`; maps as in `op.py`."""
    if _is_traced():
        return reference.neighborhood_scores(q, k, pattern, scale)
    return without_unseen(_run(_Scores, q * scale, k, pattern), pattern, float("-inf"))


def neighborhood_aggregation(v: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
    """Sum values by weights: `[B, H, W, heads, d]`; maps as in `op.py`."""
    if _is_traced():
        return reference.neighborhood_aggregation(v, weights, pattern)
    return _run(_Aggregate, v, without_unseen(weights, pattern), pattern)


def products_with_keys(q: Tensor, k: Tensor, pattern: Pattern) -> Tensor:
    """Multiply every query by the keys of its window: `[B, H, W, heads, keys]`."""
    return _by_bands(_score, pattern, q, k)


def sums_of_values(v: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
    """Sum the values of every window by their weights: `[B, H, W, heads, d]`."""
    return _by_bands(_aggregate, pattern, v, weights)


def sums_at_keys(q: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
    """Sum, for every key, the queries in whose window it is, by its weights: `[B, H, W, heads, d]`."""
    return _by_bands(_distribute, pattern, q, weights)


def _is_traced() -> bool:
    # Bands depend on the size of a map; the formula is the same program for all.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def without_unseen(weights: Tensor, pattern: Pattern, value: float = 0.0) -> Tensor:
    """Put `value` where a query does not see a key of its window, `[B, H, W, heads, keys]`."""
    axes = (pattern.y, pattern.x)
    if not any(axis.is_causal for axis in axes):
        return weights
    seen = (axis.keys(torch.arange(axis.length, device=weights.device))[1] for axis in axes)
    return weights.masked_fill(~reference.seen_keys(*seen), value)


def _run(product: Any, a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
    """Run a product, and record it for autograd where needed: that costs as much as a small map."""
    is_recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return (product.apply if is_recorded or is_functorch_active() else product.forward)(a, b, pattern)


class _Product(torch.autograd.Function):
    """One of the three products of two maps."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Pattern], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.pattern = inputs[2]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """A mapped axis is more batch."""
        a, b = (
            (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
            for x, dim in zip(args[:2], in_dims)
        )
        return cls.apply(a, b, args[2]).unflatten(0, (info.batch_size, -1)), 0


class _Scores(_Product):
    """Queries with their keys."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, pattern: Pattern) -> Tensor:
        return products_with_keys(q, k, pattern)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, k), (with_q, with_k, _) = ctx.saved_tensors, ctx.needs_input_grad
        dq = _Aggregate.apply(k, grads[0], ctx.pattern) if with_q else None
        return dq, _Distribute.apply(q, grads[0], ctx.pattern) if with_k else None, None


class _Aggregate(_Product):
    """Values with the weights of their queries."""

    @staticmethod
    def forward(v: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
        return sums_of_values(v, weights, pattern)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (v, weights), (with_v, with_weights, _) = ctx.saved_tensors, ctx.needs_input_grad
        dv = _Distribute.apply(grads[0], weights, ctx.pattern) if with_v else None
        return dv, _Scores.apply(grads[0], v, ctx.pattern) if with_weights else None, None


class _Distribute(_Product):
    """Queries with their weights, given to the keys."""

    @staticmethod
    def forward(q: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
        return sums_at_keys(q, weights, pattern)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (q, weights), (with_q, with_weights, _) = ctx.saved_tensors, ctx.needs_input_grad
        dq = _Aggregate.apply(grads[0], weights, ctx.pattern) if with_q else None
        return dq, _Scores.apply(q, grads[0], ctx.pattern) if with_weights else None, None


def _by_bands(product: Callable[..., Tensor], pattern: Pattern, a: Tensor, b: Tensor) -> Tensor:
    def of_group(group: Pattern, *maps: Tensor) -> tuple[Tensor, ...]:
        return (product(group, *maps),)

    with without_autocast(a):
        return by_groups(pattern, (a, b), of_group)[0].contiguous()


class _Piece(NamedTuple):
    """`count` blocks of `size` queries along one axis, from number `query` on, one after another.

    The keys of the first begin at `key`, those of each further one `step` farther.
    """

    query: int
    count: int
    size: int
    key: int
    step: int


class _Columns(NamedTuple):
    """A tile of columns: its queries and all their keys, first and how many, and the pieces inside of it.

    Places in the pieces count from the first query and the first key of the tile.
    """

    query: int
    queries: int
    key: int
    keys: int
    pieces: tuple[_Piece, ...]


@lru_cache(maxsize=256)
def _pieces(axis: Axis, start: int, stop: int) -> tuple[_Piece, ...]:
    """Gather adjacent blocks of an undilated axis with equal keys, or with keys that move as they do."""
    pieces: list[_Piece] = []
    for block in range(start // axis.window, -(-stop // axis.window)):
        first = max(block * axis.window, start)
        size, key = min((block + 1) * axis.window, stop) - first, axis.block_keys(block).start
        last = pieces[-1] if pieces else None
        if last and last.count == 1 and key == last.key:
            pieces[-1] = last._replace(size=last.size + size)
        elif last and size == last.size == axis.window and key == last.key + last.count * axis.window:
            pieces[-1] = last._replace(count=last.count + 1)
        else:
            pieces.append(_Piece(first, 1, size, key, axis.window))
    return tuple(pieces)


@lru_cache(maxsize=256)
def _columns(axis: Axis) -> tuple[_Columns, ...]:
    """Cut an axis into tiles of equal width."""
    width = -(-axis.length // -(-axis.length // _TILE))
    tiles = []
    for start in range(0, axis.length, width):
        stop = min(start + width, axis.length)
        pieces = _pieces(axis, start, stop)
        low, last = pieces[0].key, pieces[-1]
        keys = last.key + (last.count - 1) * last.step + axis.key_window - low
        inside = tuple(p._replace(query=p.query - start, key=p.key - low) for p in pieces)
        tiles.append(_Columns(start, stop - start, low, keys, inside))
    return tuple(tiles)


class _Part(NamedTuple):
    """What is worked off together: images and blocks of rows of a piece, first and how many, in a tile."""

    images: tuple[int, int]
    rows: _Piece
    x: _Columns
    pattern: Pattern

    def queries(self, maps: Tensor) -> Tensor:
        """View the queries `[B, heads, blocks, size, columns, n]` of `[B, H, W, heads, n]`."""
        y, x = self.rows, self.x
        maps = maps.narrow(0, *self.images).narrow(1, y.query, y.count * y.size).narrow(2, x.query, x.queries)
        return maps.unflatten(1, (y.count, y.size)).permute(0, 4, 1, 2, 3, 5)

    def keys(self, maps: Tensor, first: int = 0, count: int = 0) -> Tensor:
        """View the keys `[B, heads, blocks, key rows, key columns, n]` of `[B, H, W, heads, n]`.

        With `count`, only these of the rows of every block.
        """
        y, rows = self.rows, count or self.pattern.y.key_window
        maps = maps.narrow(0, *self.images).narrow(2, self.x.key, self.x.keys)
        maps = maps.narrow(1, y.key + first, (y.count - 1) * y.step + rows)
        return maps.unfold(1, rows, y.step).permute(0, 3, 1, 5, 2, 4)

    def bands(self, band: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """View, for every piece of the columns, its keys in a band, and its weights in their map.

        Args:
            band: `[B, heads, blocks, size, columns, key rows, key columns]`, contiguous.
            weights: `[B, H, W, heads, keys]`.
        """
        weights = self.queries(weights).unflatten(-1, (self.pattern.y.key_window, -1))
        *outer, column, row, _ = band.stride()
        for p in self.x.pieces:
            view = band.as_strided(
                (*band.shape[:4], p.count, p.size, band.shape[5], self.pattern.x.key_window),
                (*outer, p.size * column + p.step, column, row, 1),
                band.storage_offset() + p.query * column + p.key,
            )
            yield view, weights.narrow(4, p.query, p.count * p.size).unflatten(4, (p.count, p.size))

    def band_of(self, weights: Tensor, like: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Write weights into a band, into `like` where one of the same part in other places is at hand."""
        heads, y = weights.shape[3], self.rows
        shape = (self.images[1], heads, y.count, y.size, self.x.queries)
        shape = (*shape, self.pattern.y.key_window, self.x.keys)
        band = like if like is not None and like.shape == shape else weights.new_zeros(shape, dtype=dtype)
        for view, part in self.bands(band, weights):
            view.copy_(part)
        return band


def _parts(pattern: Pattern, batch: int, heads: int) -> Iterator[list[_Part]]:
    """Cut maps into parts; those of a list have bands with the same places."""
    for piece in _pieces(pattern.y, 0, pattern.y.length):
        for x in _columns(pattern.x):
            numbers = heads * piece.size * x.queries * pattern.y.key_window * x.keys
            blocks = min(max(_MOST // numbers, 1), piece.count)
            images = min(max(_MOST // (numbers * blocks), 1), max(batch, 1))
            parts = []
            for image in range(0, batch, images):
                for block in range(0, piece.count, blocks):
                    rows = piece._replace(
                        query=piece.query + block * piece.size,
                        count=min(blocks, piece.count - block),
                        key=piece.key + block * piece.step,
                    )
                    parts.append(_Part((image, min(images, batch - image)), rows, x, pattern))
            yield parts


def _matrices(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy `[B, heads, blocks, rows, columns, n]` to `[B * heads * blocks, rows * columns, n]`."""
    return x.reshape(-1, x.shape[3] * x.shape[4], x.shape[5]).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _score(pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
    out = q.new_empty(*q.shape[:4], pattern.y.key_window * pattern.x.key_window)
    for part in (part for parts in _parts(pattern, q.shape[0], q.shape[3]) for part in parts):
        queries = part.queries(q)
        band = _matrices(queries, _wide(q)) @ _matrices(part.keys(k), _wide(q)).mT
        band = band.view(*queries.shape[:5], pattern.y.key_window, part.x.keys)
        for view, target in part.bands(band, out):
            target.copy_(view)
    return out


def _aggregate(pattern: Pattern, v: Tensor, weights: Tensor) -> Tensor:
    out, heads = torch.empty(v.shape, dtype=v.dtype, device=v.device), v.shape[3]
    for parts in _parts(pattern, v.shape[0], heads):
        band = None
        for part in parts:
            band = part.band_of(weights, band, _wide(v))
            target = part.queries(out)
            target.copy_((_flat(band) @ _matrices(part.keys(v), _wide(v))).view(target.shape))
    return out


def _distribute(pattern: Pattern, q: Tensor, weights: Tensor) -> Tensor:
    out, rows = torch.zeros(q.shape, dtype=_wide(q), device=q.device), pattern.y.key_window
    for parts in _parts(pattern, q.shape[0], q.shape[3]):
        band = None
        for part in parts:
            band = part.band_of(weights, band, _wide(q))
            given = _flat(band).mT @ _matrices(part.queries(q), _wide(q))
            given = given.view(*band.shape[:3], rows, part.x.keys, -1)
            # So many rows of the keys of all blocks do not overlap.
            step = part.rows.step if part.rows.count > 1 else rows
            for first in range(0, rows, step):
                count = min(step, rows - first)
                part.keys(out, first, count).add_(given.narrow(3, first, count))
    return out.to(q.dtype)


def _flat(band: Tensor) -> Tensor:
    """View a band as matrices `[B * heads * blocks, queries, keys]`."""
    return band.view(-1, band.shape[3] * band.shape[4], band.shape[5] * band.shape[6])
