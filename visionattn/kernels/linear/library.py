"""The fused linear and agent attention as PyTorch operators, for autograd, compilers, `vmap` and counters.

Agent attention is one operator called twice: softmax attention of rows `[B, rows, heads, d]` over others. The
backward passes are operators too; their derivatives come from the PyTorch path. Triton is imported when a
kernel runs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.kernels.dense.plain.attention import attend_lse
from visionattn.kernels.linear.plain import attention as pytorch
from visionattn.kernels.operator import one_by_one

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LINEAR = "Tensor q, Tensor k, Tensor v, str normalize, float scale, float eps, float floor"
_BIASED = "Tensor q, Tensor k, Tensor v, Tensor? bias"


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> Tensor:
    """Linear attention by the fused kernels; arguments as in `op.py`."""
    return torch.ops.visionattn.linear_attention(q, k, v, normalize, scale, eps, floor)


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    bias_in: Tensor | None,
    bias_out: Tensor | None,
    scale: float,
) -> Tensor:
    """Agent attention by the fused kernels; arguments as in `op.py`."""
    size = q.shape[1:3]
    q, agents, k, v = (x.flatten(1, 2) for x in (q, agents, k, v))
    gathered, _ = torch.ops.visionattn.biased_attention(agents, k, v, bias_in, scale)
    out, _ = torch.ops.visionattn.biased_attention(q, agents, gathered, bias_out, scale)
    return out.unflatten(1, size)


def refuses_agents(q: Tensor, *args: Any) -> str | None:
    """`refuses` for `agent_attention`."""
    if q.dtype == torch.float32 and q.shape[-1] > 128:
        return "in float32 the fused kernels hold 128 channels of a head in registers"
    return refuses(q, *args)


def refuses(q: Tensor, *args: Any) -> str | None:
    """Why the fused kernels cannot take these arguments, or None where they can."""
    if q.dtype not in _DTYPES:
        return f"the fused kernels compute in float32, float16 and bfloat16, not in {q.dtype}"
    if q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes nonsense in bfloat16"
    for x in (q, *args):
        # Offsets inside an image, or inside a head of a bias.
        if isinstance(x, Tensor) and sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:])) >= 2**31:
            return "the fused kernels address 2**31 numbers per image"
    return None


@torch.library.custom_op("visionattn::linear_attention", mutates_args=(), schema=f"({_LINEAR}) -> Tensor")
def _linear(
    q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> Tensor:
    from visionattn.kernels.linear.fused.linear import forward

    return forward(q, k, v, normalize, scale, eps, floor)


@torch.library.custom_op(
    "visionattn::linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_LINEAR}) -> (Tensor, Tensor, Tensor)",
)
def _linear_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, normalize: str, scale: float, eps: float, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    from visionattn.kernels.linear.fused.linear import backward

    return backward(grad, q, k, v, normalize, scale, eps, floor)


@torch.library.custom_op(
    "visionattn::biased_attention",
    mutates_args=(),
    schema=f"({_BIASED}, float scale) -> (Tensor, Tensor)",
)
def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    from visionattn.kernels.dense.fused.attention import forward

    return forward(q, k, v, bias, scale)


@torch.library.custom_op(
    "visionattn::biased_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor grad_lse, {_BIASED}, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _biased_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels.dense.fused.attention import backward

    return backward(grad_out, grad_lse, q, k, v, bias, out, lse, scale)


@_linear.register_fake
def _(q: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape)


@_linear_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_biased.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_biased_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_bias


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.normalize, ctx.scale, ctx.eps, ctx.floor = inputs
    ctx.save_for_backward(*tensors)


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    form = (ctx.normalize, ctx.scale, ctx.eps, ctx.floor)
    grads = torch.ops.visionattn.linear_attention_backward(grad, *ctx.saved_tensors, *form)
    return *grads, None, None, None, None


def _second_linear_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients by the PyTorch path."""
    form = (ctx.normalize, ctx.scale, ctx.eps, ctx.floor)
    with torch.enable_grad():
        grad, *qkv = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        first = torch.autograd.grad(pytorch.differentiable(*qkv, *form), qkv, grad, create_graph=True)
        second = torch.autograd.grad(first, (grad, *qkv), grads, allow_unused=True)
    return *second, None, None, None, None


def _keep_biased(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _biased_gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *grads, grad_bias = torch.ops.visionattn.biased_attention_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.scale
    )
    return *grads, None if ctx.saved_tensors[3] is None else grad_bias, None


def _keep_biased_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _out, _lse, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _second_biased_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients by the PyTorch path; `out` and `lse` count as functions of the inputs."""
    with torch.enable_grad():
        saved: list[Any] = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        grad_out, grad_lse, q, k, v, bias = saved
        by_head = [x.transpose(1, 2) for x in (q, k, v)]
        outputs = [x.transpose(1, 2) for x in attend_lse(*by_head, bias=bias, scale=ctx.scale)]
        inputs = [q, k, v] if bias is None else [q, k, v, bias]
        first = torch.autograd.grad(outputs, inputs, (grad_out, grad_lse), create_graph=True)
        leaves = [x for x in saved if x is not None]
        second = iter(torch.autograd.grad(first, leaves, grads[: len(inputs)], allow_unused=True))
    return *(None if x is None else next(second) for x in saved), None, None, None


_linear.register_autograd(_linear_gradients, setup_context=_keep_linear)
_linear_backward.register_autograd(_second_linear_gradients, setup_context=_keep_linear)
_biased.register_autograd(_biased_gradients, setup_context=_keep_biased)
_biased_backward.register_autograd(_second_biased_gradients, setup_context=_keep_biased_backward)
for _operator in (_linear, _linear_backward, _biased, _biased_backward):
    _operator.register_vmap(one_by_one(_operator))


@register_flop_formula(torch.ops.visionattn.linear_attention)
def _linear_flops(q: Any, *args: Any, **kwargs: Any) -> int:
    """The sum over keys and values, and its product with the queries."""
    return 2 * 2 * q[0] * q[1] * q[2] * q[3] * q[4] ** 2


@register_flop_formula(torch.ops.visionattn.linear_attention_backward)
def _linear_backward_flops(grad: Any, q: Any, *args: Any, **kwargs: Any) -> int:
    """The sum again, that of queries and gradients, and a product for each of three gradients."""
    return 2 * 5 * q[0] * q[1] * q[2] * q[3] * q[4] ** 2


@register_flop_formula(torch.ops.visionattn.biased_attention)
def _biased_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    """Two products of queries and keys."""
    return 2 * 2 * q[0] * q[1] * k[1] * q[2] * q[3]


@register_flop_formula(torch.ops.visionattn.biased_attention_backward)
def _biased_backward_flops(
    grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, bias: Any, *args: Any, **kwargs: Any
) -> int:
    """Every kernel computes the logits and the gradients of the weights; then one, two and no products."""
    return 2 * (7 if bias is None else 9) * q[0] * q[1] * k[1] * q[2] * q[3]
