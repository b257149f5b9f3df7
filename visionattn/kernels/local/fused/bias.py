"""The fused gradient of a bias: sums over all images and tiles of the gradients of equal pairs.

A tile of queries and a tile of keys at a fixed distance from it meet the same entries of a bias all over the
map. A program adds the gradients of their logits up over a share of the images and tiles; the shares, and the
pairs of one entry, are then added in a fixed order.
"""

# Inside kernels, constants and shapes follow Triton's rules.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels.local.fused.geometry import (
    anchored,
    base_of,
    choose_tiling,
    offset_of,
    own_tile,
    part_of_keys,
    part_of_queries,
    placed,
    scores,
)
from visionattn.kernels.local.fused.tiling import Tiling
from visionattn.kernels.local.pattern import Pattern
from visionattn.kernels.triton_rows import LOG2_E, load_rows, padded_head_dim

# Programs that share the work: several for each of the processors of a large GPU.
_PROGRAMS = 1024


@dataclass(frozen=True)
class PairTiling:
    """A tiling of queries in which every pair of slots meets one entry of the bias wherever the tile lies.

    Attributes:
        tiles: the tiling of the queries.
        options: constants and options for the kernels.
        is_dense: whether the gradient is that of a dense bias, otherwise of a table.
        start: the first row and column of keys, from the beginning of a span or, if dense, of a run.
        chunks: tiles of keys from there on, in rows and columns.
    """

    tiles: Tiling
    options: dict[str, Any]
    is_dense: bool
    start: tuple[int, int]
    chunks: tuple[int, int]

    @property
    def is_closed(self) -> bool:
        """Whether a program meets all pairs of its queries and of its keys."""
        return self.tiles.closed and self.tiles.parts == 1 and self.chunks == (1, 1)

    def steps(self, batch: int) -> int:
        """Spans of all images of one head."""
        return batch * self.tiles.programs // self.tiles.parts

    def slices(self, batch: int, heads: int) -> int:
        """Into how many shares the spans are divided when their gradients are added up."""
        kinds = heads * self.tiles.parts * self.chunks[0] * self.chunks[1]
        return max(1, min(self.steps(batch), _PROGRAMS // kinds))


def pair_tiling(
    q: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    add: bool,
    hip: bool = torch.version.hip is not None,
) -> PairTiling:
    """The tiling for the gradients of pairs, which are to be added up for that of the bias if `add`."""
    is_dense = add and bias is not None and bias.shape[1:] != pattern.table_shape
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
    del options["SINGLE"], options["ZERO"]
    if tiles.closed and tiles.own == 64:
        options |= {"num_warps": 4 if bias is None or hip else 8, "num_stages": 1}
    chunks = tuple(-(-(high - low) // size) for low, high, size in zip(start, stop, sizes))
    return PairTiling(tiles, options, is_dense, start, (chunks[0], chunks[1]))


@triton.jit
def store_partial(partial, number, acc, OWN: tl.constexpr, OTHERS: tl.constexpr):
    """Write the sums `[OWN, OTHERS]` of a program."""
    row, column = tl.arange(0, OWN)[:, None], tl.arange(0, OTHERS)[None, :]
    tl.store(partial + number.to(tl.int64) * (OWN * OTHERS) + row * OTHERS + column, acc)


@triton.jit
def bias_kernel(
    q,
    k,
    v,
    bias,
    lse,
    grad_out,
    delta,
    partial,
    scale,
    strides,
    rows,
    y,
    x,
    heads,
    bias_entries,
    bias_columns,
    start,
    chunks_y,
    chunks_x,
    steps,
    slices,
    DENSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
    STRIP: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums, over a share of the spans, of the logits' gradients of one head, part of a span and tile of keys.

    The key tile stands still while the rectangles of the queries move: `MASK` must be "pairs".
    """
    program = tl.program_id(0)
    chunk_y, chunk_x = program // chunks_x % chunks_y, program % chunks_x
    tile = program // (chunks_y * chunks_x)
    part_y, part_x = tile // x.parts % y.parts, tile % x.parts
    head = tile // (y.parts * x.parts) % heads
    piece = tile // (y.parts * x.parts * heads)
    spans_y, spans_x = y.tiles * y.dilation // y.parts, x.tiles * x.dilation // x.parts
    bias += head * bias_entries
    acc = tl.zeros([OWN, OTHERS], tl.float32)
    for turn in range(tl.cdiv(steps - piece, slices)):
        step = piece + turn * slices
        tile_y, tile_x = step // spans_x % spans_y * y.parts + part_y, step % spans_x * x.parts + part_x
        at = placed((step // (spans_x * spans_y)).to(tl.int64), head, tile_y, tile_x, y, x)
        own = own_tile(at, y, x, False, OWN)
        others = anchored(chunk_y, chunk_x, own, at, y, x, start, DENSE, STRIP, OTHERS)
        meet_y = (others.first_y < own.stop_y) & (others.first_y + OTHERS // STRIP > own.start_y)
        meet_x = (others.first_x < own.stop_x) & (others.first_x + STRIP > own.start_x)
        if meet_y & meet_x:
            begin = base_of(at, strides)
            offset = offset_of(others.y, others.x, strides, y, x)
            query = load_rows(q + begin, offset_of(own.y, own.x, strides, y, x), own.valid, HEAD_DIM, BLOCK_D)
            key = load_rows(k + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
            value = load_rows(v + begin, offset, others.inside, HEAD_DIM, BLOCK_D)
            first = base_of(at, rows)
            row = offset_of(own.y, own.x, rows, y, x)
            grad = load_rows(grad_out + first * HEAD_DIM, row * HEAD_DIM, own.valid, HEAD_DIM, BLOCK_D)
            drop = tl.load(delta + first + row, mask=own.valid, other=0.0)
            norm = tl.load(lse + first + row, mask=own.valid, other=float("inf")) * LOG2_E
            part = part_of_queries(own.y, own.x, at, y, x, bias_columns, DENSE)
            key_part = part_of_keys(others.y, others.x, bias_columns)
            logits = scores(
                query,
                key,
                own,
                others,
                bias,
                bias_entries - 1,
                part,
                key_part,
                scale,
                MASK,
                STRIP,
                OTHERS,
                PRECISION,
            )
            weights = tl.exp2(logits - norm[:, None])
            grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            acc += weights * (grad_weights - drop[:, None])
    store_partial(partial, program, acc, OWN, OTHERS)


def sum_pairs(kernel: Any, pairs: PairTiling, add: bool, q: Tensor, **arguments: Any) -> Tensor | None:
    """Run `bias_kernel` or the kernel of windows, and return the sums of its programs if `add`."""
    batch, heads = q.shape[0], q.shape[3]
    tiles, options = pairs.tiles, dict(pairs.options)
    steps = pairs.steps(batch)
    slices = pairs.slices(batch, heads) if add else steps
    programs = heads * tiles.parts * pairs.chunks[0] * pairs.chunks[1]
    partial = None
    if add:
        partial = torch.empty(slices, programs, tiles.own, tiles.others, dtype=torch.float32, device=q.device)
    if kernel is bias_kernel:
        arguments |= {"chunks_y": pairs.chunks[0], "chunks_x": pairs.chunks[1]}
        options["MASK"] = "pairs"
    kernel[(slices * programs,)](
        q=q,
        partial=partial,
        y=tiles.y,
        x=tiles.x,
        start=pairs.start,
        steps=steps,
        slices=slices,
        **arguments,
        **options,
    )
    return partial


def gradient_of_bias(partial: Tensor, pairs: PairTiling, pattern: Pattern, bias: Tensor) -> Tensor:
    """The gradient of the bias from the sums `[slices, programs of a slice, own, others]` of all programs."""
    y, x, strip = pairs.tiles.y, pairs.tiles.x, pairs.tiles.strip
    sums = partial.sum(0).unflatten(0, (bias.shape[0], y.parts, x.parts, *pairs.chunks))
    sums = sums[..., : y.tile * x.tile, :].unflatten(-2, (y.tile, x.tile)).unflatten(-1, (-1, strip))
    # Heads, rows and columns of queries, rows and columns of keys.
    sums = sums.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    if pairs.is_dense:
        # Cut to the block and its run of keys, or filled up where the map is smaller.
        sizes = y.window, x.window, y.key_window, x.key_window
        ends = [(0, size - given) for size, given in zip(sizes, sums.shape[1:])]
        sums = F.pad(sums, [n for end in reversed(ends) for n in end])
        return sums.reshape(bias.shape).to(bias.dtype)
    sums = _by_distance(sums.permute(0, 2, 4, 1, 3), pairs.start[0], y.reach)
    sums = _by_distance(sums.permute(0, 3, 1, 2), pairs.start[1], x.reach)
    return sums.to(bias.dtype).contiguous()


def _by_distance(x: Tensor, start: int, reach: int) -> Tensor:
    """Sums over the diagonals of `[..., queries, keys]`: `[..., 2 * reach + 1]`, key - query from -reach on.

    `start` is the position of the first key, the first query being at 0.
    """
    queries, keys = x.shape[-2:]
    width = queries + keys - 1
    # Written behind one another and read in rows one shorter, every row moves by one more than the last.
    x = F.pad(x.flip(-2), (0, queries)).flatten(-2)[..., : queries * width]
    x = x.unflatten(-1, (queries, width)).sum(-2)
    low = start + reach - (queries - 1)
    return F.pad(x, (low, 2 * reach + 1 - low - width))
