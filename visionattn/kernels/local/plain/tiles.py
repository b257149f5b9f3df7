"""Local attention by tiles: equal tiles are batched, border tiles run in their true size.

Differentiable any number of times by PyTorch's own rules, and free of writes: the form for compilers and
transforms. On a CPU `pytorch.py` works the same tiles off in parts that stay in the cache.

No roll and no gather: a tile of queries and the rectangle of keys that it needs are strided views of the map,
and the tiles that a border cuts are smaller rectangles, so that a shifted window costs less than an unshifted
one instead of a mask and two copies more. Blocks of few queries (neighborhoods) are computed several at a
time under a mask that is the same for all tiles but those at the border.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.dense.plain.attention import attend, attend_lse
from visionattn.kernels.local.pattern import Axis, Group, Pattern, Run, Span
from visionattn.kernels.local.reference import bias_of_pairs

# Queries of a tile made of smaller blocks, rows and columns, and up to which length one tile takes the whole
# axis: enough for an efficient product, and the waste grows with the tile. Measured on 14x14 to 56x56.
TILE = (4, 8)
_ONE_TILE = 16
# Smaller blocks than this are joined into tiles if they share keys; from here on a block by itself is faster.
_MIN_BLOCK = 4


def attention_of_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
    k, v = pad_keys(k, pattern), pad_keys(v, pattern)

    def attend_group(group: Pattern, *maps: Tensor) -> tuple[Tensor, ...]:
        return _attend_tiles(group, bias, scale, return_lse, *maps)

    out, *lse = by_groups(pattern, (q, k, v), attend_group)
    return out, lse[0].squeeze(-1) if lse else None


def pad_keys(x: Tensor, pattern: Pattern) -> Tensor:
    """Keys `[B, H, W, heads, d]` with the zero keys of the pattern around them."""
    return F.pad(x, pattern.padding) if any(pattern.padding) else x


def by_groups(
    pattern: Pattern, maps: Sequence[Tensor], function: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Maps `[B, H, W, heads, d]` of a pattern from `function(undilated pattern, *maps of its group)`."""
    rows = []
    for y in pattern.y.groups():
        row = []
        for x in pattern.x.groups():
            parts = (_take_groups(_take_groups(t, y, pattern.y, 1), x, pattern.x, 2) for t in maps)
            row.append(function(Pattern(y.axis, x.axis), *parts))
        rows.append(_interleave(row, pattern.x, 2))
    return _interleave(rows, pattern.y, 1)


def _take_groups(x: Tensor, group: Group, axis: Axis, dim: int) -> Tensor:
    """The groups of a dilated axis as part of the batch: `[count * B, ...]`, groups outermost."""
    if axis.dilation == 1:
        return x
    if group.count == axis.dilation:
        x = x.unflatten(dim, (group.axis.length, group.count))
    else:
        # As many whole rounds of `dilation` as fit behind the first residue.
        x = x.narrow(dim, group.first, x.shape[dim] - group.first)
        x = x.unfold(dim, group.count, axis.dilation).movedim(-1, dim + 1)
    return x.movedim(dim + 1, 0).flatten(0, 1)


def _interleave(parts: list[tuple[Tensor, ...]], axis: Axis, dim: int) -> tuple[Tensor, ...]:
    """The inverse of `_take_groups` over all groups of an axis."""
    if axis.dilation == 1:
        return parts[0]
    groups = axis.groups()
    longest = groups[0].axis.length
    joined = []
    for tensors in zip(*parts):
        padded = []
        for x, group in zip(tensors, groups):
            x = x.unflatten(0, (group.count, -1)).movedim(0, dim + 1)
            missing = longest - group.axis.length
            padded.append(F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x)
        whole = _cat(padded, dim + 1).flatten(dim, dim + 1)
        joined.append(whole.narrow(dim, 0, axis.length))
    return tuple(joined)


def _attend_tiles(
    pattern: Pattern, bias: Tensor | None, scale: float, return_lse: bool, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """Attention of an undilated pattern: `[B, H, W, heads, d]` and, if asked for, `[B, H, W, heads, 1]`."""
    runs_y, runs_x = tile_runs(pattern)
    queries = _tiles(q, [(r, r.query) for r in runs_y], [(r, r.query) for r in runs_x])
    keys, values = (_tiles(t, [(r, r.key) for r in runs_y], [(r, r.key) for r in runs_x]) for t in (k, v))
    biases = run_biases(bias, pattern, runs_y, runs_x, q.dtype, q.device)
    outs = []
    for (y, x), q_tile, k_tile, v_tile, tile_bias in zip(
        product(runs_y, runs_x), queries, keys, values, biases
    ):
        run = attend_lse if return_lse else attend
        results = run(q_tile, k_tile, v_tile, tile_bias, scale)
        results = results if isinstance(results, tuple) else (results,)
        outs.append(tuple(_untile(t if t.dim() == 4 else t[..., None], q.shape[0], y, x) for t in results))
    return _cat_tiles(outs, len(runs_x))


def _cat_tiles(parts: list[tuple[Tensor, ...]], width: int) -> tuple[Tensor, ...]:
    """Whole maps from their rectangles in row-major order, `width` in a row."""
    return tuple(
        _cat([_cat(list(column[i : i + width]), 2) for i in range(0, len(column), width)], 1)
        for column in zip(*parts)
    )


def tile_runs(pattern: Pattern) -> tuple[list[Run], list[Run]]:
    """The tiles of both axes of an undilated pattern."""
    y, x = (axis.runs(_blocks_per_tile(axis, side)) for axis, side in zip((pattern.y, pattern.x), TILE))
    return y, x


def _blocks_per_tile(axis: Axis, side: int) -> int:
    """How many blocks of an axis are computed together."""
    joined = not _stands_alone(axis) and axis.length <= _ONE_TILE
    return axis.num_blocks if joined else blocks_of_tile(axis, side)


def blocks_of_tile(axis: Axis, side: int) -> int:
    """How many blocks of a long axis are computed together, in a tile of about `side` queries."""
    return 1 if _stands_alone(axis) else max(side // axis.window, 1)


def _stands_alone(axis: Axis) -> bool:
    return axis.window >= _MIN_BLOCK or axis.key_window == axis.window


def _tiles(
    x: Tensor, spans_y: Sequence[tuple[Run, Span]], spans_x: Sequence[tuple[Run, Span]]
) -> list[Tensor]:
    """Rectangles `[B * tiles, heads, pixels, d]` of `[B, H, W, heads, d]` for every pair of runs."""
    tiles = []
    for row, y in zip(_cut(x, 1, spans_y), spans_y):
        tiles += [_rectangles(piece, y, column) for piece, column in zip(_cut(row, 2, spans_x), spans_x)]
    return tiles


def _cut(x: Tensor, dim: int, spans: Sequence[tuple[Run, Span]]) -> Sequence[Tensor]:
    """The stretch of all tiles of a run along `dim`; for each run."""
    lengths = [(run.count - 1) * run.step + span.length for run, span in spans]
    starts = [span.start for _, span in spans]
    if [*starts, x.shape[dim]] == [0, *(start + length for start, length in zip(starts, lengths))]:
        # The gradient of a split is one concatenation, that of every slice a whole map of zeros.
        return x.split(lengths, dim)
    return [x.narrow(dim, start, length) for start, length in zip(starts, lengths)]


def _rectangles(x: Tensor, y: tuple[Run, Span], column: tuple[Run, Span]) -> Tensor:
    for dim, (run, span) in ((1, y), (3, column)):
        if run.count == 1 or span.length == run.step:
            x = x.unflatten(dim, (run.count, span.length))
        else:
            x = _Slide.apply(x, dim, span.length, run.step)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


class _Slide(torch.autograd.Function):
    """Overlapping stretches of an axis as two axes, `x.unfold` with its new axis behind `dim`.

    The gradient adds whole steps; that of `unfold` adds pixel by pixel, which takes three times as long. Both
    are linear, so derivatives of any order follow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, length: int, step: int) -> Tensor:
        return x.unfold(dim, length, step).movedim(-1, dim + 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, int], output: Tensor) -> None:
        x, ctx.dim, ctx.length, ctx.step = inputs
        ctx.size = x.shape[ctx.dim]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), dim, step = grads, ctx.dim, ctx.step
        behind = (0, 0) * (grad.dim() - 2 - dim)
        total = None
        for start in range(0, ctx.length, step):
            part = grad.narrow(dim + 1, start, min(step, ctx.length - start))
            part = F.pad(part, (*behind, 0, step - part.shape[dim + 1])).flatten(dim, dim + 1)
            end = ctx.size - start - part.shape[dim]
            part = F.pad(part, (*behind, start, end))
            total = part if total is None else total + part
        return total, None, None, None


def _untile(out: Tensor, batch: int, y: Run, x: Run) -> Tensor:
    """The inverse of `_tiles` for query rectangles: `[B, rows, columns, heads, d]`."""
    out = out.transpose(1, 2).unflatten(1, (y.query.length, x.query.length))
    out = out.unflatten(0, (batch, y.count, x.count)).transpose(2, 3)
    return out.flatten(1, 2).flatten(2, 3)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def run_biases(
    bias: Tensor | None,
    pattern: Pattern,
    runs_y: Sequence[Run],
    runs_x: Sequence[Run],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    """What is added to the logits of the tiles of every pair of runs: bias, and -inf for absent keys."""
    is_table = bias is not None and bias.shape[1:] == pattern.table_shape
    block = None
    if bias is not None and has_whole_block(pattern, is_table):
        block = from_table(bias, pattern, *whole_block(pattern)) if is_table else by_axes(bias, pattern)
    seen: list[list[tuple[Tensor, ...]]] = [[], []]
    # Blocks need neither a mask nor a gather, so nothing is written out for windows.
    is_gathered = bias is not None and block is None and not is_table
    if is_gathered or any(run.masked for run in (*runs_y, *runs_x)):
        for pairs, axis, runs in ((seen[0], pattern.y, runs_y), (seen[1], pattern.x, runs_x)):
            pairs += [axis.visibility(*run_pixels(run, axis, device)) for run in runs]
    absent = [[torch.where(visible, 0.0, float("-inf")).to(dtype) for visible, *_ in pairs] for pairs in seen]
    biases = []
    for (i, y), (j, x) in product(enumerate(runs_y), enumerate(runs_x)):
        total = None
        if block is not None:
            total = part_of_block(block, y, x)
        elif bias is not None and is_table:
            total = from_table(bias, pattern, y, x)
        elif bias is not None:
            total = bias_of_pairs(bias, pattern, seen[0][i], seen[1][j])
        if y.masked or x.masked:
            mask = absent[0][i][:, None, :, None] + absent[1][j][None, :, None, :]
            total = mask[None] if total is None else total + mask
        biases.append(None if total is None else total.flatten(3, 4).flatten(1, 2))
    return biases


def run_pixels(run: Run, axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries and keys of the first tile of a run, as `Axis.visibility` counts them."""
    key = run.key.start - axis.key_padding[0]
    return (
        torch.arange(run.query.start, run.query.start + run.query.length, device=device),
        torch.arange(key, key + run.key.length, device=device),
    )


def from_table(table: Tensor, pattern: Pattern, y: Run, x: Run) -> Tensor:
    """The bias `[heads, qy, qx, ky, kx]` of a tile; the table slides over the pairs without a gather."""
    for dim, axis, run in ((1, pattern.y, y), (2, pattern.x, x)):
        first, length = _entries(axis, run)
        # Absent pairs of a tile may lie farther apart than any entry; what they read is masked.
        low, high = max(-first, 0), max(first + length - table.shape[dim], 0)
        if low or high:
            table = F.pad(table, (0, 0) * (table.dim() - 1 - dim) + (low, high))
        table = table.narrow(dim, first + low, length)
    # Sliding along the table walks through the queries backwards: key - query grows as the query shrinks.
    rows = table.unfold(2, x.key.length, 1).flip(2).transpose(1, 2)
    starts = reversed(range(y.query.length))
    return torch.stack([rows.narrow(2, start, y.key.length) for start in starts], 1)


def add_to_table(table: Tensor, tile: Tensor, pattern: Pattern, y: Run, x: Run) -> None:
    """The transpose of `from_table`: add `[heads, qy, qx, ky, kx]` to the entries that it reads."""
    (top, rows), (left, columns) = _entries(pattern.y, y), _entries(pattern.x, x)
    sums = _along_diagonals(tile.movedim(2, 0), columns)
    sums = _along_diagonals(sums.permute(1, 0, 3, 2), rows).mT
    first = [max(top, 0), max(left, 0)]
    last = [min(start + n, size) for start, n, size in zip((top, left), (rows, columns), table.shape[1:])]
    inside = sums[:, first[0] - top : last[0] - top, first[1] - left : last[1] - left]
    table[:, first[0] : last[0], first[1] : last[1]].add_(inside)


def _entries(axis: Axis, run: Run) -> tuple[int, int]:
    """The first entry of a table that a tile reads, and how many, along an axis."""
    last_query = run.query.start + run.query.length - 1
    first = run.key.start - axis.key_padding[0] - last_query + axis.reach
    return first, run.query.length + run.key.length - 1


def _along_diagonals(pairs: Tensor, length: int) -> Tensor:
    """Sums over equal distances, the least first, of `[queries, ..., keys]`."""
    sums = pairs.new_zeros((*pairs.shape[1:-1], length))
    for query, keys in enumerate(pairs):
        sums.narrow(-1, len(pairs) - 1 - query, pairs.shape[-1]).add_(keys)
    return sums


def has_whole_block(pattern: Pattern, is_table: bool) -> bool:
    """Whether the bias of every tile of an undilated pattern is part of that of one whole block."""
    axes = pattern.y, pattern.x
    is_single = all(_blocks_per_tile(axis, side) == 1 for axis, side in zip(axes, TILE))
    # Keys that are moved inwards have their place among the keys, but not their distance from the queries.
    return is_single and not (is_table and any(axis.border == "clamp" for axis in axes))


def whole_block(pattern: Pattern) -> tuple[Run, Run]:
    """A block that no border cuts, along both axes."""
    y, x = (
        Run(1, a.window, 1, Span(0, a.window, 0), Span(a.key_padding[0] - a.before, a.key_window, 0), False)
        for a in (pattern.y, pattern.x)
    )
    return y, x


def part_of_block(block: Tensor, y: Run, x: Run) -> Tensor:
    """The part of `[heads, qy, qx, ky, kx]` of a whole block that a tile is: a border may cut it."""
    for dim, run in ((1, y), (2, x)):
        block = block.narrow(dim, run.query.offset, run.query.length)
        block = block.narrow(dim + 2, run.key.offset, run.key.length)
    return block


def by_axes(bias: Tensor, pattern: Pattern) -> Tensor:
    """A dense bias `[heads, nq, nk]` as `[heads, qy, qx, ky, kx]`."""
    return bias.unflatten(2, (pattern.y.key_window, -1)).unflatten(1, (pattern.y.window, -1))
