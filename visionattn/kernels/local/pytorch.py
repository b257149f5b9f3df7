"""Local attention in fast plain PyTorch: equal blocks are batched, border blocks run in their true size.

No roll, no mask and no gather: the blocks that a border cuts are smaller rectangles of the same map, so a
shifted window costs less than an unshifted one instead of a mask and two copies more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import attend
from .pattern import Pattern, Run, Span


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention of every pixel over the keys of its block; shapes and bias as in `op.py`."""
    padding = (0, 0, 0, 0, *pattern.x.key_padding, *pattern.y.key_padding)
    if any(padding):
        k, v = F.pad(k, padding), F.pad(v, padding)
    runs_y, runs_x = pattern.y.runs(), pattern.x.runs()
    queries = _blocks(q, [(r.count, r.query) for r in runs_y], [(r.count, r.query) for r in runs_x], pattern)
    keys, values = (
        _blocks(t, [(r.count, r.key) for r in runs_y], [(r.count, r.key) for r in runs_x], pattern)
        for t in (k, v)
    )
    rows = []
    for i, y in enumerate(runs_y):
        row = []
        for j, x in enumerate(runs_x):
            out = attend(queries[i][j], keys[i][j], values[i][j], _bias_of_blocks(bias, pattern, y, x), scale)
            row.append(_unblock(out, q.shape[0], y, x))
        rows.append(_cat(row, dim=2))
    return _cat(rows, dim=1)


def _blocks(
    x: Tensor, spans_y: Sequence[tuple[int, Span]], spans_x: Sequence[tuple[int, Span]], pattern: Pattern
) -> list[list[Tensor]]:
    """Rectangles `[B * blocks, heads, pixels, d]` of `[B, H, W, heads, d]` for every pair of runs."""
    blocks = []
    for row, y in zip(_cut(x, 1, spans_y, pattern.y.window), spans_y):
        pieces = zip(_cut(row, 2, spans_x, pattern.x.window), spans_x)
        blocks.append([_rectangles(piece, y, x, pattern) for piece, x in pieces])
    return blocks


def _cut(x: Tensor, dim: int, spans: Sequence[tuple[int, Span]], window: int) -> Sequence[Tensor]:
    """The stretch of `count` spans, one window apart, along `dim`; for each run."""
    lengths = [(count - 1) * window + span.length for count, span in spans]
    starts = [span.start for _, span in spans]
    if [*starts, x.shape[dim]] == [0, *(start + length for start, length in zip(starts, lengths))]:
        # The gradient of a split is one concatenation, that of every slice a whole map of zeros.
        return x.split(lengths, dim)
    return [x.narrow(dim, start, length) for start, length in zip(starts, lengths)]


def _rectangles(x: Tensor, y_run: tuple[int, Span], x_run: tuple[int, Span], pattern: Pattern) -> Tensor:
    for dim, (count, span), window in ((1, y_run, pattern.y.window), (3, x_run, pattern.x.window)):
        if count == 1 or span.length == window:
            x = x.unflatten(dim, (count, span.length))
        else:
            x = x.unfold(dim, span.length, window).movedim(-1, dim + 1)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def _unblock(out: Tensor, batch: int, y: Run, x: Run) -> Tensor:
    """The inverse of `_blocks` for query rectangles: `[B, rows, columns, heads, d]`."""
    out = out.transpose(1, 2).unflatten(1, (y.query.length, x.query.length))
    out = out.unflatten(0, (batch, y.count, x.count)).transpose(2, 3)
    return out.flatten(1, 2).flatten(2, 3)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _bias_of_blocks(bias: Tensor | None, pattern: Pattern, y: Run, x: Run) -> Tensor | None:
    """The dense bias `[heads, queries, keys]` of the blocks of two runs, from a table or a whole block."""
    if bias is None:
        return None
    if bias.shape[1:] == pattern.table_shape:
        for dim, axis, run in ((1, pattern.y, y), (2, pattern.x, x)):
            first = (
                run.key.start - axis.key_padding[0] - (run.query.start + run.query.length - 1) + axis.reach
            )
            bias = bias.narrow(dim, first, run.query.length + run.key.length - 1).unfold(
                dim, run.key.length, 1
            )
        # Sliding along the table walks through the queries backwards: key - query grows as the query shrinks.
        bias = bias.flip(1, 2)
    else:
        bias = bias.unflatten(2, (pattern.y.key_window, -1)).unflatten(1, (pattern.y.window, -1))
        for dim, run in ((1, y), (2, x)):
            bias = bias.narrow(dim, run.query.offset, run.query.length)
            bias = bias.narrow(dim + 2, run.key.offset, run.key.length)
    return bias.flatten(3, 4).flatten(1, 2)
