"""What a tiling of a local pattern costs, without running it.

A fused kernel computes whole tiles of queries by keys; what it computes beyond the visible pairs is waste.
Tiles of keys are *aligned*, lying on a fixed grid (contiguous after one permutation of the tokens), or
*floating*, beginning at the first key that a tile of queries needs (addressed inside the kernel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from visionattn.kernels.local.pattern import Axis, Pattern

Layout = Literal["aligned", "floating"]


@dataclass(frozen=True)
class Simulation:
    """The cost of one tiling, per sample and head.

    Attributes:
        visits: pairs of a tile of queries and a tile of keys that are computed.
        dense_visits: the same for dense attention with these tiles.
        waste: computed scores / visible scores.
    """

    visits: int
    dense_visits: int
    waste: float

    @property
    def speedup_bound(self) -> float:
        """The largest speedup over dense attention that leaving out tiles can give."""
        return self.dense_visits / self.visits


def simulate(
    pattern: Pattern, query_tile: tuple[int, int], key_tile: tuple[int, int], layout: Layout
) -> Simulation:
    """Count the tiles that a fused kernel visits.

    Args:
        pattern: the geometry; groups of a dilated axis are tiled one by one.
        query_tile: height and width of a tile of queries.
        key_tile: height and width of a tile of keys.
        layout: where tiles of keys begin.

    Raises:
        ValueError: a tile side below 1, or an unknown layout.
    """
    if min(*query_tile, *key_tile) < 1:
        raise ValueError(f"tile sides must be at least 1, got {query_tile} and {key_tile}")
    if layout not in ("aligned", "floating"):
        raise ValueError(f"layout={layout!r} is unknown; choose 'aligned' or 'floating'")
    visits = dense = pairs = 1
    for axis, queries, keys in zip((pattern.y, pattern.x), query_tile, key_tile):
        axis_visits = axis_pairs = 0
        for group in axis.groups():
            ranges = group.axis.key_ranges()
            axis_visits += group.count * _visits(ranges, queries, keys, layout)
            axis_pairs += group.count * sum(stop - start for start, stop in ranges)
        visits *= axis_visits
        pairs *= axis_pairs
        dense *= -(-axis.length // queries) * -(-_keys(axis) // keys)
    scores = query_tile[0] * query_tile[1] * key_tile[0] * key_tile[1]
    return Simulation(visits, dense, visits * scores / pairs)


def _visits(ranges: list[tuple[int, int]], queries: int, keys: int, layout: Layout) -> int:
    """Tiles of keys that the tiles of queries of one group need."""
    total = 0
    for first in range(0, len(ranges), queries):
        tile = ranges[first : first + queries]
        start, stop = min(low for low, _ in tile), max(high for _, high in tile)
        begin = start // keys * keys if layout == "aligned" else start
        total += -(-(stop - begin) // keys)
    return total


def _keys(axis: Axis) -> int:
    return axis.length + sum(axis.key_padding)
