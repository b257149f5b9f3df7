"""The tiles of a local pattern without a copy of each: strips of columns, of which a tile is a view.

Neighbouring tiles share keys. A strip holds the columns that one column of tiles needs, heads first, so that
any stretch of its rows is a matrix: only what tiles share along a row is copied more than once. Tiles are
worked off row by row in chunks that stay in the cache.

Strips are `[N, M, H, columns, d]`. Where one bias fits all the tiles of a row, N counts images times columns
of tiles and M the heads; where border tiles have a mask of their own, N counts images and M columns times
heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pattern import Pattern, Run, Span
from .tiles import run_biases, tile_runs

# How many logits a chunk holds, the best of 2**16 to 2**20 on a CPU.
_CHUNK = 2**18


class Band(NamedTuple):
    """Adjacent columns of tiles of one size that are computed together, and how many they are."""

    runs: list[Run]
    count: int


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
    if not joinable or heads * count * queries * keys > _CHUNK:
        return rows, [Band([run], run.count) for run in columns]
    widened = [_widened(run, pattern.x.length, longest) for run in columns]
    groups = [list(group) for _, group in groupby(widened, key=lambda run: run.query.length)]
    return rows, [Band(group, sum(run.count for run in group)) for group in groups]


def _widened(run: Run, length: int, keys: int) -> Run:
    """A run under a mask with this many keys, moved inwards where the map ends."""
    return run._replace(key=Span(min(run.key.start, length - keys), keys, run.key.offset), masked=True)


def chunks(strips: Tensor, y: Run, x: Run) -> Iterator[tuple[slice, int]]:
    """Which N of strips, and which row of its run, are computed at a time."""
    logits = strips.shape[1] * y.query.length * x.query.length * y.key.length * x.key.length
    step = max(_CHUNK // max(logits, 1), 1)
    for row in range(y.count):
        for first in range(0, strips.shape[0], step):
            yield slice(first, first + step), row


def tile(strips: Tensor, chunk: tuple[slice, int], run: Run, span: Span) -> Tensor:
    """The tiles of a chunk, `[n, M, pixels, d]`, as a view of their strips."""
    images, row = chunk
    return strips[images].narrow(2, span.start + row * run.step, span.length).flatten(2, 3)


def query_strips(x: Tensor, band: Band, dtype: torch.dtype) -> Tensor:
    """The queries of a map `[B, H, W, heads, d]` in strips, contiguous."""
    strips = _query_columns(x, band).permute(0, 2, 4, 1, 3, 5).to(dtype).contiguous()
    return strips.flatten(*_merged(band))


def put_query_strips(target: Tensor, strips: Tensor, band: Band) -> None:
    """The inverse of `query_strips`: write them to their map `[B, H, W, heads, d]`."""
    columns = _query_columns(target, band).permute(0, 2, 4, 1, 3, 5)
    columns.copy_(strips.reshape(columns.shape))


def key_strips(x: Tensor, band: Band, dtype: torch.dtype) -> Tensor:
    """The keys of a map `[B, H, W, heads, d]` in strips, contiguous."""
    batch, height, _, heads, dim = x.shape
    shape = (batch, band.count, heads, height, band.runs[0].key.length, dim)
    strips = torch.empty(shape, dtype=dtype, device=x.device)
    for part, run in zip(_parts(strips, band), band.runs):
        part.copy_(_key_columns(x, run, run.key))
    return strips.flatten(*_merged(band))


def add_key_strips(target: Tensor, strips: Tensor, band: Band) -> None:
    """Add strips of keys, which may overlap, to their map `[B, H, W, heads, d]`."""
    shape = (target.shape[0], band.count, target.shape[3], *strips.shape[2:])
    for part, run in zip(_parts(strips.view(shape), band), band.runs):
        step = run.step if run.count > 1 else run.key.length
        for first in range(0, run.key.length, step):
            # Pieces of one step do not overlap those of the next tile.
            piece = Span(run.key.start + first, min(step, run.key.length - first), first)
            _key_columns(target, run, piece).add_(part.narrow(4, first, piece.length))


def _merged(band: Band) -> tuple[int, int]:
    """Which axes of `[B, tiles, heads, ...]` become one."""
    return (0, 1) if len(band.runs) == 1 else (1, 2)


def _parts(strips: Tensor, band: Band) -> tuple[Tensor, ...]:
    return strips.split([run.count for run in band.runs], 1)


def _query_columns(x: Tensor, band: Band) -> Tensor:
    """`[B, H, tiles, columns, heads, d]` of `[B, H, W, heads, d]`: tiles of queries do not overlap."""
    query = band.runs[0].query
    return x.narrow(2, query.start, band.count * query.length).unflatten(2, (band.count, query.length))


def _key_columns(x: Tensor, run: Run, span: Span) -> Tensor:
    """`[B, tiles, heads, H, columns, d]` of `[B, H, W, heads, d]`."""
    step = run.step if run.count > 1 else span.length
    x = x.narrow(2, span.start, (run.count - 1) * step + span.length).unfold(2, span.length, step)
    return x.permute(0, 2, 3, 1, 5, 4)


def band_biases(
    bias: Tensor | None, pattern: Pattern, rows: list[Run], band: Band, q: Tensor
) -> list[Tensor | None]:
    """What is added to the logits `[n, M, nq, nk]` of each run of rows: `[M | 1, nq, nk]` or nothing."""
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
        return biases
    # Only tiles under a mask share a band with others.
    parts = [
        x.expand(run.count, heads, -1, -1) for x, run in zip(biases, columns * len(rows)) if x is not None
    ]
    return [torch.cat(parts[i : i + width]).flatten(0, 1) for i in range(0, len(parts), width)]


def sums_of_runs(total: Tensor, band: Band) -> tuple[Tensor, ...]:
    """The sum over its tiles `[heads, nq, nk]` of each run of a band, from the sum over N `[M, nq, nk]`."""
    if len(band.runs) == 1:
        return (total,)
    parts = total.unflatten(0, (band.count, -1)).split([run.count for run in band.runs])
    return tuple(part.sum(0) for part in parts)
