"""Selective scans of a map in several directions, as VMamba and Vision Mamba have them.

Papers: "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166; "Vision Mamba: Efficient Visual
Representation Learning with Bidirectional State Space Model", https://arxiv.org/abs/2401.09417.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import selective_scan
from visionattn.kernels.precision import at_least_float32
from visionattn.kernels.scan.orders import Order, check_order
from visionattn.layers.linear import Linear
from visionattn.layers.maps import on_nhwc

CROSS: tuple[Order, ...] = ("row", "column", "row-reversed", "column-reversed")
BOTH_WAYS: tuple[Order, ...] = ("row", "row-reversed")
# Step sizes that an untrained layer takes, and the smallest.
_STEPS, _SMALLEST_STEP = (1e-3, 0.1), 1e-4


class SelectiveScan2d(nn.Module):
    """A state space whose step sizes, inputs and outputs depend on the pixel, scanned in several directions.

    Channels are projected to `expand * dim`, convolved, scanned once per direction and projected back. As it
    stands it is the SS2D of VMamba (`v05_noz`); `vision_mamba` makes the mixer of Vision Mamba.

    Example:
        >>> layer = SelectiveScan2d(96)
        >>> layer(torch.randn(1, 14, 14, 96)).shape
        torch.Size([1, 14, 14, 96])

    Args:
        dim: channels.
        state_dim: numbers that every channel remembers.
        expand: inner channels per channel.
        rank: of the projection to step sizes; `ceil(dim / 16)` by default.
        orders: the directions, `visionattn.kernels.selective_scan`.
        conv: `"map"`: a depthwise convolution of the map before the scans. `"sequence"`: one for every
            direction, of the pixels that it has met, over the ends of rows.
        conv_size: its kernel size.
        conv_bias: whether it has a bias.
        gated: whether a projection of the input multiplies the scans, through a SiLU.
        mean: whether directions are averaged, not added.
        norm: whether the inner channels are normalised before they are projected back.

    Raises:
        ValueError: an unknown order or kind of convolution.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 1,
        expand: float = 1.0,
        rank: int | None = None,
        orders: Sequence[Order] = CROSS,
        *,
        conv: Literal["map", "sequence"] = "map",
        conv_size: int = 3,
        conv_bias: bool = False,
        gated: bool = False,
        mean: bool = False,
        norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if conv not in ("map", "sequence"):
            raise ValueError(f"conv={conv!r} is unknown; choose 'map' or 'sequence'")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.orders = check_order("SelectiveScan2d", orders, len(orders))
        inner, rank = int(expand * dim), rank or math.ceil(dim / 16)
        self.sizes = (rank, state_dim, state_dim)
        self.gated, self.mean, self.conv_size = gated, mean, conv_size
        self.in_proj = Linear(dim, inner * (1 + gated), bias=False, **dd)
        directions = range(len(self.orders))
        self.conv = self.convs = None
        if conv == "map":
            options: dict[str, Any] = {"padding": conv_size // 2, "groups": inner, "bias": conv_bias}
            self.conv = nn.Conv2d(inner, inner, conv_size, **options, **dd)
        else:
            options = {"groups": inner, "bias": conv_bias}
            self.convs = nn.ModuleList(
                nn.Conv1d(inner, inner, conv_size, **options, **dd) for _ in directions
            )
        self.x_proj = nn.ModuleList(Linear(inner, sum(self.sizes), bias=False, **dd) for _ in directions)
        self.dt_proj = nn.ModuleList(Linear(rank, inner, **dd) for _ in directions)
        self.A_log = nn.Parameter(torch.empty(len(self.orders), inner, state_dim, **dd))
        self.D = nn.Parameter(torch.empty(len(self.orders), inner, **dd))
        self.norm = nn.LayerNorm(inner, **dd) if norm else None
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.reset_scan()

    @classmethod
    def vision_mamba(cls, dim: int, state_dim: int = 16, **options: Any) -> SelectiveScan2d:
        """The bidirectional mixer of Vision Mamba, for maps of height 1 as for others."""
        settings = {"expand": 2.0, "orders": BOTH_WAYS, "conv": "sequence", "conv_size": 4, "conv_bias": True}
        settings |= {"gated": True, "mean": True, "norm": False}
        return cls(dim, state_dim, **{**settings, **options})

    @torch.no_grad()
    def reset_scan(self) -> None:
        """Initialise what the scans learn, as the authors do: decays 1 to N, steps between 0.001 and 0.1."""
        states = torch.arange(1, self.A_log.shape[-1] + 1, device=self.A_log.device)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        self.D.fill_(1)
        low, high = (math.log(step) for step in _STEPS)
        bound = self.sizes[0] ** -0.5
        for weight, bias in (proj.parameters() for proj in self.dt_proj):
            nn.init.uniform_(weight, -bound, bound)
            step = (torch.rand_like(bias) * (high - low) + low).exp().clamp(min=_SMALLEST_STEP)
            # The inverse of softplus.
            bias.copy_(step + (-(-step).expm1()).log())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        x, *gate = self.in_proj(x).chunk(1 + self.gated, -1)
        count = len(self.orders)
        if self.conv is not None:
            seen = [F.silu(on_nhwc(self.conv, x))] * count
            inputs = seen[0].unsqueeze(3).expand(-1, -1, -1, count, -1)
        else:
            seen = [F.silu(self._convolved(i, x)) for i in range(count)]
            inputs = torch.stack(seen, 3)
        steps, writes, reads = [], [], []
        for seen_i, x_proj, dt_proj in zip(seen, self.x_proj, self.dt_proj):
            step, write, read = x_proj(seen_i).split(self.sizes, -1)
            steps.append(dt_proj(step))
            writes.append(write)
            reads.append(read)
        out = selective_scan(
            inputs,
            torch.stack(steps, 3),
            -at_least_float32(self.A_log).exp(),
            torch.stack(writes, 3),
            torch.stack(reads, 3),
            D=self.D,
            z=gate[0].unsqueeze(3).expand(-1, -1, -1, count, -1) if gate else None,
            order=self.orders,
        )
        out = out.mean(3) if self.mean else out.sum(3)
        return self.out_proj(out if self.norm is None else self.norm(out))

    def _convolved(self, direction: int, x: Tensor) -> Tensor:
        """`[B, H, W, C]` convolved with what comes before each pixel in a direction."""
        assert self.convs is not None
        conv, order = self.convs[direction], self.orders[direction]
        turned = x.transpose(1, 2) if order.startswith("column") else x
        sequence = turned.flatten(1, 2)
        if order.endswith("-reversed"):
            sequence = sequence.flip(1)
        sequence = conv(F.pad(sequence.mT, (self.conv_size - 1, 0))).mT
        if order.endswith("-reversed"):
            sequence = sequence.flip(1)
        out = sequence.unflatten(1, turned.shape[1:3])
        return out.transpose(1, 2) if order.startswith("column") else out
