"""Clusters of keys by their share of the attention: the map of SVG2 (https://arxiv.org/abs/2505.18875)."""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import check_shares, softmax_scale
from visionattn.kernels.routed.selectors.pick import lists_of


@torch.no_grad()
def topp_blocks(
    query_centroids: Tensor,
    key_centroids: Tensor,
    key_counts: Tensor,
    top_p: float,
    *,
    min_share: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The key clusters that together hold `top_p` of the attention of each query cluster, by centroids: SVG2.

    A cluster of n keys counts as n times its centroid. Clusters are listed, best first, while those before
    hold at most `top_p`, and the best `int(min_share * clusters)` in any case. At 720p the paper takes 300 to
    400 query and 1000 key clusters, `top_p` 0.9 and `min_share` 0.1. Float32 whatever the input and the
    autocast state. Detached.

    Args:
        query_centroids: `[..., query clusters, d]`, as `kmeans_blocks` finds `[B, heads, query clusters, d]`.
        key_centroids: `[..., key clusters, d]`.
        key_counts: `[..., key clusters]`, the keys in each cluster.
        top_p: share of the estimated attention, above 0; 1 lists all.
        min_share: share of the key clusters that are listed anyway, 0 to 1.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[..., query clusters, n]` int32 for `block_attention`, best first, ties by the lowest index, -1
        behind the end of a list. n is the length of the longest list, or, in a compiled graph, the number of
        key clusters.

    Raises:
        ValueError: shapes do not fit, or an argument is out of its range.
    """
    check_shares("topp_blocks", top_p=top_p)
    if not 0 <= min_share <= 1:
        raise ValueError(f"topp_blocks: min_share must lie in 0 .. 1, got {min_share}")
    shapes = [tuple(x.shape) for x in (query_centroids, key_centroids, key_counts)]
    lead, clusters, dim = shapes[1][:-2], *shapes[1][-2:]
    if shapes[0][:-2] != lead or shapes[0][-1] != dim or shapes[2] != (*lead, clusters) or not clusters:
        raise ValueError(
            "topp_blocks: centroids must be [..., query clusters, d] and [..., key clusters, d], counts "
            f"[..., key clusters], got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    with without_autocast(query_centroids):
        query, key = at_least_float32(query_centroids), at_least_float32(key_centroids)
        logits = (
            query @ key.transpose(-1, -2) * softmax_scale(key, scale)
            + key_counts.to(key.dtype).log()[..., None, :]
        )
        shares, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = torch.cat((torch.zeros_like(shares[..., :1]), shares.cumsum(-1)[..., :-1]), -1)
        rank = torch.arange(clusters, device=order.device)
        kept = (before <= (top_p if top_p < 1 else float("inf"))) | (rank < int(min_share * clusters))
        return lists_of(order, kept)
