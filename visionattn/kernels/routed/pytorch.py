"""Routed attention in fast plain PyTorch.

Keys and values are laid out once as `[B, heads, region, pixels * d]`, so that a selected region is one
contiguous row and gathering it a plain copy, already in the layout that the attention reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense import attend, attend_lse
from .reference import bias_of_pairs


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region: tuple[int, int],
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
    distinct: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
    batch, height, width, heads, _ = q.shape
    if distinct and indices.shape[3] == indices.shape[2]:
        # Every region is listed: attention of the whole map, no need to sort it by regions.
        dense = None if bias is None else bias_of_pairs(bias, height, width)
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out, lse = _attend(q, k, v, dense, scale, return_lse)
        return _to_map(out, height, width), None if lse is None else _to_map(lse, height, width)

    whole = height % region[0] == 0 and width % region[1] == 0
    logits_bias, empty = None, None
    if bias is not None or not (whole and distinct):
        logits_bias, empty = _pair_bias(indices, region, bias, height, width, whole, distinct, heads, q.dtype)
    q, k, v = (_by_region(x, region) for x in (q, k, v))
    rows = _row_numbers(indices, batch, heads)
    k, v = (_gather(x, rows) for x in (k, v))
    out, lse = _attend(q.flatten(0, 1), k, v, logits_bias, scale, return_lse)
    out, lse = out.unflatten(0, (batch, heads)), None if lse is None else lse.unflatten(0, (batch, heads))
    if empty is not None:
        out = out.masked_fill(empty[..., None, None], 0)
        lse = None if lse is None else lse.masked_fill(empty[..., None], float("-inf"))
    out = _from_regions(out, region, height, width)
    return out, None if lse is None else _from_regions(lse[..., None], region, height, width).squeeze(-1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    return attend_lse(q, k, v, bias, scale) if return_lse else (attend(q, k, v, bias, scale), None)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, H, W, heads, ...]` of `[B, heads, H * W, ...]`."""
    return x.transpose(1, 2).unflatten(1, (height, width))


def _by_region(x: Tensor, region: tuple[int, int]) -> Tensor:
    """`[B, heads, regions, pixels, d]` of `[B, H, W, heads, d]`, border regions filled up with zeros."""
    x = _fill_up(x, region)
    x = x.unflatten(2, (-1, region[1])).unflatten(1, (-1, region[0]))
    return x.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)


def _fill_up(x: Tensor, region: tuple[int, int]) -> Tensor:
    bottom, right = -x.shape[1] % region[0], -x.shape[2] % region[1]
    return F.pad(x, (0, 0, 0, 0, 0, right, 0, bottom)) if bottom or right else x


def _from_regions(x: Tensor, region: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `_by_region`."""
    regions_x = -(-width // region[1])
    x = x.unflatten(3, region).unflatten(2, (-1, regions_x)).permute(0, 2, 4, 3, 5, 1, 6)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _row_numbers(indices: Tensor, batch: int, heads: int) -> Tensor:
    """Rows of `[B * heads * regions, ...]` that the lists name, `[B * heads, regions, topk]`."""
    regions = indices.shape[2]
    first = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1, 1) * regions
    return (indices.clamp(min=0) + first).flatten(0, 1)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Keys of each list one after the other: `[B * heads, regions, topk * pixels, d]`."""
    pixels, dim = x.shape[3:]
    listed = x.flatten(3).flatten(0, 2).index_select(0, rows.flatten())
    return listed.view(*rows.shape[:2], rows.shape[2] * pixels, dim)


def _pair_bias(
    indices: Tensor,
    region: tuple[int, int],
    bias: Tensor | None,
    height: int,
    width: int,
    whole: bool,
    distinct: bool,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """What is added to the logits, -inf where a key is absent, `[B * heads, regions, 1 | pixels, keys]`, and
    which lists are empty `[B, heads, regions]` (their logits stay finite)."""
    batch, _, regions, topk = indices.shape
    shape = (batch, heads, regions, 1, topk * region[0] * region[1])
    listed = indices.clamp(min=0).long()
    total = indices.new_zeros(shape, dtype=dtype)
    if bias is not None:
        y, x = _pixels(region, height, width, indices.device)
        query_y, query_x = (n.clamp(max=size - 1)[..., None] for n, size in ((y, height), (x, width)))
        key_y, key_x = (n[listed].flatten(-2)[..., None, :] for n in (query_y[..., 0], query_x[..., 0]))
        if bias.shape[1:] == (2 * height - 1, 2 * width - 1):
            where = (key_y - query_y + height - 1) * (2 * width - 1) + key_x - query_x + width - 1
        else:
            where = (query_y * width + query_x) * height * width + key_y * width + key_x
        head = torch.arange(heads, device=indices.device).view(-1, 1, 1, 1)
        total = bias.flatten(1)[head, where]
    if whole and distinct:
        return total.flatten(0, 1), None
    visible = (indices >= 0)[..., None].expand(*indices.shape, region[0] * region[1])
    if not distinct:
        repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
        visible = visible & ~repeated[..., None]
    if not whole:
        y, x = _pixels(region, height, width, indices.device)
        visible = visible & ((y < height) & (x < width))[listed]
    empty = ~visible.flatten(-2).any(-1)
    visible = (visible.flatten(-2) | empty[..., None])[..., None, :]
    total = total.masked_fill(~visible, float("-inf"))
    return total.expand(batch, heads, *total.shape[2:]).flatten(0, 1), empty.expand(batch, heads, regions)


def _pixels(region: tuple[int, int], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel of every region `[regions, pixels]`, also of those beyond the map."""
    rows, columns = -(-height // region[0]), -(-width // region[1])
    y = torch.arange(rows * region[0], device=device).view(rows, 1, region[0], 1)
    x = torch.arange(columns * region[1], device=device).view(1, columns, 1, region[1])
    shape = (rows, columns, *region)
    y, x = (n.expand(shape).flatten(2, 3).flatten(0, 1) for n in (y, x))
    return y, x
