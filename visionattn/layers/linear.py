"""Linear layers and the MLP, by the faster of PyTorch's two matrix libraries (`kernels/product`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import product


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
        exact = _is_as_made(self.act, nn.GELU) and self.act.approximate == "none"
        if exact and _is_as_made(self.fc1, Linear):
            return self.fc2(product(x, self.fc1.weight, self.fc1.bias, gelu=True))
        return self.fc2(self.act(self.fc1(x)))


def _is_as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part of this file's layers was neither replaced nor given hooks."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
