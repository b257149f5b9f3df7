"""Local attention as a formula: dense attention over all pairs, with the pattern as a mask.

The specification of the other implementations: any dtype, any device, differentiable any number of times,
memory quadratic in the number of pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.kernels.local.pattern import Axis, Pattern


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp (None unless asked for); arguments as in `op.py`."""
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


def bias_of_pairs(bias: Tensor, pattern: Pattern, y: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> Tensor:
    """The bias of pairs `[heads, queries_y, queries_x, keys_y, keys_x]` from a table or a dense block.

    `y` and `x` are what `Axis.visibility` returns for these queries and keys; any value where not visible.
    """
    axes = ((pattern.y, *y), (pattern.x, *x))
    if bias.shape[1:] == pattern.table_shape:
        rows, columns = ((offset + axis.reach).clamp(0, 2 * axis.reach) for axis, _, offset, _, _ in axes)
        return bias[:, rows[:, None, :, None], columns[None, :, None, :]]
    blocks = bias.unflatten(2, (pattern.y.key_window, -1)).unflatten(1, (pattern.y.window, -1))
    (query_y, key_y), (query_x, key_x) = (
        (query, key.clamp(0, axis.key_window - 1)) for axis, _, _, query, key in axes
    )
    return blocks[
        :,
        query_y[:, None, None, None],
        query_x[:, None, None],
        key_y[:, None, :, None],
        key_x[:, None, :],
    ]


def _pixels(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """All queries and all keys of an axis, zero keys included."""
    before, behind = axis.key_padding
    return (
        torch.arange(axis.length, device=device),
        torch.arange(-before, axis.length + behind, device=device),
    )
