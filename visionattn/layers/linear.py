"""A linear layer that takes the faster of PyTorch's two matrix libraries."""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose product is oneDNN's in inference in float32 on an x86 CPU.

    PyTorch gives such products to its BLAS, commonly MKL, which does not use all of the vector units of a
    processor that Intel did not make: there oneDNN is up to 2.2 times as fast (Zen 5), elsewhere about
    equal. The results differ by rounding. Training, compilation, export, autocast and other dtypes run as
    ever.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return linear(input, self.weight, self.bias)


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
        return self.fc2(self.act(self.fc1(x)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` by the library that `Linear` describes.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.

    Returns:
        `[..., out]`.
    """
    if _ONEDNN is None or not _in_plain_inference(x, weight):
        return F.linear(x, weight, bias)
    return _ONEDNN(x, weight, bias, "none", [], "")


def _in_plain_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the numbers of the product is asked for: oneDNN's operator knows nothing else."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or not (x.dtype == weight.dtype == torch.float32)
        or not (x.device.type == weight.device.type == "cpu")
        or not (type(x) is Tensor and type(weight) in (Tensor, nn.Parameter))
        or x.dim() < 2
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.enabled
    )


def _onednn() -> Any:
    """oneDNN's linear operator, which compiled programs use; None where PyTorch was built without."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is not None and operator not in flop_registry:
        register_flop_formula(operator)(_flops)
    return operator and operator.default


def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]


_ONEDNN = _onednn()
