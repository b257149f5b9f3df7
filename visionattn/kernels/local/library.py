"""Local attention as an operator of `torch.library`, for programs that PyTorch compiles.

A compiled program holds one node instead of the tiles of every border, so that it is traced in milliseconds
and for any height and width. Eager programs and exported ones run the tiles themselves, which every transform
of PyTorch can enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.kernels.local.pattern import Axis, Border, Call, Pattern
from visionattn.kernels.local.plain.attention import tiled_attention
from visionattn.kernels.local.plain.backward import local_attention_backward
from visionattn.kernels.operator import one_by_one

ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? bias, int[] geometry, float scale"


def encode(pattern: Pattern) -> list[int]:
    """The numbers of a pattern that are not the size of the map, as an operator can take them."""
    numbers = []
    for a in (pattern.y, pattern.x):
        border = get_args(Border).index(a.border)
        numbers += [a.window, a.key_window, a.before, a.shift, border, a.dilation, int(a.is_causal)]
    return numbers


def decode(geometry: list[int], q: Tensor) -> Pattern:
    """The inverse of `encode` for a map of the size of `q` `[B, H, W, heads, d]`."""
    axes = []
    for length, numbers in zip(q.shape[1:3], (geometry[:7], geometry[7:])):
        window, key_window, before, shift, border, dilation, is_causal = numbers
        borders = get_args(Border)
        axes.append(
            Axis(length, window, key_window, before, shift, borders[border], dilation, bool(is_causal))
        )
    return Pattern(*axes)


@torch.library.custom_op(
    "visionattn::local_attention",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool return_lse) -> (Tensor, Tensor)",
)
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (no elements unless asked for); arguments as in `op.py`."""
    out, lse = tiled_attention(q, k, v, Call(decode(geometry, q), bias, scale, return_lse))
    return out.contiguous(), _empty_lse(q, False) if lse is None else lse.contiguous()


@local_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _empty_lse(q, return_lse)


@torch.library.custom_op(
    "visionattn::local_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_lse, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (no elements without one)."""
    grads = local_attention_backward(
        grad, grad_lse, q, k, v, Call(decode(geometry, q), bias, scale, grad_lse is not None)
    )
    dq, dk, dv = (t.contiguous() for t in grads[:3])
    return dq, dk, dv, q.new_empty(0) if grads[3] is None else grads[3]


@backward.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    return dq, dk, dv, q.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    shape = q.shape[:4] if return_lse else (0,)
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.geometry, ctx.scale, ctx.return_lse = inputs
    ctx.save_for_backward(q, k, v, bias)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias = ctx.saved_tensors
    *grads, grad_bias = backward(
        grad, grad_lse if ctx.return_lse else None, q, k, v, bias, ctx.geometry, ctx.scale
    )
    return (*grads, None if bias is None else grad_bias, None, None, None)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, from the differentiable tiles."""
    return (*second_derivatives(ctx.saved_tensors, ctx.geometry, ctx.scale, grads), None, None)


def second_derivatives(
    tensors: Sequence[Tensor | None], geometry: list[int], scale: float, grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients for the tensors of the backward operator (grad, grad_lse, q, k, v, bias) from its `grads`."""
    saved: list[Any] = [None if t is None else t.detach().requires_grad_() for t in tensors]
    grad, grad_lse, q, k, v, bias = saved
    with torch.enable_grad():
        call = Call(decode(geometry, q), bias, scale, grad_lse is not None)
        out, lse = tiled_attention(q, k, v, call)
        outs, weights = ([out], [grad]) if lse is None else ([out, lse], [grad, grad_lse])
        inputs: list[Tensor] = [q, k, v] if bias is None else [q, k, v, bias]
        first = torch.autograd.grad(outs, inputs, weights, create_graph=True)
        leaves: list[Tensor] = [t for t in saved if t is not None]
        second = iter(torch.autograd.grad(first, leaves, grads[: len(inputs)], allow_unused=True))
    return [None if t is None else next(second) for t in saved]


def _flops(q_shape: tuple[int, ...], geometry: list[int], products: int) -> int:
    """Operations of so many products of queries and keys, exactly those that the pattern shows."""
    pattern = decode(geometry, torch.empty(q_shape, device="meta"))
    return q_shape[0] * pattern.flops(q_shape[3], q_shape[4]) // 2 * products


def forward_flops(
    q: tuple[int, ...], k: Any, v: Any, bias: Any, geometry: list[int], *args: Any, **kwargs: Any
) -> int:
    """The logits and the sum of values."""
    return _flops(q, geometry, products=2)


def backward_flops(
    grad: Any,
    grad_lse: Any,
    q: tuple[int, ...],
    k: Any,
    v: Any,
    bias: Any,
    geometry: list[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """The logits again, and a product for each of the weights' gradient, dq, dk and dv."""
    return _flops(q, geometry, products=5)


register_flop_formula(torch.ops.visionattn.local_attention)(forward_flops)
register_flop_formula(torch.ops.visionattn.local_attention_backward)(backward_flops)
local_attention.register_vmap(one_by_one(local_attention))
backward.register_vmap(one_by_one(backward))
local_attention.register_autograd(_differentiate, setup_context=_keep)
backward.register_autograd(_differentiate_twice, setup_context=_keep_backward)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """The PyTorch path of `op.py`: the operator where a program is compiled, the tiles elsewhere."""
    if not torch.compiler.is_compiling() or _is_exporting():
        return tiled_attention(q, k, v, call)
    out, lse = local_attention(q, k, v, call.bias, encode(call.pattern), call.scale, call.return_lse)
    return out, lse if call.return_lse else None


def _is_exporting() -> bool:
    # PyTorch 2.6 cannot tell; there an exported program holds the operator.
    return getattr(torch.compiler, "is_exporting", lambda: False)()
