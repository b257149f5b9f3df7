"""Keys by a learned bias: dynamic mask attention (https://arxiv.org/abs/2508.02124)."""

from __future__ import annotations

import torch
from torch import Tensor

from visionattn.kernels.checks import pair
from visionattn.kernels.precision import at_least_float32, without_autocast
from visionattn.kernels.routed.regions import check_counts, pixels_inside, to_rows
from visionattn.kernels.routed.selectors.pick import pick_kept, pick_topk


@torch.no_grad()
def dynamic_mask_keys(bias: Tensor, keys: int, *, region_size: int | tuple[int, int] | None = None) -> Tensor:
    """The keys, or regions of keys, that all queries of a head attend to, by a bias per key: DMA.

    The published bias is `a * softplus(v @ w.T)`, a number a per head and values v of all heads, and is added
    to the logits of the keys that stay (Dynamic Mask Attention, https://arxiv.org/abs/2508.02124). The `keys`
    largest of a head stay; with regions, all of a region or none of it: all if more than half of its pixels
    are among the largest. Float32 whatever the input and the autocast state. Detached.

    Example:
        Attention with this bias, which needs no argument of its own: one more channel of queries is 1 over
        the scale, of keys the bias, of values 0:

        >>> lists = dynamic_mask_keys(bias, 256)
        >>> scale = q.shape[-1] ** -0.5
        >>> q = torch.cat((q, q.new_full((*q.shape[:-1], 1), 1 / scale)), -1)
        >>> k = torch.cat((k, bias.permute(0, 2, 3, 1)[..., None]), -1)
        >>> v = torch.cat((v, v.new_zeros((*v.shape[:-1], 1))), -1)
        >>> whole = q.shape[1:3]
        >>> out = routed_attention(q, k, v, lists, 1, query_region_size=whole, scale=scale)[..., :-1]

    Args:
        bias: `[B, heads, H, W]`, a number per key.
        keys: how many keys stay, at least 1; all if there are fewer.
        region_size: side of a region in pixels, or (height, width); a border region may be smaller. A region
            is one pixel by default.

    Returns:
        `[B, heads, 1, n]` int32, one list for all queries: row-major numbers of regions, without region_size
        of pixels; by descending bias, regions by descending share of pixels among the largest; ties by the
        lowest index, with region_size -1 behind the end of a list. n is `min(keys, H * W)`, with region_size
        the length of the longest list, which may be 0, or, in a compiled graph, the number of regions.

    Raises:
        ValueError: bias is not a floating-point map, or an argument is out of its range.
    """
    if bias.dim() != 4 or not torch.is_floating_point(bias) or not all(bias.shape[1:]):
        raise ValueError(
            "dynamic_mask_keys: bias must be [B, heads, H, W] of a floating-point dtype and only its batch "
            f"may be empty, got {bias.dtype} of shape {tuple(bias.shape)}"
        )
    check_counts("dynamic_mask_keys", keys=keys)
    with without_autocast(bias):
        best = pick_topk(at_least_float32(bias).flatten(2)[:, :, None], keys)
        if region_size is None:
            return best
        region = pair("region_size", region_size)
        stays = torch.zeros_like(bias, dtype=torch.float32).flatten(2).scatter(2, best[:, :, 0].long(), 1)
        rows = to_rows(stays.unflatten(2, bias.shape[2:]).permute(0, 2, 3, 1)[..., None], region)
        inside = pixels_inside(bias.permute(0, 2, 3, 1), region)
        shares = rows.sum((1, 2)).view(*bias.shape[:2], 1, len(inside)) / inside.sum(1)
        return pick_kept(shares, shares > 0.5)
