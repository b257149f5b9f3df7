"""Local attention as a formula: dense attention over all pairs, with the pattern as a mask.

The specification of the other implementations: any dtype, any device, differentiable any number of times,
memory quadratic in the number of pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import Pattern


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float
) -> Tensor:
    """Attention of every pixel over the keys of its block; shapes and bias as in `op.py`."""
    (visible_y, *_), (visible_x, *_) = pattern.y.visibility(q.device), pattern.x.visibility(q.device)
    visible = visible_y[:, None, :, None] & visible_x[None, :, None, :]
    padding = (0, 0, 0, 0, *pattern.x.key_padding, *pattern.y.key_padding)
    k, v = F.pad(k, padding), F.pad(v, padding)
    logits = torch.einsum("byxhd,bvuhd->bhyxvu", q * scale, k)
    if bias is not None:
        logits = logits + bias_of_pairs(bias, pattern)
    logits = logits.masked_fill(~visible, float("-inf"))
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhyxvu,bvuhd->byxhd", weights, v)


def bias_of_pairs(bias: Tensor, pattern: Pattern) -> Tensor:
    """The bias of every pair `[heads, H, W, keys_y, keys_x]`; any value where a key is not visible."""
    axes = [(axis, *axis.visibility(bias.device)) for axis in (pattern.y, pattern.x)]
    if bias.shape[1:] == pattern.table_shape:
        y, x = ((offset + axis.reach).clamp(0, 2 * axis.reach) for axis, _, offset, _, _ in axes)
        return bias[:, y[:, None, :, None], x[None, :, None, :]]
    blocks = bias.unflatten(2, (pattern.y.key_window, -1)).unflatten(1, (pattern.y.window, -1))
    (query_y, key_y), (query_x, key_x) = (
        (query, key.clamp(0, axis.key_window - 1)) for axis, _, _, query, key in axes
    )
    return blocks[
        :, query_y[:, None, None, None], query_x[:, None, None], key_y[:, None, :, None], key_x[:, None, :]
    ]
