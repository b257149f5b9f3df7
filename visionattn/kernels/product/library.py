"""The implementations of the product: PyTorch's own, and oneDNN's.

PyTorch gives products in float32 on a CPU to its BLAS, commonly MKL, which on a Zen 5 core reaches half the
speed of oneDNN; on a Zen 3 core, which has no AVX-512, it is the faster one by a tenth to a half. The results
differ by rounding. No kernel of ours stands beside the vendors' on GPUs: where
`"triton"` is forced, PyTorch's stands in, so that whole networks run under it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from visionattn._compat import is_forward_mode_active, is_functorch_active, may_overwrite, onednn_linear
from visionattn.kernels.dispatch import Operator
from visionattn.kernels.product import reference

_ONEDNN = onednn_linear()
_PLAIN = (Tensor, nn.Parameter)
_HAS_AVX512 = "AVX512" in torch.backends.cpu.get_cpu_capability()


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    out = F.linear(x, weight, bias)
    if not gelu:
        return out
    # Where nothing is recorded the result takes the place of its input, which is in the caches.
    return torch.ops.aten.gelu_(out) if may_overwrite() else F.gelu(out)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # For more axes than two oneDNN gives a view, which could not be changed in place.
        out: Tensor = _Product.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
        return F.gelu(out) if gelu else out
    return _multiply(x, weight, bias, gelu)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    # For strides of other weights than matrices and transposed matrices, oneDNN has no fast kernel.
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return _ONEDNN(x, weight if dense else weight.contiguous(), bias, "gelu" if gelu else "none", [], "none")


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
        grad_x = _where_possible(grad, weight.t()) if with_x else None
        grad_weight = None
        if with_weight and grad.numel() > x.numel() + weight.numel():  # whichever copies fewer numbers
            grad_weight = _where_possible(x.t(), grad.t()).t().contiguous()
        elif with_weight:
            grad_weight = _where_possible(grad.t(), x.t())
        return grad_x, grad_weight, grad.sum(0) if with_bias else None


def _where_possible(x: Tensor, weight: Tensor) -> Tensor:
    """A product in a backward pass, which may run outside the block that forced its forward pass."""
    return (_torch if _refuses(x, weight) else _onednn)(x, weight, None, False)


def _refuses(x: Tensor, weight: Tensor, *args: Any) -> str | None:
    """Why oneDNN cannot be used: its operator knows numbers and, with the class above, gradients."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "programs that are compiled, exported or traced hold PyTorch's own operator"
    if _ONEDNN is None:
        return "this PyTorch has no oneDNN for this processor"
    if not (x.dtype == weight.dtype == torch.float32):
        return f"oneDNN is asked in float32 only, the input is {x.dtype}, the weight {weight.dtype}"
    if is_functorch_active() or is_forward_mode_active():
        return "transforms of torch.func and forward-mode derivatives need PyTorch's own operator"
    if weight.device.type != "cpu" or not (type(x) in _PLAIN and type(weight) in _PLAIN):
        return "the input and the weight must be plain tensors on the CPU"
    if x.dim() < 2 or x.shape[-1] != weight.shape[-1] or x.numel() == 0:
        return f"oneDNN takes no input {tuple(x.shape)} for a weight {tuple(weight.shape)}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast the product is not in float32"
    return None if torch.backends.mkldnn.enabled else "torch.backends.mkldnn is switched off"


def _drawback(*args: Any) -> str | None:
    return None if _HAS_AVX512 else "on a processor without AVX-512 PyTorch's BLAS is faster"


def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]


if _ONEDNN is not None and _ONEDNN.overloadpacket not in flop_registry:
    register_flop_formula(_ONEDNN.overloadpacket)(_flops)

PRODUCT = Operator(
    "product",
    {"reference": reference.product, "torch": _torch, "cpu": _onednn},
    {"cpu": _refuses},
    stand_ins={"triton": "torch"},
    drawbacks={"cpu": _drawback},
)
