"""Linear layers and the MLP, by the faster of PyTorch's two matrix libraries (`kernels/product`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import product
from visionattn.layers.maps import on_nhwc


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose product is `visionattn.kernels.product`: oneDNN's in float32 on an x86 CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return product(input, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them; `[..., dim]` to `[..., dim]`.

    Args:
        dim: channels.
        hidden_dim: channels between the layers.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Linear(dim, hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        # Inference makes the hidden layer in one place and pass, unless somebody looks at its parts.
        exact = is_as_made(self.act, nn.GELU) and self.act.approximate == "none"
        if exact and is_as_made(self.fc1, Linear):
            return self.fc2(product(x, self.fc1.weight, self.fc1.bias, gelu=True))
        return self.fc2(self.act(self.fc1(x)))


class NormedLinear(nn.Module):
    """A linear layer without bias, then a batch norm; `[B, H, W, dim]` to `[B, H, W, out_dim]`."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.linear = Linear(dim, out_dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` to `[B, H, W, out_dim]`."""
        return on_nhwc(self.norm, self.linear(x))


def is_as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part of a layer was neither replaced nor given hooks."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
