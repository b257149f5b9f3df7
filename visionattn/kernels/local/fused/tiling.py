"""How the fused kernels cut a local pattern into tiles, decided on the host from the geometry alone.

A program *owns* a tile of queries, or, for the gradients of keys, of keys. It *streams* the rectangle of all
pixels that its own see, or are seen by, in tiles of *others* that begin at the corner of the rectangle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

from visionattn.kernels.local.pattern import Axis, Border, Pattern

Owner = Literal["query", "key"]
# The work of a pair of tiles is taken as (own + 64) * (others + 32) instead of own * others: a streamed tile
# has to be read however few pixels use it (and Hopper's matrix instructions compute with 64), and every step
# has its addresses. Otherwise tiny tiles would always win, because they waste the fewest scores.
_PER_OTHER, _PER_OWN = 64, 32


class TiledAxis(NamedTuple):
    """An axis and its own tiles, for a kernel; lengths and places in steps of `dilation` pixels.

    The first nine are those of `Axis`; of these `length` alone counts pixels. A `cell`, one block or several,
    is cut into `parts` tiles of at most `tile` pixels. The first cell of a group begins at `first`, and the
    group has `tiles` tiles.
    """

    length: int
    dilation: int
    window: int
    key_window: int
    before: int
    shift: int
    border: Border
    is_causal: bool
    reach: int
    first: int
    tile: int
    cell: int
    parts: int
    tiles: int


class Extent(NamedTuple):
    """The pixels that one tile streams along one axis: `others`, the inner `inner` of which all its own see.

    The first of them lies `start` behind the beginning of the tile's cell; `closed` says that they are the
    tile's own.
    """

    others: int
    inner: int
    start: int
    closed: bool


# The mask that the scores of two tiles need: none; one for others beyond the rectangle; one for each pair of
# pixels; that of "pairs" for some tiles only, because in others all pairs of pixels see each other.
Mask = Literal["none", "rectangle", "pairs", "some"]


@dataclass(frozen=True)
class Tiling:
    """The tiles of both axes, `own` and `others` at a time, the others in columns of `strip` pixels.

    Attributes:
        y: tiles of the rows.
        x: tiles of the columns.
        own: slots of an own tile, a power of 2 of at least 16.
        others: slots of a streamed tile, likewise; `others // strip` rows.
        strip: width of a streamed tile.
        mask: which masks the scores need.
        single: whether everything that any tile streams fits into one streamed tile.
        closed: whether all tiles stream their own pixels, so that nothing crosses from one to another.
        start: the first row and column that any tile of a cell streams, from the beginning of the cell.
        stop: the row and the column behind the last, likewise.
    """

    y: TiledAxis
    x: TiledAxis
    own: int
    others: int
    strip: int
    mask: Mask
    single: bool
    closed: bool
    start: tuple[int, int]
    stop: tuple[int, int]

    @property
    def programs(self) -> int:
        """Own tiles of one head of one image."""
        return self.y.tiles * self.y.dilation * self.x.tiles * self.x.dilation

    @property
    def parts(self) -> int:
        """Own tiles of a cell of both axes."""
        return self.y.parts * self.x.parts


@lru_cache(maxsize=4096)
def tiling(pattern: Pattern, owner: Owner, most_own: int, most_others: int, in_block: bool = False) -> Tiling:
    """The tiling with the least work among those of at most these slots.

    Args:
        pattern: the geometry.
        owner: whose tiles a program owns.
        most_own: largest `own`, a power of 2.
        most_others: largest `others`, a power of 2.
        in_block: whether an own tile must lie inside one block of the pattern.
    """
    sides_y, sides_x = (_sides(axis, most_own, in_block) for axis in (pattern.y, pattern.x))
    sizes = [(own, others) for own in _powers(16, most_own) for others in _powers(16, most_others)]
    best: tuple[float, tuple[int, ...]] | None = None
    for (own, others), tile_y, tile_x in product(sizes, sides_y, sides_x):
        if tile_y * tile_x > own:
            continue
        for strip in reversed(_powers(1, others)):
            visits = _visits(pattern.y, owner, tile_y, others // strip)
            visits *= _visits(pattern.x, owner, tile_x, strip)
            cost = visits * (own + _PER_OTHER) * (others + _PER_OWN)
            if best is None or cost < best[0]:
                best = cost, (own, others, tile_y, tile_x, strip)
    assert best is not None  # a tile of one pixel always fits
    own, others, tile_y, tile_x, strip = best[1]
    cut = [(pattern.y, tile_y, others // strip), (pattern.x, tile_x, strip)]
    extents = [_extents(axis, owner, tile) for axis, tile, _ in cut]
    (start_y, stop_y), (start_x, stop_x) = (
        (min(e.start for e in counts), max(e.start + e.others for e in counts)) for counts in extents
    )
    return Tiling(
        _tiled(pattern.y, tile_y),
        _tiled(pattern.x, tile_x),
        own,
        others,
        strip,
        _mask([(counts, size) for counts, (_, _, size) in zip(extents, cut)]),
        single=all(e.others <= size for counts, (_, _, size) in zip(extents, cut) for e in counts),
        closed=all(e.closed for counts in extents for e in counts),
        start=(start_y, start_x),
        stop=(stop_y, stop_x),
    )


def _powers(low: int, high: int) -> list[int]:
    return [1 << n for n in range(low.bit_length() - 1, high.bit_length())]


def _sides(axis: Axis, most: int, in_block: bool) -> list[int]:
    """List sensible sides of an own tile: parts of a block, a block, several blocks."""
    longest = axis.groups()[0].axis.length
    sides = [n for n in _powers(1, most) if n < axis.window]
    sides += [axis.window * n for n in (1, *([] if in_block else _powers(2, most)))]
    needed = [side for side in sides if side < longest]
    return [side for side in sides[: len(needed) + 1] if side <= most]


def _tiled(axis: Axis, tile: int) -> TiledAxis:
    longest = axis.groups()[0].axis
    pixels, cell = longest.length - longest.first_block, max(tile, axis.window)
    parts = -(-min(cell, pixels) // tile)
    return TiledAxis(
        axis.length,
        axis.dilation,
        axis.window,
        axis.key_window,
        axis.before,
        axis.shift,
        axis.border,
        axis.is_causal,
        axis.reach,
        longest.first_block,
        tile,
        cell,
        parts,
        -(-pixels // cell) * parts,
    )


@lru_cache(maxsize=4096)
def _extents(axis: Axis, owner: Owner, tile: int) -> Counter[Extent]:
    """Count the tiles of an axis that stream equal extents."""
    extents: Counter[Extent] = Counter()
    for group in axis.groups():
        ranges = _ranges(group.axis, owner)
        for begin, start, stop in _own_tiles(axis, group.axis.length, tile):
            low, high = ranges[start][0], ranges[stop - 1][1]
            inner = max(ranges[start][1] - ranges[stop - 1][0], 0)
            closed = (low, high) == (start, stop)
            extents[Extent(high - low, inner, low - begin, closed)] += group.count
    return extents


def _own_tiles(axis: Axis, length: int, tile: int) -> Iterator[tuple[int, int, int]]:
    """Yield the beginning of its cell, the first pixel and the one behind the last for each tile."""
    tiled = _tiled(axis, tile)
    for number in range(tiled.tiles):
        begin = tiled.first + number // tiled.parts * tiled.cell
        first = begin + number % tiled.parts * tile
        start, stop = max(first, 0), min(first + tile, begin + tiled.cell, length)
        if start < stop:
            yield begin, start, stop


@lru_cache(maxsize=1024)
def _ranges(axis: Axis, owner: Owner) -> list[tuple[int, int]]:
    """List, for every pixel of an undilated axis, the range that it streams; zero keys are not counted."""
    before, _ = axis.key_padding
    if owner == "key":
        return axis.query_ranges()[before : before + axis.length]
    return [(start - before, stop - before) for start, stop in axis.key_ranges()]


@lru_cache(maxsize=16384)
def _visits(axis: Axis, owner: Owner, tile: int, others: int) -> int:
    """Count the pairs of an own and a streamed tile along one axis."""
    return sum(count * -(-extent.others // others) for extent, count in _extents(axis, owner, tile).items())


def _mask(axes: list[tuple[Counter[Extent], int]]) -> Mask:
    if all(extent.inner == extent.others for counts, _ in axes for extent in counts):
        exact = all(extent.others % size == 0 for counts, size in axes for extent in counts)
        return "none" if exact else "rectangle"
    # The share of streamed tiles that need no mask; a small one is not worth a branch.
    share = 1.0
    for counts, size in axes:
        whole = sum(count * (extent.inner // size) for extent, count in counts.items())
        share *= whole / sum(count * -(-extent.others // size) for extent, count in counts.items())
    return "some" if share > 0.25 else "pairs"
