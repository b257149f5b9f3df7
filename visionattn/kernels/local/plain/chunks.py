"""The tiles of a local pattern, a chunk at a time.

A chunk is a rectangle of tiles of equal size, as many as stay in the cache with their logits. Its tiles are
strided views of the map, which are copied when they are used: nothing of the size of the map is written but
the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Pattern, Run, Segment
from visionattn.kernels.local.plain.tiles import concatenated, tile_runs

# A chunk holds so many logits in inference and in training: the best of 2**16 to 2**20 on a CPU.
INFERENCE, TRAINING = 2**18, 2**17

# A vector instruction takes so many numbers.
_LANES = 8


class Columns(NamedTuple):
    """Adjacent columns of tiles of one size that are computed together, from one run or several."""

    runs: list[Run]

    @property
    def count(self) -> int:
        """Columns of tiles in all runs."""
        return sum(run.count for run in self.runs)


class Chunk(NamedTuple):
    """Images, rows and columns of tiles: the first, and how many."""

    images: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]


@lru_cache(maxsize=64)
def rows_and_columns(pattern: Pattern, heads: int) -> tuple[list[Run], list[Columns]]:
    """Cut an undilated pattern into rows of tiles, and into columns that are computed together.

    Border tiles made of several blocks get as many keys as the others and join their columns, unless a row of
    tiles fills a chunk anyway: then it would only cost a large mask.
    """
    rows, columns = tile_runs(pattern)
    longest, count = max(run.key.length for run in columns), sum(run.count for run in columns)
    queries, keys = (
        max(getattr(run, side).length for run in rows) * max(getattr(run, side).length for run in columns)
        for side in ("query", "key")
    )
    joinable = columns[0].blocks > 1 and pattern.x.border == "clamp"
    if not joinable or heads * count * queries * keys > INFERENCE:
        return rows, [Columns([run]) for run in columns]
    widened = [_widened(run, pattern.x.length, longest) for run in columns]
    return rows, [Columns(list(group)) for _, group in groupby(widened, key=lambda run: run.query.length)]


def _widened(run: Run, length: int, keys: int) -> Run:
    """Give a run this many keys under a mask, moved inwards where the map ends."""
    return run._replace(key=Segment(min(run.key.start, length - keys), keys, run.key.offset), masked=True)


def chunks(shape: tuple[int, ...], y: Run, columns: Columns, size: int, together: int = 0) -> Iterator[Chunk]:
    """Cut a run of rows and some columns into chunks, for maps of `shape` `[B, H, W, heads, d]`.

    A chunk has about `size` logits; `together` rows of tiles, or without it as many as there is room for.
    """
    x, many = columns.runs[0], len(columns.runs) > 1
    logits = shape[3] * y.query.length * x.query.length * y.key.length * x.key.length
    most = max(size // max(logits, 1), 1)
    # The columns of several runs have masks of their own, which serve one row of one image.
    wide = columns.count if many else min(most, columns.count)
    images = 1 if many else max(most // (wide * (1 if together else y.count)), 1)
    high = together or (1 if many else max(most // (wide * images), 1))
    sides = [(shape[0], images), (y.count, high), (columns.count, wide)]
    for firsts in product(*(range(0, count, step) for count, step in sides)):
        yield Chunk(*((first, min(step, count - first)) for first, (count, step) in zip(firsts, sides)))


def shares_keys(run: Run) -> bool:
    """Whether the tiles of a run overlap in their keys."""
    return run.count > 1 and run.key.length > run.step


def has_small_tiles(pattern: Pattern, q: Tensor) -> bool:
    """Whether the tiles of an undilated pattern are disjoint, and their weights no larger than q and k.

    Then plain products are faster than PyTorch's fused attention, and training keeps the weights.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return _keys_of_query(pattern) * wide.itemsize <= 2 * q.shape[4] * q.itemsize


@lru_cache(maxsize=64)
def _keys_of_query(pattern: Pattern) -> float:
    """Average the keys of a tile over all queries; they are infinitely many if tiles share them."""
    rows, columns = tile_runs(pattern)
    if any(shares_keys(run) for run in (*rows, *columns)):
        return float("inf")
    pairs = 1
    for runs in (rows, columns):
        pairs *= sum(run.count * run.query.length * run.key.length for run in runs)
    return pairs / (pattern.y.length * pattern.x.length)


def stretched(run: Run, chunk: Chunk) -> tuple[Run, Chunk]:
    """Make one long tile of the rows of a chunk, so that their keys are copied, and gradients added, once."""
    first, count = chunk.rows
    query, key = (
        part._replace(start=part.start + first * run.step, length=part.length + (count - 1) * run.step)
        for part in (run.query, run.key)
    )
    return run._replace(count=1, query=query, key=key), chunk._replace(rows=(0, 1))


def query_tiles(x: Tensor, chunk: Chunk, y: Run, columns: Columns) -> Tensor:
    """View the queries of a chunk, `[B, rows, columns, heads, y, x, d]` of `[B, H, W, heads, d]`."""
    whole = columns.runs[0]._replace(count=columns.count, step=columns.runs[0].query.length)
    return _view(x, chunk.images, (chunk.rows, y, y.query), (chunk.columns, whole, whole.query))


def key_tiles(x: Tensor, chunk: Chunk, y: Run, columns: Columns) -> Tensor:
    """Take the keys of a chunk as `query_tiles` does: a view for a single run, a copy for several."""
    return concatenated(_key_views(x, chunk, y, columns), 2)


def as_matrices(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy tiles `[B, rows, columns, heads, y, x, d]` to `[n * heads, pixels, d]` of another dtype.

    `d` is filled up with zeros to a multiple of 8: a product with 30 columns takes 1.6 times as long as
    one with 32.
    """
    images, rows, columns, heads, y, x, dim = tiles.shape
    if dim > _LANES and dim % _LANES:
        tiles = F.pad(tiles, (0, -dim % _LANES))
    matrices = tiles.reshape(images * rows * columns * heads, y * x, -1)
    return matrices if matrices.dtype == dtype else matrices.to(dtype)


def as_tiles(matrices: Tensor, shape: torch.Size) -> Tensor:
    """Undo `as_matrices` for tiles of `shape`; the heads may have an axis of their own."""
    tiles = matrices.view(*shape[:-1], -1)
    return tiles if tiles.shape[-1] == shape[-1] else tiles[..., : shape[-1]]


def put_key_tiles(target: Tensor, tiles: Tensor, chunk: Chunk, y: Run, columns: Columns, alone: bool) -> None:
    """Add tiles `[B, rows, columns, heads, y, x, d]` to their map `[B, H, W, heads, d]`.

    They may overlap; where no tile shares keys with any other, `alone`, they are written instead.
    """
    views = _key_views(target, chunk, y, columns)
    if alone:
        views[0].copy_(tiles)
        return
    for view, part, x in zip(views, tiles.split([view.shape[2] for view in views], 2), columns.runs):
        for high, wide in product(_pieces(y), _pieces(x)):
            view[..., high, wide, :].add_(part[..., high, wide, :])


def _pieces(run: Run) -> list[slice]:
    """Divide the keys of a tile into pieces of one step: equal pieces of all tiles do not overlap."""
    step = run.step if run.count > 1 else run.key.length
    return [slice(first, first + step) for first in range(0, run.key.length, step)]


def _key_views(x: Tensor, chunk: Chunk, y: Run, columns: Columns) -> list[Tensor]:
    """View the keys of a chunk, for every run of its columns."""
    counts = [chunk.columns] if len(columns.runs) == 1 else [(0, run.count) for run in columns.runs]
    return [
        _view(x, chunk.images, (chunk.rows, y, y.key), (count, run, run.key))
        for run, count in zip(columns.runs, counts)
    ]


# Along one axis: the first tile and how many, the run that they belong to, and its queries or its keys.
_Part = tuple[tuple[int, int], Run, Segment]


def _view(x: Tensor, images: tuple[int, int], rows: _Part, columns: _Part) -> Tensor:
    """View rectangles `[B, rows, columns, heads, y, x, d]` of `[B, H, W, heads, d]`, in one operation."""
    (first_row, high), run_y, part_y = rows
    (first_column, wide), run_x, part_x = columns
    image, height, width, head, channel = x.stride()
    top, left = part_y.start + first_row * run_y.step, part_x.start + first_column * run_x.step
    return x.as_strided(
        (images[1], high, wide, x.shape[3], part_y.length, part_x.length, x.shape[4]),
        (image, run_y.step * height, run_x.step * width, head, height, width, channel),
        x.storage_offset() + images[0] * image + top * height + left * width,
    )
