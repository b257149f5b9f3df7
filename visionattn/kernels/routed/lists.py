"""Lists of regions as sets: written out as masks, and joined."""

from __future__ import annotations

import torch
from torch import Tensor


def listed_regions(indices: Tensor, regions: int) -> Tensor:
    """Lists `[..., n]` of some of so many regions, written out `[..., regions]`: True where one is listed."""
    # The last column collects the padding and is cut off.
    listed = indices.new_zeros((*indices.shape[:-1], regions + 1), dtype=torch.bool)
    return listed.scatter_(-1, torch.where(indices < 0, regions, indices).long(), True)[..., :regions]


def cut_to_longest(lists: Tensor) -> Tensor:
    """Cut `[..., n]` lists with their padding behind to the longest of them; a compiled graph cuts nothing,
    for the length of its results may not depend on data."""
    if torch.compiler.is_compiling():
        return lists
    return lists[..., : int((lists >= 0).flatten(0, -2).any(0).sum())]


def union_regions(*lists: Tensor) -> Tensor:
    """Join lists of regions into lists that name every region once.

    Forced regions beside chosen ones, or patterns that overlap.

    Args:
        lists: `[B or 1, heads or 1, regions, n]` int32 or int64 each, n may differ; -1 is padding.

    Returns:
        `[B, heads or 1, regions, m]` int32, ascending, -1 behind the end of a list. m is the length of the
        longest list, or, in a compiled graph, the sum of the lengths given.

    Raises:
        ValueError: no lists, or shapes or dtypes that do not fit.
    """
    if not lists:
        raise ValueError("union_regions needs at least one tensor of lists, got none")
    for x in lists:
        if x.dim() != 4 or x.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "union_regions: lists must be [B, heads or 1, regions, n] of int32 or int64, got "
                f"{x.dtype} of shape {tuple(x.shape)}"
            )
    sizes = [max(sizes) for sizes in zip(*(x.shape[:3] for x in lists))]
    if any(n not in (1, size) for x in lists for n, size in zip(x.shape[:2], sizes)) or any(
        x.shape[2] != sizes[2] for x in lists
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in lists)
        raise ValueError(f"union_regions: lists must agree in batch, heads and regions, got {shapes}")
    last = torch.iinfo(torch.int32).max
    joined = torch.cat([x.to(torch.int32).expand(*sizes, -1) for x in lists], -1)
    joined = torch.where(joined < 0, last, joined).sort(-1).values
    joined[..., 1:] = torch.where(joined[..., 1:] == joined[..., :-1], last, joined[..., 1:])
    joined = joined.sort(-1).values
    return cut_to_longest(torch.where(joined == last, -1, joined))
