"""VSA as published: keys and values of all heads moved in planes by `grid_sample`, then cut into windows."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.hat import gathered_bias
from benchmarks.formulations.linear_hosts import (
    CLASSES,
    ImagesInPlanes,
    TheirEmbedding,
    TheirMerging,
    TheirSwin,
    planes,
)
from visionattn.layers import VariedSizeWindowAttention2d
from visionattn.models.frames.common import StridedConv2d
from visionattn.models.frames.pyramid import PatchEmbedding, PatchMerging
from visionattn.models.hosts.swin import Swin
from visionattn.models.swin_vsa import PositionedBlock
from visionattn.models.vitae_vsa import NormalCell, ParallelConvolutions, ReductionCell, ViTAEVSA


class TheirAttention(VariedSizeWindowAttention2d):
    """Two regressions of pooled planes, two samplings of all heads, and three copies into windows."""

    in_planes = True

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`, maps that windows divide."""
        batch, height, width, _ = x.shape
        window, heads = self.window_size, self.num_heads
        grid = self._grid(planes(x))
        if self.in_planes:
            qkv = F.conv2d(planes(x), self.qkv.weight[:, :, None, None], self.qkv.bias)
        else:
            qkv = planes(self.qkv(x))
        q, k, v = qkv.unflatten(1, (3, heads, -1)).transpose(0, 1).flatten(1, 2)
        k, v = (F.grid_sample(t, grid, padding_mode="zeros", align_corners=True) for t in (k, v))
        q, k, v = (
            t.reshape(batch, heads, -1, height // window, window, width // window, window)
            .permute(0, 3, 5, 1, 4, 6, 2)
            .reshape(-1, heads, window**2, t.shape[1])
            for t in (q, k, v)
        )
        logits = q @ k.transpose(-2, -1) * self.scale
        logits = logits + gathered_bias(self.relative_position_bias_table, window, 0)
        out = logits.softmax(-1) @ v
        out = out.reshape(batch, height // window, width // window, heads, window, window, -1)
        if not self.in_planes:
            return self.proj(out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, -1))
        out = out.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, -1, height, width)
        return F.conv2d(out, self.proj.weight[:, :, None, None], self.proj.bias).permute(0, 2, 3, 1)

    def _grid(self, x: Tensor) -> Tensor:
        """Where keys lie, from -1 to 1 along both axes, `[B * heads, H, W, 2]`."""
        heads, window, size = self.num_heads, self.window_size, x.shape[2:]
        # Movement and stretch are regressed apart, each from a map that is pooled for it.
        pool, act, conv = (cast(Any, part) for part in self.transform)
        weights, biases = (t.unflatten(0, (heads, 2, 2)).unbind(1) for t in (conv.weight, conv.bias))
        shape = (x.shape[0] * heads, 2, size[0] // window, 1, size[1] // window, 1)
        moved, stretched = (
            F.conv2d(act(pool(x)), weight.flatten(0, 1), bias.flatten()).reshape(shape)
            for weight, bias in zip(weights, biases)
        )
        moved = moved / moved.new_tensor([size[1] // window, size[0] // window]).view(2, 1, 1, 1, 1)
        lines = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in size)
        own = torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1])
        own = own.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # [2, rows, n, columns, n]
        from_centre = own - own.mean((2, 4), keepdim=True)
        grid = own + from_centre * stretched + moved
        return grid.flatten(4, 5).flatten(2, 3).permute(0, 2, 3, 1)


class TheirAttentionInRows(TheirAttention):
    """Projections of rows of pixels, as in Swin."""

    in_planes = False


class TheirPositionedBlock(PositionedBlock):
    """The position convolution in planes."""

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        assert self.pos_embed is not None
        x = x + self.pos_embed(planes(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x)))))


class TheirViTAEVSA(ImagesInPlanes, ViTAEVSA):
    """Images stay in planes."""


class TheirParallelConvolutions(ParallelConvolutions):
    """Convolutions in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H', W', C']`."""
        return torch.cat([conv(planes(x)) for conv in self.convs], 1).permute(0, 2, 3, 1)


class TheirReductionCell(ReductionCell):
    """Convolutions in planes, rows of pixels for norms."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H', W', C']`."""
        y = planes(self.prm(x))
        y = (y + self.pos_embed(y)).permute(0, 2, 3, 1).contiguous()
        x = self.attn(self.norm1(y)) + self.pcm(planes(x)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x))


class TheirNormalCell(NormalCell):
    """Convolutions in planes, rows of pixels for norms."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        assert self.pos_embed is not None
        attended = self.attend(x + self.pos_embed(planes(x)).permute(0, 2, 3, 1))
        x = x + self.drop_path(attended) + self.drop_path(self.pcm(planes(x)).permute(0, 2, 3, 1))
        return x + self.drop_path(self.mlp(self.norm2(x)))


_IN_SWIN: dict[type[nn.Module], type[nn.Module]] = {
    Swin: TheirSwin,
    PatchEmbedding: TheirEmbedding,
    PatchMerging: TheirMerging,
    StridedConv2d: CLASSES[StridedConv2d],
    PositionedBlock: TheirPositionedBlock,
    VariedSizeWindowAttention2d: TheirAttentionInRows,
}
FORMULATION = Formulation(
    {
        ViTAEVSA: TheirViTAEVSA,
        ParallelConvolutions: TheirParallelConvolutions,
        ReductionCell: TheirReductionCell,
        NormalCell: TheirNormalCell,
        VariedSizeWindowAttention2d: TheirAttention,
    },
    ((224, 224), (448, 448)),
    "keys and values of all heads moved by grid_sample in planes, windows cut, matmul-softmax-matmul",
    hosts={Swin: _IN_SWIN},
)
