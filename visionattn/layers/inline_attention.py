"""Injective linear attention with a local residual that is predicted for every image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import linear_attention
from visionattn.layers.as_made import is_as_made
from visionattn.layers.linear import Linear
from visionattn.layers.maps import add_to_map, as_tokens, is_known_to_be, on_nhwc


class InLineAttention2d(nn.Module):
    """InLine attention (https://arxiv.org/abs/2412.06590); `[B, H, W, dim]` to `[B, H, W, dim]`.

    Linear attention whose weights sum to one by subtraction, so that different queries never receive the same
    weights, plus a depthwise 3x3 convolution of the values with a kernel that two grouped layers predict from
    the mean token. O(H W (dim² + dim² / num_heads)) operations; no position bias, any map size.

    Args:
        dim: channels.
        num_heads: attention heads.
        static_conv: adds a learned depthwise 3x3 convolution of the values, as the CSwin form has.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        static_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=num_heads, **dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=num_heads, **dd),
        )
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if static_conv else None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, mean: Tensor | None = None) -> Tensor:
        """Maps `[B, H, W, C]`, or tokens `[B, prefix + H * W, C]` with the size (H, W) of their map; same
        shape.

        Tokens before the map take part in the attention and in the mean, not in the convolution. `mean` `[B,
        C]` is what the kernel is predicted from, by default the mean of the tokens.
        """
        tokens, size, prefix = as_tokens(x, size)
        qkv = self.qkv(tokens)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1))[:, None] for t in qkv.chunk(3, -1))
        out = linear_attention(q, k, v, normalize="injective").flatten(3).squeeze(1)
        values = qkv[:, prefix:].chunk(3, -1)[2].unflatten(1, size)
        kernels = self._kernels(tokens.mean(1) if mean is None else mean)
        local = _convolve_each(values, kernels)
        if self.dwc is not None:
            local = local + on_nhwc(self.dwc, values)
        out = add_to_map(out, local.flatten(1, 2), prefix)
        del qkv, q, k, v, values, local  # not held while the output is made
        return self.proj(out).view_as(x)

    def _kernels(self, mean: Tensor) -> Tensor:
        """Kernels `[B, C, 3, 3]` that are predicted from `[B, C]`."""
        first, act, last = self.residual
        return _grouped(last, act(_grouped(first, mean))).unflatten(1, (-1, 3, 3))


def _grouped(conv: nn.Module, x: Tensor) -> Tensor:
    """A grouped convolution of one position `[B, C]`, as products: no CPU has a fast convolution for it."""
    if not isinstance(conv, nn.Conv1d) or not is_as_made(nn.Conv1d, conv):
        return conv(x[..., None])[..., 0]
    groups = conv.groups
    weight = conv.weight.unflatten(0, (groups, -1)).squeeze(-1)
    out = x.unflatten(1, (groups, -1)).transpose(0, 1) @ weight.transpose(1, 2)
    out = out.transpose(0, 1).flatten(1)
    return out if conv.bias is None else out + conv.bias


def _convolve_each(x: Tensor, kernels: Tensor) -> Tensor:
    """Depthwise 3x3 correlation of `[B, H, W, C]` with kernels `[B, C, 3, 3]`, zeros beyond the border."""
    batch, height, width, dim = x.shape
    if is_known_to_be((batch,), (0,)):  # no groups, which no convolution takes
        return x * kernels[:, None, None, :, 0, 0]
    # Images side by side as channels: one grouped convolution, channels last in memory.
    maps = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * dim).permute(0, 3, 1, 2)
    out = F.conv2d(maps, kernels.reshape(batch * dim, 1, 3, 3), padding=1, groups=batch * dim)
    return out[0].unflatten(0, (batch, dim)).permute(0, 2, 3, 1)
