"""HAT's rolled windows and unfolded overlapping windows."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.windows import merge, partition, window_heads
from visionattn.models.hat import WindowAttention


def rolled_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, *, shift: tuple[int, int], bias: Tensor
) -> Tensor:
    """HAT, Swin: the map is rolled and cut into windows, a mask keeps apart what was not adjacent before."""
    batch, height, width, heads, dim = q.shape
    shifted, back = any(shift), (-shift[0], -shift[1])
    if shifted:
        q, k, v = (x.roll(back, (1, 2)) for x in (q, k, v))
    q, k, v = (window_heads(x, window_size) for x in (q, k, v))
    logits = (q * dim**-0.5) @ k.transpose(2, 3) + gathered_bias(bias, window_size, 0)
    if shifted:
        mask = shift_mask(height, width, window_size, shift[1], q.device)
        logits = (logits.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
    out = merge(out, (window_size, window_size), height, width)
    out = out.roll(shift, (1, 2)) if shifted else out
    return out.unflatten(-1, (heads, dim))


def unfolded_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, overlap: int, *, bias: Tensor
) -> Tensor:
    """HAT's overlapping cross-attention: keys and values are unfolded into their overlapping windows."""
    batch, height, width, heads, dim = q.shape
    side = window_size + 2 * overlap
    kv = torch.cat((k.flatten(3), v.flatten(3)), -1).permute(0, 3, 1, 2)
    kv = F.unfold(kv, side, padding=overlap, stride=window_size).unflatten(1, (2, heads, dim, side**2))
    k, v = kv.permute(1, 0, 5, 2, 4, 3).flatten(1, 2).contiguous()
    q = window_heads(q, window_size)
    logits = (q * dim**-0.5) @ k.transpose(2, 3) + gathered_bias(bias, window_size, overlap)
    out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
    return merge(out, (window_size, window_size), height, width).unflatten(-1, (heads, dim))


@lru_cache(maxsize=8)
def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """-100 between pixels of a rolled window that were not adjacent: `[windows, window², window²]`."""
    # Training could not use a tensor that was made in inference mode.
    with torch.inference_mode(False):
        return _shift_mask(height, width, window, shift, device)


def _shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    label = torch.zeros(1, height, width, 1, device=device)
    cuts = (slice(-window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            label[:, rows, columns] = 3 * i + j
    label = partition(label, (window, window))[0, ..., 0]
    return ((label[:, None] - label[:, :, None]) != 0) * -100.0


def gathered_bias(table: Tensor, window: int, overlap: int) -> Tensor:
    """The bias `[heads, window², key_window²]`, gathered through an index of every pair at every call."""
    with torch.inference_mode(False):
        index = _pair_index(window, overlap, table.device)
    bias = table.flatten(1).t().contiguous()[index.flatten()]
    return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=8)
def _pair_index(window: int, overlap: int, device: torch.device) -> Tensor:
    """The place of each pair's bias in the flat table; a stored buffer of the authors' networks."""
    query = torch.arange(window, device=device)
    key = torch.arange(-overlap, window + overlap, device=device)
    offset = key[None] - query[:, None] + window - 1 + overlap
    rows, columns = offset[:, None, :, None], offset[None, :, None, :]
    return (rows * (2 * (window + overlap) - 1) + columns).flatten(2).flatten(0, 1)


class TheirWindowAttention(WindowAttention):
    """Both kinds of windows on a whole map."""

    def forward(self, x: Tensor, top: int = 0) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`; `top` is for bands and not used."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        bias = self.relative_position_bias_table
        if self.overlap:
            out = unfolded_window_attention(q, k, v, self.window_size, self.overlap, bias=bias)
        else:
            out = rolled_window_attention(
                q, k, v, self.window_size, shift=(self.shift, self.shift), bias=bias
            )
        return self.proj(out.flatten(3))


FORMULATION = Formulation(
    {WindowAttention: TheirWindowAttention},
    ((64, 64),),
    "roll, window partition, mask, gathered bias, unfold, matmul-softmax-matmul",
    per_forward=(shift_mask.cache_clear,),
)
