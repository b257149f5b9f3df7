"""OverLoCK in planes; without the NATTEN library dynamic kernels meet copies of every pixel's neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import planes
from visionattn.layers.context_mixing import (
    ChannelScale,
    ContextMixingBlock,
    ConvMlp,
    GlobalResponseNorm,
    LargeConv2d,
    ResidualConv2d,
    SqueezeExcite,
    StaticBlock,
)
from visionattn.layers.linear import NormedLinear
from visionattn.models.frames.pyramid import Stage
from visionattn.models.overlock import FirstFocus, OverLoCK, Overview, SecondFocus, SplitDownsample


class TheirStage(Stage):
    """Downsampling and static blocks, all in planes."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, dim]`."""
        return _static(self, planes(x)).permute(0, 2, 3, 1)


class TheirFirstFocus(FirstFocus):
    """Base, overview and dynamic blocks, all in planes."""

    def forward(self, x: Tensor) -> Overview:  # type: ignore[override]
        """`[B, H, W, C]` to half its size."""
        x = _static(self.base, _convolved(self.downsample, planes(x)))
        overview = _static(self.overview, x)
        context = _pointwise(self.context, overview)  # type: ignore[arg-type]
        reference = F.interpolate(context, size=x.shape[2:], mode="bilinear", align_corners=False)
        out = _dynamic(self, torch.cat([x, reference], 1), reference)
        return Overview(*(t.permute(0, 2, 3, 1) for t in (out, context, overview)))


class TheirSecondFocus(SecondFocus):
    """Downsampling and dynamic blocks, all in planes."""

    def forward(self, x: Overview) -> Overview:  # type: ignore[override]
        """Half the size of the map."""
        down = self.downsample
        assert isinstance(down, SplitDownsample)
        features, context = planes(x.map).split(down.sizes, 1)
        both = torch.cat([_convolved(down.features, features), _convolved(down.context, context)], 1)
        return x._replace(map=_dynamic(self, both, planes(x.reference)).permute(0, 2, 3, 1))


def _convolved(module: nn.Module, x: Tensor) -> Tensor:
    return nn.Sequential.forward(module, x) if isinstance(module, nn.Sequential) else x


def _static(stage: Stage, x: Tensor) -> Tensor:
    x = _convolved(stage.downsample, x)
    for block in stage.blocks:
        assert isinstance(block, StaticBlock)
        x = _residual(block.dwconv, x)
        branch = block.large_norm(_large(block.large, _layer_norm(block.norm, x)))
        branch = _mlp(block.mlp, _excited(block.se, branch))
        x = (_scaled(block.ls, x) if isinstance(block.ls, ChannelScale) else x) + block.drop_path(branch)
    return x


def _dynamic(stage: Stage, x: Tensor, reference: Tensor) -> Tensor:
    for block in stage.blocks:
        assert isinstance(block, ContextMixingBlock)
        if block.x_scale is not None:
            assert block.h_scale is not None
            features, context = x.split((block.dim, block.context_dim), 1)
            x = torch.cat([features, _scaled(block.x_scale, context) + _scaled(block.h_scale, reference)], 1)
        x = _residual(block.dwconv1, x)
        x = _scaled(block.ls1, x) + block.drop_path(_mixed(block, _layer_norm(block.norm1, x)))
        x = _residual(block.dwconv2, x)
        x = _scaled(block.ls2, x) + block.drop_path(_mlp(block.mlp, _layer_norm(block.norm2, x)))
    return x


def _mixed(block: ContextMixingBlock, x: Tensor) -> Tensor:
    fusion, size = block.fusion, (x.shape[2], x.shape[3])
    y = _pointwise(fusion.linear, F.gelu(fusion.norm(fusion.dwconv(x))))  # type: ignore[operator, arg-type]
    y = _response(fusion.grn, y)  # type: ignore[arg-type]
    gate = F.silu(_normed(block.gate, y))
    local = block.large_norm(_large(block.large, y))
    least = block.kernels[1]
    if is_enlarged := min(size) < least:
        height, width = size
        larger = (
            (least, int(least / height * width)) if height < width else (int(least / width * height), least)
        )
        x, y = (F.interpolate(t, size=larger, mode="bilinear", align_corners=False) for t in (x, y))
    outs = [
        _summed(half, weights, n)
        for half, weights, n in zip(y.chunk(2, 1), _kernels(block, x), block.kernels)
    ]
    out = torch.cat(outs, 1)
    out = F.adaptive_avg_pool2d(out, size) if is_enlarged else out
    out = _excited(block.se, _normed(block.mix, out) + local) * gate
    return _pointwise(block.out, block.out_norm(out))


def _kernels(block: ContextMixingBlock, x: Tensor) -> list[Tensor]:
    """The kernels `[B, groups, H, W, side²]` of every pixel, mixed for each from its 49 affinities."""
    queries, context = x.split((block.dim, block.context_dim), 1)
    q = _normed(block.query, queries) * block.scale
    k = _normed(block.key, F.adaptive_avg_pool2d(context, 7))
    q, k = (t.flatten(2).unflatten(1, (block.num_groups, -1)) for t in (q, k))
    affinity = (q.transpose(2, 3) @ k).permute(0, 3, 1, 2).contiguous()
    logits = _pointwise(block.weight_proj, affinity).permute(0, 2, 3, 1).unflatten(2, x.shape[2:])
    out = []
    for part, table, n in zip(
        logits.split([n * n for n in block.kernels], -1), (block.rpb1, block.rpb2), block.kernels
    ):
        rows, columns = (_places(side, n, x.device) for side in x.shape[2:])
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3)
        out.append((part + bias).softmax(-1))
    return out


def _places(length: int, kernel: int, device: torch.device) -> Tensor:
    """Where the biases of a pixel's keys stand in the table, `[length, kernel]`."""
    pixel = torch.arange(length, device=device)
    first = (pixel - kernel // 2).clamp(0, length - kernel)
    return (first - pixel + kernel - 1)[:, None] + torch.arange(kernel, device=device)


def _summed(x: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Neighbours copied by an unfold, those of the border repeated, and their weighted sum."""
    height, width = x.shape[2:]
    inner = height - kernel + 1, width - kernel + 1
    copies = F.unfold(x, kernel).unflatten(2, inner)
    copies = F.pad(copies, (kernel // 2,) * 4, mode="replicate")
    copies = copies.unflatten(1, (weights.shape[1], -1, kernel * kernel))
    return torch.einsum("bgcnyx,bgyxn->bgcyx", copies, weights).flatten(1, 2)


def _pointwise(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def _normed(layer: NormedLinear, x: Tensor) -> Tensor:
    return layer.norm(_pointwise(layer.linear, x))


def _residual(conv: ResidualConv2d, x: Tensor) -> Tensor:
    return x + F.conv2d(x, conv.weight, conv.bias, padding=1, groups=conv.groups)


def _scaled(scale: ChannelScale, x: Tensor) -> Tensor:
    """A depthwise 1x1 convolution."""
    return F.conv2d(x, scale.weight[:, None, None, None], scale.bias, groups=len(scale.weight))


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def _large(large: LargeConv2d, x: Tensor) -> Tensor:
    if not large.branches:
        return large.lk_origin(x)
    out = large.origin_bn(large.lk_origin(x))
    for side, dilation in large.branches:
        conv, norm = (large.get_submodule(f"dil_{part}_k{side}_{dilation}") for part in ("conv", "bn"))
        out = out + norm(conv(x))
    return out


def _excited(se: SqueezeExcite, x: Tensor) -> Tensor:
    weights = _pointwise(se.fc2, F.gelu(_pointwise(se.fc1, F.adaptive_avg_pool2d(x, 1))))
    return x * weights.sigmoid()


def _response(norm: GlobalResponseNorm, x: Tensor) -> Tensor:
    strength = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    strength = strength / (strength.mean(1, keepdim=True) + 1e-6)
    return (norm.gamma[:, None, None] * strength + 1) * x + norm.beta[:, None, None]


def _mlp(mlp: ConvMlp, x: Tensor) -> Tensor:
    x = _residual(mlp.dwconv, F.gelu(_pointwise(mlp.fc1, x)))
    return _pointwise(mlp.fc2, _response(mlp.grn, x))


class _Merged(Formulation):
    def prepare(self, net: nn.Module) -> None:
        """For inference the authors merge the large convolutions."""
        if isinstance(net, OverLoCK) and not net.training:
            net.reparameterize()


FORMULATION = _Merged(
    {Stage: TheirStage, FirstFocus: TheirFirstFocus, SecondFocus: TheirSecondFocus},
    ((224, 224), (448, 448)),
    "planes, neighbours copied by an unfold, kernels mixed for every pixel; inference merges convolutions",
)
