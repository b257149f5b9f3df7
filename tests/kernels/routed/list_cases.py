"""Kinds of lists on ugly shapes, for all implementations of routed attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from agreement import packed_qkv
from torch import Tensor

from visionattn.kernels import routed_attention


class Case(NamedTuple):
    """Sizes of the maps of queries and of keys, sides of their regions (None: those of keys), places of a
    list, sets of lists and of counts (0: no counts), whether lists are padded, and the kind of bias."""

    size: tuple[int, int]
    key_size: tuple[int, int]
    query_region: Any
    region: Any
    topk: int
    lists: int = 1
    counts: int = 0
    padded: bool = False
    bias: str | None = None


CASES = {
    "counts": Case((6, 9), (6, 9), None, (2, 3), 3, counts=1),
    "counts per head, padded": Case((7, 5), (7, 5), None, 3, 3, 2, 2, True),
    "counts, shared lists": Case((7, 5), (7, 5), None, 3, 3, 1, 2, True, "table"),
    "pixels": Case((6, 5), (6, 5), 1, (2, 2), 3),
    "pixels, large regions": Case((9, 9), (9, 9), 1, 4, 3, 2, 0, True),
    "pixels, counts, table": Case((6, 5), (6, 5), 1, (5, 4), 2, 2, 1, True, "table"),
    "pixels, dense bias": Case((5, 6), (4, 9), 1, (4, 4), 2, 1, 2, True, "dense"),
    "small on large": Case((7, 8), (7, 8), (2, 1), (7, 5), 2, bias="table"),
    "large on small": Case((7, 8), (7, 8), 5, (1, 2), 9, 2, 0, True),
    "other map": Case((7, 5), (3, 4), 2, (2, 3), 2, 2, 0, True, "dense"),
    "other map, counts": Case((3, 3), (8, 7), (3, 2), 4, 3, 1, 1),
    "one row": Case((1, 12), (1, 12), None, (1, 5), 2, 1, 2, True, "table"),
    "one row, pixels": Case((1, 12), (1, 7), 1, (1, 4), 2, 2, 0, True),
    "one pixel": Case((1, 1), (1, 1), None, 2, 1, counts=1, bias="table"),
    "one column": Case((11, 1), (5, 1), 3, 2, 3, padded=True),
    "few, all": Case((4, 4), (4, 4), (4, 2), 2, 4, counts=1),
}


def two(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def inputs_of(case: Case, dtype: torch.dtype = torch.float64, dim: int = 3) -> tuple[list[Tensor], dict]:
    """Maps of two images with two heads, a bias behind them if there is one; and the other arguments."""
    generator = torch.Generator().manual_seed(0)
    region, query_region = two(case.region), two(case.query_region or case.region)
    rows, regions = (
        -(-size[0] // sides[0]) * -(-size[1] // sides[1])
        for size, sides in ((case.size, query_region), (case.key_size, region))
    )
    indices = (
        torch.rand(2, case.lists, rows, regions, generator=generator).argsort(-1)[..., : case.topk].int()
    )
    if case.padded:
        indices[torch.rand(indices.shape, generator=generator) < 0.4] = -1
        indices[0, 0, 0] = -1
    counts = None
    if case.counts:
        most = region[0] * region[1] + 1
        counts = torch.randint(0, most, (2, case.counts, regions), generator=generator, dtype=torch.int32)
    torch.manual_seed(1)
    (q, _, _), (_, k, v) = (packed_qkv(2, *size, 2, dim, dtype) for size in (case.size, case.key_size))
    inputs, (height, width) = [q, k, v], case.size
    if case.bias == "table":
        inputs.append(torch.randn(2, 2 * height - 1, 2 * width - 1, dtype=dtype))
    if case.bias == "dense":
        inputs.append(torch.randn(2, height * width, k.shape[1] * k.shape[2], dtype=dtype))
    sides = {"region_size": case.region, "query_region_size": case.query_region}
    return inputs, {"indices": indices, "counts": counts, **sides}


def attention_of(arguments: dict, **more: Any) -> Any:
    """Routed attention as a function of maps and bias."""

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Any:
        return routed_attention(q, k, v, bias=bias, **arguments, **more)

    return attention
