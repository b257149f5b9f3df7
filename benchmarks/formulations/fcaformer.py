"""FcaFormer as published: rows of pixels turned into planes and back, biases gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import ImagesInPlanes, planes
from benchmarks.formulations.planes import TheirMapSequential
from visionattn.layers.windows.cross_attention import CrossAttention
from visionattn.models.fcaformer import (
    ConvBlock,
    Downsample,
    FcaBlock,
    FcaFormer,
)
from visionattn.models.frames.pyramid import MapSequential


class TheirFcaFormer(ImagesInPlanes, FcaFormer):
    """Images stay in planes."""


class TheirDownsample(Downsample):
    """Convolutions in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, C']`."""
        x = self.act(self.conv1(planes(x)))
        return self.conv3(self.act(self.conv2(x))).permute(0, 2, 3, 1)


class TheirConvBlock(ConvBlock):
    """The map is planes; of its branch, the convolution alone."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = planes(x)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.ls.gamma * self.mlp.fc2(self.mlp.act(self.mlp.fc1(y)))
        return (x + self.drop_path(y.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class TheirCrossAttention(CrossAttention):
    """Projections and products of pixels and of tokens for themselves, joined before the softmax."""

    def forward(self, x: Tensor, cross: Sequence[Tensor] = ()) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = self._project(x.flatten(1, 2))
        q = q * q.shape[-1] ** -0.5
        logits = q @ k.transpose(-2, -1) + self.attention_biases[:, self._offsets()]
        if self.s_norm is not None:
            _, k_of_tokens, v_of_tokens = self._project(
                self.s_norm(torch.cat(tuple(cross), 1) * self.s_scale_factors)
            )
            logits = torch.cat([logits, q @ k_of_tokens.transpose(-2, -1) + self.s_token_bias], -1)
            v = torch.cat([v, v_of_tokens], -2)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).view_as(x)

    def _project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _offsets(self) -> Tensor:
        """Which entry of the table belongs to a pair of pixels; their buffer, made once."""
        if not hasattr(self, "_index"):
            with torch.inference_mode(False):
                pixels = torch.cartesian_prod(*(torch.arange(side) for side in self.size))
                apart = (pixels[:, None] - pixels).abs()
                self._index = (apart[..., 0] * self.size[1] + apart[..., 1]).to(self.qkv.weight.device)
        return self._index


class TheirFcaBlock(FcaBlock):
    """Rows of pixels become planes for two convolutions, and rows again."""

    def forward(self, x: Tensor, *cross: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, H, W, C]` and tokens to the map and tokens."""
        shape = x.shape
        rows = (x + self.drop_path(self.ls1(self.attend(x, cross)))).flatten(1, 2)
        x = rows.transpose(1, 2).reshape(shape[0], shape[3], *shape[1:3])
        tokens = None if self.dw_conv is None else self.dw_conv(x).flatten(2).transpose(1, 2)
        rows = self.local_conv(x).flatten(2).transpose(1, 2)
        hidden = self.mlp.act(self.mlp.fc1(self.norm2(rows)))
        rows = rows + self.drop_path(self.ls2(self.mlp.fc2(hidden)))
        return rows.view(shape), tokens


FORMULATION = Formulation(
    {
        FcaFormer: TheirFcaFormer,
        MapSequential: TheirMapSequential,
        Downsample: TheirDownsample,
        ConvBlock: TheirConvBlock,
        CrossAttention: TheirCrossAttention,
        FcaBlock: TheirFcaBlock,
    },
    ((224, 224), (448, 448)),
    "maps in planes and rows in turn, pixels and tokens projected and multiplied apart, biases gathered",
)
