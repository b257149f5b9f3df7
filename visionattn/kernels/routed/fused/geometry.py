"""Regions and lists inside the fused kernels: which pixels a program owns, and which a list shows it."""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.triton_rows import LOG2_E, Strides


class Regions(NamedTuple):
    """A map cut into regions, and its lists: `topk` regions for each of `count`.

    A row of the map holds `columns` regions of `region_h` by `region_w` pixels. An image has `lists` sets of
    lists: one that all heads share, or one per head.
    """

    height: int
    width: int
    heads: int
    region_h: int
    region_w: int
    columns: int
    count: int
    lists: int
    topk: int


class BiasStrides(NamedTuple):
    """Where the bias of a pair stands: behind `start`, by a stride for the head and every coordinate."""

    start: int
    head: int
    query_y: int
    query_x: int
    key_y: int
    key_x: int


class Place(NamedTuple):
    """Where a program works: image (int64), head, region, and the first of its pixels in the region."""

    batch: Any
    head: Any
    region: Any
    first: Any


class Pixels(NamedTuple):
    """Pixels of a tile: their rows and columns, and which of them lie on the map."""

    y: Any
    x: Any
    valid: Any


@triton.jit
def place(program, regions, TILE: tl.constexpr):
    """Decode the number of a program."""
    tiles = tl.cdiv(regions.region_h * regions.region_w, TILE)
    first = program % tiles * TILE
    region = program // tiles % regions.count
    head = program // (tiles * regions.count) % regions.heads
    return Place((program // (tiles * regions.count * regions.heads)).to(tl.int64), head, region, first)


@triton.jit
def pixels_of(region, number, regions):
    """The pixels of these numbers in a region, row by row."""
    y = region // regions.columns * regions.region_h + number // regions.region_w
    x = region % regions.columns * regions.region_w + number % regions.region_w
    return Pixels(y, x, (y < regions.height) & (x < regions.width))


@triton.jit
def own_pixels(at, regions, TILE: tl.constexpr):
    """The tile of a program."""
    number = at.first + tl.arange(0, TILE)
    own = pixels_of(at.region, number, regions)
    return Pixels(own.y, own.x, own.valid & (number < regions.region_h * regions.region_w))


@triton.jit
def listed_pixels(entries, start, count, regions, TILE: tl.constexpr):
    """Pixels `start` to `start + TILE` of the `count` regions at `entries`, as if these were one long row."""
    pixels = regions.region_h * regions.region_w
    number = start + tl.arange(0, TILE)
    region = tl.load(entries + number // pixels, mask=number < count * pixels, other=-1)
    listed = pixels_of(region, number % pixels, regions)
    return Pixels(listed.y, listed.x, listed.valid & (region >= 0))


@triton.jit
def set_of_lists(batch, head, regions):
    """The number of the set of lists (int64) that a head of an image has."""
    return batch * regions.lists + head % regions.lists


@triton.jit
def offset_of(pixels, strides):
    """The offsets of pixels in a head of an image of q, k or v."""
    return pixels.y * strides.y + pixels.x * strides.x


@triton.jit
def row_of(pixels, head, regions):
    """The numbers of the vectors of pixels among those of an image, in contiguous maps."""
    return (pixels.y * regions.width + pixels.x) * regions.heads + head


@triton.jit
def rows_of_image(batch, regions):
    """The number of the first vector (int64) of an image, in contiguous maps."""
    return batch * regions.height * regions.width * regions.heads


@triton.jit
def bias_of_head(bias, head, strides):
    """Where the bias of a head begins, None for none."""
    if bias is not None:
        bias += strides.start + head.to(tl.int64) * strides.head
    return bias


@triton.jit
def bias_of_queries(pixels, strides):
    """How far the bias of a pair lies behind that of its head because of its query."""
    return pixels.y * strides.query_y + pixels.x * strides.query_x


@triton.jit
def bias_of_keys(pixels, strides):
    """How far the bias of a pair lies behind that of its head because of its key."""
    return pixels.y * strides.key_y + pixels.x * strides.key_x


@triton.jit
def scores(own_rows, other_rows, own, others, bias, own_part, others_part, scale, PRECISION: tl.constexpr):
    """Base-2 logits `[own, others]` of queries and keys; the two parts add up to the place of a bias."""
    logits = tl.dot(own_rows, tl.trans(other_rows), input_precision=PRECISION) * (scale * LOG2_E)
    if bias is not None:
        mask = own.valid[:, None] & others.valid[None, :]
        entry = tl.load(bias + own_part[:, None] + others_part[None, :], mask=mask, other=0.0)
        logits += entry.to(tl.float32) * LOG2_E
    return logits


def geometry(q: Tensor, indices: Tensor, region: Sequence[int], bias: Tensor | None) -> dict[str, Any]:
    """The numbers that all kernels take; a bias is contiguous, a relative table or dense."""
    _, height, width, heads, _ = q.shape
    _, lists, count, topk = indices.shape
    row = 2 * width - 1
    if bias is None:
        bias_strides = BiasStrides(0, 0, 0, 0, 0, 0)
    elif is_table(bias, q):
        bias_strides = BiasStrides((height - 1) * row + width - 1, bias.stride(0), -row, -1, row, 1)
    else:
        pixels = height * width
        bias_strides = BiasStrides(0, bias.stride(0), width * pixels, pixels, width, 1)
    return {
        "strides": Strides(*q.stride()[:4]),
        "regions": Regions(height, width, heads, *region, -(-width // region[1]), count, lists, topk),
        "bias_strides": bias_strides,
    }


def is_table(bias: Tensor, q: Tensor) -> bool:
    """Whether a bias is relative, not dense."""
    return bias.shape[1:] == (2 * q.shape[1] - 1, 2 * q.shape[2] - 1)


def num_programs(q: Tensor, region: Sequence[int], tile: int) -> int:
    """Tiles of all regions, heads and images."""
    batch, height, width, heads, _ = q.shape
    regions = -(-height // region[0]) * -(-width // region[1])
    return batch * heads * regions * -(-(region[0] * region[1]) // tile)
