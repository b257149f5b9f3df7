"""Weights for what a network has already computed: of features, and of the heads of an attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels.gaussian import Over, gaussian_reweighting
from visionattn.layers.linear import Linear


class GaussianReweighting(nn.Module):
    """Features times weights that say how near they are to a learned offset from their mean (GAAM,
    https://arxiv.org/abs/2401.11143; `visionattn.kernels.gaussian_reweighting`).

    Weights of a head sum to one over its part, so that outputs are small: add them to the input.

    Args:
        num_heads: parts of the pixels, or channels, with Gaussians of their own.
        gaussians: per head.
        over: `"pixels"` or `"channels"`.
    """

    def __init__(
        self,
        num_heads: int = 4,
        gaussians: int = 2,
        over: Over = "pixels",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.over: Over = over
        self.offset = nn.Parameter(torch.zeros(num_heads, gaussians, **dd))
        self.width = nn.Parameter(torch.randn(num_heads, gaussians, **dd).exp())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        return gaussian_reweighting(x, self.offset, self.width, self.over)


class HeadGates(nn.Module):
    """The gates of a mixture of heads (https://arxiv.org/abs/2410.11842).

    Shared heads serve every pixel; of the routed ones every pixel uses its best.

    Args:
        dim: channels.
        shared: heads that every pixel uses, the first; 0 for none.
        routed: heads of which every pixel uses `active`; 0 for none.
        active: of the routed ones.

    Raises:
        ValueError: no heads, or more active heads than routed ones.
    """

    def __init__(
        self,
        dim: int,
        shared: int,
        routed: int,
        active: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if (
            shared < 0
            or routed < 0
            or not shared + routed
            or not (0 < active <= routed or routed == active == 0)
        ):
            raise ValueError(
                f"shared={shared} and routed={routed} heads, active={active} of these, do not fit: active "
                "must be between 1 and routed"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.shared, self.routed, self.active = shared, routed, active
        self.wg = Linear(dim, routed, bias=False, **dd) if routed else None
        self.wg_0 = Linear(dim, 2, bias=False, **dd) if routed and shared else None
        self.wg_1 = Linear(dim, shared, bias=False, **dd) if shared > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Gates `[B, H, W, heads]` of `[B, H, W, C]`; exactly zero where a pixel does not use a head."""
        parts = []
        if self.shared:
            ones = x.new_ones((*x.shape[:-1], 1))
            parts.append(ones if self.wg_1 is None else self.wg_1(x).softmax(-1) * self.shared)
        if self.wg is not None:
            shares = self.wg(x).softmax(-1)
            best, places = shares.topk(self.active, -1)
            total = best.sum(-1, keepdim=True).clamp(min=torch.finfo(best.dtype).eps)
            parts.append(torch.zeros_like(shares).scatter(-1, places, best / total * self.active))
        if self.wg_0 is not None:
            balance = self.wg_0(x).softmax(-1) * 2
            parts = [part * balance[..., i : i + 1] for i, part in enumerate(parts)]
        return torch.cat(parts, -1)


class MixtureOfHeads(nn.Module):
    """Any attention of `visionattn.layers`, its heads gated by every pixel before the last projection.

    Example:
        >>> layer = MixtureOfHeads(NeighborhoodAttention2d(64, 8, kernel_size=7), 64, 8, shared=2, active=4)

    Args:
        attention: a layer on `[B, H, W, C]` whose last step is its `proj`; it is taken over.
        dim: channels.
        num_heads: of the attention.
        shared: heads that every pixel uses, the first ones.
        active: how many of the others a pixel uses.

    Raises:
        ValueError: a layer without a projection, or numbers of heads that do not fit.
    """

    def __init__(self, attention: nn.Module, dim: int, num_heads: int, shared: int, active: int):
        super().__init__()
        proj = getattr(attention, "proj", None)
        if not isinstance(proj, nn.Module):
            raise ValueError(
                f"{type(attention).__name__} has no projection `proj` that gates could stand before"
            )
        weight = next(proj.parameters())
        dd: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.gates = HeadGates(dim, shared, num_heads - shared, active, **dd)
        self.num_heads, self.attention, self.proj = num_heads, attention, proj
        attention.proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, H, W, C]`."""
        heads = self.attention(x).unflatten(-1, (self.num_heads, -1))
        return self.proj((heads * self.gates(x).unsqueeze(-1)).flatten(-2))
