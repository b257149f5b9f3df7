"""Local attention as a formula: dense attention over all pairs, with the pattern as a mask.

The specification of the other implementations: any dtype, any device, differentiable any number of times,
memory quadratic in the number of pixels. Its two halves for neighborhoods copy the keys of every pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Axis, Call, Pattern


def local_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute the output and, if asked for, the log-sum-exp; maps as in `op.py`."""
    pattern, bias, scale, return_lse = call
    axes = [axis.visibility(*_pixels(axis, q.device)) for axis in (pattern.y, pattern.x)]
    visible = axes[0][0][:, None, :, None] & axes[1][0][None, :, None, :]
    k, v = F.pad(k, pattern.padding), F.pad(v, pattern.padding)
    logits = torch.einsum("byxhd,bvuhd->bhyxvu", q * scale, k)
    if bias is not None:
        logits = logits + bias_of_pairs(bias, pattern, *axes)
    logits = logits.masked_fill(~visible, float("-inf"))
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    lse = logits.flatten(-2).logsumexp(-1).permute(0, 2, 3, 1) if return_lse else None
    return torch.einsum("bhyxvu,bvuhd->byxhd", weights, v), lse


def neighborhood_scores(q: Tensor, k: Tensor, pattern: Pattern, scale: float) -> Tensor:
    """Compute the logits `[B, H, W, heads, keys]` of every pixel and its key window, as in `op.py`."""
    keys, seen = _neighbours(k, pattern)
    scores = torch.einsum("byxhd,byxnhd->byxhn", q * scale, keys)
    return scores.masked_fill(~seen, float("-inf"))


def neighborhood_aggregation(v: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
    """Sum the values of every key window by the weights of their pixel, as in `op.py`."""
    values, seen = _neighbours(v, pattern)
    return torch.einsum("byxhn,byxnhd->byxhd", weights.masked_fill(~seen, 0), values)


def _neighbours(maps: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Copy the key window `[B, H, W, keys, heads, d]` of every pixel, and say which keys it sees."""
    (rows, seen_y), (columns, seen_x) = (
        axis.keys(torch.arange(axis.length, device=maps.device)) for axis in (pattern.y, pattern.x)
    )
    neighbours = maps[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4)
    return neighbours, seen_keys(seen_y, seen_x)


def seen_keys(seen_y: Tensor, seen_x: Tensor) -> Tensor:
    """Which keys of its window every pixel sees, `[H, W, 1, keys]`, from what both axes say."""
    return (seen_y[:, None, :, None] & seen_x[None, :, None, :]).flatten(2)[:, :, None]


def bias_of_neighborhoods(bias: Tensor, pattern: Pattern) -> Tensor:
    """Write out the bias `[H, W, heads, keys]` of every pixel and its key window, from a table or a block."""
    axes = pattern.y, pattern.x
    pixels = [torch.arange(axis.length, device=bias.device) for axis in axes]
    if pattern.is_table(bias):
        # Key windows are windows of the table: which one depends on how far a border pushed the keys.
        bias = bias.unfold(1, pattern.y.key_window, 1).unfold(2, pattern.x.key_window, 1)
        rows, columns = (
            axis.keys(pixel)[0][:, 0] // axis.dilation - pixel // axis.dilation + axis.reach
            for axis, pixel in zip(axes, pixels)
        )
    else:
        bias = pattern.by_axes(bias)
        rows, columns = (pixel // axis.dilation % axis.window for axis, pixel in zip(axes, pixels))
    return bias.permute(1, 2, 0, 3, 4)[rows][:, columns].flatten(3)


def bias_of_pairs(bias: Tensor, pattern: Pattern, y: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> Tensor:
    """Write out the bias of pairs `[heads, qy, qx, ky, kx]` from a table or a dense block.

    `y` and `x` are what `Axis.visibility` returns for these queries and keys. Pairs that do not see each
    other get any entry.
    """
    axes = ((pattern.y, *y), (pattern.x, *x))
    if pattern.is_table(bias):
        rows, columns = ((offset + axis.reach).clamp(0, 2 * axis.reach) for axis, _, offset, _, _ in axes)
        return bias[:, rows[:, None, :, None], columns[None, :, None, :]]
    (query_y, key_y), (query_x, key_x) = (
        (query, key.clamp(0, axis.key_window - 1)) for axis, _, _, query, key in axes
    )
    queries = query_y[:, None, None, None], query_x[:, None, None]
    return pattern.by_axes(bias)[(slice(None), *queries, key_y[:, None, :, None], key_x[:, None, :])]


def _pixels(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number all queries and all keys of an axis, zero keys included."""
    before, behind = axis.key_padding
    keys = torch.arange(-before, axis.length + behind, device=device)
    return torch.arange(axis.length, device=device), keys
