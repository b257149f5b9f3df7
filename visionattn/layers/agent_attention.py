"""Agent attention with learned position biases, on maps of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn._compat import is_functorch_active
from visionattn.kernels import agent_attention
from visionattn.kernels.checks import pair
from visionattn.layers.as_made import joining_axes
from visionattn.layers.linear import Linear
from visionattn.layers.maps import add_to_map, as_tokens, is_known_to_be, on_nhwc

# Biases that are kept between calls, in numbers per layer: all of them up to 512 x 512 images. Those of
# larger maps would hold more memory than the features.
_KEPT = 1 << 22
_PLAIN = (Tensor, nn.Parameter)
# Side of the coarse bias tables of all published weights.
_COARSE = 7


class AgentAttention2d(nn.Module):
    """Agent attention (https://arxiv.org/abs/2312.08874): softmax attention through a few pooled queries.

    O(H W (dim² + n dim)) operations for n agents; `[B, H, W, dim]` to `[B, H, W, dim]`. The attention is
    followed by a depthwise 3x3 convolution of the values and a projection.

    The position biases are learned for one map size, as a coarse table and one line per row and per column.
    For another size they are resized bilinearly, and so is the grid of agents where `agent_shape` asks for
    more of them: the authors' rule for detection and segmentation. In evaluation without gradients the
    resized biases are kept until the weights, the size, or the mode change; only writing to `.data` goes
    unnoticed.

    Args:
        dim: channels.
        num_heads: attention heads.
        size: (height, width) of the map that the biases are learned for.
        agents: agents per side.
        agent_shape: (rows, columns) of agents that are used; by default `agents` of each.
        prefix: whether a class token precedes the map: query and key, but neither pooled nor convolved.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: tuple[int, int],
        agents: int = 7,
        agent_shape: tuple[int, int] | None = None,
        prefix: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.agents = agents
        self.agent_shape = pair("agent_shape", agents if agent_shape is None else agent_shape)
        self.prefix = prefix
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

        def table(*shape: int) -> nn.Parameter:
            return trunc_normal_(nn.Parameter(torch.empty(*shape, **dd)), std=0.02)

        count = agents**2
        # In the authors' names a is an agent, n a pixel, h a row, w a column, c the class token.
        self.an_bias = table(num_heads, count, _COARSE, _COARSE)
        self.na_bias = table(num_heads, count, _COARSE, _COARSE)
        self.ah_bias = table(1, num_heads, count, size[0], 1)
        self.aw_bias = table(1, num_heads, count, 1, size[1])
        self.ha_bias = table(1, num_heads, size[0], 1, count)
        self.wa_bias = table(1, num_heads, 1, size[1], count)
        self.ac_bias = table(1, num_heads, count, 1) if prefix else None
        self.ca_bias = table(1, num_heads, 1, count) if prefix else None
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Maps `[B, H, W, C]`, or tokens `[B, prefix + H * W, C]` with the (H, W) of their map."""
        tokens, size, prefix = as_tokens(x, size)
        qkv = self.qkv(tokens)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1))[:, None] for t in qkv.chunk(3, -1))
        queries, _, values = qkv[:, prefix:].unflatten(1, size).chunk(3, -1)
        agents = F.adaptive_avg_pool2d(queries.permute(0, 3, 1, 2), self.agent_shape).permute(0, 2, 3, 1)
        bias_in, bias_out = self._biases(size)
        out = agent_attention(
            q,
            agents.unflatten(-1, (self.num_heads, -1)),
            k,
            v,
            bias_in=bias_in,
            bias_out=bias_out.transpose(1, 2),
        )
        out = add_to_map(out.flatten(3).squeeze(1), on_nhwc(self.dwc, values).flatten(1, 2), prefix)
        del qkv, q, k, v, queries, values  # not held while the output is made
        return self.proj(out).view_as(x)

    def train(self, mode: bool = True) -> AgentAttention2d:
        """Training or evaluation mode; either forgets kept biases."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AgentAttention2d:
        self._kept = None
        return super()._apply(joining_axes(fn), recurse)

    def _biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Biases of agents over pixels and of pixels over agents, both `[heads, agents, prefix + H * W]`."""
        names = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias", "ac_bias", "ca_bias")
        # By name: replicas of `DataParallel` have no parameters.
        tables = [table for name in names if (table := getattr(self, name)) is not None]
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in tables)
        numbers = 2 * self.num_heads * self.agent_shape[0] * self.agent_shape[1] * size[0] * size[1]
        passing = self.training or learning or torch.compiler.is_compiling() or numbers > _KEPT
        if passing or is_functorch_active() or any(p.is_inference() or type(p) not in _PLAIN for p in tables):
            return self._resized_biases(size)
        # Loading and optimizer steps write in place, which counts the version up; moves replace the memory.
        state = (size, [(p.data_ptr(), p._version) for p in tables])
        # Read once and replaced as a whole: other threads may keep those of other sizes meanwhile.
        kept = self._kept
        if kept is not None and kept[0] == state:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            biases = self._resized_biases(size)
        if all(type(bias) is Tensor for bias in biases):  # none of a mode that computes without numbers
            self._kept = state, biases
        return biases

    def _resized_biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        bias_in = self._bias(self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0], size)
        rows, columns = self.ha_bias[0, :, :, 0].transpose(1, 2), self.wa_bias[0, :, 0].transpose(1, 2)
        bias_out = self._bias(self.na_bias, rows, columns, size)
        if self.ac_bias is None or self.ca_bias is None:
            return bias_in, bias_out
        token_in, token_out = self._regrid(self.ac_bias[0]), self._regrid(self.ca_bias[0].transpose(1, 2))
        return torch.cat([token_in, bias_in], -1), torch.cat([token_out, bias_out], -1)

    def _bias(self, coarse: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
        """`[heads, agents, H * W]` of a coarse table `[heads, agents, 7, 7]` and lines `[heads, agents,
        length]`.

        The authors resize the sum of both lines as a map, and the grid of agents last; all of it is linear
        and separable, so the small tables can be resized before they are added.
        """
        coarse, rows, columns = (self._regrid(table) for table in (coarse, rows, columns))
        rows, columns = (_resize(line, (length,), "linear") for line, length in zip((rows, columns), size))
        return (_resize(coarse, size, "bilinear") + rows[..., None] + columns[..., None, :]).flatten(2)

    def _regrid(self, table: Tensor) -> Tensor:
        """`[heads, agents, ...]` for the agents in use."""
        if self.agent_shape == (self.agents, self.agents):
            return table
        grid = table.flatten(2).transpose(1, 2).unflatten(2, (self.agents, self.agents))
        grid = _resize(grid, self.agent_shape, "bilinear")
        return grid.flatten(2).transpose(1, 2).unflatten(2, table.shape[2:])


def _resize(table: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    return table if is_known_to_be(size, table.shape[2:]) else F.interpolate(table, size=size, mode=mode)
