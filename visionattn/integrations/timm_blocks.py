"""timm's attention blocks with their attention computed by our kernels; everything else is inherited.

A block changes class and nothing more, so that parameters, buffers and names stay. What timm computes is kept
to the letter: Swin rolls a map before it fills it up with zeros, zeros are keys like any other, and the zero
halo of halo attention takes part in the softmax with its relative logits. One thing is exact here and not in
timm: pixels that a shifted window keeps apart are absent, where timm subtracts 100 from their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from timm.models import davit, maxxvit, shvit, swin_transformer, swin_transformer_v2
from torch import Tensor

from visionattn.integrations.timm_parts import (
    Size,
    bias_table,
    cosine_qkv,
    cosine_table,
    drops_weights,
    flipped_table,
)
from visionattn.kernels import dense_attention, grid_attention, window_attention
from visionattn.layers.local_attention import halo_attention
from visionattn.layers.maps import extend_to, fill_up, on_nhwc


class FusedSwinBlock(swin_transformer.SwinTransformerBlock):
    """Swin (https://arxiv.org/abs/2103.14030)."""

    def _attn(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        attn: Any = self.attn
        if drops_weights(attn):
            return super()._attn(x)

        def attend(x: Tensor) -> Tensor:
            q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
            bias = flipped_table(attn.relative_position_bias_table, attn.window_size)
            return window_attention(q, k, v, self.window_size, shift=self.shift_size, bias=bias)

        out = _rolled_then_filled_up(x, self.window_size, self.shift_size, attend)
        return attn.proj_drop(attn.proj(out.flatten(3)))


class FusedSwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """Swin V2, cosine attention (https://arxiv.org/abs/2111.09883)."""

    def _attn(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        attn: Any = self.attn
        if drops_weights(attn):
            return super()._attn(x)

        def attend(x: Tensor) -> Tensor:
            q, k, v = cosine_qkv(attn, x)
            bias = flipped_table(cosine_table(attn), attn.window_size)
            return window_attention(q, k, v, self.window_size, shift=self.shift_size, bias=bias, scale=1.0)

        out = _rolled_then_filled_up(x, self.window_size, self.shift_size, attend)
        return attn.proj_drop(attn.proj(out.flatten(3)))


class FusedPartitionAttentionCl(maxxvit.PartitionAttentionCl):
    """MaxViT's windows or grid (https://arxiv.org/abs/2204.01697)."""

    partition_size: Size

    def _partition_attn(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if drops_weights(self.attn):
            return super()._partition_attn(x)
        return _partition_attention(self.attn, x, self.partition_size, self.partition_block)


class FusedParallelPartitionAttention(maxxvit.ParallelPartitionAttention):
    """MaxViT's windows and grid side by side."""

    partition_size: Size

    def _partition_attn(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        if drops_weights(self.attn_block):
            return super()._partition_attn(x)
        parts = ((self.attn_block, True), (self.attn_grid, False))
        return torch.cat([_partition_attention(a, x, self.partition_size, block) for a, block in parts], -1)


class FusedPartitionAttention2d(maxxvit.PartitionAttention2d):
    """MaxViT's windows or grid with channels first."""

    partition_size: Size

    def _partition_attn(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        if drops_weights(self.attn):
            return super()._partition_attn(x)
        x = x.permute(0, 2, 3, 1)
        x = _partition_attention(self.attn, x, self.partition_size, self.partition_block)
        return x.permute(0, 3, 1, 2)


class FusedAttention2d(maxxvit.Attention2d):
    """CoAtNet's attention over the whole map (https://arxiv.org/abs/2106.04803), one window."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        if drops_weights(self) or shared_rel_pos is not None:
            return super().forward(x, shared_rel_pos)
        size = (x.shape[2], x.shape[3])
        return _partition_attention(self, x.permute(0, 2, 3, 1), size, True).permute(0, 3, 1, 2)


class FusedSpatialBlock(davit.SpatialBlock):
    """DaViT's windows (https://arxiv.org/abs/2204.03645)."""

    window_size: Size

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        batch, channels, height, width = x.shape
        shortcut = self.cpe1(x).flatten(2).transpose(1, 2)
        x = fill_up(self.norm1(shortcut).unflatten(1, (height, width)), self.window_size)
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        x = window_attention(q, k, v, self.window_size)[:, :height, :width]
        x = self.attn.proj(x.flatten(3)).flatten(1, 2)
        x = shortcut + self.drop_path1(x)  # pyright: ignore[reportOptionalCall]
        x = self.cpe2(x.transpose(1, 2).view(batch, channels, height, width))
        if self.mlp is not None:
            x = x.flatten(2).transpose(1, 2)
            x = x + self.drop_path2(self.mlp(self.norm2(x)))  # pyright: ignore[reportOptionalCall]
            x = x.transpose(1, 2).view(batch, channels, height, width)
        return x


class FusedHaloAttn(HaloAttn):
    """Halo attention (https://arxiv.org/abs/2103.12731)."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`."""
        q, kv = (t.permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1)) for t in (self.q(x), self.kv(x)))
        k, v = kv.split([self.dim_head_qk, self.dim_head_v], -1)
        relative = self.pos_embed.height_rel, self.pos_embed.width_rel
        sizes = self.block_size, self.halo_size
        out = halo_attention(q, k, v, relative, *sizes, self.scale, self.scale_pos_embed)
        return self.pool(out.flatten(3).permute(0, 3, 1, 2))


class FusedSHSA(shvit.SHSA):
    """SHViT's single head, whose values are wider than its queries and keys (https://arxiv.org/abs/2401.16456)."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        x, rest = x.split([self.pdim, self.dim - self.pdim], 1)
        qkv = self.qkv(self.pre_norm(x)).permute(0, 2, 3, 1)
        parts = qkv.split([self.qk_dim, self.qk_dim, self.pdim], -1)
        # Zeros, which change no product, give all three the same width.
        width = max(self.qk_dim, self.pdim)
        q, k, v = (F.pad(part, (0, width - part.shape[-1])).unsqueeze(3) for part in parts)
        out = dense_attention(q, k, v, scale=self.scale)[..., 0, : self.pdim].permute(0, 3, 1, 2)
        return self.proj(torch.cat([out, rest], 1))


def _rolled_then_filled_up(
    x: Tensor, window: Size, shift: Size, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    """`attend`, which takes shifted windows of a map, as timm has it on maps that windows do not divide."""
    height, width = x.shape[1:3]
    fill = [-side % size for side, size in zip((height, width), window)]
    if not any(fill):
        return attend(x)
    full = (height + fill[0], width + fill[1])
    if not any(shift):
        return attend(extend_to(x, *full))[:, :height, :width]
    # The zeros go between what the roll brings to the end and what stood there.
    back = (-shift[0], -shift[1])
    x = extend_to(x.roll(back, (1, 2)), *full).roll(shift, (1, 2))
    return attend(x).roll(back, (1, 2))[:, :height, :width].roll(shift, (1, 2))


def _partition_attention(attn: Any, x: Tensor, size: Size, in_windows: bool) -> Tensor:
    """`[B, H, W, C']` of `[B, H, W, C]`, by an `AttentionCl` or `Attention2d` in windows or grids."""
    for side, part in zip(x.shape[1:3], size):
        if side % part:
            raise ValueError(
                f"partitions of {size[0]}x{size[1]} do not divide a map of {x.shape[1]}x{x.shape[2]}"
            )
    first_channels = isinstance(attn, maxxvit.Attention2d)
    qkv = on_nhwc(attn.qkv, x) if first_channels else attn.qkv(x)
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3, -1)).unbind(4)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(3)
    run = window_attention if in_windows else grid_attention
    out = run(q, k, v, size, bias=bias_table(attn.rel_pos), scale=attn.scale).flatten(3)
    return attn.proj_drop(on_nhwc(attn.proj, out) if first_channels else attn.proj(out))
