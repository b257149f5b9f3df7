"""Context-mixing dynamic convolution (OverLoCK, https://arxiv.org/abs/2502.20087) and the parts around it.

All modules take and return maps `[B, H, W, C]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from visionattn.kernels import neighborhood_aggregation, neighborhood_bias, product
from visionattn.layers.as_made import is_as_made
from visionattn.layers.linear import Linear, NormedLinear
from visionattn.layers.maps import on_nhwc

# Side and dilation of the convolutions beside a large one, by the side of that.
DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
# The context has so many rows and columns of keys.
_KEYS = 7


class LargeConv2d(nn.Module):
    """A large depthwise convolution, trained as a sum of it and smaller dilated ones, each with a batch norm.

    In evaluation the sum is one convolution, which `reparameterize` makes for good.

    Args:
        dim: channels.
        kernel_size: side of the large kernel, one of `DILATED_BRANCHES`.
        merged: whether there is only the large kernel, with a bias.

    Raises:
        ValueError: another kernel size.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        merged: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if kernel_size not in DILATED_BRANCHES:
            known = ", ".join(map(str, DILATED_BRANCHES))
            raise ValueError(f"there are dilated convolutions for kernels of {known}, not of {kernel_size}")
        self.branches = () if merged else DILATED_BRANCHES[kernel_size]
        self.lk_origin = nn.Conv2d(
            dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=merged, **dd
        )
        if not merged:
            self.origin_bn = nn.BatchNorm2d(dim, **dd)
        for side, dilation in self.branches:
            padding = (dilation * (side - 1) + 1) // 2
            conv = nn.Conv2d(dim, dim, side, 1, padding, dilation, groups=dim, bias=False, **dd)
            self.add_module(f"dil_conv_k{side}_{dilation}", conv)
            self.add_module(f"dil_bn_k{side}_{dilation}", nn.BatchNorm2d(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = x.permute(0, 3, 1, 2)
        if not self.branches:
            out = self.lk_origin(x)
        elif self.training or not all(map(self._is_as_made, *zip(*self._pairs()))):
            out = reduce(torch.add, (norm(conv(x)) for conv, norm in self._pairs()))
        else:
            weight, bias = self.merged_kernel()
            out = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return out.permute(0, 2, 3, 1)

    @staticmethod
    def _is_as_made(conv: nn.Module, norm: nn.Module) -> bool:
        return is_as_made(nn.Conv2d, conv) and is_as_made(nn.BatchNorm2d, norm)

    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """The weight `[C, 1, k, k]` and the bias `[C]` of the convolution that all are together."""
        side = self.lk_origin.kernel_size[0]
        weights, biases = [], []
        for conv, norm in self._pairs():
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weights.append(_spread(conv.weight * scale[:, None, None, None], conv.dilation[0], side))
            biases.append(norm.bias - norm.running_mean * scale)
        return torch.stack(weights).sum(0), torch.stack(biases).sum(0)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Keep nothing but the merged convolution: the same outputs, and no training as before."""
        if not self.branches:
            return
        weight, bias = self.merged_kernel()
        dim, _, side, _ = weight.shape
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.lk_origin = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, **like)
        self.lk_origin.weight.copy_(weight)
        assert self.lk_origin.bias is not None
        self.lk_origin.bias.copy_(bias)
        for name in [name for name, _ in self.named_children() if name != "lk_origin"]:
            delattr(self, name)
        self.branches = ()

    def _pairs(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        yield self.lk_origin, self.origin_bn
        for side, dilation in self.branches:
            conv = self.get_submodule(f"dil_conv_k{side}_{dilation}")
            yield conv, self.get_submodule(f"dil_bn_k{side}_{dilation}")  # pyright: ignore[reportReturnType]


def _spread(weight: Tensor, dilation: int, side: int) -> Tensor:
    """A dilated kernel `[C, 1, k, k]` as one without dilation, `[C, 1, side, side]`."""
    if dilation > 1:
        gaps = (0, dilation - 1)
        weight = F.pad(weight[..., :, None, :, None], (*gaps, 0, 0, *gaps)).flatten(4, 5).flatten(2, 3)
        weight = weight[..., : 1 - dilation, : 1 - dilation]
    margin = (side - weight.shape[-1]) // 2
    return F.pad(weight, (margin,) * 4)


class ResidualConv2d(nn.Conv2d):
    """A map and its depthwise 3x3 convolution: `x + conv(x)`."""

    def __init__(self, dim: int, **kwargs: Any):
        super().__init__(dim, dim, 3, padding=1, groups=dim, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        return input + super().forward(input)


class ChannelScale(nn.Module):
    """`weight * x + bias` of `[..., C]`; at first `value * x`."""

    def __init__(
        self,
        dim: int,
        value: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.full((dim,), value, **dd))
        self.bias = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`."""
        return torch.addcmul(self.bias, x, self.weight)


class GlobalResponseNorm(nn.Module):
    """Channels weighed by how strong they are in the whole map (https://arxiv.org/abs/2301.00808)."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gamma = nn.Parameter(torch.zeros(dim, **dd))
        self.beta = nn.Parameter(torch.zeros(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        # In half precision the squares of a whole map overflow.
        wide = torch.promote_types(x.dtype, torch.float32)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            strength = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
        else:
            # Three to ten times as fast on a CPU, and without a gradient where a channel is zero.
            strength = x.to(wide).square().sum((1, 2), keepdim=True).sqrt()
        strength = (strength / (strength.mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return torch.addcmul(self.beta, x, torch.addcmul(torch.ones_like(self.gamma), self.gamma, strength))


class SqueezeExcite(nn.Module):
    """Channels weighed by two linear layers of their means, with an exact GELU between."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, max(dim // 8, 16), **dd)
        self.fc2 = Linear(max(dim // 8, 16), dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        weights = self.fc2(F.gelu(self.fc1(x.mean((1, 2)))))
        return x * weights.sigmoid()[:, None, None]


class ConvMlp(nn.Module):
    """An MLP whose hidden layer sees its neighbours: GELU, residual convolution, global response norm."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.dwconv = ResidualConv2d(hidden_dim, **dd)
        self.grn = GlobalResponseNorm(hidden_dim, **dd)
        self.fc2 = Linear(hidden_dim, out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`."""
        short = is_as_made(Linear, self.fc1)
        hidden = product(x, self.fc1.weight, self.fc1.bias, gelu=True) if short else F.gelu(self.fc1(x))
        return self.fc2(self.grn(on_nhwc(self.dwconv, hidden)))


class Fusion(nn.Module):
    """Features and context to features: a depthwise convolution, a linear layer, a global response norm."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.linear = Linear(dim, out_dim, **dd)
        self.grn = GlobalResponseNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`."""
        x = self.norm(self.dwconv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.grn(self.linear(F.gelu(x)))


class StaticBlock(nn.Module):
    """OverLoCK's block without a dynamic kernel: one residual branch with a large convolution and an MLP.

    Args:
        dim: channels.
        kernel_size: side of the large convolution.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        scaled: whether the residual connection has a learned scale.
        merged: whether the large convolution is merged.
        drop_path: stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        mlp_ratio: float,
        scaled: bool,
        merged: bool,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv = ResidualConv2d(dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.large = LargeConv2d(dim, kernel_size, merged, **dd)
        self.large_norm = nn.BatchNorm2d(dim, **dd)
        self.se = SqueezeExcite(dim, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), dim, **dd)
        self.ls = ChannelScale(dim, **dd) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x = on_nhwc(self.dwconv, x)
        branch = self.se(on_nhwc(self.large_norm, self.large(self.norm(x))))
        return self.ls(x) + self.drop_path(self.mlp(branch))


class ContextMixingBlock(nn.Module):
    """A block whose convolution has another kernel at every pixel, made from its affinity to a context.

    The affinities of a pixel to 7x7 regions of the context, mixed by a linear layer, are the kernels: a small
    one for the first half of the channels and a large one for the second, softmaxed with a relative bias, in
    windows that move inwards at the border. Maps smaller than the large kernel are enlarged for it.

    Args:
        dim: channels of the features.
        num_heads: half of the groups of channels, each of which has its own kernels.
        context_dim: channels of the context, which stand behind the features; 0 for none: the block by
            itself, whose context is its input.
        kernel_size: side of the large kernel, as `LargeConv2d` takes it.
        small_kernel: side of the small one.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        renews_context: whether the context is mixed with a reference first.
        merged: whether the large static convolution is merged.
        drop_path: stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        context_dim: int = 0,
        kernel_size: int = 13,
        small_kernel: int = 5,
        mlp_ratio: float = 4.0,
        renews_context: bool = False,
        merged: bool = False,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width = dim + context_dim
        self.dim, self.context_dim, self.num_groups = dim, context_dim, 2 * num_heads
        if dim % (2 * self.num_groups):
            raise ValueError(f"dim must be a multiple of 4 * num_heads, got {dim} and {num_heads}")
        self.kernels = small_kernel, kernel_size
        self.scale = (dim // self.num_groups) ** -0.5
        self.x_scale = ChannelScale(context_dim, **dd) if renews_context else None
        self.h_scale = ChannelScale(context_dim, **dd) if renews_context else None
        self.dwconv1 = ResidualConv2d(width, **dd)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, **dd)
        self.fusion = Fusion(width, dim, **dd) if context_dim else nn.Identity()
        self.query = NormedLinear(dim, dim // 2, **dd)
        self.key = NormedLinear(context_dim or dim, dim // 2, **dd)
        self.value = nn.Identity() if context_dim else NormedLinear(dim, dim, **dd)
        self.weight_proj = Linear(_KEYS**2, sum(n * n for n in self.kernels), **dd)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.zeros(self.num_groups, 2 * n - 1, 2 * n - 1, **dd)) for n in self.kernels
        )
        if not context_dim:
            for table in (self.rpb1, self.rpb2):
                trunc_normal_(table, std=0.02)
        self.mix = NormedLinear(dim, dim, **dd)
        self.large = LargeConv2d(dim, kernel_size, merged, **dd)
        self.large_norm = nn.BatchNorm2d(dim, **dd)
        self.se = SqueezeExcite(dim, **dd)
        self.gate = NormedLinear(dim, dim, **dd)
        self.out_norm = nn.BatchNorm2d(dim, **dd)
        self.out = Linear(dim, width, **dd)
        self.ls1, self.ls2 = ChannelScale(width, **dd), ChannelScale(width, **dd)
        self.dwconv2 = ResidualConv2d(width, **dd)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, **dd)
        self.mlp = ConvMlp(width, int(dim * mlp_ratio), width, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, reference: Tensor | None = None) -> Tensor:
        """`[B, H, W, dim + context_dim]`, features and context, to the same.

        The reference `[B, H, W, context_dim]` is what the context is mixed with.
        """
        if self.x_scale is not None and self.h_scale is not None and reference is not None:
            features, context = x.split((self.dim, self.context_dim), -1)
            x = torch.cat([features, self.x_scale(context) + self.h_scale(reference)], -1)
        x = on_nhwc(self.dwconv1, x)
        x = self.ls1(x) + self.drop_path(self.mix_context(self.norm1(x)))
        x = on_nhwc(self.dwconv2, x)
        return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))

    def mix_context(self, x: Tensor) -> Tensor:
        """The dynamic convolution, beside a static one and behind a gate: `[B, H, W, C]` to the same."""
        y = self.fusion(x)
        local = on_nhwc(self.large_norm, self.large(y))
        out = self.mix(self.convolve_dynamically(x, self.value(y))) + local
        gate = F.silu(self.gate(y))
        return self.out(on_nhwc(self.out_norm, self.se(out) * gate))

    def convolve_dynamically(self, x: Tensor, values: Tensor) -> Tensor:
        """Values `[B, H, W, dim]` under the kernels that features and context `[B, H, W, C]` make."""
        size = (x.shape[1], x.shape[2])
        if is_enlarged := min(size) < self.kernels[1]:
            enlarged = _enlarged(size, self.kernels[1])
            x, values = (resize(t, enlarged) for t in (x, values))
        outs = []
        for n, weights, half in zip(self.kernels, self.dynamic_kernels(x), values.chunk(2, -1)):
            half = half.unflatten(-1, (self.num_groups, -1))
            outs.append(neighborhood_aggregation(weights.to(half.dtype), half, n).flatten(3))
        out = torch.cat(outs, -1)
        return on_nhwc(lambda t: F.adaptive_avg_pool2d(t, size), out) if is_enlarged else out

    def dynamic_kernels(self, x: Tensor) -> list[Tensor]:
        """The small and the large kernel of every pixel, `[B, H, W, groups, side * side]`."""
        height, width = x.shape[1:3]
        queries, context = x.split((self.dim, self.context_dim), -1) if self.context_dim else (x, x)
        q = self.query(queries).unflatten(-1, (self.num_groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        regions = on_nhwc(lambda t: F.adaptive_avg_pool2d(t, _KEYS), context)
        k = self.key(regions).unflatten(-1, (self.num_groups, -1)).permute(0, 3, 4, 1, 2).flatten(3)
        biases = [
            neighborhood_bias(table, (height, width), n)
            for table, n in zip((self.rpb1, self.rpb2), self.kernels)
        ]
        bias = torch.cat(biases, -1).permute(2, 0, 1, 3).flatten(1, 2)
        if is_as_made(Linear, self.weight_proj):
            # Mixed among the few keys instead of for every pixel: a third of the work.
            logits = q @ (product(k, self.weight_proj.weight, None) * self.scale)
            logits = logits + (bias + self.weight_proj.bias)
        else:
            logits = self.weight_proj(q @ (k * self.scale)) + bias
        parts = logits.unflatten(2, (height, width)).split([n * n for n in self.kernels], -1)
        return [part.softmax(-1).permute(0, 2, 3, 1, 4) for part in parts]


def _enlarged(size: tuple[int, int], least: int) -> tuple[int, int]:
    """The size of a map whose shorter side is `least`, rounded as the authors round it."""
    height, width = size
    return (least, int(least / height * width)) if height < width else (int(least / width * height), least)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, H, W, C]` in another size, bilinearly."""
    return on_nhwc(lambda t: F.interpolate(t, size=size, mode="bilinear", align_corners=False), x)
