"""Linear layers and the MLP, by the faster of PyTorch's two matrix libraries (`kernels/product`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.kernels import product
from visionattn.layers.as_made import is_as_made


class _CountsAsLinear(type):
    """The class of `Linear`, which is equal to `torch.nn.Linear` in tables and lists of classes.

    Quantisation and counters of FLOPs look modules up by their exact class, and would pass over a subclass.
    Classes that others derive, as for parametrisations, are no layers of ours any more.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is nn.Linear and cls.__module__.startswith("visionattn."))

    def __hash__(cls) -> int:
        return hash(nn.Linear)


class Linear(nn.Linear, metaclass=_CountsAsLinear):
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
        exact = is_as_made(nn.GELU, self.act) and self.act.approximate == "none"
        if exact and is_as_made(Linear, self.fc1):
            return self.fc2(product(x, self.fc1.weight, self.fc1.bias, gelu=True))
        return self.fc2(self.act(self.fc1(x)))
