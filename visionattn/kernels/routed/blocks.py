"""Attention between blocks of any shape: a partition of the pixels instead of regions of a grid."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from visionattn.kernels.checks import check_maps
from visionattn.kernels.grouped import grouped_heads
from visionattn.kernels.operator import leaf
from visionattn.kernels.routed.call import Call
from visionattn.kernels.routed.checks import check_integers, checked_lists
from visionattn.kernels.routed.library import ROUTED_ATTENTION
from visionattn.kernels.routed.lists import cut_to_longest, listed_regions


class Blocks(NamedTuple):
    """A partition of the N pixels of a map into blocks of any shape; a block may be empty.

    Attributes:
        order: `[B or 1, 1 or heads, N]` int32: the numbers of the pixels (row-major), block after block.
        starts: `[B or 1, 1 or heads, blocks + 1]` int32: block i is `order[starts[i] : starts[i + 1]]`.
    """

    order: Tensor
    starts: Tensor


def sort_blocks(labels: Tensor, blocks: int) -> Blocks:
    """Sort the pixels of a map by the block that each belongs to; inside a block they stay in order.

    Args:
        labels: `[B or 1, 1 or heads, N]` integers: the block of each pixel, pixels in row-major order.
        blocks: how many blocks there are.

    Raises:
        ValueError: labels that are no integers `[B, 1 or heads, N]` or name blocks that do not exist.
    """
    if labels.dim() != 3 or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "sort_blocks: labels must be [B or 1, 1 or heads, pixels] of int32 or int64, got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    is_checked = not torch.compiler.is_compiling() and labels.numel()
    if is_checked and (labels.min() < 0 or labels.max() >= blocks):
        raise ValueError(f"sort_blocks: labels must lie in 0 .. {blocks - 1}")
    listed, order = labels.sort(dim=-1, stable=True)
    bounds = torch.arange(blocks + 1, dtype=labels.dtype, device=labels.device)
    starts = torch.searchsorted(listed, bounds.expand(*labels.shape[:2], -1).contiguous(), out_int32=True)
    return Blocks(order.to(torch.int32), starts)


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    query_blocks: Blocks,
    key_blocks: Blocks,
    *,
    tile: int = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    query_blocks: Blocks,
    key_blocks: Blocks,
    *,
    tile: int = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@leaf
@grouped_heads(lists=1, query_blocks=1, key_blocks=1)
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    query_blocks: Blocks,
    key_blocks: Blocks,
    *,
    tile: int = 64,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Attention of each block of queries to the union of the blocks of keys on its list.

    `routed_attention` for clusters, buckets and chunks in place of regions. The pixels are sorted by block,
    every block is filled up to whole tiles, and the output is put back in the order of the map.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys `[B, height, width, heads, d]`, of the same map or of one of another size, with more or
            fewer heads by any factor (`kernels/grouped.py`).
        v: values, as the keys.
        lists: `[B or 1, 1 or heads, query blocks, n]` int32 or int64: the key blocks that each query block
            attends to; -1 is padding. A list of nothing but padding or empty blocks gives zeros and a
            log-sum-exp of -inf.
        query_blocks: partition of the pixels of q, as `sort_blocks` makes.
        key_blocks: partition of the pixels of k.
        tile: pixels that are computed at once; every block costs up to a tile more than its pixels.
        scale: multiplies q·k; `d ** -0.5` by default.
        return_lse: also return the natural log of the softmax denominator, differentiable.

    Returns:
        `[B, H, W, heads, d]`, contiguous; with `return_lse` also `[B, H, W, heads]`.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, a list names a block twice or one that does not
            exist, or a partition lacks a pixel. (Outside compiled graphs; on a GPU this waits for the
            device.)
    """
    name = "block_attention"
    pixels = check_maps(name, q, k, v)
    if tile < 1:
        raise ValueError(f"{name}: tile must be at least 1, got {tile}")
    for what, blocks, count in zip(("query_blocks", "key_blocks"), (query_blocks, key_blocks), pixels):
        _check_blocks(name, what, blocks, count, q)
    rows, columns = (blocks.starts.shape[2] - 1 for blocks in (query_blocks, key_blocks))
    lists = checked_lists(name, "lists", lists, q, rows, columns)
    own, others = (_tiles(blocks, tile, len(q)) for blocks in (query_blocks, key_blocks))
    # Lists of blocks become lists of tiles: those of the block that a tile belongs to.
    listed = listed_regions(lists, columns)
    listed = _take(listed, others.block, 3) & (others.count > 0)[:, :, None]
    listed = _take(listed, own.block, 2) & (own.count > 0)[..., None]
    numbers = torch.where(listed, torch.arange(listed.shape[3], device=q.device), listed.shape[3])
    numbers = numbers.sort(-1).values
    indices = cut_to_longest(numbers.masked_fill(numbers == listed.shape[3], -1).to(torch.int32))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    maps = _sorted(q, own), _sorted(k, others), _sorted(v, others)
    call = Call(indices, others.count, None, (1, tile), (1, tile), scale, return_lse, False)
    out, lse = ROUTED_ATTENTION(*maps, call)
    out = _unsorted(out, own, q)
    return out if lse is None else (out, _unsorted(lse[..., None], own, q).squeeze(-1))


class _Tiles(NamedTuple):
    """A partition cut into tiles; `lists` sets of them, one for all heads or one per head.

    Attributes:
        block: `[B, lists, tiles]` the block of each tile; the last one for tiles that there are not.
        count: `[B, lists, tiles]` int32, the pixels of each.
        pixel: `[B, lists, tiles * tile]` the pixel at each place; the first one where there is none.
        place: `[B, lists, N]` the place of each pixel.
    """

    block: Tensor
    count: Tensor
    pixel: Tensor
    place: Tensor


def _tiles(blocks: Blocks, tile: int, batch: int) -> _Tiles:
    order, starts = (x.long().expand(batch, -1, -1) for x in blocks)
    order, starts = order.contiguous(), starts.contiguous()
    sizes = starts.diff()
    ends = (-(-sizes // tile)).cumsum(-1)
    # How many tiles there may be at most; a compiled graph takes so many.
    most = (order.shape[2] + sizes.shape[2] * (tile - 1)) // tile
    if not torch.compiler.is_compiling():
        most = int(ends[..., -1].max()) if ends.numel() else 0
    numbers = torch.arange(most, device=order.device).expand(*ends.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, numbers, right=True).clamp(max=sizes.shape[2] - 1)
    first = numbers - (ends - -(-sizes // tile)).gather(2, block)
    count = (sizes.gather(2, block) - first * tile).clamp(0, tile)
    ranks = torch.arange(order.shape[2], device=order.device).expand_as(order).contiguous()
    own = torch.searchsorted(starts, ranks, right=True) - 1
    place = (ends - -(-sizes // tile)).gather(2, own) * tile + ranks - starts.gather(2, own)
    pixel = order.new_zeros((*order.shape[:2], most * tile)).scatter(2, place, order)
    return _Tiles(block, count.to(torch.int32), pixel, torch.empty_like(place).scatter(2, order, place))


def _take(x: Tensor, numbers: Tensor, axis: int) -> Tensor:
    """Entries of `x` `[B, lists, ...]` along an axis, by `numbers` `[B, lists, n]`; lists may be shared."""
    lists = max(x.shape[1], numbers.shape[1])
    x, numbers = x.expand(-1, lists, -1, -1), numbers.expand(-1, lists, -1)
    numbers = numbers[:, :, None] if axis == 3 else numbers[..., None]
    return x.gather(axis, numbers.expand(*(-1 if i == axis else n for i, n in enumerate(x.shape))))


def _sorted(x: Tensor, tiles: _Tiles) -> Tensor:
    """A map `[B, H, W, heads, d]` as one row of tiles `[B, 1, tiles * tile, heads, d]`."""
    return _rows_of(x.flatten(1, 2), tiles.pixel)[:, None]


def _unsorted(x: Tensor, tiles: _Tiles, like: Tensor) -> Tensor:
    """The inverse of `_sorted`, of as many pixels as `like` has."""
    return _rows_of(x[:, 0], tiles.place).contiguous().unflatten(1, like.shape[1:3])


def _rows_of(x: Tensor, numbers: Tensor) -> Tensor:
    """`[B, n, heads, d]` of `[B, N, heads, d]` by `numbers` `[B, 1 or heads, n]`."""
    numbers = numbers.transpose(1, 2)
    images = torch.arange(len(x), device=x.device)[:, None]
    if numbers.shape[2] == 1:
        return x[images, numbers[..., 0]]
    return x[images[..., None], numbers, torch.arange(x.shape[2], device=x.device)]


def _check_blocks(name: str, what: str, blocks: Blocks, pixels: int, q: Tensor) -> None:
    batch, _, _, heads, _ = q.shape
    for part, x in zip(("order", "starts"), blocks):
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            raise ValueError(
                f"{name}: {what}.{part} must be [{batch} or 1, 1 or {heads}, n], got {tuple(x.shape)}"
            )
        check_integers(name, f"{what}.{part}", x, q)
    order, starts = blocks
    if order.shape[:2] != starts.shape[:2] or order.shape[2] != pixels or starts.shape[2] < 2:
        raise ValueError(
            f"{name}: {what} has order {tuple(order.shape)} and starts {tuple(starts.shape)}; needed are "
            f"{pixels} pixels, and starts of one block or more with an end, for the same images and heads"
        )
    if torch.compiler.is_compiling() or not order.numel():
        return
    if not (order.sort(-1).values == torch.arange(pixels, device=order.device)).all():
        raise ValueError(f"{name}: {what}.order must name each of the {pixels} pixels once")
    if starts[..., 0].any() or (starts[..., -1] != pixels).any() or (starts.diff() < 0).any():
        raise ValueError(f"{name}: {what}.starts must ascend from 0 to {pixels}")
