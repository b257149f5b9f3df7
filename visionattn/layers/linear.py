"""A linear layer that takes the faster of PyTorch's two matrix libraries."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula

# The hidden features of an MLP, in numbers, that caches hold; the pixels of a piece where they are more. The
# best of powers of two as measured: up to 1.8 times faster.
_IN_CACHE, _PIECE = 1 << 19, 512


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose products are oneDNN's in float32 on an x86 CPU.

    PyTorch gives them to its BLAS, commonly MKL, which on a Zen 5 core reaches half the speed of oneDNN. The
    results differ by rounding. Programs that are compiled or exported, autocast, forward-mode derivatives,
    `vmap` and other dtypes run as ever.
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
        # Inference makes the hidden layer in one place and pass, unless somebody looks at its parts.
        exact = _is_as_made(self.act, nn.GELU) and self.act.approximate == "none"
        if exact and _is_as_made(self.fc1, Linear):
            return self.fc2(linear(x, self.fc1.weight, self.fc1.bias, gelu=True))
        return self.fc2(self.act(self.fc1(x)))


def add_pixelwise(x: Tensor, branch: Callable[[Tensor], Tensor], hidden_dim: int, training: bool) -> Tensor:
    """`x + branch(x)` for a branch that sees every pixel by itself, as norm and MLP do.

    In inference on a CPU a large map is overwritten piece by piece, so that caches hold the hidden features.

    Args:
        x: `[..., C]`, a tensor that nobody needs any more.
        branch: `[n, C]` to `[n, C]`, whatever n.
        hidden_dim: features of the widest layer in the branch.
        training: of the module; whether the branch may be random.
    """
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if not on_cpu or training or torch.is_grad_enabled() or hidden_dim * x[..., 0].numel() <= _IN_CACHE:
        return x + branch(x)
    x = x.contiguous()
    for piece in x.view(-1, x.shape[-1]).split(_PIECE * torch.get_num_threads()):
        piece += branch(piece)
    return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear` by the library that `Linear` describes.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`.
        gelu: whether an exact GELU follows.

    Returns:
        `[..., out]`.
    """
    if _ONEDNN is None or not _asks_for_numbers(x, weight):
        out = F.linear(x, weight, bias)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # For more axes than two oneDNN gives a view, which could not be changed in place.
        out: Tensor = _Product.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    else:
        return _multiply(x, weight, bias, gelu)
    return F.gelu(out) if gelu else out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    # For strides of other weights than matrices and transposed matrices, oneDNN has no fast kernel.
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return _ONEDNN(x, weight if dense else weight.contiguous(), bias, "gelu" if gelu else "none", [], "none")


def _is_as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part of this file's layers was neither replaced nor given hooks."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


class _Product(torch.autograd.Function):
    """The linear layer of `[n, in]` with its gradients, which are linear layers too and have their own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        with_x, with_weight, with_bias = ctx.needs_input_grad
        grad_x = linear(grad, weight.t(), None) if with_x else None
        grad_weight = None
        if with_weight and grad.numel() > x.numel() + weight.numel():  # whichever copies fewer numbers
            grad_weight = linear(x.t(), grad.t(), None).t().contiguous()
        elif with_weight:
            grad_weight = linear(grad.t(), x.t(), None)
        return grad_x, grad_weight, grad.sum(0) if with_bias else None


def _asks_for_numbers(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but numbers is asked for, and by gradients: oneDNN's operator knows nothing else."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or not (x.dtype == weight.dtype == torch.float32)
        or not (x.device.type == weight.device.type == "cpu")
        or not (type(x) in (Tensor, nn.Parameter) and type(weight) in (Tensor, nn.Parameter))
        or x.dim() < 2
        or x.shape[-1] != weight.shape[-1]  # PyTorch's own layer says so more clearly
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
