"""The fused gradient of a bias: sums over all images and tiles of the gradients of equal pairs.

A tile of queries and a tile of keys at a fixed distance from it meet the same entries of a bias all over the
map. A program adds the gradients of their logits up over a share of the images and tiles; the shares, and the
pairs of one entry, are then added in a fixed order.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.geometry import (
    anchored,
    choose_tiling,
    geometry,
    load_pixels,
    load_vectors,
    numbers_of,
    own_tile,
    placed,
)
from visionattn.kernels.local.fused.scores import part_of_own, scores
from visionattn.kernels.local.fused.tiling import Tiling
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import LOG2_E, padded_head_dim

# Programs that share the work: several for each of the processors of a large GPU.
_PROGRAMS = 1024


class Share(NamedTuple):
    """The share of the cells that a program adds up.

    Attributes:
        start: the first row and column of keys, from the beginning of a cell or, if dense, of a key window.
        key_tiles: tiles of keys from there on, in rows and columns.
        steps: cells of all images of one head.
        slices: a program takes every `slices`-th of them.
    """

    start: tuple[int, int]
    key_tiles: tuple[int, int]
    steps: int
    slices: int


@dataclass(frozen=True)
class PairTiling:
    """A tiling of queries in which every pair of slots meets one entry of the bias wherever the tile lies.

    Attributes:
        tiles: the tiling of the queries.
        options: constants and options for the kernels.
        is_dense: whether the gradient is that of a dense bias, otherwise of a table.
        start: as in `Share`.
        key_tiles: likewise.
    """

    tiles: Tiling
    options: dict[str, Any]
    is_dense: bool
    start: tuple[int, int]
    key_tiles: tuple[int, int]

    @property
    def is_closed(self) -> bool:
        """Whether a program meets all pairs of its queries and of its keys."""
        return self.tiles.closed and self.tiles.parts == 1 and self.key_tiles == (1, 1)

    @property
    def programs(self) -> int:
        """Programs that one head needs for all pairs of a cell."""
        return self.tiles.parts * self.key_tiles[0] * self.key_tiles[1]

    def share(self, batch: int, heads: int, add: bool) -> Share:
        """Divide the cells into shares; each is a single cell unless gradients are to be added up."""
        steps = batch * self.tiles.programs // self.tiles.parts
        slices = max(1, min(steps, _PROGRAMS // (heads * self.programs))) if add else steps
        return Share(self.start, self.key_tiles, steps, slices)


def pair_tiling(
    q: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    add: bool,
    hip: bool = torch.version.hip is not None,
) -> PairTiling:
    """Choose the tiling for the gradients of pairs, which are added up to that of the bias if `add`."""
    is_dense = add and bias is not None and not pattern.is_table(bias)
    dim, args = padded_head_dim(q), (q, bias, pattern, "query", is_dense, hip)
    most_others = 32 if dim > 32 and bias is not None else 64
    tiles, options = choose_tiling(*args, most_others=most_others)
    # Five products at once, and their sums where there is a bias, fill the registers.
    if tiles.closed and dim > 64:
        tiles, options = choose_tiling(*args, most_own=32, most_others=most_others)
    start, stop = tiles.start, tiles.stop
    if is_dense:
        start, stop = (0, 0), (pattern.y.key_window, pattern.x.key_window)
    sizes = tiles.others // tiles.strip, tiles.strip
    if tiles.closed and tiles.own == 64:
        options |= {"num_warps": 4 if bias is None or hip else 8, "num_stages": 1}
    y, x = (-(-(high - low) // size) for low, high, size in zip(start, stop, sizes))
    return PairTiling(tiles, options, is_dense, start, (y, x))


@triton.jit
def store_partial(partial, number, acc, FORM: tl.constexpr):
    """Write the sums `[own, others]` of a program."""
    row, column = tl.arange(0, FORM.own)[:, None], tl.arange(0, FORM.others)[None, :]
    base = partial + number.to(tl.int64) * (FORM.own * FORM.others)
    tl.store(base + row * FORM.others + column, acc)


@triton.jit
def bias_kernel(q, k, v, bias, lse, grad_out, delta, partial, scale, g, share, FORM: tl.constexpr):
    """Sum the logits' gradients of one head, part of a cell and tile of keys over a share of the cells.

    The key tile stands still while the rectangles of the queries move: the mask must be "pairs".
    """
    program = tl.program_id(0)
    wide, high = share.key_tiles[1], share.key_tiles[0]
    number_y, number_x = program // wide % high, program % wide
    tile = program // (high * wide)
    part_y, part_x = tile // g.x.parts % g.y.parts, tile % g.x.parts
    head = tile // (g.y.parts * g.x.parts) % g.heads
    piece = tile // (g.y.parts * g.x.parts * g.heads)
    cells_y, cells_x = g.y.tiles * g.y.dilation // g.y.parts, g.x.tiles * g.x.dilation // g.x.parts
    acc = tl.zeros([FORM.own, FORM.others], tl.float32)
    for turn in range(tl.cdiv(share.steps - piece, share.slices)):
        step = piece + turn * share.slices
        tile_y = step // cells_x % cells_y * g.y.parts + part_y
        tile_x = step % cells_x * g.x.parts + part_x
        at = placed((step // (cells_x * cells_y)).to(tl.int64), head, tile_y, tile_x, g)
        own = own_tile(at, g, FORM)
        others = anchored(number_y, number_x, own, at, share.start, g, FORM)
        meet_y = (others.first_y < own.rows.stop) & (
            others.first_y + FORM.others // FORM.strip > own.rows.start
        )
        meet_x = (others.first_x < own.columns.stop) & (others.first_x + FORM.strip > own.columns.start)
        if meet_y & meet_x:
            query = load_pixels(q, at, own, own.valid, g, FORM)
            key = load_pixels(k, at, others, others.valid, g, FORM)
            value = load_pixels(v, at, others, others.valid, g, FORM)
            grad = load_vectors(grad_out, at, own, own.valid, g, FORM)
            drop = tl.load(numbers_of(delta, at, own, g), mask=own.valid, other=0.0)
            norm = tl.load(numbers_of(lse, at, own, g), mask=own.valid, other=float("inf")) * LOG2_E
            part = part_of_own(own, bias, at, g, FORM)
            logits = scores(query, key, own, others, bias, part, at, scale, g, FORM)
            weights = tl.exp2(logits - norm[:, None])
            grad_weights = tl.dot(grad, tl.trans(value), input_precision=FORM.precision)
            acc += weights * (grad_weights - drop[:, None])
    store_partial(partial, program, acc, FORM)


def sum_pairs(
    kernel: Any,
    pairs: PairTiling,
    pattern: Pattern,
    add: bool,
    q: Tensor,
    bias: Tensor | None,
    **arguments: Any,
) -> Tensor | None:
    """Run `bias_kernel` or the kernel of windows, and return the sums of its programs if `add`."""
    batch, heads = q.shape[0], q.shape[3]
    tiles, options, programs = pairs.tiles, dict(pairs.options), heads * pairs.programs
    share = pairs.share(batch, heads, add)
    partial = None
    if add:
        shape = share.slices, programs, tiles.own, tiles.others
        partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    if kernel is bias_kernel:
        options["FORM"] = options["FORM"]._replace(mask="pairs")
    arguments |= {"partial": partial, "g": geometry(q, bias, pattern, tiles), "share": share}
    kernel[(share.slices * programs,)](q=q, bias=bias, **arguments, **options)
    return partial


def gradient_of_bias(partial: Tensor, pairs: PairTiling, pattern: Pattern, bias: Tensor) -> Tensor:
    """Make the gradient of the bias from the sums `[slices, programs, own, others]` of all programs."""
    y, x, strip = pairs.tiles.y, pairs.tiles.x, pairs.tiles.strip
    sums = partial.sum(0).unflatten(0, (bias.shape[0], y.parts, x.parts, *pairs.key_tiles))
    sums = sums[..., : y.tile * x.tile, :].unflatten(-2, (y.tile, x.tile)).unflatten(-1, (-1, strip))
    # Heads, rows and columns of queries, rows and columns of keys.
    sums = sums.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if pairs.is_dense:
        # Cut to the block and its key window, or filled up where the map is smaller.
        sizes = y.window, x.window, y.key_window, x.key_window
        ends = [(0, size - given) for size, given in zip(sizes, sums.shape[1:])]
        sums = F.pad(sums, [n for end in reversed(ends) for n in end])
        return sums.reshape(bias.shape).to(bias.dtype)
    sums = _by_distance(sums.permute(0, 2, 4, 1, 3), pairs.start[0], y.reach)
    sums = _by_distance(sums.permute(0, 3, 1, 2), pairs.start[1], x.reach)
    return sums.to(bias.dtype).contiguous()


def _by_distance(x: Tensor, start: int, reach: int) -> Tensor:
    """Sum `[..., queries, keys]` over its diagonals: `[..., 2 * reach + 1]`, key - query from -reach on.

    `start` is the position of the first key, the first query being at 0.
    """
    queries, keys = x.shape[-2:]
    width = queries + keys - 1
    # Written behind one another and read in rows one shorter, every row moves by one more than the last.
    x = F.pad(x.flip(-2), (0, queries)).flatten(-2)[..., : queries * width]
    x = x.unflatten(-1, (queries, width)).sum(-2)
    low = start + reach - (queries - 1)
    return F.pad(x, (low, 2 * reach + 1 - low - width))
