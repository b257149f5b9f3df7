"""Local attention in one form for all sizes of a map: for programs exported with sizes that vary.

Every tile has as many queries and keys as the largest; indices gather them, and a mask hides those that are
not there. Nothing that Python decides depends on the size, so that a program traced at one size holds at all
others, and the expressions of sizes stay short. Where sizes are known, `attention_of_tiles` is faster: it
takes a fifth of the time for windows of 16, two thirds for neighborhoods of 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.kernels.dense.plain.attention import attend, attend_lse
from visionattn.kernels.local.pattern import Axis, Call, Pattern, Run, Segment
from visionattn.kernels.local.plain.bias import from_table
from visionattn.kernels.local.plain.tiles import TILE, blocks_at_any_length


class _UniformAxis(NamedTuple):
    """The tiles of an axis, those of all groups of a dilated one.

    Attributes:
        queries: pixels `[tiles, queries of a tile]`, some of them beyond the map.
        keys: pixels `[tiles, keys of a tile]`.
        back: for every pixel of the map its place in `queries`, `[length]`.
        absent: 0 for pairs that attend, -inf for the others, `[tiles, queries, keys]`.
        run: the queries and keys of any of them, counted from its first block.
    """

    queries: Tensor
    keys: Tensor
    back: Tensor
    absent: Tensor
    run: Run


def can_be_uniform(pattern: Pattern, bias: Tensor | None) -> bool:
    """Whether `uniform_attention` can compute a pattern: a dense bias must fit to every tile as it is."""
    if bias is None or pattern.is_table(bias):
        return True
    sides = zip((pattern.y, pattern.x), TILE)
    return all(axis.border != "clamp" and blocks_at_any_length(axis, side) == 1 for axis, side in sides)


def uniform_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, if asked for, the log-sum-exp; maps as in `op.py`."""
    pattern, bias, scale, return_lse = call
    y, x = (_uniform(axis, side, q) for axis, side in zip((pattern.y, pattern.x), TILE))
    queries = _gather(q, y.queries, x.queries, pattern)
    keys, values = (_gather(t, y.keys, x.keys, pattern) for t in (k, v))
    absent = y.absent[:, None, :, None, :, None] + x.absent[:, None, :, None]
    mask = absent.flatten(4).flatten(2, 3)[:, :, None]
    if bias is not None:
        if pattern.is_table(bias):
            bias = from_table(bias, pattern, y.run, x.run).flatten(3).flatten(1, 2)
        mask = mask + bias
    mask = mask.expand(q.shape[0], *mask.shape).flatten(0, 2)
    if not return_lse:
        return _scatter(attend(queries, keys, values, mask, scale), q, y, x), None
    out, lse = attend_lse(queries, keys, values, mask, scale)
    return _scatter(out, q, y, x), _scatter(lse[..., None], q, y, x).squeeze(-1)


def _uniform(axis: Axis, side: int, like: Tensor) -> _UniformAxis:
    blocks, low, high = blocks_at_any_length(axis, side), 0, 0
    size = blocks * axis.window
    if axis.border == "clamp":
        # The first and the last blocks see keys farther inside than the others do.
        low, high = axis.key_window - 1 - axis.before, max(axis.before + axis.window - size, 0)
    num_keys = size - axis.window + axis.key_window + low + high
    longest = (axis.length + axis.dilation - 1) // axis.dilation
    count = (longest - axis.first_block + size - 1) // size

    def line(length: int) -> Tensor:
        return torch.arange(length, device=like.device)

    def pixels(start: int, length: int) -> Tensor:
        steps = (size * line(count) + start)[:, None] + line(length)
        return (steps * axis.dilation + line(axis.dilation)[:, None, None]).flatten(0, 1)

    begin = axis.first_block - axis.before - low
    queries, keys = pixels(axis.first_block, size), pixels(begin, num_keys)
    visible = axis.visibility(queries, keys)[0]
    if axis.border != "zero":
        visible = visible & _inside(keys, axis)[:, None]
    places = line(axis.length)
    back = places % axis.dilation * (count * size) + places // axis.dilation - axis.first_block
    key = Segment(begin - axis.first_block + axis.key_padding[0], num_keys, 0)
    absent = torch.where(visible, 0.0, float("-inf")).to(like.dtype)
    return _UniformAxis(queries, keys, back, absent, Run(1, size, blocks, Segment(0, size, 0), key, True))


def _inside(pixels: Tensor, axis: Axis) -> Tensor:
    return (pixels >= 0) & (pixels < axis.length)


def _gather(maps: Tensor, rows: Tensor, columns: Tensor, pattern: Pattern) -> Tensor:
    """Copy tiles `[B * tiles, heads, pixels, d]` of `[B, H, W, heads, d]`; zero keys lie beyond the map."""
    for dim, pixels, axis in ((1, rows, pattern.y), (3, columns, pattern.x)):
        maps = maps.index_select(dim, pixels.flatten().clamp(0, axis.length - 1))
        maps = maps.unflatten(dim, (-1, pixels.shape[1]))
        if axis.border == "zero":
            inside = _inside(pixels, axis).to(maps.dtype)
            maps = maps * inside[(..., *(None,) * (maps.dim() - dim - 2))]
    return maps.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def _scatter(tiles: Tensor, like: Tensor, y: _UniformAxis, x: _UniformAxis) -> Tensor:
    """Undo `_gather` for the queries: `[B, H, W, heads, d]`."""
    out = tiles.unflatten(2, (y.run.query.length, x.run.query.length))
    out = out.unflatten(0, (like.shape[0], y.queries.shape[0], x.queries.shape[0]))
    out = out.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 2).index_select(1, y.back)
    return out.flatten(2, 3).index_select(2, x.back)
