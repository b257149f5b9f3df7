"""Partitions of the pixels of a map by content, and attention inside their parts.

Clusters for `block_attention` (SVG2), buckets of similar codes (HyperAttention) and overlapping clusters of
one size (Routing Transformer).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.checks import check_maps, check_qkv, pair
from visionattn.kernels.merge import merge_attention
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.blocks import Blocks, block_attention, sort_blocks
from visionattn.kernels.routed.reference import places
from visionattn.kernels.routed.regions import check_counts, softmax_scale

# A centroid that moves less than this has come to rest (SVG2).
_AT_REST = 1e-4


class Clusters(NamedTuple):
    """What `kmeans_blocks` finds.

    Attributes:
        labels: `[B, heads, H * W]` int32, the cluster of each pixel; `sort_blocks` makes blocks of them.
        centroids: `[B, heads, clusters, d]`, float32 (float64 stays).
        counts: `[B, heads, clusters]` int32, the pixels of each cluster.
    """

    labels: Tensor
    centroids: Tensor
    counts: Tensor


@torch.no_grad()
def kmeans_blocks(x: Tensor, clusters: int, iterations: int, init: Tensor | None = None) -> Clusters:
    """Cluster the pixels of each head by k-means, the partition of SVG2 (https://arxiv.org/abs/2505.18875).

    Every iteration gives each pixel the nearest centroid, of equally near ones the first, and moves each
    centroid to the mean of its pixels; one without pixels stays. An image is done when none of its centroids
    moves by 1e-4; those of the iteration before are its result. Labels and counts belong to the last
    assignment, which the last move follows. Float32 whatever the input and the autocast state. Detached.

    Args:
        x: queries or keys `[B, H, W, heads, d]`.
        clusters: how many, at most as many as there are pixels.
        iterations: the most there are, at least 1; the paper takes 50 first and 2 from cached centroids.
        init: where centroids start: integers `[heads, clusters]` or `[B, heads, clusters]`, row-major numbers
            of pixels, or centroids `[heads, clusters, d]` or `[B, heads, clusters, d]` of an earlier step.
            Evenly spaced pixels by default.

    Raises:
        ValueError: x is not such a map, or an argument is out of its range or of another shape.
    """
    if x.dim() != 5 or not torch.is_floating_point(x) or not all(x.shape[1:]):
        raise ValueError(
            "kmeans_blocks: x must be [B, H, W, heads, d] of a floating-point dtype and only its batch may "
            f"be empty, got {x.dtype} of shape {tuple(x.shape)}"
        )
    check_counts("kmeans_blocks", clusters=clusters, iterations=iterations)
    with without_autocast(x):
        x = _by_head(at_least_float32(x))
        centroids = _start(x, clusters, init)
        is_done = x.new_zeros(len(x), dtype=torch.bool)
        for _ in range(iterations):
            labels = _nearest(x, centroids)
            means, sizes = _means(x, labels, clusters)
            means = torch.where(sizes[..., None] > 0, means, centroids)
            is_done = is_done | ((means - centroids).norm(dim=-1).amax((1, 2)) < _AT_REST)
            centroids = torch.where(is_done[:, None, None, None], centroids, means)
            if not torch.compiler.is_compiling() and is_done.all():
                break
        return Clusters(labels.to(torch.int32), centroids, sizes.to(torch.int32))


def _start(x: Tensor, clusters: int, init: Tensor | None) -> Tensor:
    """The first centroids `[B, heads, clusters, d]` of `[B, heads, N, d]`."""
    batch, heads, pixels, dim = x.shape
    if clusters > pixels:
        raise ValueError(f"kmeans_blocks: clusters must be at most the {pixels} pixels, got {clusters}")
    if init is None:
        init = (torch.arange(clusters, device=x.device) * pixels // clusters).expand(heads, -1)
    shape = (heads, clusters, dim) if torch.is_floating_point(init) else (heads, clusters)
    if tuple(init.shape) not in (shape, (batch, *shape)):
        raise ValueError(
            f"kmeans_blocks: init must be pixel numbers [{heads}, {clusters}] or centroids "
            f"[{heads}, {clusters}, {dim}], with or without {batch} images before, got {tuple(init.shape)}"
        )
    init = init.expand(batch, *shape)
    if torch.is_floating_point(init):
        return init.to(x.dtype)
    is_checked = not torch.compiler.is_compiling() and init.numel()
    if is_checked and (init.min() < 0 or init.max() >= pixels):
        raise ValueError(f"kmeans_blocks: init must name pixels 0 .. {pixels - 1}")
    return _rows(x, init)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid `[B, heads, N]` of each row, the first of equally near ones."""
    squares = centroids.square().sum(-1)[:, :, None]
    return (squares - 2 * x @ centroids.transpose(2, 3)).argmin(-1)


def _means(x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean `[B, heads, count, d]` of the rows of each label, 0 where there is none, and how many.

    By a product and not by scattered sums, whose order, and with it the rounding, may vary on a GPU.
    """
    members = labels[..., None] == torch.arange(count, device=x.device)
    sizes = members.sum(2)
    return members.to(x.dtype).transpose(2, 3) @ x / sizes.clamp(min=1)[..., None], sizes


def block_means(name: str, x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The mean `[B, heads, blocks, d]` of each block of a map, 0 where it is empty, and sizes `[B, heads,
    blocks]`.

    Raises:
        ValueError: the blocks, called `name`, do not fit the map.
    """
    rows = _by_head(x)
    batch, heads, pixels, _ = rows.shape
    order, starts = blocks
    if any(t.dim() != 3 or t.shape[0] not in (1, batch) or t.shape[1] not in (1, heads) for t in blocks) or (
        order.shape[2] != pixels or starts.shape[2] < 2
    ):
        raise ValueError(
            f"{name} need order [{batch} or 1, 1 or {heads}, {pixels}] and starts of one block or more with "
            f"an end, got {tuple(order.shape)} and {tuple(starts.shape)}"
        )
    ranks = torch.arange(pixels, device=x.device).expand(*starts.shape[:2], -1).contiguous()
    labels = torch.searchsorted(starts.long().contiguous(), ranks, right=True) - 1
    rows = _rows(rows, order.expand(batch, heads, -1))
    means, sizes = _means(rows, labels, starts.shape[2] - 1)
    return means, sizes.to(x.dtype)


def region_blocks(
    height: int, width: int, region_size: int | tuple[int, int], device: torch.device | None = None
) -> Blocks:
    """The regions of a map as blocks, so that one side of `block_attention` may be regions.

    Args:
        height: of the map in pixels.
        width: likewise.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller.
        device: where the result lies.
    """
    region = pair("region_size", region_size)
    pair("the size of the map", (height, width))
    numbers, _ = places((height, width), region, device)
    return sort_blocks(numbers[None, None], -(-height // region[0]) * -(-width // region[1]))


@torch.no_grad()
def lsh_codes(x: Tensor, directions: Tensor) -> Tensor:
    """Codes of the pixels such that similar ones tend to have near codes: HyperAttention
    (https://arxiv.org/abs/2310.05869).

    Bit r of a code c is the side of `directions[:, r]` on which a pixel lies; the result is `c ^ (c >> 1)`,
    as in the official code. Float32 whatever the input and the autocast state. Detached.

    Args:
        x: queries or keys `[B, H, W, heads, d]`.
        directions: `[d, n]`, n at most 30, usually normal random numbers; the paper takes 7.

    Returns:
        `[B, heads, H * W]` int32, pixels in row-major order.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.dim() != 5 or directions.dim() != 2 or directions.shape[0] != x.shape[-1]:
        raise ValueError(
            "lsh_codes: x must be [B, H, W, heads, d] and directions [d, n], got "
            f"{tuple(x.shape)} and {tuple(directions.shape)}"
        )
    if not 1 <= directions.shape[1] <= 30:
        raise ValueError(f"lsh_codes: directions must be 1 to 30, got {directions.shape[1]}")
    with without_autocast(x):
        x = at_least_float32(x)
        sides = _by_head(x) @ directions.to(x.dtype) > 0
    weights = 2 ** torch.arange(directions.shape[1], device=x.device)
    codes = (sides * weights).sum(-1)
    return (codes ^ codes >> 1).to(torch.int32)


def lsh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor,
    *,
    block: int = 256,
    samples: int | Tensor = 256,
    mask_own: bool = True,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attention among pixels of similar codes, and to a sample of all: HyperAttention.

    Queries and keys are sorted by `lsh_codes` each, and cut into blocks of equal size; block i of the queries
    sees block i of the keys. What lies outside is estimated from keys drawn with replacement, each of which
    stands for `H * W / samples` (https://arxiv.org/abs/2310.05869).

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys, same shape.
        v: values, same shape.
        directions: `[d, n]` of the codes, for instance `torch.randn(d, 7)`.
        block: pixels per block; the last one may be smaller.
        samples: how many keys are drawn per image and head, 0 for none; or their row-major numbers `[B or 1,
            1 or heads, samples]`, which a compiled graph needs where a generator is given.
        mask_own: whether drawn keys of the own block are left out, as in the paper; the official code counts
            them twice.
        scale: multiplies q·k; `d ** -0.5` by default.
        generator: draws them, on the device of q; PyTorch's own by default.

    Returns:
        `[B, H, W, heads, d]`, differentiable in q, k and v; which pixels meet has no gradient.

    Raises:
        ValueError: shapes do not fit, or an argument is out of its range.
    """
    height, width = check_qkv("lsh_attention", q, k, v)
    pixels = height * width
    check_counts("lsh_attention", block=block)
    if not isinstance(samples, Tensor):
        if samples < 0:
            raise ValueError(f"lsh_attention: samples must be at least 0, got {samples}")
        drawn = (len(q), q.shape[3], samples)
        samples = torch.randint(pixels, drawn, generator=generator, device=q.device)
    elif samples.dim() != 3 or samples.shape[0] not in (1, len(q)) or samples.shape[1] not in (1, q.shape[3]):
        raise ValueError(
            f"lsh_attention: samples must be a number or [{len(q)} or 1, 1 or {q.shape[3]}, n], "
            f"got {tuple(samples.shape)}"
        )
    scale = softmax_scale(q, scale)
    # Ranks by code, and the blocks that they fall in.
    orders = [lsh_codes(x, directions).argsort(dim=-1, stable=True) for x in (q, k)]
    count = -(-pixels // block)
    starts = (torch.arange(count + 1, device=q.device) * block).clamp(max=pixels)
    parts = [Blocks(x.to(torch.int32), starts.to(torch.int32).expand(*x.shape[:2], -1)) for x in orders]
    lists = torch.arange(count, dtype=torch.int32, device=q.device)[None, None, :, None]
    out, lse = block_attention(q, k, v, lists, *parts, tile=min(block, 64), scale=scale, return_lse=True)
    if not samples.shape[2]:
        return out
    samples = samples.long().expand(len(q), q.shape[3], -1).sort(-1).values
    own, of_key = (x.argsort(dim=-1) // block for x in orders)
    hidden = None
    if mask_own:
        hidden = own[..., None] == of_key.gather(2, samples)[:, :, None]
    rest, rest_lse = _sampled(q, k, v, samples, hidden, scale)
    return merge_attention([out, rest], [lse, rest_lse])[0]


def _sampled(
    q: Tensor, k: Tensor, v: Tensor, samples: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of all queries to sampled keys `[B, heads, samples]`, ascending, and its log-sum-exp, as an
    estimate of that to all keys; `hidden` `[B, heads, H * W, samples]` ones are left out."""
    height, width = q.shape[1:3]
    # A key that was drawn twice has twice the weight, and is gathered once: sums of its gradients from
    # several places would come in any order.
    times = (samples[..., None] == samples[..., None, :]).sum(-1)
    is_first = torch.ones_like(samples, dtype=torch.bool)
    is_first[..., 1:] = samples[..., 1:] != samples[..., :-1]
    with without_autocast(q):
        queries, keys, values = (_by_head(at_least_float32(x)) for x in (q, k, v))
        logits = queries @ _rows(keys, samples).transpose(2, 3) * scale
        logits = logits + (times * (height * width / samples.shape[2])).to(logits.dtype).log()[:, :, None]
        shown = is_first[:, :, None].expand_as(logits)
        shown = shown if hidden is None else shown & ~hidden
        empty = ~shown.any(-1, keepdim=True)
        logits = logits.masked_fill(~shown, -math.inf).masked_fill(empty, 0)
        lse = logits.logsumexp(-1, keepdim=True)
        out = (logits - lse).exp().masked_fill(empty, 0) @ _rows(values, samples)
    lse = lse.masked_fill(empty, -math.inf).squeeze(-1)
    out, lse = (x.transpose(1, 2).unflatten(1, (height, width)) for x in (out, lse))
    return out.to(q.dtype), lse


def cluster_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    queries: int,
    keys: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention inside overlapping clusters of one size: Routing Transformer
    (https://arxiv.org/abs/2003.05997).

    Each centroid takes the queries and the keys of the largest inner products, among queries and keys of unit
    length, ties by the lowest index; inside a cluster q, k and v attend as they are. A pixel in several
    clusters gets the sum of its outputs over (their number + 1e-5), a pixel in none zero. Choices are float32
    whatever the input and the autocast state, and have no gradient. The paper trains the centroids by moving
    averages with decay 0.999, and takes `H * W / clusters` queries and keys.

    Args:
        q: queries `[B, H, W, heads, d]`.
        k: keys `[B, height, width, heads, d]`, of the same map or of one of another size.
        v: values, as the keys.
        centroids: `[heads, clusters, d]` or `[B, heads, clusters, d]`.
        queries: queries per cluster; all if there are fewer.
        keys: keys per cluster; all if there are fewer.
        scale: multiplies q·k; `d ** -0.5` by default.

    Returns:
        `[B, H, W, heads, d]`, differentiable in q, k and v.

    Raises:
        ValueError: shapes do not fit, or an argument is out of its range.
    """
    check_maps("cluster_attention", q, k, v)
    check_counts("cluster_attention", queries=queries, keys=keys)
    batch, height, width, heads, dim = q.shape
    shape = tuple(centroids.shape)
    if len(shape) not in (3, 4) or (shape[-3], shape[-1]) != (heads, dim) or shape[:-3] not in ((), (batch,)):
        raise ValueError(
            f"cluster_attention: centroids must be [{heads}, clusters, {dim}], with or without {batch} "
            f"images before, got {shape}"
        )
    chosen = [_members(x, centroids, count) for x, count in ((q, queries), (k, keys))]
    q_rows, k_rows, v_rows = (_by_head(x) for x in (q, k, v))
    # A gather per cluster, which holds a pixel once: gradients and outputs are added cluster after cluster,
    # in an order that does not vary.
    of_queries, of_keys = (x.unbind(2) for x in chosen)
    queries_in, keys_in, values_in = (
        torch.stack([_rows(x, rows) for rows in members], 2)
        for x, members in ((q_rows, of_queries), (k_rows, of_keys), (v_rows, of_keys))
    )
    found = F.scaled_dot_product_attention(queries_in, keys_in, values_in, scale=scale)
    total = at_least_float32(torch.zeros_like(q_rows))
    count = torch.zeros_like(total[..., :1])
    for rows, out in zip(of_queries, found.unbind(2)):
        index = rows[..., None]
        total.scatter_add_(2, index.expand_as(out), out.to(total.dtype))
        count.scatter_add_(2, index, torch.ones_like(index, dtype=total.dtype))
    out = (total / (count + 1e-5)).to(q.dtype)
    return out.transpose(1, 2).unflatten(1, (height, width)).contiguous()


@torch.no_grad()
def _members(x: Tensor, centroids: Tensor, count: int) -> Tensor:
    """The pixels `[B, heads, clusters, count]` of each cluster, best first."""
    with without_autocast(x):
        x = F.normalize(_by_head(at_least_float32(x)), dim=-1)
        scores = centroids.to(x.dtype) @ x.transpose(2, 3)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _by_head(x: Tensor) -> Tensor:
    """`[B, heads, H * W, d]` of a map `[B, H, W, heads, d]`."""
    return x.flatten(1, 2).transpose(1, 2)


def _rows(x: Tensor, numbers: Tensor) -> Tensor:
    """Rows `[B, heads, n, d]` of `[B, heads, N, d]` by numbers `[B, heads, n]`."""
    return x.gather(2, numbers.long()[..., None].expand(-1, -1, -1, x.shape[3]))
