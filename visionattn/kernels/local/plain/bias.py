"""The bias of tiles, from a relative table or a dense block, and the way of a gradient back to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Axis, Pattern, Run, Segment
from visionattn.kernels.local.plain.chunks import Columns
from visionattn.kernels.local.plain.tiles import TILE, blocks_per_tile
from visionattn.kernels.local.reference import bias_of_pairs


def run_biases(
    bias: Tensor | None,
    pattern: Pattern,
    rows: Sequence[Run],
    columns: Sequence[Run],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    """Write out, for every pair of runs, the bias `[heads | 1, nq, nk]` of a tile and -inf for absent keys.

    None where logits stay as they are.
    """
    is_table = bias is not None and pattern.is_table(bias)
    block = None
    if bias is not None and has_whole_block(pattern, is_table):
        block = from_table(bias, pattern, *whole_block(pattern)) if is_table else pattern.by_axes(bias)
    seen: list[list[tuple[Tensor, ...]]] = [[], []]
    # Blocks need neither a mask nor a gather, so nothing is written out for windows.
    is_gathered = bias is not None and block is None and not is_table
    if is_gathered or any(run.masked for run in (*rows, *columns)):
        for pairs, axis, runs in ((seen[0], pattern.y, rows), (seen[1], pattern.x, columns)):
            pairs += [axis.visibility(*run_pixels(run, axis, device)) for run in runs]
    absent = [[torch.where(visible, 0.0, float("-inf")).to(dtype) for visible, *_ in pairs] for pairs in seen]
    biases = []
    for (i, y), (j, x) in product(enumerate(rows), enumerate(columns)):
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
    """Number the queries and keys of the first tile of a run, as `Axis.visibility` counts them."""
    key = run.key.start - axis.key_padding[0]
    return (
        torch.arange(run.query.start, run.query.start + run.query.length, device=device),
        torch.arange(key, key + run.key.length, device=device),
    )


def from_table(table: Tensor, pattern: Pattern, y: Run, x: Run) -> Tensor:
    """Write out the bias `[heads, qy, qx, ky, kx]` of a tile; the table slides over the pairs, no gather."""
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
    """Add `[heads, qy, qx, ky, kx]` to the entries that `from_table` reads for it."""
    (top, rows), (left, columns) = _entries(pattern.y, y), _entries(pattern.x, x)
    sums = _along_diagonals(tile.movedim(2, 0), columns)
    sums = _along_diagonals(sums.permute(1, 0, 3, 2), rows).mT
    first = [max(top, 0), max(left, 0)]
    last = [min(start + n, size) for start, n, size in zip((top, left), (rows, columns), table.shape[1:])]
    inside = sums[:, first[0] - top : last[0] - top, first[1] - left : last[1] - left]
    table[:, first[0] : last[0], first[1] : last[1]].add_(inside)


def _entries(axis: Axis, run: Run) -> tuple[int, int]:
    """Find the first entry of a table that a tile reads along an axis, and how many it reads."""
    last_query = run.query.start + run.query.length - 1
    first = run.key.start - axis.key_padding[0] - last_query + axis.reach
    return first, run.query.length + run.key.length - 1


def _along_diagonals(pairs: Tensor, length: int) -> Tensor:
    """Sum `[queries, ..., keys]` over pairs of equal distance, the least first: `[..., length]`."""
    sums = pairs.new_zeros((*pairs.shape[1:-1], length))
    for query, keys in enumerate(pairs):
        sums.narrow(-1, len(pairs) - 1 - query, pairs.shape[-1]).add_(keys)
    return sums


def has_whole_block(pattern: Pattern, is_table: bool) -> bool:
    """Whether the bias of one whole block holds that of every tile of an undilated pattern."""
    axes = pattern.y, pattern.x
    is_single = all(blocks_per_tile(axis, side) == 1 for axis, side in zip(axes, TILE))
    # Keys that are moved inwards keep their places among the keys, but not their distances from the queries.
    return is_single and not (is_table and any(axis.border == "clamp" for axis in axes))


def whole_block(pattern: Pattern) -> tuple[Run, Run]:
    """Describe a block that no border cuts, along both axes."""
    y, x = (
        Run(1, axis.window, 1, Segment(0, axis.window, 0), Segment(first, axis.key_window, 0), False)
        for axis in (pattern.y, pattern.x)
        for first in (axis.key_padding[0] - axis.before,)
    )
    return y, x


def part_of_block(block: Tensor, y: Run, x: Run) -> Tensor:
    """Take the part of a whole block `[heads, qy, qx, ky, kx]` that a tile is, where a border may cut it."""
    for dim, run in ((1, y), (2, x)):
        block = block.narrow(dim, run.query.offset, run.query.length)
        block = block.narrow(dim + 2, run.key.offset, run.key.length)
    return block


def chunk_biases(
    bias: Tensor | None, pattern: Pattern, rows: Sequence[Run], columns: Columns, q: Tensor
) -> list[Tensor | None]:
    """Write out `run_biases` for chunks of `q`: for each run of rows `[1, heads | 1, nq, nk]` or None.

    If the columns come from several runs, `[columns, heads, nq, nk]`.
    """
    setting = pattern, tuple(rows), tuple(columns.runs), q.shape[3], q.dtype, q.device
    # Tensors of a tracer must not outlive it.
    return _masks(*setting) if bias is None and type(q) is Tensor else _chunk_biases(bias, *setting)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _masks(*setting: Any) -> list[Tensor | None]:
    """Keep the masks of maps of one size, which are a tenth of the work of a small map."""
    return _chunk_biases(None, *setting)


def _chunk_biases(
    bias: Tensor | None,
    pattern: Pattern,
    rows: tuple[Run, ...],
    columns: tuple[Run, ...],
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    biases, width = run_biases(bias, pattern, rows, columns, dtype, device), len(columns)
    if width == 1:
        return [None if x is None else x[None] for x in biases]
    # Only columns under a mask are computed together with others.
    parts = [
        x.expand(run.count, heads, -1, -1) for x, run in zip(biases, columns * len(rows)) if x is not None
    ]
    return [torch.cat(parts[i : i + width]) for i in range(0, len(parts), width)]
