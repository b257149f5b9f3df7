"""The selectors by name. A new one is a file of scores beside this one, a pick, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from visionattn.kernels.routed.selectors.affinity import affinity_scores, topk_regions
from visionattn.kernels.routed.selectors.antidiagonal import antidiagonal_regions, antidiagonal_scores


class Selector(NamedTuple):
    """A way to list, for each region of a map, the regions that it attends to.

    Attributes:
        regions: `(q, k, region_size, **options)` to lists for `routed_attention`.
        scores: `(q, k, region, **options)` to the scores `[B, heads or 1, query regions, key regions]` that
            `regions` picks from: float32 (float64 stays), under autocast too.
        is_full: whether lists never hold padding, which `routed_attention` takes as a promise (`full`). No
            list names a region twice.
    """

    regions: Callable[..., Tensor]
    scores: Callable[..., Tensor]
    is_full: bool = False


SELECTORS: dict[str, Selector] = {
    "antidiagonal": Selector(antidiagonal_regions, antidiagonal_scores),
    "topk": Selector(topk_regions, affinity_scores, is_full=True),
}
