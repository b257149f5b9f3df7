"""Linear attention whose memory decays, and the delta rule, on maps.

Papers: Lightning attention, https://arxiv.org/abs/2405.17381; RetNet, https://arxiv.org/abs/2307.08621; GLA,
https://arxiv.org/abs/2312.06635; Gated DeltaNet, https://arxiv.org/abs/2412.06464.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import decay_attention, delta_attention
from visionattn.kernels.precision import at_least_float32
from visionattn.kernels.scan.orders import Order, check_order
from visionattn.layers.linear import Linear
from visionattn.layers.recurrent.selective_scan import CROSS

Decay = Literal["constant", "scalar", "vector"]
# GLA divides the logarithms of its gates, so that an untrained memory lasts for some twenty pixels.
_GATE_DIVISOR = 16


class _Recurrent(nn.Module):
    """What layers with a decaying state share: projections, decays, normalised heads and a gate."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decay: Decay | None,
        orders: Sequence[Order] = CROSS,
        restart: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if dim % num_heads:
            raise ValueError(f"{name}: dim={dim} must be a multiple of num_heads={num_heads}")
        if decay is not None and decay not in get_args(Decay):
            raise ValueError(
                f"{name}: decay={decay!r} is unknown; choose one of {', '.join(get_args(Decay))}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.decay, self.restart = num_heads, decay, restart
        head_orders = (tuple(orders) * num_heads)[:num_heads]
        self.orders = check_order(name, head_orders, num_heads)
        self.qkv = Linear(dim, 3 * dim, bias=False, **dd)
        self.decay_proj = None
        if decay in ("scalar", "vector"):
            self.decay_proj = Linear(dim, num_heads if decay == "scalar" else dim, **dd)
        self.gate = Linear(dim, dim, bias=False, **dd)
        self.norm = nn.LayerNorm(dim // num_heads, **dd)
        self.proj = Linear(dim, dim, bias=False, **dd)

    def _log_decay(self, x: Tensor) -> Tensor:
        if self.decay_proj is None:
            return -decay_slopes(self.num_heads, x.device)
        gates = F.logsigmoid(at_least_float32(self.decay_proj(x))) / _GATE_DIVISOR
        return gates.unflatten(-1, (self.num_heads, -1))

    def _finished(self, out: Tensor, x: Tensor) -> Tensor:
        return self.proj(self.norm(out).flatten(3) * self.gate(x).sigmoid())


class DecayAttention2d(_Recurrent):
    """Linear attention with a memory that decays on the way through the map.

    Queries, keys and values pass a SiLU; heads are normalised, gated by a sigmoid and projected. Heads take
    the directions in turn, so that with four heads or more every pixel is reached from all sides.

    Example:
        >>> layer = DecayAttention2d(64, 4)
        >>> layer(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads.
        decay: `"constant"`: the slopes of ALiBi (Lightning attention), nothing learned; `"scalar"`: one per
            pixel and head, from the pixel; `"vector"`: one per pixel and channel (GLA).
        orders: directions that heads take in turn.
        restart: whether every row, or column, begins with an empty memory.

    Raises:
        ValueError: a dim that num_heads does not divide, an unknown decay or direction.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decay: Decay = "constant",
        orders: Sequence[Order] = CROSS,
        restart: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, num_heads, decay, orders, restart, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = F.silu(self.qkv(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        decay = self._log_decay(x)
        out = decay_attention(q, k, v, decay, scale=1.0, order=self.orders, restart=self.restart)
        return self._finished(out, x)


class DeltaAttention2d(_Recurrent):
    """The delta rule: what the memory says about a key is replaced, by a share that the pixel decides.

    Queries and keys pass a SiLU and get unit length; heads are normalised, gated and projected, and take the
    directions in turn.

    Example:
        >>> layer = DeltaAttention2d(64, 4, decay="scalar")
        >>> layer(torch.randn(1, 14, 14, 64)).shape
        torch.Size([1, 14, 14, 64])

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads.
        decay: None (DeltaNet), `"scalar"` (Gated DeltaNet), `"vector"` (Kimi delta attention) or
            `"constant"`, as in `DecayAttention2d`.
        orders: directions that heads take in turn.
        restart: whether every row, or column, begins with an empty memory.

    Raises:
        ValueError: a dim that num_heads does not divide, an unknown decay or direction.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        decay: Decay | None = "scalar",
        orders: Sequence[Order] = CROSS,
        restart: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, num_heads, decay, orders, restart, device, dtype)
        self.beta = Linear(dim, num_heads, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        q, k, v = F.silu(self.qkv(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(3)
        q, k = (F.normalize(t, dim=-1) for t in (q, k))
        decay = None if self.decay is None else self._log_decay(x)
        beta = self.beta(x).sigmoid()
        out = delta_attention(q, k, v, beta, log_decay=decay, order=self.orders, restart=self.restart)
        return self._finished(out, x)


def decay_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi (https://arxiv.org/abs/2108.12409), `[num_heads]`: how fast memories decay.

    `2 ** (-8 i / n)` for n heads, a power of two; for other numbers those of the next smaller power, and
    between them every second one of the next larger.
    """
    below = 2 ** int(math.log2(num_heads))

    def of_power(n: int) -> Tensor:
        return 2.0 ** (-8 * torch.arange(1, n + 1, device=device) / n)

    return torch.cat([of_power(below), of_power(2 * below)[::2][: num_heads - below]])
