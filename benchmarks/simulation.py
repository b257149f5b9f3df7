"""The cost of tilings of local patterns, counted without running a kernel, and as lines of a table.

A fused kernel computes whole tiles of queries by keys; all scores beyond the visible pairs are waste. Tiles
of keys are *aligned*, lying on a fixed grid (contiguous after one permutation of the tokens), or *floating*,
beginning at the first key that a tile of queries needs (addressed inside the kernel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from visionattn.errors import InputError, as_input_error
from visionattn.kernels.local.pattern import Axis, Pattern, neighborhood_axis, window_axis

Pair = tuple[int, int]
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


def simulate(pattern: Pattern, query_tile: Pair, key_tile: Pair, layout: Layout) -> Simulation:
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


@dataclass(frozen=True)
class Tiling:
    """A pattern on a map, and the tiles of a fused kernel.

    Attributes:
        size: height and width of the map.
        query_tile: height and width of a tile of queries.
        key_tile: height and width of a tile of keys.
        kernel: keys per side of a neighborhood.
        stride: side of a block of queries that share their keys.
        dilation: pixels from one key to the next.
        is_causal: whether keys behind the query are absent.
        window: side of disjoint windows instead of neighborhoods, 0 for neighborhoods.
        shift: where windows begin.
    """

    size: Pair
    query_tile: Pair
    key_tile: Pair
    kernel: int = 7
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    window: int = 0
    shift: int = 0

    def __str__(self) -> str:
        if self.window:
            return f"windows of {self.window}" + (f", shift {self.shift}" if self.shift else "")
        parts = [f"kernel {self.kernel}", f"stride {self.stride}"]
        parts += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        return ", ".join(parts + ["causal"] * self.is_causal)

    def pattern(self) -> Pattern:
        """The geometry.

        Raises:
            InputError: numbers that do not go together.
        """
        y, x = (self._axis(length) for length in self.size)
        return Pattern(y, x)

    def _axis(self, length: int) -> Axis:
        if self.window:
            if not 0 <= self.shift < self.window:
                raise InputError(f"--shift must lie in 0..{self.window - 1}, but is {self.shift}")
            return window_axis(length, self.window, self.shift)
        reach = self.kernel * self.dilation
        if reach > length:
            raise InputError(
                f"--kernel {self.kernel} with --dilation {self.dilation} needs sides of at least {reach}, "
                f"but --size is {self.size[0]} {self.size[1]}"
            )
        if self.stride > self.kernel:
            raise InputError(f"--stride must be at most --kernel {self.kernel}, but is {self.stride}")
        return neighborhood_axis(length, self.kernel, self.stride, self.dilation, self.is_causal)


TILINGS = (
    Tiling((56, 56), (8, 8), (8, 8)),
    Tiling((56, 56), (8, 8), (16, 8)),
    Tiling((56, 56), (4, 8), (8, 8)),
    Tiling((56, 56), (7, 7), (7, 7)),
    Tiling((56, 56), (8, 8), (8, 8), kernel=13),
    Tiling((56, 56), (4, 4), (8, 8), kernel=13),
    Tiling((256, 256), (16, 8), (16, 8), kernel=80),
    Tiling((256, 256), (16, 8), (16, 8), kernel=80, stride=16),
)
# The options of a pattern that a command line may leave out.
DEFAULT = {"size": (56, 56), "query_tile": (8, 8), "key_tile": (8, 8)}
COLUMNS = (
    "map",
    "pattern",
    "query tile",
    "key tile",
    "layout",
    "tiles",
    "of dense",
    "waste",
    "bound on speedup",
)


def lines(tilings: Sequence[Tiling]) -> list[tuple[str, ...]]:
    """Under `COLUMNS`, two lines a tiling: tiles visited, waste and the bound on the speedup over dense.

    Raises:
        InputError: numbers that do not go together, or a tile side below 1.
    """
    found = []
    for tiling in tilings:
        pattern = tiling.pattern()
        sizes = [f"{height}x{width}" for height, width in (tiling.size, tiling.query_tile, tiling.key_tile)]
        for layout in get_args(Layout):
            with as_input_error("cannot simulate", ValueError):
                cost = simulate(pattern, tiling.query_tile, tiling.key_tile, layout)
            numbers = (
                str(cost.visits),
                str(cost.dense_visits),
                f"{cost.waste:.1f}",
                f"{cost.speedup_bound:.2f}x",
            )
            found.append((sizes[0], str(tiling), *sizes[1:], layout, *numbers))
    return found
