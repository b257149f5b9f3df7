"""The fused routed attention as PyTorch operators, for autograd, compilers, `vmap` and FLOP counters.

The operators take plain arguments: maps `[B, H, W, heads, d]` and contiguous int32 index lists
`[B, 1 | heads, regions, topk]`, -1 for padding, without repetition. Triton is imported when a kernel runs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.kernels.routed.plain import attention as pytorch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region: tuple[int, int],
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
    distinct: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by the fused kernels; arguments as in `op.py`."""
    if not distinct:
        # Eager calls have refused repetitions; in a compiled graph nothing else keeps them from counting
        # twice.
        repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
        indices = indices.masked_fill(repeated, -1)
    indices = indices.to(torch.int32).contiguous()
    bias = None if bias is None else bias.contiguous()
    return torch.ops.visionattn.routed_attention(q, k, v, indices, bias, *region, scale)


def refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    region: tuple[int, int],
    bias: Tensor | None,
    scale: float,
    return_lse: bool,
    distinct: bool,
) -> str | None:
    """Why the fused kernels cannot take these arguments, or None where they can."""
    if q.dtype not in _DTYPES:
        return f"the fused kernels compute in float32, float16 and bfloat16, not in {q.dtype}"
    if q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes nonsense in bfloat16"
    if max(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:])) for x in (q, k, v)) >= 2**31:
        return "the fused kernels address 2**31 numbers per image"
    if bias is not None and bias[0].numel() >= 2**31:
        return "the fused kernels address 2**31 numbers of a bias per head"
    return None


@torch.library.custom_op(
    "visionattn::routed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? bias, int region_h, int region_w,"
    " float scale) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    region_h: int,
    region_w: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels.routed.fused.forward import forward

    return forward(q, k, v, indices, bias, (region_h, region_w), scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op(
    "visionattn::routed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor indices, Tensor out,"
    " Tensor lse, Tensor? bias, int region_h, int region_w, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    region_h: int,
    region_w: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (no elements without one)."""
    from visionattn.kernels.routed.fused.backward import backward

    region = (region_h, region_w)
    dq, dk, dv, dbias = backward(grad_out, grad_lse, q, k, v, indices, out, lse, bias, region, scale)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = args[5]
    grad_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), grad_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, bias, ctx.region_h, ctx.region_w, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, bias)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *grads, grad_bias = torch.ops.visionattn.routed_attention_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.region_h, ctx.region_w, ctx.scale
    )
    has_bias = ctx.saved_tensors[-1] is not None
    return *grads, None, grad_bias if has_bias else None, None, None, None


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _out, _lse, bias, ctx.region_h, ctx.region_w, ctx.scale = inputs
    ctx.save_for_backward(*tensors, bias)


def _second_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients by the PyTorch path; `out` and `lse` count as functions of q, k and v."""
    *inputs, indices, bias = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (*inputs, *([] if bias is None else [bias]))]
        grad_out, grad_lse, q, k, v, *biases = leaves
        region, used = (ctx.region_h, ctx.region_w), biases[0] if biases else None
        outputs = pytorch.routed_attention(q, k, v, indices, region, used, ctx.scale, True, False)
        outputs = [x for x in outputs if x is not None]
        first = torch.autograd.grad(outputs, leaves[2:], (grad_out, grad_lse), create_graph=True)
        second = torch.autograd.grad(first, leaves, grads[: len(first)], allow_unused=True)
    grad_bias = second[5] if biases else None
    return *second[:5], None, None, None, grad_bias, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)


def _mapped(operator: Any, tensors: int) -> Any:
    """The rule for `vmap`: a mapped axis is more batch, with which the first `tensors` arguments begin.

    Samples with a bias are taken one by one: its gradient is per sample.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        if args[tensors] is not None:
            samples = [
                operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims)))
                for i in range(info.batch_size)
            ]
            return tuple(torch.stack(parts) for parts in zip(*samples)), (0,) * len(samples[0])
        stacked = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:tensors], in_dims)
        ]
        out = operator(*(x.flatten(0, 1) for x in stacked), *args[tensors:])
        # The gradient of an absent bias has no elements and no batch.
        parts = (x.unflatten(0, (info.batch_size, -1)) if x.numel() else x for x in out)
        return tuple(parts), tuple(0 if x.numel() else None for x in out)

    return rule


_forward.register_vmap(_mapped(_forward, 4))
_backward.register_vmap(_mapped(_backward, 8))


def _flops(q: tuple[int, ...], indices: tuple[int, ...], region: tuple[int, int], products: int) -> int:
    """Two operations for each of `products` multiply-adds per pair and number of a head; padding counts."""
    batch, height, width, heads, dim = q
    return 2 * products * batch * height * width * heads * dim * indices[3] * region[0] * region[1]


@register_flop_formula(torch.ops.visionattn.routed_attention)
def _forward_flops(q: Any, k: Any, v: Any, indices: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(q, indices, args[1:3], products=2)


@register_flop_formula(torch.ops.visionattn.routed_attention_backward)
def _backward_flops(
    grad: Any, lse: Any, q: Any, k: Any, v: Any, indices: Any, *args: Any, **kwargs: Any
) -> int:
    # Both kernels compute the logits and the gradients of the weights, then one and two products more.
    return _flops(q, indices, args[3:5], products=7)
