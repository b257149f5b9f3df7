"""Static lists of regions, from the sizes of the map alone.

A pattern is int32 `[1, 1 or heads, regions, n]` in ascending order, -1 behind the end of a list, for
`routed_attention`; regions are numbered row by row. Patterns are kept: asking again for one costs a copy.
`layers_to_reach` says after how many layers every region has heard of every other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.kernels.checks import pair
from visionattn.kernels.routed.lists import listed_regions
from visionattn.kernels.routed.regions import check_counts

Mask = NDArray[np.bool_]


def window_regions(
    height: int,
    width: int,
    region_size: int | tuple[int, int],
    radius: int | Sequence[int],
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The regions at most `radius` rows and columns away: windows.

    With a radius of 1 or more, all regions are reached in `ceil((longer side - 1) / radius)` layers, sides in
    regions; the largest radius of the heads counts.

    Args:
        height: of the map in pixels.
        width: likewise.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        radius: in regions, at least 0, or one radius per head (MoA, https://arxiv.org/abs/2406.14909).
        device: where the lists lie.

    Returns:
        `[1, 1 or heads, regions, n]` int32.

    Raises:
        ValueError: an argument is out of its range.
    """
    radii = tuple(radius) if isinstance(radius, Sequence) else (radius,)
    if not radii or min(radii) < 0:
        raise ValueError(f"window_regions: radius must be at least 0, or one such per head, got {radius}")
    return _pattern("window", height, width, region_size, device, *radii)


def power_regions(
    height: int,
    width: int,
    region_size: int | tuple[int, int],
    *,
    window: int = 5,
    sinks: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Regions nearby, and those of the own row and column at distances of powers of two: PowerAttention
    (https://arxiv.org/abs/2503.03588) in both directions and, on maps, along both axes.

    All regions are reached in at most `ceil(log2(rows)) + ceil(log2(columns))` layers, rows and columns of
    regions, with lists whose length grows with the logarithm.

    Args:
        height: of the map in pixels.
        width: likewise.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        window: regions less than so many rows and columns away are listed; at least 1.
        sinks: so many regions, the first of the map, are listed everywhere.
        device: where the lists lie.

    Returns:
        `[1, 1, regions, n]` int32.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_counts("power_regions", window=window)
    _check_least("power_regions", sinks=sinks)
    return _pattern("power", height, width, region_size, device, window, sinks)


def strided_regions(
    height: int,
    width: int,
    region_size: int | tuple[int, int],
    heads: int,
    *,
    local: int,
    stride: int,
    position: Literal["absolute", "relative"] = "absolute",
    offset: int = 0,
    dense_heads: int = 0,
    skew: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Regions nearby and every `stride`-th of the rest, another one for every head: S2
    (https://arxiv.org/abs/2407.17678), on maps along diagonals.

    `"absolute"`: all queries of a head see the regions (y, x) with `(y * skew + x + h * max(1, stride //
    heads) + offset) % stride == 0`. With as many heads as strides or more, the heads together reach all in
    one layer; with fewer in two, if every region is less than `local` away from one that a head sees.
    `"relative"`: what counts is how far a region lies beyond the near ones, `(distance - local + 1) % stride
    == 0`, distance being the larger of those in rows and columns; heads are alike. All regions are reached in
    at most three layers if `2 * local > stride`, and never later than by windows of radius `local - 1`.

    Args:
        height: of the map in pixels.
        width: likewise.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        heads: attention heads.
        local: regions less than so many rows and columns away are listed; 0 for none.
        stride: at least 1, which lists all.
        position: where strides are counted from.
        offset: added to the absolute position.
        dense_heads: so many heads, the last ones, list all.
        skew: by how much the listed columns move from row to row, absolute; the rounded square root of
            `stride` by default, which spreads them evenly.
        device: where the lists lie.

    Returns:
        `[1, heads, regions, n]` int32, or `[1, 1, regions, n]` where all heads are alike.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_counts("strided_regions", heads=heads, stride=stride)
    _check_least("strided_regions", local=local, dense_heads=dense_heads)
    if position not in ("absolute", "relative"):
        raise ValueError(f"strided_regions: position must be 'absolute' or 'relative', got {position!r}")
    if dense_heads > heads:
        raise ValueError(f"strided_regions: dense_heads must be at most the {heads} heads, got {dense_heads}")
    skew = round(stride**0.5) if skew is None else skew
    numbers = (heads, local, stride, offset, dense_heads, skew)
    rule = "strided" if position == "absolute" else "ringed"
    return _pattern(rule, height, width, region_size, device, *numbers)


def radial_regions(
    height: int,
    width: int,
    region_size: int | tuple[int, int],
    *,
    decay: float = 1.0,
    sink: bool = False,
    axis: Literal["rows", "both"] = "rows",
    device: torch.device | str | None = None,
) -> Tensor:
    """Regions the sparser the farther: Radial Attention (https://arxiv.org/abs/2506.19852), whose frames are
    the rows of a map, and a pattern for both axes.

    `"rows"`: with w the power of two above the width, rows d apart, of bit length n, are listed where d is a
    multiple of `max(1, b * 2 ** n // w)`, b being the width of a region: rows at most 1 apart whole, others
    within `max(b, decay * w / 2 ** n)` columns. A region is listed if, of its columns that are seen at all,
    more than 0.6 are seen by over a third of its queries, as in the official code. Neighbouring rows are
    listed whole, so that all regions are reached in at most `rows - 1` layers, usually in two.
    `"both"`: at the ring r, the larger distance in rows and columns of regions, those whose distances are
    multiples of `2 ** max(0, floor(log2 r) - 1)`: equally many in every octave. All regions are reached in at
    most `max(1, ceil(log2(longer side)) - 1)` layers, the side in regions.

    Args:
        height: of the map in pixels.
        width: likewise.
        region_size: width of a region of one row in pixels, or (1, width), a divisor of the map's width; for
            both axes the side of a region in pixels, or (height, width), and a border region may be smaller.
        decay: of the columns with the distance of rows, positive; for rows.
        sink: the first row is listed everywhere, whole.
        axis: which axis is sparse with distance.
        device: where the lists lie.

    Returns:
        `[1, 1, regions, n]` int32.

    Raises:
        ValueError: an argument is out of its range, or regions do not fit.
    """
    if axis not in ("rows", "both"):
        raise ValueError(f"radial_regions: axis must be 'rows' or 'both', got {axis!r}")
    if not decay > 0:
        raise ValueError(f"radial_regions: decay must be above 0, got {decay}")
    if axis == "both":
        return _pattern("octaves", height, width, region_size, device, sink)
    region = (1, region_size) if isinstance(region_size, int) else pair("region_size", region_size)
    if region[0] != 1 or width % region[1]:
        raise ValueError(
            f"radial_regions: rows need regions (1, n), n a divisor of the width {width}, got {region_size}"
        )
    return _pattern("radial", height, width, region, device, region[1], width, decay, sink)


def layers_to_reach(lists: Tensor) -> int | None:
    """How many layers of attention along these lists carry every region to every other; None: never.

    Args:
        lists: `[B, 1 or heads, regions, n]`, -1 is padding; a layer sees what any of its heads sees. The most
            of all images.
    """
    regions = lists.shape[2]
    seen = listed_regions(lists, regions).any(1).float()
    reached = torch.eye(regions, device=lists.device).expand_as(seen)
    for layers in range(regions + 1):
        if bool((reached > 0).all()):
            return layers
        # A region has heard of what those that it sees had heard of.
        following = (reached + seen @ reached > 0).float()
        if torch.equal(following, reached):
            return None
        reached = following
    return None


def _check_least(name: str, **numbers: int) -> None:
    for argument, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name}: {argument} must be at least 0, got {number}")


def _pattern(
    rule: str,
    height: int,
    width: int,
    region_size: int | tuple[int, int],
    device: torch.device | str | None,
    *numbers: float,
) -> Tensor:
    region = pair("region_size", region_size)
    pair("the size of the map", (height, width))
    place = torch.empty(0, device=device).device
    return _listed(rule, -(-height // region[0]), -(-width // region[1]), numbers, place)


# As an operator, so that a compiled graph holds one node and not how lists come about.
@torch.library.custom_op("visionattn::region_pattern", mutates_args=())
def _listed(rule: str, rows: int, columns: int, numbers: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(_lists(rule, rows, columns, *numbers), device=device)


@_listed.register_fake
def _(rule: str, rows: int, columns: int, numbers: Sequence[float], device: torch.device) -> Tensor:
    # Sizes that vary become fixed here, for the length of lists depends on them.
    shape = _lists(rule, int(rows), int(columns), *numbers).shape
    return torch.empty(shape, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _lists(rule: str, rows: int, columns: int, *numbers: float) -> NDArray[np.int32]:
    """The lists of a rule of this name."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    whole = (int(number) if number == int(number) else number for number in numbers)
    mask = _RULES[rule](y - y[:, None], x - x[:, None], y[None], x[None], *whole)
    mask = mask if mask.ndim == 3 else mask[None]
    order = np.argsort(~mask, axis=-1, kind="stable")[..., : mask.sum(-1).max()]
    return np.where(np.take_along_axis(mask, order, -1), order, -1).astype(np.int32)[None]


def _ring(dy: NDArray[np.int64], dx: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum(abs(dy), abs(dx))


def _window(dy: NDArray, dx: NDArray, y: NDArray, x: NDArray, *radii: int) -> Mask:
    return _ring(dy, dx) <= np.array(radii)[:, None, None]


def _power(dy: NDArray, dx: NDArray, y: NDArray, x: NDArray, window: int, sinks: int) -> Mask:
    # On the own row or column the ring is the distance; x & (x - 1) is 0 for powers of two.
    ring = _ring(dy, dx)
    far = ((dy == 0) | (dx == 0)) & (ring & (ring - 1) == 0)
    return (ring < window) | far | (np.arange(dy.shape[1]) < sinks)


def _strided(
    dy: NDArray, dx: NDArray, y: NDArray, x: NDArray,
    heads: int, local: int, stride: int, offset: int, dense_heads: int, skew: int,
) -> Mask:  # fmt: skip
    head = np.arange(heads)[:, None, None]
    listed = (y * skew + x + head * max(1, stride // heads) + offset) % stride == 0
    return listed | (_ring(dy, dx) < local) | (head >= heads - dense_heads)


def _ringed(
    dy: NDArray, dx: NDArray, y: NDArray, x: NDArray,
    heads: int, local: int, stride: int, offset: int, dense_heads: int, skew: int,
) -> Mask:  # fmt: skip
    listed = np.maximum(0, _ring(dy, dx) - local + 1) % stride == 0
    if not dense_heads:
        return listed
    return listed | (np.arange(heads)[:, None, None] >= heads - dense_heads)


def _octaves(dy: NDArray, dx: NDArray, y: NDArray, x: NDArray, sink: bool) -> Mask:
    octave = np.floor(np.log2(np.maximum(_ring(dy, dx), 1))).astype(np.int64)
    step = 2 ** np.maximum(0, octave - 1)
    return (dy % step == 0) & (dx % step == 0) | ((y == 0) & sink)


def _radial(
    dy: NDArray, dx: NDArray, y: NDArray, x: NDArray, side: int, width: int, decay: float, sink: bool
) -> Mask:
    power, queries = 2 ** width.bit_length(), np.arange(side)
    listed = np.zeros(dy.shape, bool)
    for rows in range(int(y.max()) + 1):
        octave = 2 ** rows.bit_length()
        if rows % max(1, side * octave // power):
            continue
        reach = width if rows <= 1 else max(side, decay * power / octave)
        for columns in range(int(x.max()) + 1):
            seen = (abs(columns * side + queries - queries[:, None]) <= reach).sum(0)
            kept = (seen > side / 3).sum() > 0.6 * (seen > 0).sum()
            listed |= kept & (abs(dy) == rows) & (abs(dx) == columns)
    return listed | ((y == 0) & sink)


# From (dy, dx), key minus query, and (y, x), the key, all in regions, to a mask `[regions, regions]`, or one
# per head before.
_RULES: dict[str, Callable[..., Mask]] = {
    "octaves": _octaves,
    "power": _power,
    "radial": _radial,
    "ringed": _ringed,
    "strided": _strided,
    "window": _window,
}
