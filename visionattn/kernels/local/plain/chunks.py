"""The tiles of a local pattern, a chunk at a time.

A chunk is a rectangle of tiles of equal size, as many as stay in the cache with their logits. Its tiles are
strided views of the map, which are copied when they are used: nothing of the size of the map is written but
the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Pattern, Run, Span
from visionattn.kernels.local.plain.tiles import run_biases, tile_runs

# How many logits a chunk holds, in inference and in training, the best of 2**16 to 2**20 on a CPU.
INFERENCE, TRAINING = 2**18, 2**17

# Numbers that a vector instruction takes.
_LANES = 8


class Band(NamedTuple):
    """Adjacent columns of tiles of one size that are computed together."""

    runs: list[Run]

    @property
    def count(self) -> int:
        """How many columns of tiles."""
        return sum(run.count for run in self.runs)


class Chunk(NamedTuple):
    """Images, rows and columns of tiles: the first, and how many."""

    images: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]


@lru_cache(maxsize=64)
def bands(pattern: Pattern, heads: int) -> tuple[list[Run], list[Band]]:
    """The rows of tiles of an undilated pattern and the columns in bands.

    Border tiles made of several blocks get as many keys as the others and join their band, unless a row of
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
        return rows, [Band([run]) for run in columns]
    widened = [_widened(run, pattern.x.length, longest) for run in columns]
    return rows, [Band(list(group)) for _, group in groupby(widened, key=lambda run: run.query.length)]


def _widened(run: Run, length: int, keys: int) -> Run:
    """A run under a mask with this many keys, moved inwards where the map ends."""
    return run._replace(key=Span(min(run.key.start, length - keys), keys, run.key.offset), masked=True)


def chunks(shape: tuple[int, ...], y: Run, band: Band, size: int, together: int = 0) -> Iterator[Chunk]:
    """The chunks of a run of rows and a band for maps of `shape` `[B, H, W, heads, d]`.

    A chunk has about `size` logits; `together` rows of tiles, or without it as many as there is room for.
    """
    x, many = band.runs[0], len(band.runs) > 1
    logits = shape[3] * y.query.length * x.query.length * y.key.length * x.key.length
    most = max(size // max(logits, 1), 1)
    # The columns of several runs have masks of their own, which serve one row of one image.
    columns = band.count if many else min(most, band.count)
    images = 1 if many else max(most // (columns * (1 if together else y.count)), 1)
    rows = together or (1 if many else max(most // (columns * images), 1))
    counts = shape[0], y.count, band.count
    starts = (range(0, count, step) for count, step in zip(counts, (images, rows, columns)))
    for firsts in product(*starts):
        yield Chunk(
            *(
                (first, min(step, count - first))
                for first, step, count in zip(firsts, (images, rows, columns), counts)
            )
        )


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
    """How many keys the tile of a query has on average; infinitely many if tiles share them."""
    rows, columns = tile_runs(pattern)
    if any(shares_keys(run) for run in (*rows, *columns)):
        return float("inf")
    pairs = 1
    for runs in (rows, columns):
        pairs *= sum(run.count * run.query.length * run.key.length for run in runs)
    return pairs / (pattern.y.length * pattern.x.length)


def stretched(run: Run, chunk: Chunk) -> tuple[Run, Chunk]:
    """The rows of a chunk as one long tile, whose keys are copied, and their gradients added, once."""
    first, count = chunk.rows
    query, key = (
        span._replace(start=span.start + first * run.step, length=span.length + (count - 1) * run.step)
        for span in (run.query, run.key)
    )
    return run._replace(count=1, query=query, key=key), chunk._replace(rows=(0, 1))


def query_tiles(x: Tensor, chunk: Chunk, y: Run, band: Band) -> Tensor:
    """The queries of a chunk: a view `[B, rows, columns, heads, y, x, d]` of `[B, H, W, heads, d]`."""
    whole = band.runs[0]._replace(count=band.count, step=band.runs[0].query.length)
    return _tiles(x, chunk.images, (chunk.rows, y, y.query), (chunk.columns, whole, whole.query))


def key_tiles(x: Tensor, chunk: Chunk, y: Run, band: Band) -> Tensor:
    """The keys of a chunk as `query_tiles`: a view for a single run, a copy for several."""
    tiles = _key_tiles(x, chunk, y, band)
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, 2)


def as_matrices(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles `[B, rows, columns, heads, y, x, d]` as `[n * heads, pixels, d]` of another dtype.

    `d` is filled up with zeros to a multiple of 8: a product with 30 columns takes 1.6 times as long as
    one with 32.
    """
    images, rows, columns, heads, y, x, dim = tiles.shape
    if dim > _LANES and dim % _LANES:
        tiles = F.pad(tiles, (0, -dim % _LANES))
    matrices = tiles.reshape(images * rows * columns * heads, y * x, -1)
    return matrices if matrices.dtype == dtype else matrices.to(dtype)


def as_tiles(matrices: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `as_matrices` for tiles of `shape`; the heads may have an axis of their own."""
    tiles = matrices.view(*shape[:-1], -1)
    return tiles if tiles.shape[-1] == shape[-1] else tiles[..., : shape[-1]]


def put_key_tiles(target: Tensor, tiles: Tensor, chunk: Chunk, y: Run, band: Band, alone: bool) -> None:
    """Add tiles `[B, rows, columns, heads, y, x, d]` to their map `[B, H, W, heads, d]`.

    They may overlap; where no tile shares keys with any other, `alone`, they are written instead.
    """
    views = _key_tiles(target, chunk, y, band)
    if alone:
        views[0].copy_(tiles)
        return
    for view, part, x in zip(views, tiles.split([view.shape[2] for view in views], 2), band.runs):
        for rows, columns in product(_pieces(y), _pieces(x)):
            view[..., rows, columns, :].add_(part[..., rows, columns, :])


def _pieces(run: Run) -> list[slice]:
    """The keys of a tile in pieces of one step, which do not overlap those of the next tile."""
    step = run.step if run.count > 1 else run.key.length
    return [slice(first, first + step) for first in range(0, run.key.length, step)]


def _key_tiles(x: Tensor, chunk: Chunk, y: Run, band: Band) -> list[Tensor]:
    """A view for every run of a band."""
    pieces = [chunk.columns] if len(band.runs) == 1 else [(0, run.count) for run in band.runs]
    return [
        _tiles(x, chunk.images, (chunk.rows, y, y.key), (columns, run, run.key))
        for run, columns in zip(band.runs, pieces)
    ]


_Side = tuple[tuple[int, int], Run, Span]


def _tiles(x: Tensor, images: tuple[int, int], row: _Side, column: _Side) -> Tensor:
    """Rectangles `[B, rows, columns, heads, y, x, d]` of `[B, H, W, heads, d]`, in one operation."""
    (first_row, rows), y, span_y = row
    (first_column, columns), run_x, span_x = column
    image, height, width, head, channel = x.stride()
    top, left = span_y.start + first_row * y.step, span_x.start + first_column * run_x.step
    return x.as_strided(
        (images[1], rows, columns, x.shape[3], span_y.length, span_x.length, x.shape[4]),
        (image, y.step * height, run_x.step * width, head, height, width, channel),
        x.storage_offset() + images[0] * image + top * height + left * width,
    )


def band_biases(
    bias: Tensor | None, pattern: Pattern, rows: list[Run], band: Band, q: Tensor
) -> list[Tensor | None]:
    """What is added to the logits `[n, heads, nq, nk]` of each run of rows, or nothing.

    `[1, heads | 1, nq, nk]`, and with an entry for every column for several runs.
    """
    setting = pattern, tuple(rows), tuple(band.runs), q.shape[3], q.dtype, q.device
    # Tensors of a tracer must not outlive it.
    return _masks(*setting) if bias is None and type(q) is Tensor else _biases(bias, *setting)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _masks(*setting: Any) -> list[Tensor | None]:
    """`_biases` without a bias: the same for every map of a size, and a tenth of the work of a small one."""
    return _biases(None, *setting)


def _biases(
    bias: Tensor | None,
    pattern: Pattern,
    rows: tuple[Run, ...],
    columns: tuple[Run, ...],
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor | None]:
    biases = run_biases(bias, pattern, rows, columns, dtype, device)
    width = len(columns)
    if width == 1:
        return [None if x is None else x[None] for x in biases]
    # Only tiles under a mask share a band with others.
    parts = [
        x.expand(run.count, heads, -1, -1) for x, run in zip(biases, columns * len(rows)) if x is not None
    ]
    return [torch.cat(parts[i : i + width]) for i in range(0, len(parts), width)]
