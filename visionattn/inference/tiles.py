"""Restoration in tiles with some context: little memory, but for most networks an approximation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from torch import Tensor

from visionattn.models import RestorationInfo


def check_tiles(info: RestorationInfo, tile: int, overlap: int) -> None:
    """Refuse tiles that a network cannot take.

    Raises:
        ValueError: the sentence says what is possible.
    """
    if overlap < 0 or tile < info.min_size or tile % info.size_multiple or overlap % info.size_multiple:
        raise ValueError(
            f"tiles must have at least {info.min_size} pixels a side, and tile and overlap be multiples of "
            f"{info.size_multiple}, but are {tile} and {overlap}"
        )


def run_in_tiles(
    network: Callable[[Tensor], Tensor], x: Tensor, info: RestorationInfo, tile: int, overlap: int
) -> Tensor:
    """Run a network on tiles of an image, each with its surroundings, and put them together with hard seams.

    Args:
        network: takes and returns images.
        x: images `[B, C, H, W]`.
        info: the record of the network; `exact_tiling` says whether the result can be that of the whole
            image, given an overlap of the network's reach.
        tile: side of a tile in pixels.
        overlap: pixels of the surroundings that a tile sees on each side.

    Returns:
        `[B, C, upscale * H, upscale * W]`.

    Raises:
        ValueError: tiles that the network cannot take.
    """
    check_tiles(info, tile, overlap)
    height, width = x.shape[-2:]
    scale, out = info.upscale, None
    for top, left in product(range(0, height, tile), range(0, width, tile)):
        (y, x_), (rows, columns) = zip(
            _context(top, height, tile, overlap, info), _context(left, width, tile, overlap, info)
        )
        part = network(x[..., y, x_])
        part = part[..., _scaled(rows, y.start, scale), _scaled(columns, x_.start, scale)]
        if out is None:
            out = part.new_empty(*part.shape[:2], height * scale, width * scale)
        out[..., _scaled(rows, 0, scale), _scaled(columns, 0, scale)] = part
    assert out is not None
    return out


def _context(begin: int, side: int, tile: int, overlap: int, info: RestorationInfo) -> tuple[slice, slice]:
    """Find which pixels of an axis a tile sees, never fewer than the network needs, and which it keeps."""
    end = min(begin + tile, side)
    start, stop = max(begin - overlap, 0), min(end + overlap, side)
    while stop - start < info.min_size and start > 0:
        start = max(start - info.size_multiple, 0)
    return slice(start, stop), slice(begin, end)


def _scaled(span: slice, start: int, scale: int) -> slice:
    return slice((span.start - start) * scale, (span.stop - start) * scale)


def describe_tiles(info: RestorationInfo, overlap: int) -> str:
    """Say in one sentence how good the result is."""
    if info.exact_tiling:
        return f"tiles with {overlap} pixels of overlap: exact if the network reaches no farther"
    return (
        "tiles are an approximation: every pixel of this network's output depends on the whole image "
        "(a memory budget gives the exact result)"
    )
