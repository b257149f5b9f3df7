"""timm's modules as they are fastest on the CPU.

There a map is better cut into windows before the projection than after it, because that copies a third, and a
mask is cheaper than a shifted window's nine shapes. timm's blocks do so already; what is slow in them is
replaced here: biases that are gathered anew for every batch, and most of all the linear layers.
"""

from __future__ import annotations

import torch
from timm.layers import RelPosBiasTf
from timm.models import shvit, swin_transformer, swin_transformer_v2
from torch import Tensor

from visionattn.integrations.timm_parts import (
    Size,
    cosine_qkv,
    cosine_table,
    dense_bias,
    drops_weights,
    flipped_table,
)
from visionattn.kernels.dense.plain.attention import attend
from visionattn.layers.linear import Linear


class FusedWindowAttention(swin_transformer.WindowAttention):
    """Swin's windows."""

    window_size: Size
    relative_position_bias_table: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B * windows, n, C]` to the same; `mask` `[windows, n, n]` is added to the logits."""
        if drops_weights(self):
            return super().forward(x, mask)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        table = flipped_table(self.relative_position_bias_table, self.window_size)
        out = attend(q, k, v, _masked(dense_bias(table, self.window_size), mask, len(x)), self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FusedCosineAttention(swin_transformer_v2.WindowAttention):
    """Swin V2's windows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B * windows, n, C]` to the same; `mask` `[windows, n, n]` is added to the logits."""
        if drops_weights(self):
            return super().forward(x, mask)
        q, k, v = (t.transpose(1, 2) for t in cosine_qkv(self, x))
        bias = dense_bias(flipped_table(cosine_table(self), self.window_size), self.window_size)
        out = attend(q, k, v, _masked(bias, mask, len(x)), 1.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SlidingRelPosBias(RelPosBiasTf):
    """MaxViT's bias without products with one-hot matrices."""

    def get_bias(self) -> Tensor:
        """`[heads, n, n]`."""
        return dense_bias(self.relative_position_bias_table, self.window_size)


class ChannelsLastStage(shvit.StageBlock):
    """SHViT's stage on maps whose channels lie together, as 1x1 convolutions, most of its work, take them."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H / stride, W / stride]`."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class OneDnnLinear(Linear):
    """`torch.nn.Linear` by the faster of PyTorch's two matrix libraries.

    A class of its own, so that `decelerate` tells it from the linear layers of our networks.
    """


def _masked(bias: Tensor, mask: Tensor | None, batch: int) -> Tensor:
    """The addend of logits `[batch, heads, n, n]`, whose windows of one map follow one another."""
    if mask is None:
        return bias
    return (bias + mask[:, None]).repeat(batch // len(mask), 1, 1, 1)
