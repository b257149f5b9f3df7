"""InLine attention as published: the subtraction of two means at the end, the local kernels in planes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import visionattn
from visionattn.layers import InLineAttention2d
from visionattn.layers.maps import as_tokens

from .formulation import Formulation
from .linear_hosts import FUNCTIONS, Size, planes, windows_of_planes


def inline_attention(
    self: InLineAttention2d, x: Tensor, size: Size | None = None, mean: Tensor | None = None
) -> Tensor:
    """The forward pass of the published layer."""
    tokens, size, prefix = as_tokens(x, size)
    batch, count, channels = tokens.shape
    q, k, v = self.qkv(tokens).reshape(batch, count, 3, channels).permute(2, 0, 1, 3)
    static = None
    if self.dwc is not None:  # CSwin: to planes, to one window, and back
        q, k = (windows_of_planes(planes(t.unflatten(1, size)), size) for t in (q, k))
        v = planes(v.unflatten(1, size))
        v, static = (t.flatten(2).transpose(1, 2).contiguous() for t in (v, self.dwc(v)))
    q, k, v = (t.reshape(batch, count, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
    mean = tokens.mean(1) if mean is None else mean
    kernels = self.residual(mean[..., None]).reshape(batch * channels, 1, 3, 3)

    scale = q.shape[-1] ** -0.5
    root = (scale / count) ** 0.5
    state = (k.transpose(-2, -1) * root) @ (v * root)
    rest = 1 - q @ k.mean(2, keepdim=True).transpose(-2, -1) * scale
    out = q @ state + rest * v.mean(2, keepdim=True)

    out = out.transpose(1, 2).reshape(batch, count, channels)
    maps = v[:, :, prefix:].transpose(1, 2).reshape(batch, *size, channels).permute(0, 3, 1, 2)
    maps = maps.reshape(1, batch * channels, *size)
    local = F.conv2d(maps, kernels, padding=1, groups=batch * channels)
    local = local.reshape(batch, channels, -1).transpose(1, 2)
    out = torch.cat([out[:, :prefix], out[:, prefix:] + local], 1) if prefix else out + local
    return self.proj(out if static is None else out + static).view_as(x)


FORMULATION = Formulation(
    visionattn,
    {**FUNCTIONS, "layers.InLineAttention2d.forward": inline_attention},
    (),
    "means subtracted at the end, kernels predicted by grouped convolutions and applied in planes; hosts in "
    "planes, rolled windows, stripes copied three times",
)
