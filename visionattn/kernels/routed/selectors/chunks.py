"""Blocks of any size within a budget of keys: the selection of DHSA (https://arxiv.org/abs/2510.24606)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.blocks import Blocks
from visionattn.kernels.routed.partitions import block_means
from visionattn.kernels.routed.regions import check_counts, check_maps
from visionattn.kernels.routed.selectors.pick import lists_of


@torch.no_grad()
def topk_blocks(
    q: Tensor,
    k: Tensor,
    query_blocks: Blocks,
    key_blocks: Blocks,
    budget: int,
    *,
    normalise: Literal["sqrt"] | None = "sqrt",
    per_head: bool = False,
) -> Tensor:
    """The key blocks of the highest affinity for each query block, as many as fill a budget of keys: DHSA.

    A block is described by the mean of its queries or keys; with `normalise` the means are multiplied by the
    square roots of the blocks' sizes, so that of two equally fitting blocks the larger one comes first. Whole
    blocks are listed, best first, while the keys listed before are fewer than the budget. Where blocks end is
    the caller's choice: DHSA cuts a text where a trained predictor says. Float32 whatever the input and the
    autocast state. Detached.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        query_blocks: partition of the queries, as `sort_blocks` or `region_blocks` make.
        key_blocks: partition of the keys.
        budget: keys, at least 1; a list ends with the block that reaches it.
        normalise: `"sqrt"` or None.
        per_head: whether each head has lists of its own; otherwise the mean over heads of queries and
            keys decides, and heads share the blocks.

    Returns:
        `[B, 1 or heads, query blocks, n]` int32 for `block_attention`, best first, ties by the lowest index,
        -1 behind the end of a list. Empty blocks are not listed. n is the length of the longest list, or, in
        a compiled graph, the number of key blocks.

    Raises:
        ValueError: shapes do not fit, or an argument is out of its range.
    """
    check_maps("topk_blocks", q, k, 1)
    check_counts("topk_blocks", budget=budget)
    if normalise not in ("sqrt", None):
        raise ValueError(f"topk_blocks: normalise must be 'sqrt' or None, got {normalise!r}")
    if not per_head and any(x.shape[1] > 1 for x in (query_blocks.starts, key_blocks.starts)):
        raise ValueError("topk_blocks: heads that have blocks of their own need per_head=True")
    scores = block_scores(q, k, query_blocks, key_blocks, normalise, per_head)
    sizes = key_blocks.starts.diff()[:, :, None].expand_as(scores)
    order = scores.masked_fill(sizes == 0, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    sizes = sizes.gather(-1, order)
    kept = (sizes.cumsum(-1) - sizes < budget) & (sizes > 0)
    return lists_of(order, kept)


def block_scores(
    q: Tensor,
    k: Tensor,
    query_blocks: Blocks,
    key_blocks: Blocks,
    normalise: Literal["sqrt"] | None = "sqrt",
    per_head: bool = False,
) -> Tensor:
    """Affinities `[B, 1 or heads, query blocks, key blocks]`; 0 where a block is empty."""
    described = []
    with without_autocast(q):
        for name, x, blocks in (("query_blocks", q, query_blocks), ("key_blocks", k, key_blocks)):
            x = at_least_float32(x)
            x = x if per_head else x.mean(3, keepdim=True)
            means, sizes = block_means(f"topk_blocks: {name}", x, blocks)
            described.append(means * sizes.sqrt()[..., None] if normalise else means)
        return described[0] @ described[1].transpose(2, 3)
