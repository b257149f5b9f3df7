"""The cost of tilings of local patterns, as lines of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from benchmarks.simulator import Layout, simulate
from visionattn.errors import InputError, as_input_error
from visionattn.kernels.local.pattern import Axis, Pattern, neighborhood_axis, window_axis

Pair = tuple[int, int]


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
# What a command line that names a pattern leaves open.
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
