"""The parts of timm's attention modules in the form that our kernels take."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor, nn

from visionattn.kernels import product
from visionattn.layers.as_made import is_as_made

Size = tuple[int, int]


def drops_weights(attn: Any) -> bool:
    """Whether attention weights are to be dropped, which no kernel does: timm's own formulation then runs."""
    return attn.training and attn.attn_drop.p > 0


def bias_table(rel_pos: Any) -> Tensor | None:
    """timm's relative position bias as `[heads, 2 * height - 1, 2 * width - 1]`, key minus query."""
    if rel_pos is None:
        return None
    if isinstance(rel_pos, RelPosBiasTf):
        return rel_pos.relative_position_bias_table
    if isinstance(rel_pos, RelPosBias):
        return flipped_table(rel_pos.relative_position_bias_table, rel_pos.window_size)
    if isinstance(rel_pos, RelPosMlp):
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log)).flatten(0, -2)
        table = table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
        return flipped_table(table, rel_pos.window_size)
    raise TypeError(f"the relative position bias {type(rel_pos).__name__} is not known")


def flipped_table(table: Tensor, window: Size) -> Tensor:
    """timm's `[pairs, heads]`, query minus key, as `[heads, rows, columns]`, key minus query."""
    return table.unflatten(0, (2 * window[0] - 1, 2 * window[1] - 1)).flip(0, 1).permute(2, 0, 1)


def dense_bias(table: Tensor, window: Size) -> Tensor:
    """The bias `[heads, n, n]` of all pairs of a window, from a table as `bias_table` gives it."""
    # Sliding along the table walks through the queries backwards.
    return table.unfold(1, window[0], 1).unfold(2, window[1], 1).flip(1, 2).flatten(3, 4).flatten(1, 2)


def cosine_qkv(attn: CosineAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swin V2's queries, keys and values `[..., heads, d]` of `[..., C]`, for a softmax scale of 1."""
    parts: Any = (attn.q_bias, attn.k_bias, attn.v_bias)
    bias = None if attn.q_bias is None else torch.cat(parts)
    if is_as_made(nn.Linear, attn.qkv):
        qkv = product(x, attn.qkv.weight, bias)
    else:
        qkv = attn.qkv(x) if bias is None else attn.qkv(x) + bias
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    scale = attn.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1)
    q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    return q.to(v.dtype), k.to(v.dtype), v  # autocast normalises in float32


def cosine_table(attn: CosineAttention) -> Tensor:
    """Swin V2's bias from its MLP, `[pairs, heads]`, query minus key."""
    coordinates: Any = attn.relative_coords_table
    return 16 * attn.cpb_mlp(coordinates).flatten(0, 2).sigmoid()
