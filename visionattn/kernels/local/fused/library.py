"""The fused kernels of local attention as operators of `torch.library`, and what they cannot take.

They return the log-sum-exp with every output, because their backward pass starts from it. Triton is imported
when a kernel runs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.kernels.local.library import (
    ARGUMENTS,
    backward_flops,
    decode,
    encode,
    forward_flops,
    second_derivatives,
)
from visionattn.kernels.local.pattern import Call
from visionattn.kernels.operator import one_by_one

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """The Triton path of `op.py`."""
    out, lse = forward(q, k, v, call.bias, encode(call.pattern), call.scale)
    return out, lse if call.return_lse else None


def refuses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> str | None:
    """Why the fused kernels cannot take these arguments, or None where they can."""
    if q.dtype not in _DTYPES:
        return f"the fused kernels compute in float32, float16 and bfloat16, not in {q.dtype}"
    if q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes nonsense in bfloat16"
    if max(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:])) for x in (q, k, v)) >= 2**31:
        return "the fused kernels address 2**31 numbers per image"
    return None


@torch.library.custom_op(
    "visionattn::local_attention_fused", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)"
)
def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as in `library.py`."""
    from visionattn.kernels.local.fused.forward import forward

    return forward(q, k, v, bias, decode(geometry, q), scale)


@forward.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op(
    "visionattn::local_attention_fused_backward",
    mutates_args=(),
    schema=f"(Tensor? grad_out, Tensor? grad_lse, {ARGUMENTS}, Tensor out, Tensor lse, bool bias_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (no elements unless asked for)."""
    from visionattn.kernels.local.fused.backward import backward

    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    pattern = decode(geometry, q)
    dq, dk, dv, grad_bias = backward(
        grad_out, grad_lse, q, k, v, bias, out, lse, pattern, scale, bias_gradient
    )
    return dq, dk, dv, q.new_empty(0) if grad_bias is None else grad_bias


@backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(0) if bias is None or not args[-1] else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), grad_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    bias_gradient = ctx.needs_input_grad[3]
    *grads, grad_bias = backward(
        grad_out, grad_lse, *inputs, ctx.geometry, ctx.scale, out, lse, bias_gradient
    )
    return *grads, grad_bias if bias_gradient else None, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.geometry, ctx.scale, _, _, ctx.bias_gradient = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives by the PyTorch path; `out` and `lse` count as functions of the inputs."""
    grad_out, *rest = ctx.saved_tensors
    first = torch.zeros_like(rest[1]) if grad_out is None else grad_out
    second = second_derivatives([first, *rest], ctx.geometry, ctx.scale, grads)
    return None if grad_out is None else second[0], *second[1:], None, None, None, None, None


forward.register_vmap(one_by_one(forward))
backward.register_vmap(one_by_one(backward))
forward.register_autograd(_differentiate, setup_context=_keep)
backward.register_autograd(_differentiate_twice, setup_context=_keep_backward)
register_flop_formula(torch.ops.visionattn.local_attention_fused)(forward_flops)
register_flop_formula(torch.ops.visionattn.local_attention_fused_backward)(backward_flops)
