"""The geometry of `pattern.py` inside the fused kernels: which pixels a program owns and what they see.

`y` and `x` are `TiledAxis`; positions count steps of an axis's dilation inside one of its groups.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.tiling import Owner, Tiling, tiling
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import LOG2_E, padded_head_dim, precision


class Strides(NamedTuple):
    """Of maps `[B, H, W, heads, d]`, in numbers; those of the rows and columns are of pixels."""

    b: int
    y: int
    x: int
    h: int


@triton.jit
def floor_div(a, b):
    """Rounded down, for positive b; Triton's own division rounds towards zero."""
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))


@triton.jit
def block_begin(position, axis):
    """Where the block of a query begins."""
    return floor_div(position - axis.shift, axis.window) * axis.window + axis.shift


@triton.jit
def run_begin(position, length, axis):
    """Where the whole run of keys of a query begins, the part beyond the map included."""
    begin = block_begin(position, axis) - axis.before
    return tl.minimum(tl.maximum(begin, -axis.loose), length - axis.key_window + axis.loose)


@triton.jit
def keys_of(position, length, axis):
    """The first key that a query sees, and the one behind the last."""
    begin = run_begin(position, length, axis)
    stop = tl.minimum(begin + axis.key_window, length + axis.beyond)
    return tl.maximum(begin, -axis.beyond), tl.minimum(stop, position + axis.ahead)


@triton.jit
def queries_of(position, length, axis):
    """The first query that sees a key, and the one behind the last: they are contiguous in every pattern."""
    reaching = position - axis.shift + axis.before
    start = (floor_div(reaching - axis.key_window, axis.window) + 1) * axis.window + axis.shift
    stop = (floor_div(reaching, axis.window) + 1) * axis.window + axis.shift
    # Runs that move inwards at the border: the outermost keys are seen from there on.
    start = tl.where(position < axis.key_window - axis.loose, 0, start)
    stop = tl.where(position >= length - axis.key_window + axis.loose, length, stop)
    start = tl.maximum(start, position - axis.ahead + 1)
    return tl.maximum(start, 0), tl.minimum(stop, length)


class Place(NamedTuple):
    """Where a program works: image (int64), head, and of both axes residue and length of the group and the
    number of the tile in it."""

    batch: Any
    head: Any
    residue_y: Any
    length_y: Any
    tile_y: Any
    residue_x: Any
    length_x: Any
    tile_x: Any


class Tile(NamedTuple):
    """An own tile: its pixels, and what each of them sees, or is seen by.

    Slots beyond the tile or the map repeat a pixel inside, so that everything computed from them is ordinary;
    `valid` is false there. From `start` to before `stop` reaches the rectangle of everything that the tile
    streams, from `inner_start` to before `inner_stop` what all its pixels see.
    """

    y: Any
    x: Any
    y_first: Any
    x_first: Any
    valid: Any
    low_y: Any
    high_y: Any
    low_x: Any
    high_x: Any
    start_y: Any
    stop_y: Any
    start_x: Any
    stop_x: Any
    inner_start_y: Any
    inner_stop_y: Any
    inner_start_x: Any
    inner_stop_x: Any


class Streamed(NamedTuple):
    """A streamed tile: its pixels, which of them lie in the rectangle, which of these on the map, and its
    first row and column."""

    y: Any
    x: Any
    seen: Any
    inside: Any
    first_y: Any
    first_x: Any


@triton.jit
def place(program, heads, y, x):
    """Decode the number of a program; the heads of a tile are neighbours, so that they share the cache."""
    tiles_y, tiles_x = y.tiles * y.dilation, x.tiles * x.dilation
    tile = program // heads
    batch = (tile // (tiles_x * tiles_y)).to(tl.int64)
    return placed(batch, program % heads, tile // tiles_x % tiles_y, tile % tiles_x, y, x)


@triton.jit
def placed(batch, head, tile_y, tile_x, y, x):
    """The place of a tile by its numbers among those of all groups of an axis."""
    residue_y, length_y, tile_y = group_of(tile_y, y)
    residue_x, length_x, tile_x = group_of(tile_x, x)
    return Place(batch, head, residue_y, length_y, tile_y, residue_x, length_x, tile_x)


@triton.jit
def group_of(number, axis):
    """Residue and length of the group of a tile, and the number of the tile in its group."""
    residue = number // axis.tiles
    return residue, (axis.length - residue + axis.dilation - 1) // axis.dilation, number % axis.tiles


@triton.jit
def base_of(place, strides):
    """The offset (int64) of the first pixel of a group."""
    begin = place.batch * strides.b + place.head * strides.h
    return begin + place.residue_y * strides.y + place.residue_x * strides.x


@triton.jit
def offset_of(position_y, position_x, strides, y, x):
    """The offsets of pixels of a group from its first."""
    return position_y * (y.dilation * strides.y) + position_x * (x.dilation * strides.x)


@triton.jit
def span_of(tile, axis):
    """Where the span of a tile begins."""
    return axis.first + tile // axis.parts * axis.span


@triton.jit
def owned(tile, slot, length, axis):
    """Positions and validity of the slots of a tile along one axis, and the first and the last position."""
    span = span_of(tile, axis)
    begin = span + tile % axis.parts * axis.tile
    stop = tl.minimum(tl.minimum(begin + axis.tile, span + axis.span), length)
    last = tl.maximum(stop - 1, 0)
    first = tl.minimum(tl.maximum(begin, 0), last)
    position = tl.minimum(tl.maximum(begin + slot, first), last)
    return position, (begin + slot == position) & (position < stop), first, last


@triton.jit
def bounds_of(position, length, axis, OF_KEYS: tl.constexpr):
    """What a pixel streams: a query its keys, a key its queries."""
    if OF_KEYS:
        return queries_of(position, length, axis)
    return keys_of(position, length, axis)


@triton.jit
def own_tile(place, y, x, OF_KEYS: tl.constexpr, OWN: tl.constexpr):
    """The tile of a program."""
    slot = tl.arange(0, OWN)
    own_y, valid_y, first_y, last_y = owned(place.tile_y, slot // x.tile, place.length_y, y)
    own_x, valid_x, first_x, last_x = owned(place.tile_x, slot % x.tile, place.length_x, x)
    low_y, high_y = bounds_of(own_y, place.length_y, y, OF_KEYS)
    low_x, high_x = bounds_of(own_x, place.length_x, x, OF_KEYS)
    # Both bounds grow with the position.
    start_y, inner_stop_y = bounds_of(first_y, place.length_y, y, OF_KEYS)
    start_x, inner_stop_x = bounds_of(first_x, place.length_x, x, OF_KEYS)
    inner_start_y, stop_y = bounds_of(last_y, place.length_y, y, OF_KEYS)
    inner_start_x, stop_x = bounds_of(last_x, place.length_x, x, OF_KEYS)
    return Tile(
        own_y,
        own_x,
        first_y,
        first_x,
        valid_y & valid_x,
        low_y,
        high_y,
        low_x,
        high_x,
        start_y,
        stop_y,
        start_x,
        stop_x,
        inner_start_y,
        inner_stop_y,
        inner_start_x,
        inner_stop_x,
    )


@triton.jit
def stream_length(own, STRIP: tl.constexpr, OTHERS: tl.constexpr):
    """How many tiles the rectangle of an own tile has."""
    wide = tl.cdiv(own.stop_x - own.start_x, STRIP)
    return tl.cdiv(own.stop_y - own.start_y, OTHERS // STRIP) * wide


@triton.jit
def stream(
    number, own, place, MASK: tl.constexpr, ZERO: tl.constexpr, STRIP: tl.constexpr, OTHERS: tl.constexpr
):
    """A tile of the rectangle of an own tile."""
    wide = tl.cdiv(own.stop_x - own.start_x, STRIP)
    first_y = own.start_y + number // wide * (OTHERS // STRIP)
    first_x = own.start_x + number % wide * STRIP
    slot = tl.arange(0, OTHERS)
    y, x = first_y + slot // STRIP, first_x + slot % STRIP
    seen = tl.full([OTHERS], 1, tl.int1) if MASK == "none" else (y < own.stop_y) & (x < own.stop_x)
    inside = seen & on_map(y, x, place) if ZERO else seen
    return Streamed(y, x, seen, inside, first_y, first_x)


@triton.jit
def on_map(y, x, place):
    """Which pixels are no zero keys."""
    return (y >= 0) & (y < place.length_y) & (x >= 0) & (x < place.length_x)


@triton.jit
def anchored(
    chunk_y, chunk_x, own, place, y, x, start, DENSE: tl.constexpr, STRIP: tl.constexpr, OTHERS: tl.constexpr
):
    """A tile of keys whose places in the bias are the same for all own tiles of the same part of a span.

    A table is about places relative to the query, a dense bias about places in the run of keys; in both, the
    `chunk_y`, `chunk_x`-th tile of keys from `start` behind the beginning of the span, or of the run.
    """
    if DENSE:
        begin_y = run_begin(own.y_first, place.length_y, y)
        begin_x = run_begin(own.x_first, place.length_x, x)
    else:
        begin_y, begin_x = span_of(place.tile_y, y), span_of(place.tile_x, x)
    first_y = begin_y + start[0] + chunk_y * (OTHERS // STRIP)
    first_x = begin_x + start[1] + chunk_x * STRIP
    slot = tl.arange(0, OTHERS)
    key_y, key_x = first_y + slot // STRIP, first_x + slot % STRIP
    seen = (key_y >= own.start_y) & (key_y < own.stop_y) & (key_x >= own.start_x) & (key_x < own.stop_x)
    return Streamed(key_y, key_x, seen, seen & on_map(key_y, key_x, place), first_y, first_x)


@triton.jit
def part_of_keys(key_y, key_x, columns):
    """What a key adds to the place of a pair in a bias, be it a table or dense: both are rows of keys."""
    return key_y * columns + key_x


@triton.jit
def part_of_queries(query_y, query_x, place, y, x, columns, DENSE: tl.constexpr):
    """What a query adds to the place of a pair in a bias."""
    if DENSE:
        row = (query_y - block_begin(query_y, y)) * x.window + query_x - block_begin(query_x, x)
        origin = run_begin(query_y, place.length_y, y) * columns + run_begin(query_x, place.length_x, x)
        return row * (y.key_window * x.key_window) - origin
    return (y.reach - query_y) * columns + x.reach - query_x


@triton.jit
def biased(logits, bias, own_part, others_part):
    """Logits of pairs that all see each other, with their bias."""
    if bias is not None:
        entry = tl.load(bias + own_part[:, None] + others_part[None, :])
        logits += entry.to(tl.float32) * LOG2_E
    return logits


@triton.jit
def masked(logits, bias, last_entry, own_part, others_part, visible):
    """Logits with their bias, -inf where not visible."""
    if bias is not None:
        # Pairs that are not visible read any entry: keeping the place inside the bias takes far fewer
        # registers than a mask in the layout of the load.
        entry = tl.minimum(tl.maximum(own_part[:, None] + others_part[None, :], 0), last_entry)
        logits += tl.load(bias + entry).to(tl.float32) * LOG2_E
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def visible_pairs(own, others):
    """Which pairs of an own and a streamed tile see each other."""
    visible = (own.low_y[:, None] <= others.y[None, :]) & (others.y[None, :] < own.high_y[:, None])
    return visible & (own.low_x[:, None] <= others.x[None, :]) & (others.x[None, :] < own.high_x[:, None])


@triton.jit
def scores(
    own_rows,
    other_rows,
    own,
    others,
    bias,
    last_entry,
    own_part,
    others_part,
    scale,
    MASK: tl.constexpr,
    STRIP: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 logits `[own, others]` of queries and keys, -inf for pairs that do not see each other.

    `bias` is None or that of the head, up to `last_entry`; `own_part` and `others_part` add up to the entry
    of a pair.
    """
    logits = tl.dot(own_rows, tl.trans(other_rows), input_precision=PRECISION) * (scale * LOG2_E)
    if MASK == "none":
        logits = biased(logits, bias, own_part, others_part)
    elif MASK == "rectangle":
        logits = masked(logits, bias, last_entry, own_part, others_part, others.seen[None, :])
    elif MASK == "pairs":
        logits = masked(logits, bias, last_entry, own_part, others_part, visible_pairs(own, others))
    else:
        whole = (others.first_y >= own.inner_start_y) & (others.first_x >= own.inner_start_x)
        whole &= others.first_y + OTHERS // STRIP <= own.inner_stop_y
        whole &= others.first_x + STRIP <= own.inner_stop_x
        if whole:
            logits = biased(logits, bias, own_part, others_part)
        else:
            logits = masked(logits, bias, last_entry, own_part, others_part, visible_pairs(own, others))
    return logits


def choose_tiling(
    q: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    owner: Owner,
    in_block: bool = False,
    hip: bool = torch.version.hip is not None,
    most_own: int = 64,
    most_others: int = 64,
) -> tuple[Tiling, dict[str, Any]]:
    """The tiling for these shapes, and constants and options to launch a kernel with.

    Chosen so that the compiled kernels keep their numbers in registers; the tests assert it.
    """
    dim = padded_head_dim(q)
    single = q.dtype == torch.float32
    wide, widest = single or dim > 64, dim > 128
    # Products in float32 do not run on matrix units and take registers for their operands.
    most_own = 32 if widest or single else most_own
    most_others = 16 if widest else 32 if wide else most_others
    tiles = tiling(pattern, owner, most_own, most_others, in_block)
    gathers = bias is not None and not tiles.single
    if gathers:
        # Every score gathers an entry, whose address takes two registers.
        tiles = tiling(pattern, owner, most_own, min(most_others, 32), in_block)
    num_warps = (2 if tiles.own < 64 else 4) * (2 if wide and not hip else 1)
    if widest or (single and dim > 32) or (owner == "key" and gathers and 32 < dim <= 64 and not hip):
        num_warps *= 2
    return tiles, {
        "HEAD_DIM": q.shape[4],
        "BLOCK_D": dim,
        "OWN": tiles.own,
        "OTHERS": tiles.others,
        "STRIP": tiles.strip,
        "MASK": tiles.mask,
        "SINGLE": tiles.single,
        "ZERO": "zero" in (pattern.y.border, pattern.x.border),
        "PRECISION": precision(q),
        "num_warps": num_warps,
        "num_stages": 1 if wide else 2,
    }
