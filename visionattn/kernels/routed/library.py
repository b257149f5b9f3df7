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

from . import pytorch

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
    """Output and log-sum-exp by the fused kernels; arguments as in `op.py`, bias None."""
    if not distinct:
        # Eager calls have refused repetitions; in a compiled graph nothing else keeps them from counting
        # twice.
        repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
        indices = indices.masked_fill(repeated, -1)
    indices = indices.to(torch.int32).contiguous()
    return torch.ops.visionattn.routed_attention(q, k, v, indices, *region, scale)


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
    if bias is not None:
        return "the fused kernels take no bias"
    if q.dtype not in _DTYPES:
        return f"the fused kernels compute in float32, float16 and bfloat16, not in {q.dtype}"
    if q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes nonsense in bfloat16"
    if max(sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:])) for x in (q, k, v)) >= 2**31:
        return "the fused kernels address 2**31 numbers per image"
    return None


@torch.library.custom_op(
    "visionattn::routed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor indices, int region_h, int region_w, float scale)"
    " -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, region_h: int, region_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    from .triton_forward import forward

    return forward(q, k, v, indices, (region_h, region_w), scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op(
    "visionattn::routed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor indices, Tensor out,"
    " Tensor lse, int region_h, int region_w, float scale) -> (Tensor, Tensor, Tensor)",
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
    region_h: int,
    region_w: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_backward import backward

    return backward(grad_out, grad_lse, q, k, v, indices, out, lse, (region_h, region_w), scale)


@_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.region_h, ctx.region_w, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.visionattn.routed_attention_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.region_h, ctx.region_w, ctx.scale
    )
    return *grads, None, None, None, None


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _out, _lse, ctx.region_h, ctx.region_w, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients by the PyTorch path; `out` and `lse` count as functions of q, k and v."""
    *inputs, indices = ctx.saved_tensors
    with torch.enable_grad():
        grad_out, grad_lse, q, k, v = (x.detach().requires_grad_() for x in inputs)
        region = (ctx.region_h, ctx.region_w)
        outputs = pytorch.routed_attention(q, k, v, indices, region, None, ctx.scale, True, False)
        outputs = [x for x in outputs if x is not None]
        first = torch.autograd.grad(outputs, (q, k, v), (grad_out, grad_lse), create_graph=True)
        second = torch.autograd.grad(first, (grad_out, grad_lse, q, k, v), grads, allow_unused=True)
    return *second, *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_keep)
_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)


def _mapped(operator: Any, tensors: int) -> Any:
    """The rule for `vmap`: a mapped axis is more batch, every tensor argument begins with the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        stacked = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:tensors], in_dims)
        ]
        out = operator(*(x.flatten(0, 1) for x in stacked), *args[tensors:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)

    return rule


_forward.register_vmap(_mapped(_forward, 4))
_backward.register_vmap(_mapped(_backward, 8))


def _flops(q: tuple[int, ...], indices: tuple[int, ...], region: tuple[int, int], products: int) -> int:
    """Two operations for each of `products` multiply-adds per pair and number of a head; padding counts."""
    batch, height, width, heads, dim = q
    return 2 * products * batch * height * width * heads * dim * indices[3] * region[0] * region[1]


@register_flop_formula(torch.ops.visionattn.routed_attention)
def _forward_flops(q: Any, k: Any, v: Any, indices: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(q, indices, args[:2], products=2)


@register_flop_formula(torch.ops.visionattn.routed_attention_backward)
def _backward_flops(
    grad: Any, lse: Any, q: Any, k: Any, v: Any, indices: Any, *args: Any, **kwargs: Any
) -> int:
    # Both kernels compute the logits and the gradients of the weights, then one and two products more.
    return _flops(q, indices, args[2:4], products=7)
