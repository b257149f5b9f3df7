"""Agent attention as published: biases resized in every pass, softmax over rows of few agents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.formulations.formulation import Formulation
from benchmarks.formulations.linear_hosts import (
    CLASSES,
    Size,
    add_to_map,
    one_window,
    project,
    project_apart,
)
from visionattn.layers import AgentAttention2d
from visionattn.layers.maps import as_tokens
from visionattn.models.hosts.cswin import CSwin
from visionattn.models.hosts.pvt import PVT


class TheirAgentAttention(AgentAttention2d):
    """The published layer in Swin and DeiT."""

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """A map `[B, H, W, C]`, or tokens `[B, N, C]` of a map of `size`, to the same."""
        tokens, size, prefix = as_tokens(x, size)
        return _attend(self, *project(self.qkv, tokens), size, prefix).view_as(x)


class TheirPvtAttention(AgentAttention2d):
    """In PVT, queries come apart from keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        tokens, size, _ = as_tokens(x, None)
        return _attend(self, *project_apart(self.qkv, tokens), size).view_as(x)


class TheirCSwinAttention(AgentAttention2d):
    """In CSwin, maps go to planes, to one window, and back."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        tokens, size, _ = as_tokens(x, None)
        q, k, v, local = one_window(*project(self.qkv, tokens), size, self.dwc)
        return _attend(self, q, k, v, size, local=local).view_as(x)


def _attend(
    self: AgentAttention2d,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Size,
    prefix: int = 0,
    local: Tensor | None = None,
) -> Tensor:
    """Tokens `[B, N, C]`; `local` is the convolution of the values, where it has been computed."""
    batch, count, channels = q.shape
    heads, side = self.num_heads, self.agents
    pooled = F.adaptive_avg_pool2d(q[:, prefix:].reshape(batch, *size, channels).permute(0, 3, 1, 2), side)
    agents = pooled.reshape(batch, channels, -1).permute(0, 2, 1)
    q, k, v, agents = (
        t.reshape(batch, -1, heads, channels // heads).transpose(1, 2) for t in (q, k, v, agents)
    )
    scale = q.shape[-1] ** -0.5

    coarse = F.interpolate(self.an_bias, size=size, mode="bilinear")
    bias = _repeated(coarse.reshape(1, heads, side**2, -1), batch)
    bias = bias + _repeated((self.ah_bias + self.aw_bias).reshape(1, heads, side**2, -1), batch)
    if self.ac_bias is not None:
        bias = torch.cat([_repeated(self.ac_bias, batch), bias], -1)
    gathered = ((agents * scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v

    coarse = F.interpolate(self.na_bias, size=size, mode="bilinear")
    bias = _repeated(coarse.reshape(1, heads, side**2, -1).permute(0, 1, 3, 2), batch)
    bias = bias + _repeated((self.ha_bias + self.wa_bias).reshape(1, heads, -1, side**2), batch)
    if self.ca_bias is not None:
        bias = torch.cat([_repeated(self.ca_bias, batch), bias], -2)
    out = ((q * scale) @ agents.transpose(-2, -1) + bias).softmax(-1) @ gathered

    out = out.transpose(1, 2).reshape(batch, count, channels)
    if local is not None:
        return self.proj(out + local)
    values = v[:, :, prefix:].transpose(1, 2).reshape(batch, *size, channels).permute(0, 3, 1, 2)
    return self.proj(add_to_map(out, self.dwc(values).permute(0, 2, 3, 1).flatten(1, 2), prefix))


def _repeated(bias: Tensor, batch: int) -> Tensor:
    return bias.repeat(batch, 1, 1, 1)


FORMULATION = Formulation(
    {**CLASSES, AgentAttention2d: TheirAgentAttention},
    (),
    "biases resized and repeated, matmul-softmax-matmul over few agents; hosts in planes, rolled windows, "
    "stripes copied three times",
    hosts={
        CSwin: {AgentAttention2d: TheirCSwinAttention},
        PVT: {AgentAttention2d: TheirPvtAttention},
    },
)
