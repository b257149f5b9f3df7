"""DeiT, with the attention of its first blocks as a part (https://arxiv.org/abs/2012.12877)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import dense_attention
from visionattn.kernels.checks import pair
from visionattn.layers.linear import Linear
from visionattn.models.frames.common import Block, Size, StridedConv2d, drop_path_rates, resize_square
from visionattn.models.frames.tokens import TokenNetwork
from visionattn.models.hosts.guest import Guest
from visionattn.models.registry.names import Names
from visionattn.models.registry.shapes import Shapes, classes_of, square
from visionattn.models.registry.variants import Layout


class DeiT(TokenNetwork):
    """DeiT, the first blocks with the guest's attention, the others with softmax attention.

    Images whose sides the patch does not divide lose the remainder on the right and bottom, as a strided
    convolution has it. The position embedding is resized bicubically for other sizes.

    Args:
        guest: the attention of the first blocks.
        global_blocks: how many of the first blocks have it.
        img_size: training size in pixels, or (height, width): that of the position embedding.
        patch_size: side of a patch in pixels.
        in_chans: input channels.
        num_classes: classes; 0 for no classifier.
        global_pool: what the classifier sees: `"token"`, the class token; `"avg"`, `"max"` or `"avgmax"`
            of the others; `""`, all tokens.
        embed_dim: channels.
        depth: blocks.
        num_heads: attention heads.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        guest: Guest,
        global_blocks: int = 12,
        img_size: int | Size = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = pair("img_size", img_size)
        size = (height // patch_size, width // patch_size)

        def block(i: int, rate: float) -> Block:
            if i < global_blocks:
                attn = guest.attention(embed_dim, num_heads, stage=0, size=size, prefix=True, **dd)
                return guest.block(embed_dim, attn, drop_path=rate, eps=1e-6, **dd)
            return Block(
                embed_dim, SoftmaxAttention(embed_dim, num_heads, **dd), drop_path=rate, eps=1e-6, **dd
            )

        super().__init__(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            patch_embed=StridedConv2d(in_chans, embed_dim, patch_size, patch_size, **dd),
            patch_size=patch_size,
            embed_dim=embed_dim,
            size=size,
            class_token="first",
            blocks=(block(i, rate) for i, rate in enumerate(drop_path_rates(drop_path_rate, depth))),
            norm=nn.LayerNorm(embed_dim, eps=1e-6, **dd),
            **dd,
        )


class SoftmaxAttention(nn.Module):
    """Attention among all tokens `[B, N, C]`; it takes, and does not need, the size of their map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))[:, None].unbind(3)
        return self.proj(dense_attention(q, k, v).flatten(3).squeeze(1))


def layout(guest: Guest) -> Layout:
    """How weights of DeiT with a guest are recognised and converted."""
    names = Names(("^patch_embed.proj.", "^patch_embed."))
    return Layout(
        family=guest.family,
        model_cls=DeiT,
        marks=(r"^pos_embed$", rf"^blocks\.0\.attn\.{re.escape(guest.mark)}$"),
        rename=names.to_ours,
        fit=lambda weights, model: guest.fit(weights, model, {"pos_embed": _resize_positions}),
        reads={"patch_embed.weight": 4, "pos_embed": 3, f"blocks.0.attn.{guest.mark}": guest.mark_dims},
        arguments=lambda ours, official: _arguments(ours, guest),
        to_official=names.official_weights,
        wrapper="model",
        unlearned=guest.unlearned,
    )


def _arguments(ours: Shapes, guest: Guest) -> dict[str, Any]:
    dim, in_chans, patch, _ = ours["patch_embed.weight"]
    depth = ours.length("blocks")
    marks = [shape for i in range(depth) if (shape := guest.mark_of(ours, f"blocks.{i}"))]
    side = math.isqrt(ours["pos_embed"][1] - 1)
    rows, columns = guest.size(ours, "blocks.0.attn") or (side, side)
    return {
        "in_chans": in_chans,
        "num_classes": classes_of(ours),
        "img_size": square(patch * rows, patch * columns),
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": guest.heads(marks[0]),
        # Twelve, where all are: there may be fewer blocks than that.
        "global_blocks": len(marks) if len(marks) < depth else 12,
        **guest.read_options(marks[:1]),
    }


def _resize_positions(value: Tensor, target: tuple[int, ...], module: Any) -> Tensor:
    """The entry of the class token stays."""
    return torch.cat([value[:, :1], resize_square(value[:, 1:], target, module)], 1)
