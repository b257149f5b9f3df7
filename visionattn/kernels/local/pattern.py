"""The geometry of local attention: which keys a query sees, axis by axis.

Windows, shifted windows, overlapping windows (HAT, halo), grids and neighborhoods differ only in where their
blocks begin, how many keys a block sees, what happens at the border of the map, and whether the axis is
dilated into interleaved groups. Neighborhood attention with a stride is blocks of `stride` queries; without
one, blocks of a single query. A 2-D pattern is the product of its two axes.

The words of this folder:

- block: adjacent queries that see the same keys. Swin's window of 7 is a block of 7 queries on each axis.
- key window: the keys that a block sees. HAT's block of 16 queries sees 24 keys, 4 more on each side.
- group: every `dilation`-th pixel of a dilated axis, from a residue on; it is an undilated axis for itself.
- tile: queries that are computed at once, with all keys that any of them sees: a block, several, or a part of
  one. On a map it is a rectangle of queries with its rectangle of keys.
- run: tiles of equal geometry along one axis, one block after another.
- segment: adjacent pixels of one axis, such as the queries or the keys of a tile.
- chunk (`plain/`): tiles of a run of rows and of columns that stay in a CPU's cache together.
- own and streamed tile (`fused/`): a program owns the one, and reads the others that belong to it in turn.
- cell (`fused/`): the queries of whole blocks that own tiles are cut from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Border = Literal["zero", "mask", "clamp"]


class Segment(NamedTuple):
    """Adjacent pixels; `offset` is the place of the first of them inside a whole block or key window."""

    start: int
    length: int
    offset: int


class Run(NamedTuple):
    """`count` tiles of equal geometry, `step` pixels apart: the queries and the keys of the first of them.

    Key coordinates count the zero keys that `Axis.key_padding` adds; a border may cut a tile or its keys.
    `blocks` is the number of blocks in a tile; `masked` says that not every query of a tile sees all its
    keys.
    """

    count: int
    step: int
    blocks: int
    query: Segment
    key: Segment
    masked: bool


class Group(NamedTuple):
    """`count` interleaved groups of a dilated axis from residue `first` on; each of them is `axis`."""

    first: int
    count: int
    axis: Axis


@dataclass(frozen=True)
class Axis:
    """One axis of a local pattern; every number but `length` counts steps of `dilation` pixels.

    Attributes:
        length: size of the map along this axis, in pixels.
        window: queries in a block.
        key_window: keys that a block sees when no border is near.
        before: how many of these keys lie before the first query of the block.
        shift: where a block begins; blocks begin at `shift + n * window` for all integers n.
        border: what keys beyond the map are: zero vectors that stay in the softmax (`"zero"`, undilated axes
            only), absent (`"mask"`), or replaced by moving the key window inwards (`"clamp"`).
        dilation: pixels from one position of a group to the next; pixels attend inside their group.
        is_causal: whether keys behind the query are absent.
    """

    length: int
    window: int
    key_window: int
    before: int = 0
    shift: int = 0
    border: Border = "mask"
    dilation: int = 1
    is_causal: bool = False

    @property
    def reach(self) -> int:
        """The largest |key - query|: a bias table has `2 * reach + 1` entries along this axis."""
        if self.border == "clamp":
            return self.key_window - 1
        return max(self.before + self.window, self.key_window - self.before) - 1

    @property
    def first_block(self) -> int:
        """Where the first block begins: at 0, or before the map when shifted."""
        return self.shift - self.window if self.shift else 0

    @property
    def num_blocks(self) -> int:
        """Blocks that hold at least one query, on an undilated axis."""
        return -(-(self.length - self.first_block) // self.window)

    @property
    def key_padding(self) -> tuple[int, int]:
        """Zero keys that lie before and behind the map."""
        if self.border != "zero":
            return 0, 0
        end = self.first_block + (self.num_blocks - 1) * self.window - self.before + self.key_window
        return self.before - self.first_block, end - self.length

    def groups(self) -> list[Group]:
        """The groups that dilation makes of the axis, those of equal length together."""
        if self.dilation == 1:
            return [Group(0, 1, self)]
        whole, longer = self.length // self.dilation, self.length % self.dilation
        sizes = [(0, longer, whole + 1), (longer, self.dilation - longer, whole)]
        return [
            Group(first, count, replace(self, length=length, dilation=1))
            for first, count, length in sizes
            if count > 0
        ]

    def block_keys(self, block: int) -> Segment:
        """The keys that a block of an undilated axis sees, causality aside."""
        begin = self.first_block + block * self.window - self.before
        start, stop = begin, begin + self.key_window
        if self.border == "clamp":
            begin = start = min(max(begin, 0), self.length - self.key_window)
            stop = start + self.key_window
        elif self.border == "mask":
            start, stop = max(start, 0), min(stop, self.length)
        return Segment(start + self.key_padding[0], stop - start, start - begin)

    def run(self, tile: int, blocks: int = 1, count: int = 1) -> Run:
        """The geometry of `count` equal tiles of `blocks` blocks from number `tile` on."""
        first, last = tile * blocks, min(tile * blocks + blocks, self.num_blocks) - 1
        begin = self.first_block + first * self.window
        start, stop = max(begin, 0), min(begin + blocks * self.window, self.length)
        keys, last_keys = self.block_keys(first), self.block_keys(last)
        key_stop = stop if self.is_causal else last_keys.start + last_keys.length
        return Run(
            count,
            blocks * self.window,
            blocks,
            Segment(start, stop - start, start - begin),
            Segment(keys.start, key_stop - keys.start, keys.offset),
            self.is_causal or keys != last_keys,
        )

    def runs(self, blocks: int = 1) -> list[Run]:
        """All tiles of `blocks` blocks in order, those that no border cuts gathered into one run."""
        size, tiles = blocks * self.window, -(-self.num_blocks // blocks)
        before = after = 0
        if self.border != "zero":
            before, after = self.before, self.key_window - self.window - self.before
        whole_from = max(-(-(before - self.first_block) // size), 0)
        whole_to = max((self.length - after - self.first_block) // size, whole_from)
        if whole_from >= tiles:
            return [self.run(tile, blocks) for tile in range(tiles)]
        middle = [self.run(whole_from, blocks, whole_to - whole_from)] if whole_to > whole_from else []
        first, last = range(whole_from), range(whole_to, tiles)
        return [*(self.run(i, blocks) for i in first), *middle, *(self.run(i, blocks) for i in last)]

    def visibility(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pattern written out for every pair of the given queries and keys.

        Args:
            query: pixels `[..., nq]`.
            key: pixels `[..., nk]`, negative or beyond the map for the zero keys of `key_padding`.

        Returns:
            `visible` `[..., nq, nk]`, whether the query sees the key; `offset` `[..., nq, nk]`, key - query
            in steps; `query_position` `[..., nq]` and `key_position` `[..., nq, nk]`, the places inside the
            block and its key window. All but the first are meaningless where not visible.
        """
        residue, step, key = query % self.dilation, query // self.dilation, key[..., None, :]
        key_step, begin = key // self.dilation, self._block_begin(step)
        key_begin = self._key_begin(step, residue)
        key_position = key_step - key_begin[..., None]
        visible = (key_position >= 0) & (key_position < self.key_window)
        visible = visible & (key % self.dilation == residue[..., None])
        if self.is_causal:
            visible = visible & (key_step <= step[..., None])
        return visible, key_step - step[..., None], step - begin, key_position

    def keys(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The key window of every query written out, of an axis whose border is `"clamp"`.

        Args:
            query: pixels `[nq]`.

        Returns:
            The pixels `[nq, key_window]` of its keys, and whether the query sees them.
        """
        residue, step = query % self.dilation, query // self.dilation
        window = torch.arange(self.key_window, device=query.device)
        key_step = self._key_begin(step, residue)[:, None] + window
        seen = key_step <= step[:, None] if self.is_causal else torch.ones_like(key_step, dtype=torch.bool)
        return key_step * self.dilation + residue[:, None], seen

    def _block_begin(self, step: Tensor) -> Tensor:
        """Where the block of a query begins, in steps of its group."""
        return (step - self.shift).div(self.window, rounding_mode="floor") * self.window + self.shift

    def _key_begin(self, step: Tensor, residue: Tensor) -> Tensor:
        """Where the key window of a query begins, in steps of its group."""
        begin = self._block_begin(step) - self.before
        if self.border == "clamp":
            group_length = (self.length - 1 - residue) // self.dilation + 1
            begin = torch.minimum(begin.clamp(min=0), group_length - self.key_window)
        return begin

    def key_ranges(self) -> list[tuple[int, int]]:
        """For every query of an undilated axis, the first key that it sees and the one behind the last.

        Coordinates as in `Run`.
        """
        ranges = []
        for query in range(self.length):
            keys = self.block_keys((query - self.first_block) // self.window)
            ranges.append((keys.start, query + 1 if self.is_causal else keys.start + keys.length))
        return ranges

    def query_ranges(self) -> list[tuple[int, int]]:
        """For every key of an undilated axis, the first query that sees it and the one behind the last.

        These queries are contiguous in every pattern, so that gradients of keys need no scattered additions.
        """
        before, behind = self.key_padding
        ranges = [(self.length, 0)] * (before + self.length + behind)
        for query, (start, stop) in enumerate(self.key_ranges()):
            for key in range(start, stop):
                ranges[key] = min(ranges[key][0], query), query + 1
        return ranges


def window_axis(length: int, window: int, shift: int = 0) -> Axis:
    """Disjoint windows, cut at the borders."""
    return Axis(length, window, window, shift=shift)


def overlapping_axis(length: int, window: int, overlap: int, border: Border) -> Axis:
    """Windows of queries that see `overlap` keys more on either side."""
    return Axis(length, window, window + 2 * overlap, overlap, border=border)


def neighborhood_axis(length: int, kernel: int, stride: int, dilation: int, is_causal: bool) -> Axis:
    """Generalised neighborhood attention: the `kernel` keys nearest to each block of `stride` queries.

    The block's leader, its middle or when causal its last query, stands in the middle of the keys (causal: at
    their end); a block that the map cuts has the same keys as the clamped whole one.
    """
    before = kernel - stride if is_causal else kernel // 2 - stride // 2
    return Axis(length, stride, kernel, before, 0, "clamp", dilation, is_causal)


def grid_axis(length: int, size: int) -> Axis:
    """Groups of at most `size` pixels, spread evenly over the axis, each seeing all of itself."""
    return Axis(length, size, size, dilation=-(-length // size))


@dataclass(frozen=True)
class Pattern:
    """A 2-D local pattern: the product of its two axes."""

    y: Axis
    x: Axis

    @property
    def table_shape(self) -> tuple[int, int]:
        """Rows and columns of a relative bias table, entry (reach, reach) for key = query."""
        return 2 * self.y.reach + 1, 2 * self.x.reach + 1

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Queries and keys of a whole block: the shape of a dense bias."""
        return self.y.window * self.x.window, self.y.key_window * self.x.key_window

    @property
    def padding(self) -> tuple[int, ...]:
        """The zero keys around `[B, H, W, heads, d]`, as `torch.nn.functional.pad` takes them."""
        return (0, 0, 0, 0, *self.x.key_padding, *self.y.key_padding)

    def is_table(self, bias: Tensor) -> bool:
        """Whether a bias is a relative table; otherwise it is dense."""
        return bias.shape[1:] == self.table_shape

    def by_axes(self, bias: Tensor) -> Tensor:
        """View a dense bias `[heads, nq, nk]` as `[heads, qy, qx, ky, kx]`."""
        return bias.unflatten(2, (self.y.key_window, -1)).unflatten(1, (self.y.window, -1))

    def flops(self, heads: int, head_dim: int) -> int:
        """Operations of both products for one sample; a multiplication and its addition are two."""
        pairs_y, pairs_x = (
            sum(
                group.count * sum(stop - start for start, stop in group.axis.key_ranges())
                for group in axis.groups()
            )
            for axis in (self.y, self.x)
        )
        return 4 * heads * head_dim * pairs_y * pairs_x


class Call(NamedTuple):
    """All that an implementation of local attention takes besides queries, keys and values.

    Attributes:
        pattern: which keys a query sees.
        bias: added to the scaled logits, a table or dense as in `op.py`, or None.
        scale: multiplies q·k.
        return_lse: whether the log-sum-exp `[B, H, W, heads]` is wanted besides the output; else it is None.
    """

    pattern: Pattern
    bias: Tensor | None
    scale: float
    return_lse: bool
