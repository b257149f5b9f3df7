"""Linear layers and the MLP, by the faster of PyTorch's two matrix libraries (`kernels/product`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionattn._compat import has_hooks, may_overwrite
from visionattn.kernels import product
from visionattn.layers.as_made import is_as_made
from visionattn.layers.maps import on_nhwc


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
    """`torch.nn.Linear`, whose product is `visionattn.kernels.product`: oneDNN's in float32 with AVX-512."""

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
        return self.fc2(activated(self.fc1, self.act, x))


def activated(linear: nn.Linear, act: nn.GELU, x: Tensor) -> Tensor:
    """`act(linear(x))`, in one place and pass unless somebody looks at its parts.

    Args:
        linear: a layer.
        act: its activation.
        x: `[..., in_features]`.

    Returns:
        `[..., out_features]`.
    """
    exact = is_as_made(nn.GELU, act) and act.approximate == "none"
    if exact and is_as_made(Linear, linear):
        return product(x, linear.weight, linear.bias, gelu=True)
    return act(linear(x))


def is_disposable(*makers: nn.Module) -> bool:
    """Whether what these modules made or took may be overwritten: nothing records it, no hook has seen it."""
    return may_overwrite() and not any(map(has_hooks, makers))


def overwritten(act: nn.Module, x: Tensor, *makers: nn.Module) -> Tensor:
    """`act(x)` of features that nobody needs but the modules that made them: a GELU takes their place."""
    exact = isinstance(act, nn.GELU) and is_as_made(nn.GELU, act) and act.approximate == "none"
    return torch.ops.aten.gelu_(x) if exact and is_disposable(*makers) else act(x)


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
