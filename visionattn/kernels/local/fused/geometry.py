"""The geometry of `pattern.py` inside the fused kernels: pixels that a program owns, and those it streams.

Positions count steps of an axis's dilation inside one of its groups.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.tiling import Mask, Owner, TiledAxis, Tiling, tiling
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import Strides, load_rows, padded_head_dim, precision, store_rows


class Geometry(NamedTuple):
    """The numbers that all kernels take.

    Attributes:
        strides: of q, k and v.
        rows: of contiguous maps like q, counted in vectors.
        y: the rows and their tiles.
        x: the columns and their tiles.
        heads: attention heads.
        bias_entries: numbers of the bias of a head.
        bias_columns: how many entries lie between one row of keys and the next.
    """

    strides: Strides
    rows: Strides
    y: TiledAxis
    x: TiledAxis
    heads: int
    bias_entries: int
    bias_columns: int


class Form(NamedTuple):
    """The constants that a kernel is compiled for.

    Attributes:
        head_dim: width of a head.
        block_d: the power of 2 that it is filled up to.
        own: slots of an own tile; this and the next three as in `Tiling`.
        others: slots of a streamed tile.
        strip: width of a streamed tile.
        mask: which masks the scores need.
        single: whether every rectangle is a single streamed tile.
        zero: whether keys beyond the map are zero keys.
        of_keys: whether the own tiles are keys, and the others queries.
        dense: whether the bias is dense.
        precision: how products of float32 are computed.
    """

    head_dim: int
    block_d: int
    own: int
    others: int
    strip: int
    mask: Mask
    single: bool
    zero: bool
    of_keys: bool
    dense: bool
    precision: str


class Member(NamedTuple):
    """A tile along one axis: residue and length of its group, and its number among the tiles of that."""

    residue: Any
    length: Any
    tile: Any


class Place(NamedTuple):
    """The place where a program works: image (int64), head, and the tile along both axes."""

    batch: Any
    head: Any
    y: Member
    x: Member


class Owned(NamedTuple):
    """The pixels of an own tile along one axis, one for each slot, and what they stream.

    Slots beyond the tile or the map repeat a pixel inside, so that everything computed from them is ordinary;
    `valid` is false there. A slot streams pixels from `low` to before `high`; from `start` to before `stop`
    reaches the rectangle of the tile, from `inner_start` to before `inner_stop` what all its pixels stream.
    """

    position: Any
    valid: Any
    first: Any
    low: Any
    high: Any
    start: Any
    stop: Any
    inner_start: Any
    inner_stop: Any


class Tile(NamedTuple):
    """An own tile: its pixels, which slots are valid, and both axes."""

    y: Any
    x: Any
    valid: Any
    rows: Owned
    columns: Owned


class Streamed(NamedTuple):
    """A streamed tile: its pixels, its first row and column, and which of its pixels are `valid`: inside the
    rectangle (`seen`) and no zero keys."""

    y: Any
    x: Any
    first_y: Any
    first_x: Any
    seen: Any
    valid: Any


@triton.jit
def floor_div(a, b):
    """Divide by a positive b and round down; Triton's own division rounds towards zero."""
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))


@triton.jit
def block_begin(position, axis):
    """Find where the block of a query begins."""
    return floor_div(position - axis.shift, axis.window) * axis.window + axis.shift


@triton.jit
def key_window_begin(position, length, axis):
    """Find where the key window of a query begins, be it before the map."""
    begin = block_begin(position, axis) - axis.before
    if axis.border == "clamp":
        begin = tl.minimum(tl.maximum(begin, 0), length - axis.key_window)
    return begin


@triton.jit
def keys_of(position, length, axis):
    """Find the first key that a query sees, and the one behind the last."""
    begin = key_window_begin(position, length, axis)
    stop = begin + axis.key_window
    if axis.border == "mask":
        begin, stop = tl.maximum(begin, 0), tl.minimum(stop, length)
    if axis.is_causal:
        stop = tl.minimum(stop, position + 1)
    return begin, stop


@triton.jit
def queries_of(position, length, axis):
    """Find the first query that sees a key, and the one behind the last: they are always contiguous."""
    reaching = position - axis.shift + axis.before
    start = (floor_div(reaching - axis.key_window, axis.window) + 1) * axis.window + axis.shift
    stop = (floor_div(reaching, axis.window) + 1) * axis.window + axis.shift
    if axis.border == "clamp":
        # Key windows move inwards at the border: the outermost keys are seen from there on.
        start = tl.where(position < axis.key_window, 0, start)
        stop = tl.where(position >= length - axis.key_window, length, stop)
    if axis.is_causal:
        start = tl.maximum(start, position)
    return tl.maximum(start, 0), tl.minimum(stop, length)


@triton.jit
def place(program, g):
    """Decode the number of a program; the heads of a tile are neighbours, so that they share the cache."""
    tiles_y, tiles_x = g.y.tiles * g.y.dilation, g.x.tiles * g.x.dilation
    tile = program // g.heads
    batch = (tile // (tiles_x * tiles_y)).to(tl.int64)
    return placed(batch, program % g.heads, tile // tiles_x % tiles_y, tile % tiles_x, g)


@triton.jit
def placed(batch, head, tile_y, tile_x, g):
    """Give the place of a tile by its numbers among those of all groups of an axis."""
    return Place(batch, head, member(tile_y, g.y), member(tile_x, g.x))


@triton.jit
def member(number, axis):
    """Find a tile in its group by its number among those of all groups."""
    residue = number // axis.tiles
    length = (axis.length - residue + axis.dilation - 1) // axis.dilation
    return Member(residue, length, number % axis.tiles)


@triton.jit
def base_of(at, strides):
    """Compute the offset (int64) of the first pixel of a group."""
    begin = at.batch * strides.b + at.head * strides.h
    return begin + at.y.residue * strides.y + at.x.residue * strides.x


@triton.jit
def offset_of(pixels, strides, g):
    """Compute the offsets of the pixels of a tile from the first of their group."""
    return pixels.y * (g.y.dilation * strides.y) + pixels.x * (g.x.dilation * strides.x)


@triton.jit
def load_pixels(maps, at, pixels, valid, g, FORM: tl.constexpr):
    """Read the vectors of a tile from q, k or v."""
    offset = offset_of(pixels, g.strides, g)
    return load_rows(maps + base_of(at, g.strides), offset, valid, FORM.head_dim, FORM.block_d)


@triton.jit
def load_vectors(maps, at, pixels, valid, g, FORM: tl.constexpr):
    """Read the vectors of a tile from a contiguous map like q."""
    first, row = base_of(at, g.rows) * FORM.head_dim, offset_of(pixels, g.rows, g) * FORM.head_dim
    return load_rows(maps + first, row, valid, FORM.head_dim, FORM.block_d)


@triton.jit
def store_vectors(maps, at, pixels, valid, vectors, g, FORM: tl.constexpr):
    """Write what `load_vectors` reads."""
    first, row = base_of(at, g.rows) * FORM.head_dim, offset_of(pixels, g.rows, g) * FORM.head_dim
    store_rows(maps + first, row, valid, vectors, FORM.head_dim, FORM.block_d)


@triton.jit
def numbers_of(maps, at, pixels, g):
    """Point at the numbers of a tile in a contiguous map of one number for each vector of q."""
    return maps + base_of(at, g.rows) + offset_of(pixels, g.rows, g)


@triton.jit
def cell_begin(tile, axis):
    """Find where the cell of a tile begins."""
    return axis.first + tile // axis.parts * axis.cell


@triton.jit
def streamed_by(position, length, axis, FORM: tl.constexpr):
    """Find the first pixel that a pixel streams, and the one behind the last."""
    if FORM.of_keys:
        return queries_of(position, length, axis)
    return keys_of(position, length, axis)


@triton.jit
def owned(slot, group, axis, FORM: tl.constexpr):
    """Find the pixels of an own tile along one axis."""
    cell = cell_begin(group.tile, axis)
    begin = cell + group.tile % axis.parts * axis.tile
    end = tl.minimum(tl.minimum(begin + axis.tile, cell + axis.cell), group.length)
    last = tl.maximum(end - 1, 0)
    first = tl.minimum(tl.maximum(begin, 0), last)
    position = tl.minimum(tl.maximum(begin + slot, first), last)
    valid = (begin + slot == position) & (position < end)
    low, high = streamed_by(position, group.length, axis, FORM)
    # Both bounds grow with the position.
    start, inner_stop = streamed_by(first, group.length, axis, FORM)
    inner_start, stop = streamed_by(last, group.length, axis, FORM)
    return Owned(position, valid, first, low, high, start, stop, inner_start, inner_stop)


@triton.jit
def own_tile(at, g, FORM: tl.constexpr):
    """Find the own tile of a program."""
    slot = tl.arange(0, FORM.own)
    rows, columns = owned(slot // g.x.tile, at.y, g.y, FORM), owned(slot % g.x.tile, at.x, g.x, FORM)
    return Tile(rows.position, columns.position, rows.valid & columns.valid, rows, columns)


@triton.jit
def stream_length(own, FORM: tl.constexpr):
    """Count the tiles of the rectangle of an own tile."""
    wide = tl.cdiv(own.columns.stop - own.columns.start, FORM.strip)
    return tl.cdiv(own.rows.stop - own.rows.start, FORM.others // FORM.strip) * wide


@triton.jit
def stream(number, own, at, FORM: tl.constexpr):
    """Find a tile of the rectangle of an own tile."""
    wide = tl.cdiv(own.columns.stop - own.columns.start, FORM.strip)
    first_y = own.rows.start + number // wide * (FORM.others // FORM.strip)
    first_x = own.columns.start + number % wide * FORM.strip
    slot = tl.arange(0, FORM.others)
    y, x = first_y + slot // FORM.strip, first_x + slot % FORM.strip
    if FORM.mask == "none":
        seen = tl.full([FORM.others], 1, tl.int1)
    else:
        seen = (y < own.rows.stop) & (x < own.columns.stop)
    valid = seen
    if FORM.zero and not FORM.of_keys:
        valid = seen & on_map(y, x, at)
    return Streamed(y, x, first_y, first_x, seen, valid)


@triton.jit
def on_map(y, x, at):
    """Tell the pixels of the map from zero keys."""
    return (y >= 0) & (y < at.y.length) & (x >= 0) & (x < at.x.length)


@triton.jit
def anchored(number_y, number_x, own, at, start, g, FORM: tl.constexpr):
    """Find a tile of keys that meets the same entries of the bias in all cells.

    A table is about distances from the query, a dense bias about places in the key window. So, from `start`
    behind the beginning of the cell, or of the key window, it is the `number_y`, `number_x`-th tile of keys.
    """
    if FORM.dense:
        begin_y = key_window_begin(own.rows.first, at.y.length, g.y)
        begin_x = key_window_begin(own.columns.first, at.x.length, g.x)
    else:
        begin_y, begin_x = cell_begin(at.y.tile, g.y), cell_begin(at.x.tile, g.x)
    first_y = begin_y + start[0] + number_y * (FORM.others // FORM.strip)
    first_x = begin_x + start[1] + number_x * FORM.strip
    slot = tl.arange(0, FORM.others)
    y, x = first_y + slot // FORM.strip, first_x + slot % FORM.strip
    seen = (y >= own.rows.start) & (y < own.rows.stop)
    seen = seen & (x >= own.columns.start) & (x < own.columns.stop)
    return Streamed(y, x, first_y, first_x, seen, seen & on_map(y, x, at))


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
    """Choose the tiling for these shapes, and the constants and options to launch a kernel with.

    Chosen so that the compiled kernels keep their numbers in registers; the tests assert it.
    """
    dim = padded_head_dim(q)
    is_float32 = q.dtype == torch.float32
    wide, widest = is_float32 or dim > 64, dim > 128
    # Products in float32 do not run on matrix units and take registers for their operands.
    most_own = 32 if widest or is_float32 else most_own
    most_others = 16 if widest else 32 if wide else most_others
    tiles = tiling(pattern, owner, most_own, most_others, in_block)
    gathers = bias is not None and not tiles.single
    if gathers:
        # Every score gathers an entry, whose address takes two registers.
        tiles = tiling(pattern, owner, most_own, min(most_others, 32), in_block)
    num_warps = (2 if tiles.own < 64 else 4) * (2 if wide and not hip else 1)
    if widest or (is_float32 and dim > 32) or (owner == "key" and gathers and 32 < dim <= 64 and not hip):
        num_warps *= 2
    form = Form(
        q.shape[4],
        dim,
        tiles.own,
        tiles.others,
        tiles.strip,
        tiles.mask,
        tiles.single,
        zero="zero" in (pattern.y.border, pattern.x.border),
        of_keys=owner == "key",
        dense=bias is not None and not pattern.is_table(bias),
        precision=precision(q),
    )
    return tiles, {"FORM": form, "num_warps": num_warps, "num_stages": 1 if wide else 2}


def geometry(q: Tensor, bias: Tensor | None, pattern: Pattern, tiles: Tiling) -> Geometry:
    """Collect the numbers that all kernels take; words among them are constants for Triton."""
    _, height, width, heads, _ = q.shape
    y, x = (
        axis._replace(border=tl.constexpr(axis.border), is_causal=tl.constexpr(axis.is_causal))
        for axis in (tiles.y, tiles.x)
    )
    is_table = bias is None or pattern.is_table(bias)
    return Geometry(
        Strides(*q.stride()[:4]),
        Strides(height * width * heads, width * heads, heads, 1),
        y,
        x,
        heads,
        0 if bias is None else bias[0].numel(),
        pattern.table_shape[1] if is_table else pattern.x.key_window,
    )
