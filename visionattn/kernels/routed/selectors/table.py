"""The selectors by name. A new one is a file of scores beside this one, a pick, and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from visionattn.kernels.routed.selectors.affinity import affinity_scores, topk_regions
from visionattn.kernels.routed.selectors.antidiagonal import antidiagonal_regions, antidiagonal_scores
from visionattn.kernels.routed.selectors.bounds import bound_regions, bound_scores
from visionattn.kernels.routed.selectors.gated import gate_scores, gated_regions
from visionattn.kernels.routed.selectors.hierarchical import hierarchical_regions
from visionattn.kernels.routed.selectors.mass import mass_regions, mass_scores
from visionattn.kernels.routed.selectors.quantized import quantized_regions, quantized_scores


class Selector(NamedTuple):
    """A way to list, for each region of a map, the regions that it attends to.

    Attributes:
        regions: `(q, k, region_size, **options)` to lists for `routed_attention`.
        scores: `(q, k, region, **options)` to the scores `[B, heads or 1, query regions, key regions]` that
            `regions` picks from: float32 (float64 stays), under autocast too; None where only some are ever
            computed.
        is_full: whether lists never hold padding, which `routed_attention` takes as a promise (`full`). No
            list names a region twice.
        per_pixel: whether every pixel has a list (`query_region_size=1`), not every region.
    """

    regions: Callable[..., Tensor]
    scores: Callable[..., Tensor] | None
    is_full: bool = False
    per_pixel: bool = False


SELECTORS: dict[str, Selector] = {
    "antidiagonal": Selector(antidiagonal_regions, antidiagonal_scores),
    "bound": Selector(bound_regions, bound_scores, is_full=True),
    "gated": Selector(gated_regions, gate_scores, per_pixel=True),
    "hierarchical": Selector(hierarchical_regions, None, is_full=True),
    "mass": Selector(mass_regions, mass_scores),
    "quantized": Selector(quantized_regions, quantized_scores),
    "topk": Selector(topk_regions, affinity_scores, is_full=True),
}
