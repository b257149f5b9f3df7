"""The geometry of local attention: which keys a query sees, axis by axis.

Queries lie in blocks; all queries of a block see the same run of keys. Windows, shifted windows and
overlapping windows (HAT, halo) differ only in where the blocks begin, how far the keys reach beyond their
block, and what happens to keys beyond the border of the map. A 2-D pattern is the product of its two axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Border = Literal["zero", "mask", "clamp"]


class Span(NamedTuple):
    """A stretch of one axis; `offset` is the place of its first pixel inside a whole block or key window."""

    start: int
    length: int
    offset: int


class Run(NamedTuple):
    """`count` blocks of equal geometry, one window apart: the queries and keys of the first of them.

    Key coordinates count the zero keys that `Axis.key_padding` adds; a border may cut a block or its keys.
    """

    count: int
    query: Span
    key: Span


@dataclass(frozen=True)
class Axis:
    """One axis of a local pattern.

    Attributes:
        length: size of the map along this axis.
        window: queries in a block.
        shift: where a block begins; blocks begin at `shift + n * window` for all integers n.
        overlap: keys seen beyond the block on either side.
        border: what keys beyond the map are: zero vectors that stay in the softmax (`"zero"`), absent
            (`"mask"`), or replaced by moving the run of keys inwards (`"clamp"`).
    """

    length: int
    window: int
    shift: int = 0
    overlap: int = 0
    border: Border = "mask"

    @property
    def key_window(self) -> int:
        """Keys that a block sees when no border is near."""
        return self.window + 2 * self.overlap

    @property
    def reach(self) -> int:
        """The largest |key - query|: a bias table has `2 * reach + 1` entries along this axis."""
        return self.window - 1 + self.overlap * (2 if self.border == "clamp" else 1)

    @property
    def first_block(self) -> int:
        """Where the first block begins: at 0, or before the map when shifted."""
        return self.shift - self.window if self.shift else 0

    @property
    def num_blocks(self) -> int:
        """Blocks that hold at least one query."""
        return -(-(self.length - self.first_block) // self.window)

    @property
    def key_padding(self) -> tuple[int, int]:
        """Zero keys that lie before and behind the map."""
        if self.border != "zero":
            return 0, 0
        end = self.first_block + self.num_blocks * self.window + self.overlap
        return self.overlap - self.first_block, end - self.length

    def run(self, block: int, count: int = 1) -> Run:
        """The geometry of `count` equal blocks from number `block` on."""
        begin = self.first_block + block * self.window
        query_start, query_stop = max(begin, 0), min(begin + self.window, self.length)
        key_begin = begin - self.overlap
        key_start, key_stop = key_begin, key_begin + self.key_window
        if self.border == "clamp":
            key_start = min(max(key_begin, 0), self.length - self.key_window)
            key_begin, key_stop = key_start, key_start + self.key_window
        elif self.border == "mask":
            key_start, key_stop = max(key_start, 0), min(key_stop, self.length)
        return Run(
            count,
            Span(query_start, query_stop - query_start, query_start - begin),
            Span(key_start + self.key_padding[0], key_stop - key_start, key_start - key_begin),
        )

    def runs(self) -> list[Run]:
        """All blocks in order, those that no border cuts gathered into one run."""
        overlap = 0 if self.border == "zero" else self.overlap
        whole_from = max(-(-(overlap - self.first_block) // self.window), 0)
        whole_to = max((self.length - overlap - self.first_block) // self.window, whole_from)
        if whole_from >= self.num_blocks:
            return [self.run(block) for block in range(self.num_blocks)]
        middle = [self.run(whole_from, whole_to - whole_from)] if whole_to > whole_from else []
        head = [self.run(block) for block in range(whole_from)]
        return head + middle + [self.run(whole_to + i) for i in range(self.num_blocks - whole_to)]

    def visibility(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pattern written out for every pair: the form in which the reference uses it.

        Returns:
            `visible` `[length, keys]`, whether the query sees the key (zero keys of `key_padding` included);
            `offset` `[length, keys]`, key - query; `query_position` `[length]` and `key_position`
            `[length, keys]`, the places inside the block (meaningless where not visible).
        """
        before, behind = self.key_padding
        query = torch.arange(self.length, device=device)
        key = torch.arange(-before, self.length + behind, device=device)
        begin = (query - self.shift).div(self.window, rounding_mode="floor") * self.window + self.shift
        key_begin = begin - self.overlap
        if self.border == "clamp":
            key_begin = key_begin.clamp(0, self.length - self.key_window)
        key_position = key - key_begin[:, None]
        visible = (key_position >= 0) & (key_position < self.key_window)
        return visible, key - query[:, None], query - begin, key_position


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

    def flops(self, heads: int, head_dim: int) -> int:
        """Multiply-adds of both products, counted as two operations each, for one sample."""
        pairs_y, pairs_x = (
            sum(run.count * run.query.length * run.key.length for run in axis.runs())
            for axis in (self.y, self.x)
        )
        return 4 * heads * head_dim * pairs_y * pairs_x
