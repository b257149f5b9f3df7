"""Cutting maps into tiles and putting them together again, in operations that PyTorch differentiates.

No roll and no gather: the queries of a tile and its keys are rectangles of the map, strided views of it, and
the tiles that a border cuts are smaller rectangles. So a shifted window costs less than an unshifted one,
instead of a mask and two copies more. Blocks of few queries (neighborhoods) are computed several at a time
under a mask that is the same for all tiles but those at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Axis, Pattern, Run, Segment

# A tile of several blocks has so many rows and columns of queries, and an axis no longer than `_ONE_TILE` is
# one tile: enough for an efficient product, and the waste grows with the tile. Measured on 14x14 to 56x56.
TILE = (4, 8)
_ONE_TILE = 16
# Smaller blocks than this are joined into tiles if they share keys; from here on a block by itself is faster.
_MIN_BLOCK = 4


def tile_runs(pattern: Pattern) -> tuple[list[Run], list[Run]]:
    """Cut both axes of an undilated pattern into tiles."""
    y, x = (axis.runs(blocks_per_tile(axis, side)) for axis, side in zip((pattern.y, pattern.x), TILE))
    return y, x


def blocks_per_tile(axis: Axis, side: int) -> int:
    """Count the blocks of a tile of about `side` queries: all of a short axis if blocks share keys."""
    is_whole = not _stands_alone(axis) and axis.length <= _ONE_TILE
    return axis.num_blocks if is_whole else blocks_at_any_length(axis, side)


def blocks_at_any_length(axis: Axis, side: int) -> int:
    """Count the blocks of a tile of about `side` queries without asking how long the axis is."""
    return 1 if _stands_alone(axis) else max(side // axis.window, 1)


def _stands_alone(axis: Axis) -> bool:
    return axis.window >= _MIN_BLOCK or axis.key_window == axis.window


def pad_keys(x: Tensor, pattern: Pattern) -> Tensor:
    """Lay the zero keys of the pattern around keys `[B, H, W, heads, d]`."""
    return F.pad(x, pattern.padding) if any(pattern.padding) else x


def rectangles(
    maps: Tensor, rows: Sequence[Run], columns: Sequence[Run], side: Literal["query", "key"]
) -> list[Tensor]:
    """Cut `[B, H, W, heads, d]` into queries or keys `[B * tiles, heads, pixels, d]` of all pairs of runs."""
    parts_y, parts_x = ([(run, getattr(run, side)) for run in runs] for runs in (rows, columns))
    return [
        _stacked(piece, y, x)
        for row, y in zip(_cut(maps, 1, parts_y), parts_y)
        for piece, x in zip(_cut(row, 2, parts_x), parts_x)
    ]


def _cut(x: Tensor, dim: int, parts: Sequence[tuple[Run, Segment]]) -> Sequence[Tensor]:
    """Take, for each run, the pixels along `dim` from its first to its last tile."""
    lengths = [(run.count - 1) * run.step + segment.length for run, segment in parts]
    starts = [segment.start for _, segment in parts]
    if [*starts, x.shape[dim]] == [0, *(start + length for start, length in zip(starts, lengths))]:
        # The gradient of a split is one concatenation, that of every slice a whole map of zeros.
        return x.split(lengths, dim)
    return [x.narrow(dim, start, length) for start, length in zip(starts, lengths)]


def _stacked(maps: Tensor, y: tuple[Run, Segment], x: tuple[Run, Segment]) -> Tensor:
    for dim, (run, segment) in ((1, y), (3, x)):
        if run.count == 1 or segment.length == run.step:
            maps = maps.unflatten(dim, (run.count, segment.length))
        else:
            maps = _Slide.apply(maps, dim, segment.length, run.step)
    return maps.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


class _Slide(torch.autograd.Function):
    """Overlapping segments of an axis as two axes, `x.unfold` with its new axis behind `dim`.

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


def laid_out(out: Tensor, batch: int, y: Run, x: Run) -> Tensor:
    """Undo `rectangles` for the queries of one pair of runs: `[B, rows, columns, heads, d]`."""
    out = out.transpose(1, 2).unflatten(1, (y.query.length, x.query.length))
    out = out.unflatten(0, (batch, y.count, x.count)).transpose(2, 3)
    return out.flatten(1, 2).flatten(2, 3)


def whole_maps(parts: list[tuple[Tensor, ...]], width: int) -> tuple[Tensor, ...]:
    """Put whole maps together from rectangles in row-major order, `width` in a row."""
    return tuple(
        concatenated([concatenated(list(column[i : i + width]), 2) for i in range(0, len(column), width)], 1)
        for column in zip(*parts)
    )


def concatenated(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate without copying a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
