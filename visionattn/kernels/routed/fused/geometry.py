"""Regions and lists inside the fused kernels: which pixels a program owns, and which a list shows it."""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.routed.call import Call
from visionattn.kernels.triton_rows import LOG2_E, Strides, equally_strided


class Regions(NamedTuple):
    """A map cut into `count` regions: `columns` of them in a row, each of `region_h` by `region_w` pixels."""

    height: int
    width: int
    heads: int
    region_h: int
    region_w: int
    columns: int
    count: int


class Sets(NamedTuple):
    """How the lists lie: an image has `lists` sets of them, one that all heads share or one per head, and
    `counts` sets of counts; a list has `topk` places."""

    lists: int
    counts: int
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
def listed_pixels(entries, start, count, counts, regions, TILE: tl.constexpr):
    """Pixels `start` to `start + TILE` of the `count` regions at `entries`, as if these were one long row.

    Of a region only the first pixels are valid, as many as stand at its place in `counts` if not None.
    """
    pixels = regions.region_h * regions.region_w
    number = start + tl.arange(0, TILE)
    region = tl.load(entries + number // pixels, mask=number < count * pixels, other=-1)
    listed = pixels_of(region, number % pixels, regions)
    valid = listed.valid & (region >= 0)
    if counts is not None:
        # A load of its own and not one that waits for the region: that takes twice the registers.
        most = tl.load(counts + number // pixels, mask=number < count * pixels, other=0)
        valid = valid & (number % pixels < most)
    return Pixels(listed.y, listed.x, valid)


@triton.jit
def set_of_lists(batch, head, sets):
    """The number of the set of lists (int64) that a head of an image has."""
    return batch * sets.lists + head % sets.lists


@triton.jit
def counts_of_head(counts, batch, head, sets, regions):
    """Where the counts of a head of an image begin, None for none."""
    if counts is not None:
        counts += (batch * sets.counts + head % sets.counts) * regions.count
    return counts


@triton.jit
def list_of(lists, ends, list_counts, batch, head, row, sets, regions):
    """Where the list of a query region and its counts begin, and how many places of it are to be read: up to
    its end in `ends`, or all where that is None."""
    number = set_of_lists(batch, head, sets) * regions.count + row
    count = sets.topk
    if ends is not None:
        count = tl.load(ends + number)
    if list_counts is not None:
        list_counts += number * sets.topk
    return lists + number * sets.topk, list_counts, count


@triton.jit
def region_of(pixels, regions):
    """The regions that pixels lie in."""
    return pixels.y // regions.region_h * regions.columns + pixels.x // regions.region_w


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


class Prepared(NamedTuple):
    """A call as the kernels take it: maps of equal strides, and contiguous tables. `ends` are the ends of
    lists, `list_counts` the counts of the regions on them."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor
    ends: Tensor | None
    list_counts: Tensor | None
    counts: Tensor | None
    bias: Tensor | None
    numbers: dict[str, Any]


def prepare(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Prepared:
    """Lay out the arguments of a call and the numbers that all kernels take."""
    (q,), (k, v) = equally_strided(q), equally_strided(k, v)
    lists, counts, list_counts, ends = call.indices.to(torch.int32), call.counts, None, None
    if counts is not None:
        sets = max(lists.shape[1], counts.shape[1])
        lists, counts = lists.expand(-1, sets, -1, -1), counts.to(torch.int32).contiguous()
        of_lists = counts.expand(-1, sets, -1)[:, :, None].expand(-1, -1, lists.shape[2], -1)
        list_counts = of_lists.gather(3, lists.clamp(min=0).long())
    lists = lists.contiguous()
    if not call.is_full:
        places = torch.arange(1, lists.shape[3] + 1, dtype=torch.int32, device=lists.device)
        # Behind the last region of a list nothing is read.
        ends = F.pad(torch.where(lists < 0, 0, places), (1, 0)).amax(3)
    bias = None if call.bias is None else call.bias.contiguous()
    numbers = {
        "strides": Strides(*q.stride()[:4]),
        "strides_k": Strides(*k.stride()[:4]),
        "query_regions": _regions(q, call.query_region),
        "key_regions": _regions(k, call.region),
        "sets": Sets(lists.shape[1], 1 if counts is None else counts.shape[1], lists.shape[3]),
        "bias_strides": _bias_strides(bias, q, k),
    }
    return Prepared(q, k, v, lists, ends, list_counts, counts, bias, numbers)


def is_table(bias: Tensor, q: Tensor) -> bool:
    """Whether a bias is relative, not dense."""
    return bias.shape[1:] == (2 * q.shape[1] - 1, 2 * q.shape[2] - 1)


def num_programs(x: Tensor, region: Sequence[int], tile: int) -> int:
    """Tiles of all regions of a map, heads and images."""
    batch, height, width, heads, _ = x.shape
    regions = -(-height // region[0]) * -(-width // region[1])
    return batch * heads * regions * -(-(region[0] * region[1]) // tile)


def _regions(x: Tensor, region: Sequence[int]) -> Regions:
    _, height, width, heads, _ = x.shape
    columns = -(-width // region[1])
    return Regions(height, width, heads, *region, columns, -(-height // region[0]) * columns)


def _bias_strides(bias: Tensor | None, q: Tensor, k: Tensor) -> BiasStrides:
    if bias is None:
        return BiasStrides(0, 0, 0, 0, 0, 0)
    height, width = q.shape[1:3]
    if is_table(bias, q):
        row = 2 * width - 1
        return BiasStrides((height - 1) * row + width - 1, bias.stride(0), -row, -1, row, 1)
    pixels = k.shape[1] * k.shape[2]
    return BiasStrides(0, bias.stride(0), width * pixels, pixels, k.shape[2], 1)
